"""The training runs of gpu_train.py in their order, and its settings, without torch and timm.

Minutes are estimates for one NVIDIA H100 or H200. All students of a table train for the same number of epochs.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coatnet_train.runtime.cli import ConfigError, check_range, did_you_mean

__all__ = ['DATA_SETS', 'RUNS', 'GpuTrainSettings', 'Run', 'check_gpu_train', 'flags_of']

# by prefix of a set's shard names: its training folder, and the number of images of each class held out of train
DATA_SETS = {'tiny-imagenet': ('tin200', 10), 'imagenette': ('nette', 50)}

# Random erasing runs image by image and takes about as long as a step on a GPU, so every run leaves it out.
TIN200 = '--recipe tin200 --reprob 0 --val-interval 5 --data-dir {data}/tin200 '
TAUGHT = '--teacher-outputs {runs}/teacher_outputs --kd-loss-weight 0.9 --kd-temperature 2 --smoothing 0 '
NETTE = '--recipe nette --val-interval 5 --data-dir {data}/nette '
SMALL = ('coatnet_pico_64.untrained', 'lightconvnet_pico_64.untrained', 'dynamicconvnet_pico_64.untrained')
PEERS = ('resnet18', 'convnextv2_femto', 'mobilenetv3_small_100')  # twice the size: total stride 32, not 16


class Run(NamedTuple):
    """One run: name, minutes, script, flags ({data}, {runs} and {weights} are filled in), and runs that it needs."""

    name: str
    minutes: float
    script: str
    flags: str
    needs: tuple[str, ...] = ()


def _student(model: str, taught: bool, minutes: float) -> Run:
    name = model.removesuffix('.untrained')
    folder = 'tin200_taught' if taught else 'tin200'
    size = '--img-size 128 ' if model in PEERS else ''
    return Run(f'{folder}/{name}-seed42', minutes, 'finetune.py',
               f'{TIN200}{size}{TAUGHT if taught else ""}--model {model} --output {{runs}}/{folder} '
               f'--experiment {name}-seed42', ('teacher_outputs',) if taught else ())


def _nette(model: str, minutes: float) -> Run:
    return Run(f'nette/{model}', minutes, 'finetune.py',
               f'{NETTE}--img-size 128 --model {model} --output {{runs}}/nette --experiment {model}')


RUNS = (
    Run('teacher', 4, 'finetune.py',
        '--recipe tin200_teacher --data-dir {data}/tin200 --model tf_efficientnet_lite2 --pretrained '
        "--model-kwargs pretrained_cfg_overlay={{'file':'{weights}'}} --output {runs} --experiment teacher"),
    Run('teacher_outputs', 5, 'teach.py',
        '--recipe tin200 --reprob 0 --teacher local-dir:{runs}/teacher --teacher-img-size 128 --img-size 64 --views 8 '
        '--top-k 16 --temperatures 2 --batch-size 512 --amp --data-dir {data}/tin200 --output {runs}/teacher_outputs',
        ('teacher',)),
    *(_student(model, True, 12) for model in SMALL),
    *(_student(model, False, 12) for model in SMALL),
    *(_student(model, True, 14) for model in PEERS),
    *(_student(model, False, 14) for model in PEERS),
    _nette('coatnet_nano', 8),
    _nette('coatnet_nano_rw_224', 8),
    _nette('convnext_nano', 8),
)


@dataclass(frozen=True)
class GpuTrainSettings:
    """Settings of gpu_train.py."""

    runs: tuple[str, ...] = ()  # Runs to make, in place of all that are not finished.
    minutes: float = 9.0  # Time of this session; a run that is not through by then saves itself.
    shards: tuple[str, ...] = ()  # Zip files of images to unpack first, such as tiny-imagenet-train-0.zip.
    weights: str = 'lite2.safetensors'  # ImageNet weights of the teacher, by import_weights.py.
    data: str = 'output/gpu_train/data'  # Folder for the images.
    output: str = 'output/gpu_train/runs'  # Folder for the runs.
    list: bool = False  # Print the runs, their state and their commands, and run nothing.
    pack: str = ''  # Run nothing, and pack --runs (all if not given) into this folder, in parts.
    unpack: str = ''  # First join the parts in this folder into --output.
    part_mib: float = 15.0  # Largest size of a part.
    tiny: bool = False  # A hundredth of the size, on a CPU: two short epochs, small batches, nothing compiled.


def check_gpu_train(settings: GpuTrainSettings) -> None:
    """Raise ConfigError for unknown runs and files that are not there."""
    known = [run.name for run in RUNS]
    for name in settings.runs:
        if name not in known:
            raise ConfigError(f'--runs must be among {", ".join(known)}, got {name!r}{did_you_mean(name, known)}.')
    check_range(settings, 'minutes', 0.1, 10_000)
    check_range(settings, 'part_mib', 0.01, 1_000)
    for shard in settings.shards:
        if not Path(shard).is_file() or not any(Path(shard).name.startswith(name) for name in DATA_SETS):
            raise ConfigError(f'--shards {shard} must be a zip file whose name begins with '
                              f'{" or ".join(DATA_SETS)}.')
    if settings.unpack and not Path(settings.unpack).is_dir():
        raise ConfigError(f'--unpack {settings.unpack} must be a folder that --pack filled.')


# Flags that --tiny appends; the last value of a repeated flag counts.
TINY = {
    'finetune.py': '--epochs 2 --last-epoch 2 --warmup-epochs 0 --batch-size 4 --validation-batch-size 4 '
                   '--val-interval 1 --device cpu --workers 0 --no-amp --no-torchcompile',
    'teach.py': '--batch-size 4 --views 2 --top-k 1 --device cpu --workers 0 --no-amp'}


def flags_of(run: Run, settings: GpuTrainSettings) -> list[str]:
    """Command line of a run, after its script."""
    places = {'data': settings.data, 'runs': settings.output, 'weights': settings.weights}
    return [*(word.format(**places) for word in run.flags.split()),
            *(TINY[run.script].split() if settings.tiny else ()),
            *(['--resume', 'auto'] if run.script == 'finetune.py' else ())]
