"""FSDP: full (unsharded) state dicts while each process holds only a shard of the weights."""
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.training.config import FinetuneSettings

__all__ = ['check_fsdp', 'gather_training_state', 'gather_weights', 'prepare_model', 'restore_training_state']


def check_fsdp(settings: FinetuneSettings, accelerator: Accelerator) -> None:
    """Raise ConfigError for settings that need the full weights in every step."""
    if accelerator.is_fsdp2 and settings.model_ema:
        raise ConfigError('--model-ema averages full weights after every step, which FSDP never holds; leave one '
                          'of them out.')


def prepare_model(accelerator: Accelerator, model: nn.Module,
                  optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap (DDP) or shard (FSDP) model and optimizer through accelerate.

    Raises ConfigError if the accelerate configuration names a layer class that the model lacks.
    """
    if accelerator.is_fsdp2:  # keep weights (and BatchNorm) in float32: --amp means autocast alone
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        model.register_forward_hook(lambda module, images, logits: logits.float())  # as accelerate's DDP does
    try:
        return accelerator.prepare(model, optimizer)
    except ValueError as error:
        if not accelerator.is_fsdp2:
            raise
        # the layer class to wrap is not in this model
        raise ConfigError(f'the accelerate configuration does not fit this model: {one_line(error)} See '
                          f'fsdp_transformer_layer_cls_to_wrap.') from error


def gather_weights(sharded: nn.Module, full_model: nn.Module) -> None:
    """Gather all weights into an unsharded model of the same shape; every process must take part."""
    full_model.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))


def gather_training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Gather weights and optimizer state on the CPU of the main process; every process must take part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {'state_dict': weights, 'optimizer': moments}


def restore_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load what `gather_training_state` returned into the shards of every process."""
    set_state_dict(model, optimizer, model_state_dict=state['state_dict'], optim_state_dict=state['optimizer'],
                   options=StateDictOptions(full_state_dict=True))
