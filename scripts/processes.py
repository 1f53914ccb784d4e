"""Devices, precision and processes, through accelerate: the same command for a CPU, a GPU, or many of them."""
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from settings import SettingsError, one_line

__all__ = ['choose_device', 'start']


def choose_device(name: str) -> torch.device:
    """The device that --device auto, cpu or cuda means here."""
    if name not in ('auto', 'cpu', 'cuda'):
        raise SettingsError(f'--device must be auto, cpu or cuda, got {name!r}; for one GPU of several set '
                            f'CUDA_VISIBLE_DEVICES.')
    try:
        device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f'--device {name} cannot be used here: {one_line(error)}; try --device auto.') from error
    return device


def start(device: str, amp: bool = False, amp_dtype: str = 'bfloat16', may_shard: bool = False,
          **options: object) -> Accelerator:
    """An Accelerator whose loaders split every batch over the processes: no number depends on how many there are.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        amp: Mixed precision.
        amp_dtype: 'bfloat16' or 'float16'.
        may_shard: Whether the weights may be sharded (FSDP), or every process needs all of them.
        options: Of `Accelerator`.
    """
    device = choose_device(device)
    if amp_dtype not in ('bfloat16', 'float16'):
        raise SettingsError(f'--amp-dtype must be bfloat16 or float16, got {amp_dtype!r}.')
    if amp and amp_dtype == 'float16' and device.type == 'cpu':
        raise SettingsError('--amp-dtype float16 needs a GPU, this is a CPU; use bfloat16.')
    # accelerate keeps its state for the process, and would refuse another precision in a second run
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    precision = {'bfloat16': 'bf16', 'float16': 'fp16'}[amp_dtype] if amp else 'no'
    accelerator = Accelerator(
        cpu=device.type == 'cpu', mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True), **options)
    kind = accelerator.distributed_type.value
    if kind == 'FSDP' and not (may_shard and accelerator.is_fsdp2):
        raise SettingsError('FSDP is for finetune.py, with fsdp_version: 2 in the accelerate configuration; change it '
                            'there, or leave FSDP out.')
    if kind not in ('NO', 'MULTI_GPU', 'MULTI_CPU', 'FSDP'):
        raise SettingsError(f'this script runs in one process or as data parallel (DDP) in several, not as {kind}; '
                            f'change that in the accelerate configuration.')
    return accelerator
