"""Two models timed in turns, and the functions that build and time a model in every benchmark."""
import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models import resolve_model_input_args
from timm.utils import reparameterize_model

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm
from coatnet_train.benchmarks import timing
from coatnet_train.benchmarks.config import ModelPairSettings, check_benchmark
from coatnet_train.benchmarks.timing import synchronize
from coatnet_train.runtime.accelerator import warn_if_emulated
from coatnet_train.runtime.cli import ConfigError, did_you_mean, parse_argument
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance


def build(settings: ModelPairSettings, name: str, kwargs: tuple[str, ...], mode: str) -> Callable[[], None]:
    """Return a function that runs one step of `mode`, 'inference' or 'training'."""
    torch.manual_seed(settings.seed)
    memory_format = torch.channels_last if settings.channels_last else torch.contiguous_format
    images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size, device=settings.device)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.zeros(settings.batch_size, dtype=torch.long, device=settings.device)
    sized = resolve_model_input_args(name, {'img_size': settings.img_size}).get('img_size')  # None: takes any size
    model = timm.create_model(name, img_size=sized, **dict(map(parse_argument, kwargs))).to(settings.device)
    model = model.train() if mode == 'training' else reparameterize_model(model.eval())
    model = model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    run = torch.compile(model) if settings.compile else model

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(settings.device, torch.bfloat16, enabled=settings.amp):
            run(images)

    def train() -> None:
        with torch.autocast(settings.device, torch.bfloat16, enabled=settings.amp):
            loss = F.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train if mode == 'training' else infer


def images_per_second(step: Callable[[], None], settings: ModelPairSettings) -> float:
    """Images per second over a window of at least `settings.window` seconds."""
    return settings.batch_size / timing.measure_window(step, settings.window, settings.device)


def status_field(name: str) -> float:
    """Value of a field of Linux's /proc/self/status, in MiB."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def peak_memory(settings: ModelPairSettings, name: str, kwargs: tuple[str, ...], mode: str) -> float:
    """Peak MiB of the weights and three steps: allocated memory on a GPU, growth of resident memory on a CPU."""
    torch.set_num_threads(settings.threads)
    if settings.device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
    before = status_field('VmRSS') if settings.device == 'cpu' else 0.
    step = build(settings, name, kwargs, mode)
    for _ in range(3):
        step()
    synchronize(settings.device)
    return (status_field('VmHWM') - before) if settings.device == 'cpu' else torch.cuda.max_memory_allocated() / 2**20


def check_machine(device: str, models: tuple[str, ...] = (), amp: bool = False) -> None:
    """Raise ConfigError for a missing device or a model that timm does not know; warn of slow --amp."""
    for name in models:
        if not timm.is_model(name):
            raise ConfigError(f'models to time must be names in timm.list_models(), got {name!r}'
                              f'{did_you_mean(name, timm.list_models()) or "."}')
    if device != 'cpu' and not torch.cuda.is_available():
        raise ConfigError(f'--device {device} needs CUDA, which is not available; use --device cpu.')
    warn_if_emulated(device, amp)


def main(settings: ModelPairSettings) -> dict:
    """Measure, print and return the results."""
    check_benchmark(settings, ('batch_size', 'img_size', 'threads', 'rounds', 'window'))
    check_machine(settings.device, (settings.model, settings.against), settings.amp)
    torch.set_num_threads(settings.threads)
    sides = {'model': (settings.model, settings.model_kwargs), 'against': (settings.against, settings.against_kwargs)}
    results: dict[str, dict] = {}
    can_measure_memory = settings.device != 'cpu' or Path('/proc/self/status').exists()
    with progress_bar(total=len(settings.modes) * (settings.rounds + 2), unit='window', desc='benchmark') as bar:
        for mode in settings.modes:
            memory = {}
            for side, (name, kwargs) in sides.items():
                if can_measure_memory:  # in a new process, since a peak cannot be reset
                    with multiprocessing.get_context('spawn').Pool(1) as pool:
                        memory[side] = pool.apply(peak_memory, (settings, name, kwargs, mode))
                bar.update()
            steps = {side: build(settings, name, kwargs, mode) for side, (name, kwargs) in sides.items()}
            for step in steps.values():
                step(), step()
            windows: dict[str, list[float]] = {side: [] for side in sides}
            for index in range(settings.rounds):
                for side in sorted(sides, reverse=bool(index % 2)):  # alternate the order
                    windows[side].append(images_per_second(steps[side], settings))
                bar.update()
            speed = {side: statistics.median(values) for side, values in windows.items()}
            results[mode] = dict(
                images_per_second={side: round(value, 3) for side, value in speed.items()},
                windows={side: [round(value, 3) for value in values] for side, values in windows.items()},
                peak_memory_mib={side: round(memory[side], 1) if memory else 'not measured' for side in sides},
                ratio=round(speed['model'] / speed['against'], 4))
    report = dict(
        settings={key: value for key, value in asdict(settings).items() if key != 'results_file'},
        results=results, **provenance(settings.device))
    for mode, row in results.items():
        print(f'\n{mode}, batch {settings.batch_size} at {settings.img_size}, {report["hardware"]}')
        for side, (name, kwargs) in sides.items():
            memory = row['peak_memory_mib'][side]
            print(f'  {" ".join((name, *kwargs)):40s} {row["images_per_second"][side]:9.2f} images/s   '
                  f'peak {memory if isinstance(memory, str) else f"{memory:.0f} MiB"}')
        print(f'  ratio {row["ratio"]:.2f}')
    if settings.results_file:
        write_json(Path(settings.results_file), report)
    return report
