"""The inference form of models in torch, ONNX Runtime and OpenVINO, timed in one process on a CPU."""
import io
import statistics
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path

import timm
import torch
from timm.models import resolve_model_input_args
from timm.utils import reparameterize_model
from torch import nn

from coatnet_train.benchmarks.config import RuntimesSettings, check_runtimes
from coatnet_train.benchmarks.models import check_machine
from coatnet_train.benchmarks.rows import NOT_MEASURED
from coatnet_train.benchmarks.timing import measure_window
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.packages import is_installed
from coatnet_train.runtime.progress import progress_bar
from coatnet_train.runtime.provenance import provenance

MODULES = {'onnxruntime': ('onnxruntime', 'onnxscript'), 'openvino': ('openvino', 'onnxscript')}  # needed modules
TOLERANCE = 1e-3  # maximum difference of logits, as a fraction of the largest logit

Call = Callable[[], torch.Tensor]


def installed(runtimes: tuple[str, ...]) -> list[str]:
    """Runtimes that are installed; prints how to install the others."""
    usable = []
    for runtime in runtimes:
        missing = [module for module in MODULES.get(runtime, ()) if not is_installed(module)]
        if missing:
            print(f"{runtime}: {' and '.join(missing)} is not installed, so it is not measured; in a checkout of "
                  f"coatnet_zoo: pip install '.[runtimes]'")
        else:
            usable.append(runtime)
    return usable


def export_onnx(name: str, model: nn.Module, images: torch.Tensor) -> bytes:
    """ONNX file of a model; raises ConfigError if torch cannot export it."""
    try:
        program = torch.onnx.export(model, (images,), input_names=['input'], output_names=['logits'], dynamo=True,
                                    verbose=False)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f'--models: {name} must be one that torch exports to ONNX, found: {one_line(error)[:300]} '
                          f'Leave it out, or leave onnxruntime and openvino out of --runtimes.') from error
    program.save(file := io.BytesIO())
    return file.getvalue()


def onnxruntime_call(onnx: bytes, images: torch.Tensor, threads: int) -> Call:
    onnxruntime = import_module('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(onnx, options, providers=['CPUExecutionProvider'])
    return lambda: torch.from_numpy(session.run(None, {'input': images.numpy()})[0])


def openvino_call(onnx: bytes, images: torch.Tensor, threads: int) -> Call:
    core = import_module('openvino').Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(onnx)), 'CPU', {
        'INFERENCE_NUM_THREADS': threads, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda: torch.from_numpy(compiled([images.numpy()])[0])


def build(name: str, batch_size: int, runtimes: list[str], settings: RuntimesSettings) -> dict[str, Call]:
    """A function for each runtime that returns the logits of one batch from the inference form of a model.

    Raises ConfigError for an image size that the model does not take.
    """
    torch.manual_seed(settings.seed)
    sized = resolve_model_input_args(name, {'img_size': settings.img_size}).get('img_size')  # None: takes any size
    try:
        model = reparameterize_model(timm.create_model(name, img_size=sized).eval())
    except ValueError as error:  # a size that the model does not take
        raise ConfigError(f'--img-size {settings.img_size}: {name}: {one_line(error)}') from error
    images = torch.randn(batch_size, 3, settings.img_size, settings.img_size)
    calls: dict[str, Call] = {}
    if {'onnxruntime', 'openvino'} & {*runtimes}:  # in contiguous format, for the export
        onnx = export_onnx(name, model, images)
    model, batch = model.to(memory_format=torch.channels_last), images.contiguous(memory_format=torch.channels_last)
    for runtime in runtimes:
        if runtime == 'onnxruntime':
            calls[runtime] = onnxruntime_call(onnx, images, settings.threads)
        elif runtime == 'openvino':
            calls[runtime] = openvino_call(onnx, images, settings.threads)
        else:
            calls[runtime] = partial(torch.compile(model) if runtime == 'compiled' else model, batch)
    return calls


def compare(name: str, calls: dict[str, Call]) -> dict[str, float]:
    """Maximum difference from eager's logits by runtime, over the largest logit; raises ConfigError above 1e-3."""
    expected = calls['eager']()
    gaps = {runtime: ((call() - expected).abs().max() / expected.abs().max()).item() for runtime, call in calls.items()}
    for runtime, gap in gaps.items():
        if not gap <= TOLERANCE:
            raise ConfigError(f'{runtime}: logits of {name} must be those of eager up to {TOLERANCE}, differ by '
                              f'{gap:.1e}; leave it out of --runtimes.')
    return gaps


@torch.inference_mode()
def measure(calls: dict[str, Call], settings: RuntimesSettings, tick: Callable[[], object]) -> dict[str, list[float]]:
    """Milliseconds of a batch by runtime, a value for each round; `tick` is called after each round."""
    windows: dict[str, list[float]] = {runtime: [] for runtime in calls}
    for index in range(settings.rounds):
        for runtime in sorted(calls, reverse=bool(index % 2)):  # alternate the order
            windows[runtime].append(1e3 * measure_window(calls[runtime], settings.window, 'cpu'))
        tick()
    return windows


def main(settings: RuntimesSettings) -> dict:
    """Check, measure, print and return the results."""
    check_runtimes(settings)
    check_machine('cpu', settings.models)
    torch.set_num_threads(settings.threads)
    runtimes, rows, rounds = installed(settings.runtimes), [], len(settings.batch_sizes) * settings.rounds
    with progress_bar(total=rounds, unit='round', desc='benchmark runtimes') as bar:
        for batch_size in settings.batch_sizes:
            torch._dynamo.reset()
            calls, gaps = {}, {}
            for name in settings.models:
                with torch.no_grad():
                    built = build(name, batch_size, runtimes, settings)
                with torch.inference_mode():
                    gaps[name] = compare(name, built)
                calls |= {f'{name} {runtime}': call for runtime, call in built.items()}
            windows = measure(calls, settings, bar.update)
            for name in settings.models:
                found = {runtime: windows.get(f'{name} {runtime}') for runtime in settings.runtimes}
                rows.append(dict(
                    model=name, batch_size=batch_size, windows={key: rounded for key, values in found.items() if (
                        rounded := [round(value, 2) for value in values or ()])},
                    ms={key: round(statistics.median(values), 2) if values else NOT_MEASURED
                        for key, values in found.items()}, difference=gaps[name]))
    versions = {runtime: import_module(runtime).__version__ for runtime in runtimes if runtime in MODULES}
    report = dict(settings={key: value for key, value in asdict(settings).items() if key != 'results_file'},
                  rows=rows, versions=versions, **provenance('cpu'))
    print(f'\nms a batch at {settings.img_size} px, {report["hardware"]}')
    for row in rows:
        cells = '  '.join(f'{key} {value}' for key, value in row['ms'].items())
        print(f'  {row["model"]:20s} batch {row["batch_size"]:3d}  {cells}')
    if settings.results_file:
        write_json(Path(settings.results_file), report)
    return report
