"""Steps of gpu_report.py with their order, time limits and sizes, and its settings, without torch and timm."""
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

from coatnet_train.benchmarks.config import FORCED
from coatnet_train.runtime.cli import ConfigError, did_you_mean, one_line, tyro

__all__ = [
    'BUDGETS', 'FULL', 'STEPS', 'TINY', 'GpuReportSettings', 'Sizes', 'Step', 'check_gpu_report', 'make_output', 'plan']

BUDGETS = (8, 25, 60)  # minutes
INTERPRETING = ('1', 'true', 'on', 'yes', 'y')  # values of TRITON_INTERPRET, as Triton reads them


class Step(NamedTuple):
    """One step of the report, run as a process with a time limit.

    Args:
        name: Name of the step, for --steps.
        minutes: Limit in minutes for each of BUDGETS; 0 leaves the step out.
        function: Method of gpu_steps.Steps.
        arguments: Keyword arguments of that method.
    """

    name: str
    minutes: tuple[float, float, float]
    function: str
    arguments: Mapping[str, object] = MappingProxyType({})


def _ops(name: str, minutes: tuple[float, float, float], op: str, kernel: int) -> Step:
    return Step(name, minutes, 'time_operators', {'op': op, 'kernel': kernel})


def _models(name: str, minutes: tuple[float, float, float], group: str, mode: str) -> Step:
    return Step(name, minutes, 'time_models', {
        'group': group, 'mode': mode, 'compiled': name.endswith('-compiled')})


# Steps in the order in which they run. The limits are estimates, and a column adds up to its budget at most. A step may
# also use the time left over by the steps before it.
STEPS = (
    #    name                              8    25   60 minutes
    Step('versions',                      (1.0, 1.0, 1.0), 'show_versions'),
    Step('compare',                       (0.8, 1.0, 1.5), 'compare_operators'),
    Step('kernel-tests',                  (1.8, 2.5, 3.0), 'run_kernel_tests'),
    _ops('dynamic-7',                     (1.4, 2.0, 2.5), 'dynamic', 7),
    _ops('light-7',                       (0.9, 1.2, 1.5), 'light', 7),
    _models('coatnet-inference',          (0.6, 0.8, 1.0), 'coatnet', 'inference'),
    _models('coatnet-training',           (0.8, 1.0, 1.5), 'coatnet', 'training'),
    Step('agreement',                     (0.7, 1.0, 1.5), 'compare_training'),
    _models('convnet-inference',          (0.0, 1.0, 1.5), 'convnet', 'inference'),
    _models('convnet-training',           (0.0, 1.2, 2.0), 'convnet', 'training'),
    _ops('light-13',                      (0.0, 1.2, 1.5), 'light', 13),
    _ops('light-31',                      (0.0, 1.5, 2.0), 'light', 31),
    Step('large-image',                   (0.0, 1.0, 1.5), 'compare_large_image'),
    _models('coatnet-inference-compiled', (0.0, 2.0, 3.0), 'coatnet', 'inference'),
    _models('convnet-inference-compiled', (0.0, 2.5, 4.0), 'convnet', 'inference'),
    _models('coatnet-training-compiled',  (0.0, 2.0, 5.0), 'coatnet', 'training'),
    _models('convnet-training-compiled',  (0.0, 2.1, 6.0), 'convnet', 'training'),
    _ops('dynamic-3',                     (0.0, 0.0, 2.0), 'dynamic', 3),
    _ops('light-3',                       (0.0, 0.0, 1.5), 'light', 3),
    Step('memcheck',                      (0.0, 0.0, 4.0), 'run_sanitizer', {'tool': 'memcheck'}),
    Step('racecheck',                     (0.0, 0.0, 6.0), 'run_sanitizer', {'tool': 'racecheck'}),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the steps."""

    shapes: tuple[str, ...]  # shapes of the operators to time, as in benchmark.py ops
    operator_batch: int
    dtype: str
    backends: tuple[str, ...]
    window: float  # seconds
    rounds: int
    input_sets: int | None
    # (B, C, heads, side, kernel) of the operators to compare with naive
    compared: tuple[tuple[int, int, int, int, int], ...]
    compared_dtypes: tuple[str, ...]
    models: dict[str, tuple[str, ...]]  # groups of models that take turns
    model_batch: int
    img_size: int
    amp: bool
    large_side: int  # height and width of the large image with 32 channels
    steps: int  # training steps
    step_batch: int
    step_size: int  # pixels
    step_models: tuple[str, ...]
    step_kwargs: dict[str, object] = field(default_factory=dict)


FULL = Sizes(
    shapes=('56x96', '28x192', '14x384'), operator_batch=128, dtype='bfloat16',
    backends=('eager', 'compiled', 'triton', *FORCED, 'conv2d'), window=0.1, rounds=5, input_sets=None,
    compared=((8, 96, 3, 56, 7), (8, 192, 6, 28, 7), (8, 384, 12, 14, 7), (4, 96, 3, 33, 3), (4, 64, 1, 17, 5),
              (4, 96, 3, 56, 13)),
    compared_dtypes=('bfloat16', 'float16', 'float32'),
    models={'coatnet': ('coatnet_0', 'coatnet_0_224', 'coatnet_0_rw_224'),
            'convnet': ('lightconvnet_tiny', 'dynamicconvnet_tiny', 'convnext_tiny', 'swin_tiny_patch4_window7_224')},
    model_batch=128, img_size=224, amp=True,
    large_side=8200,  # 8200^2 * 32 > 2^31
    steps=50, step_batch=64, step_size=64, step_models=('lightconvnet_pico_64', 'dynamicconvnet_pico_64'))

# for a dry run on a CPU in Triton's interpreter, and for the sanitizer, which is slow
TINY = Sizes(
    shapes=('2x32',), operator_batch=1, dtype='bfloat16', backends=('eager', 'triton', *FORCED, 'conv2d'), window=0.001,
    rounds=1, input_sets=2, compared=((1, 32, 1, 4, 3),), compared_dtypes=('bfloat16', 'float32'),
    models={'coatnet': ('coatnet_pico_64', 'test_vit'), 'convnet': ('lightconvnet_pico_64', 'test_resnet')},
    model_batch=2, img_size=32, amp=False, large_side=7, steps=2, step_batch=1, step_size=16,
    step_models=('dynamicconvnet_pico_64',),
    step_kwargs={'layout': 'LDTT', 'depths': (1, 1, 1, 1), 'embed_dim': (32, 32, 32, 32), 'stem_width': 32,
                 'kernel_size': (3, 3, 3, 3)})  # T, as the interpreter takes a second a block of L or D


@dataclass(frozen=True)
class GpuReportSettings:
    """Settings of gpu_report.py."""

    budget: Literal[8, 25, 60] = 25  # Minutes: which steps run, and how long each may take.
    steps: tuple[str, ...] = ()  # Steps to run in place of those of --budget, with their longest limits.
    output: str = 'results'  # Folder of the CSV files and of gpu_report.log; existing rows are kept.
    collect: str = ''  # Run nothing, and add to --output the rows of the CSV files in this folder.
    device: Literal['cuda', 'cpu'] = 'cuda'  # cpu is a dry run, in Triton's interpreter under TRITON_INTERPRET=1.
    tiny: bool = False  # Shapes that take seconds on a CPU.
    list: bool = False  # Print the steps and their limits, and run nothing.
    run_step: Annotated[str, tyro.conf.Suppress] = ''  # Set by the word `step`, never by a flag.


def check_gpu_report(settings: GpuReportSettings) -> None:
    """Raise ConfigError for unknown steps, a missing --collect, dry runs into results/, or kernels that cannot run."""
    known = [step.name for step in STEPS]
    for name in (*settings.steps, *filter(None, [settings.run_step])):
        if name not in known:
            raise ConfigError(f'--steps must be among {", ".join(known)}, got {name!r}{did_you_mean(name, known)}.')
    if settings.collect and not Path(settings.collect).is_dir():
        raise ConfigError(f'--collect {settings.collect} must be a folder that --output of another run named.')
    dry_run = settings.device == 'cpu' or settings.tiny
    if dry_run and not settings.list and Path(settings.output).name == 'results':
        raise ConfigError(f'--device cpu and --tiny are dry runs, and their figures do not belong into --output '
                          f'{settings.output}; give another folder.')
    runs = not (settings.list or settings.collect)
    if runs and settings.device == 'cpu' and os.environ.get('TRITON_INTERPRET', '').lower() not in INTERPRETING:
        raise ConfigError('--device cpu needs the environment variable TRITON_INTERPRET=1, for kernels that run on a '
                          f'CPU, got {os.environ.get("TRITON_INTERPRET", "none")}; set it before the command.')


def make_output(settings: GpuReportSettings) -> Path:
    """Make the folder of --output and return it; raises ConfigError if it cannot be written."""
    output = Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        raise ConfigError(f'--output {output} must be a folder that can be written: {one_line(error)}; give '
                          f'another.') from error
    return output


def plan(settings: GpuReportSettings) -> list[tuple[Step, float]]:
    """Steps to run with their limits in minutes; `versions` is always the first."""
    if settings.steps:
        return [(step, max(step.minutes)) for step in STEPS if step.name in ('versions', *settings.steps)]
    column = BUDGETS.index(settings.budget)
    return [(step, step.minutes[column]) for step in STEPS if step.minutes[column]]
