"""Settings of ablation.py and their checks, without torch and timm."""
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coatnet_train.runtime.cli import ConfigError

__all__ = ['GRIDS', 'LAYOUTS', 'AblationSettings', 'check_values']

LAYOUTS = ('CCCC', 'CCTT', 'CCLL', 'CCDD', 'LLLL', 'DDDD', 'LLDD')
# Each switch is compared with its plain layout.
L_SWITCHES = (
    'normalize="none"', 'glu=False', 'conv_head_dim=1', 'conv_head_dim=16', 'conv_head_dim=64', 'dropconnect=0.1',
    'kernel_size=(3,3,3,3)', 'kernel_size=(3,5,7,7)', 'kernel_size=(3,7,15,31)', 'kernel_size=(13,13,13,13)')
D_SWITCHES = (
    'normalize="none"', 'glu=False', 'conv_head_dim=16', 'conv_head_dim=64', 'dropconnect=0.1', 'static_branch=True',
    'kernel_size=(3,3,3,3)', 'kernel_size=(3,5,7,7)')
# CoAtNet's downsampling, one more stage of attention, and attention alone.
T_ROWS = ('CCTT pool="max"', 'CTTT', 'TTTT stem="vit" embed_dim=(192,192,192,192)')
GRIDS = {
    'layouts': LAYOUTS,
    # the switches that matter most in the papers: kernel width for LightConv, softmax for DynamicConv
    'cpu': (*LAYOUTS, 'LLLL kernel_size=(3,3,3,3)', 'DDDD normalize="none"', *T_ROWS),
    'full': (*LAYOUTS, *(f'LLLL {switch}' for switch in L_SWITCHES), *(f'DDDD {switch}' for switch in D_SWITCHES),
             *T_ROWS),
}


@dataclass(frozen=True)
class AblationSettings:
    data_dir: str  # Folder with train/ and val/, a sub-folder a class.
    grid: Literal['layouts', 'cpu', 'full'] = 'layouts'  # Rows: seven layouts; with the main switches; with all.
    rows: tuple[str, ...] = ()  # Other rows than those of --grid.
    seeds: tuple[int, ...] = (0,)  # One run of every row for each.
    model: str = 'coatnet_pico'  # What the rows are variants of.
    # Widths, depths and initialisation of lightconvnet_pico, and a BatchNorm momentum for short runs.
    model_kwargs: tuple[str, ...] = (
        'embed_dim=(32,64,192,320)', 'depths=(2,2,3,2)', 'weight_init=vit_eff', 'conv_norm_momentum=0.1')
    img_size: int = 64  # Height and width in pixels.
    epochs: int = 10  # Passes over the training split.
    batch_size: int = 64  # Images per step.
    lr: float = 1e-3  # Highest learning rate of AdamW; cosine decay after one epoch of warm-up.
    amp: bool = False  # bfloat16 autocast.
    device: str = 'auto'  # cpu or cuda; auto takes CUDA where there is one.
    workers: int = 1  # Processes that read images.
    threads: int = 1  # CPU threads.
    output: str = 'output/ablation'  # Folder of the runs.
    results_file: str = ''  # JSON to write after every run; the plot takes its name.
    speed: bool = False  # Only time the rows of an existing --results-file, and add that to it.


def check_values(settings: AblationSettings) -> None:
    """Raise ConfigError for single values that cannot work, before anything is read."""
    if settings.results_file and not Path(settings.results_file).parent.is_dir():
        raise ConfigError(f'--results-file {settings.results_file}: its folder does not exist; make it first.')
    if settings.speed and not Path(settings.results_file).is_file():
        raise ConfigError(f'--speed needs a --results-file with trained rows, got {settings.results_file!r}.')
