"""Settings of benchmark.py and its sub-commands, and their checks, without torch and timm."""
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from coatnet_train.runtime.cli import ConfigError, flag, one_line

__all__ = [
    'FORCED', 'Backend', 'DistillationSettings', 'InferenceFormSettings', 'LoaderSettings', 'ModelPairSettings',
    'OpsSettings', 'Pass', 'RuntimesSettings', 'ScalingSettings', 'check_benchmark', 'check_distillation',
    'check_inference_form', 'check_ops', 'check_runtimes', 'check_scaling']

HEAD_DIM = 32  # channels that share a kernel
MAX_DYNAMIC_KERNEL = 7  # side of the largest kernel that is timed for DynamicConv

# 'triton' lets the package choose its kernels; each of FORCED forces the kernels of that name, where they can run
FORCED = ('direct', 'band')
Backend = Literal['naive', 'eager', 'compiled', 'triton', 'direct', 'band', 'conv2d']
Pass = Literal['forward', 'forward_backward']
Runtime = Literal['eager', 'compiled', 'onnxruntime', 'openvino']


@dataclass(frozen=True)
class ModelPairSettings:
    """Two models that are timed against each other."""

    model: str  # The model to judge.
    against: str  # The model it is judged by.
    model_kwargs: tuple[str, ...] = ()  # Arguments of --model, as key=value.
    against_kwargs: tuple[str, ...] = ()  # Arguments of --against, as key=value.
    modes: tuple[Literal['inference', 'training'], ...] = ('inference', 'training')  # What is timed.
    batch_size: int = 8  # Images a step.
    img_size: int = 224  # Height and width in pixels.
    threads: int = 1  # CPU threads; more of them make small parallel regions noisy.
    rounds: int = 5  # Windows of each model; the median counts.
    window: float = 1.0  # Minimum seconds of a window.
    channels_last: bool = True  # Memory format of images and weights.
    amp: bool = False  # bfloat16 autocast.
    compile: bool = False  # torch.compile both.
    device: str = 'cpu'  # cpu or cuda.
    seed: int = 0  # Of weights and images.
    results_file: str = ''  # JSON to write, with hardware and versions.


@dataclass(frozen=True)
class OpsSettings:
    """Time LightConv and DynamicConv at the shapes of the stages, relative to a depthwise convolution and to a floor.

        python scripts/benchmark.py ops
        python scripts/benchmark.py ops --op dynamic --shapes 28x192 --kernels 7 --passes forward
        python scripts/benchmark.py ops --device cuda --dtype bfloat16 --results-file results/ops_h100.csv

    A row is an operator, a shape, a kernel and a pass. Its backends take turns in windows of at least --window seconds,
    and the median window counts; only naive, the reference implementation, has a single window. The baseline is
    `conv2d`: depthwise F.conv2d with one kernel per channel, in channels_last. `triton` lets the package choose its
    kernels; `direct` and `band` force one set of them.

    The floor is the longer of two times: the memory time, with every tensor read or written once at the bandwidth of a
    large copy; and the compute time, with one multiply-add for each tap inside the map (three times as many with
    backward) at the rate of a large matrix product, in float32 on a CPU and in --dtype on a GPU. Both rates are
    measured first. More than 100 % of the floor is possible where tensors stay in a cache. On a GPU the calls are
    replayed as a CUDA graph, which excludes launch overhead, over more sets of inputs than its cache holds.
    """

    op: Literal['light', 'dynamic', 'both'] = 'both'  # The operators to time.
    shapes: tuple[str, ...] = ('56x96', '28x192', '14x384', '7x768')  # Height (and width) x channels, in heads of 32.
    kernels: tuple[int, ...] = (3, 7, 13, 31)  # Sides of the kernels; above 7 for LightConv only.
    passes: tuple[Pass, ...] = ('forward', 'forward_backward')  # What a call computes.
    backends: tuple[Backend, ...] = ('naive', 'eager', 'compiled', 'triton', 'conv2d')  # Implementations to time.
    batch_size: int | None = None  # Images a call; None: 2 on a CPU, 128 on a GPU.
    dtype: Literal['float32', 'bfloat16', 'float16'] = 'float32'  # Of every tensor.
    device: Literal['cpu', 'cuda'] = 'cpu'  # cpu or cuda.
    threads: int = 1  # CPU threads; more of them make small parallel regions noisy.
    rounds: int = 5  # Windows of each backend; the median counts.
    window: float = 0.5  # Minimum seconds of a window.
    seed: int = 0  # Of the tensors.
    input_sets: int | None = None  # Sets of inputs that calls take in turn; None: 1 on a CPU, 3 or more on a GPU.
    results_file: str = ''  # CSV to write, replacing an existing file; every row has hardware and versions.


@dataclass(frozen=True)
class ScalingSettings:
    """Time models in inference form over image sizes, and fit the exponent a of time ~ pixels^a.

        python scripts/benchmark.py scaling
        python scripts/benchmark.py scaling --models lightconvnet_pico coatnet_pico --sizes 224 448 --device cuda --amp
        python scripts/benchmark.py scaling --results-file results/scaling_cpu.json     # and scaling_cpu.png

    All models at all sizes take turns in windows of at least --window seconds, and the median window counts, so that
    other load on the machine affects one window of each and not one end of a curve. Models with attention are built
    for each size.
    """

    models: tuple[str, ...] = ('dynamicconvnet_pico', 'lightconvnet_pico', 'coatnet_pico')  # Names in timm.
    sizes: tuple[int, ...] = (448, 576, 704, 832, 1024)  # Height and width in pixels.
    batch_size: int = 1  # Images a step.
    threads: int = 1  # CPU threads; more of them make small parallel regions noisy.
    rounds: int = 5  # Windows of each model and size; the median counts.
    window: float = 1.0  # Minimum seconds of a window.
    amp: bool = False  # bfloat16 autocast.
    compile: bool = False  # torch.compile every model, separately for each size.
    device: str = 'cpu'  # cpu or cuda.
    seed: int = 0  # Of weights and images.
    results_file: str = ''  # JSON to write, with hardware and versions, and a plot beside it as .png.


@dataclass(frozen=True)
class InferenceFormSettings:
    """Time two optimisations of the inference form on a CPU: the chunked tanh GELU, and batches split to stay in cache.

        python scripts/benchmark.py inference_form --results-file results/inference_form_cpu.json

    Every candidate runs once a round, in alternating order. Reported are the medians of its times, and of their ratios
    to the package's time in the same round. Times are CPU times of this process on one thread (page faults included),
    which other load disturbs less than wall time. The package's inference form computes the tanh GELU as
    x * sigmoid(...), in chunks that stay in a core's cache. The candidates use torch's in-place GELU instead, or the
    same formula without chunks, or also split batches so that the widest map of each MBConv and of the stem takes at
    most 6 MiB.
    """

    models: tuple[str, ...] = ('coatnet_pico', 'coatnet_0')  # Names of this package.
    batch_sizes: tuple[int, ...] = (1, 8, 32)  # Images of a batch.
    rounds: int = 15  # Measurements of each candidate.
    results_file: str = ''  # JSON file to write.


@dataclass(frozen=True)
class RuntimesSettings:
    """Time the inference form of models on a CPU in torch, eager and compiled, and exported to ONNX in other runtimes.

        python scripts/benchmark.py runtimes
        python scripts/benchmark.py runtimes --results-file results/runtimes_cpu.json

    Logits are compared with eager's before anything is timed. All models and runtimes of a batch size take turns in
    windows of at least --window seconds, and the median window counts. Everything runs in float32 on the same number of
    threads. A runtime that is not installed is named and left out: pip install '.[runtimes]'.
    """

    models: tuple[str, ...] = ('coatnet_0', 'coatnet_0_224')  # Names in timm.
    runtimes: tuple[Runtime, ...] = ('eager', 'compiled', 'onnxruntime', 'openvino')  # Eager is the baseline.
    batch_sizes: tuple[int, ...] = (1, 8)  # Images of a batch.
    img_size: int = 224  # Height and width in pixels.
    threads: int = 1  # CPU threads of every runtime.
    rounds: int = 7  # Windows of each; the median counts.
    window: float = 0.6  # Minimum seconds of a window.
    seed: int = 0  # Of weights and images.
    results_file: str = ''  # JSON to write, with hardware and versions.


@dataclass(frozen=True)
class LoaderSettings:
    """Time image loading alone, as in finetune.py, and training alone, to find which of the two is the bottleneck.

        python scripts/benchmark.py loader --data-dir imagenette --model coatnet_pico_64
    python scripts/benchmark.py loader --data-dir imagenette --model coatnet_pico_64 --workers 0 1 2 --device cuda --amp

    Decoding, augmentation and collation are timed for each number of --workers, and training on one batch in memory.
    All take turns, and the median window counts. Recipes with --cache-images are timed without it.
    """

    data_dir: str  # Folder with train/ and val/.
    model: str = 'coatnet_pico_64'  # Model to train.
    recipe: str = 'imagenette_64'  # Augmentation and image size, see coatnet_train/training/recipes.py.
    workers: tuple[int, ...] = (0, 1, 2)  # Numbers of processes that read images.
    batch_size: int = 64  # Images a step.
    rounds: int = 3  # Windows of each; the median counts.
    window: float = 5.0  # Minimum seconds of a window.
    threads: int = 1  # CPU threads of training.
    amp: bool = False  # bfloat16 autocast in training.
    device: str = 'cpu'  # cpu or cuda.
    results_file: str = ''  # JSON to write, with hardware and versions.


@dataclass(frozen=True)
class DistillationSettings:
    """Time a training step from stored outputs of a teacher (teach.py) against one from labels alone.

        python scripts/benchmark.py distillation --results-file results/distillation_cpu.json
        python scripts/benchmark.py distillation --cache-images --device cuda --img-size 64 --batch-size 512

    The steps are those of finetune.py on image files of noise, which are read in the same process. Labels alone, all
    logits and the --top-k largest take turns, --steps of each a round; the median of the rounds counts. On a CPU the
    CPU time of this process is measured, which other load disturbs less than wall time.
    """

    model: str = 'coatnet_pico_64'  # Model to train.
    img_size: int = 32  # Height and width in pixels.
    batch_size: int = 32  # Images a step.
    classes: int = 200  # Number of classes.
    views: int = 4  # Stored views of every image.
    top_k: int = 16  # Logits kept in the third row.
    cache_images: bool = False  # Keep the images on the device and augment them there.
    steps: int = 2  # Training steps of each a round.
    rounds: int = 15  # Rounds, after one that is not counted.
    threads: int = 1  # CPU threads.
    device: str = 'cpu'  # cpu or cuda.
    seed: int = 0  # Of weights and images.
    results_file: str = ''  # JSON file to write.


def check_benchmark(settings: Any, counts: tuple[str, ...]) -> None:
    """Raise ConfigError if a field of `counts` is not above 0 (None passes), or --results-file cannot be written."""
    for name in counts:
        if (value := getattr(settings, name)) is not None and not value > 0:
            raise ConfigError(f'{flag(name)} must be greater than 0, got {value}.')
    if not settings.results_file:
        return
    path = Path(settings.results_file)
    if not path.parent.is_dir():
        raise ConfigError(f'--results-file {path}: its folder does not exist; make it first.')
    if path.is_dir():
        raise ConfigError(f'--results-file must be a file, got the folder {path}; give a name in it.')
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ConfigError(f'--results-file {path} cannot be written: {one_line(error)}; give another.') from error


def check_inference_form(settings: InferenceFormSettings) -> None:
    """Raise ConfigError for fewer than two rounds, which have no quartiles, or for no model or batch size."""
    check_benchmark(settings, ('rounds',))
    if settings.rounds < 2:
        raise ConfigError(f'--rounds must be at least 2, got {settings.rounds}: quartiles need two rounds.')
    if not settings.models or min(settings.batch_sizes, default=0) < 1:
        raise ConfigError(f'--models and --batch-sizes must name at least one each, sizes above 0, got '
                          f'{settings.models} and {settings.batch_sizes}.')


def check_runtimes(settings: RuntimesSettings) -> None:
    """Raise ConfigError if eager, a model or a batch size is missing, or a value is given twice."""
    check_benchmark(settings, ('img_size', 'threads', 'rounds', 'window'))
    if 'eager' not in settings.runtimes:
        raise ConfigError(f'--runtimes must have eager, which the others are compared with, got '
                          f'{" ".join(settings.runtimes) or "none"}.')
    if not settings.models or min(settings.batch_sizes, default=0) < 1:
        raise ConfigError(f'--models and --batch-sizes must name at least one each, sizes above 0, got '
                          f'{settings.models} and {settings.batch_sizes}.')
    for name in ('models', 'runtimes', 'batch_sizes'):
        values = getattr(settings, name)
        if len(set(values)) < len(values):
            raise ConfigError(f'{flag(name)} must be different from each other, got {" ".join(map(str, values))}.')
    if settings.results_file and Path(settings.results_file).suffix != '.json':
        raise ConfigError(f'--results-file must end in .json, got {settings.results_file}.')


def check_distillation(settings: DistillationSettings) -> None:
    """Raise ConfigError for fewer than two rounds, which have no quartiles, or --top-k not below --classes."""
    check_benchmark(settings, ('img_size', 'batch_size', 'views', 'top_k', 'steps', 'threads'))
    if settings.rounds < 2:
        raise ConfigError(f'--rounds must be at least 2, got {settings.rounds}: quartiles need two rounds.')
    if settings.top_k >= settings.classes:
        raise ConfigError(f'--top-k must be below --classes {settings.classes}, got {settings.top_k}.')


def check_ops(settings: OpsSettings) -> None:
    """Raise ConfigError for operators, shapes or kernels that cannot be timed."""
    check_benchmark(settings, ('batch_size', 'threads', 'rounds', 'window', 'input_sets'))
    for name in ('shapes', 'kernels', 'passes', 'backends'):
        if not getattr(settings, name):
            raise ConfigError(f'--{name} must name one or more, got none.')
    for kernel in settings.kernels:
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError(f'--kernels must be odd and positive, got {kernel}.')
    for shape in settings.shapes:
        found = re.fullmatch('([1-9][0-9]*)x([1-9][0-9]*)', shape)
        if found is None or int(found[2]) % HEAD_DIM:
            raise ConfigError(f'--shapes must be height x channels, channels a multiple of {HEAD_DIM}, such as '
                              f'28x192, got {shape}.')
    if settings.results_file and Path(settings.results_file).suffix != '.csv':
        raise ConfigError(f'--results-file must end in .csv, got {settings.results_file}.')
    if settings.op == 'dynamic' and min(settings.kernels) > MAX_DYNAMIC_KERNEL:
        raise ConfigError(f'--kernels must have one up to {MAX_DYNAMIC_KERNEL} for --op dynamic, '
                          f'got {" ".join(map(str, settings.kernels))}.')


def check_scaling(settings: ScalingSettings) -> None:
    """Raise ConfigError for no model, or fewer than two image sizes, through which no curve can be fitted."""
    check_benchmark(settings, ('batch_size', 'threads', 'rounds', 'window'))
    if not settings.models:
        raise ConfigError('--models must name one model or more, got none.')
    if len(set(settings.sizes)) < 2 or min(settings.sizes) < 1:
        raise ConfigError(f'--sizes must be two or more different sizes above 0, '
                          f'got {" ".join(map(str, settings.sizes)) or "none"}.')
    if settings.results_file and Path(settings.results_file).suffix != '.json':
        raise ConfigError(f'--results-file must end in .json, got {settings.results_file}.')
