"""Device, precision and processes through accelerate: one command for a CPU, one GPU or several."""
import os
import platform
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration

from coatnet_train.runtime.cli import ConfigError, one_line

__all__ = ['choose_device', 'create_accelerator', 'has_native_bfloat16', 'warn', 'warn_if_emulated']

# CPU time of bfloat16 over float32, forward and backward of the pico models at 64 px.
EMULATION_COST = '2 times (AVX-512) to 10 times (AVX2) as long as float32'


def choose_device(name: str) -> torch.device:
    """Device for --device auto, cpu or cuda; raises ConfigError if it is unknown or cannot be used."""
    if name not in ('auto', 'cpu', 'cuda'):
        raise ConfigError(f'--device must be auto, cpu or cuda, got {name!r}; for one GPU of several set '
                          f'CUDA_VISIBLE_DEVICES.')
    try:
        device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if name == 'auto' else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f'--device {name} cannot be used here: {one_line(error)}; try --device auto.') from error
    return device


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; others emulate it, slower than they compute float32."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    # on x86 oneDNN also accepts plain AVX-512, which emulates bfloat16
    return (platform.machine().lower() not in ('x86_64', 'amd64') or torch.cpu._is_avx512_bf16_supported()
            or torch.cpu._is_amx_tile_supported())


def warn(message: str) -> None:
    """Print a warning to stderr, in the main process only."""
    if os.environ.get('RANK', '0') == '0':
        print(f'warning: {message}', file=sys.stderr)


def warn_if_emulated(device: str | torch.device, amp: bool) -> None:
    """Warn that --amp is slow, if the device is a CPU that emulates bfloat16."""
    if amp and torch.device(device).type == 'cpu' and not has_native_bfloat16():
        warn(f'--amp: this CPU has no bfloat16 instructions and takes {EMULATION_COST}; --no-amp computes in float32.')


def create_accelerator(device: str, amp: bool = False, amp_dtype: str = 'bfloat16', may_shard: bool = False,
                       amp_if_native: bool = False, **options: object) -> Accelerator:
    """Create an Accelerator whose loaders split every batch over the processes: results do not depend on their number.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        amp: Mixed precision.
        amp_dtype: 'bfloat16' or 'float16'.
        may_shard: Whether FSDP may shard the weights; otherwise every process holds all of them.
        amp_if_native: Use float32 on a CPU that emulates bfloat16, since `amp` comes from a recipe and not the user.
        options: Keyword arguments of `Accelerator`.

    Raises ConfigError for a device, precision or kind of parallelism that cannot be used.
    """
    device = choose_device(device)
    if amp_dtype not in ('bfloat16', 'float16'):
        raise ConfigError(f'--amp-dtype must be bfloat16 or float16, got {amp_dtype!r}.')
    if amp and amp_dtype == 'float16' and device.type == 'cpu':
        raise ConfigError('--amp-dtype float16 needs a GPU, this is a CPU; use bfloat16, or --no-amp for float32.')
    native = device.type != 'cpu' or has_native_bfloat16()
    use_amp = amp and (native or not amp_if_native)
    # accelerate keeps global state, which would reject another precision in a second run of this process
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    precision = {'bfloat16': 'bf16', 'float16': 'fp16'}[amp_dtype] if use_amp else 'no'
    accelerator = Accelerator(
        cpu=device.type == 'cpu', mixed_precision=precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True), **options)
    kind = accelerator.distributed_type.value
    if kind == 'FSDP' and not (may_shard and accelerator.is_fsdp2):
        raise ConfigError('FSDP is for finetune.py, with fsdp_version: 2 in the accelerate configuration; change it '
                          'there, or leave FSDP out.')
    if kind not in ('NO', 'MULTI_GPU', 'MULTI_CPU', 'FSDP'):
        raise ConfigError(f'this script runs in one process or as data parallel (DDP) in several, not as {kind}; '
                          f'change that in the accelerate configuration.')
    if accelerator.is_main_process:
        if amp and not use_amp:
            warn(f'this CPU has no bfloat16 instructions, so float32 takes the place of the recipe\'s mixed precision; '
                 f'--amp computes in bfloat16 all the same, which takes {EMULATION_COST}.')
        warn_if_emulated(device, use_amp)
    return accelerator
