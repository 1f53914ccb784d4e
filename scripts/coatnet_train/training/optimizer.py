"""The optimizer, with the learning rate of each part of the model."""
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from coatnet_train.runtime.cli import ConfigError, did_you_mean, one_line
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.task import classifier_of

__all__ = ['build_optimizer']


def build_optimizer(settings: FinetuneSettings, model: nn.Module, batch_size: int) -> torch.optim.Optimizer:
    """timm's optimizer; its learning rate is --lr times images per update / --lr-base-size, where that is given.

    Args:
        settings: Settings of finetune.py.
        model: Model on its device.
        batch_size: Images of a step over all processes.

    Raises ConfigError for an optimizer that timm does not know, or that needs second derivatives.
    """
    lr = settings.lr
    if settings.lr_base_size is not None:
        lr *= batch_size * settings.grad_accum_steps / settings.lr_base_size
    try:
        optimizer = create_optimizer_v2(
            model, settings.opt, lr=lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
            layer_decay=settings.layer_decay)
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f'--opt {settings.opt}: {one_line(error)}; see timm.optim.list_optimizers()'
                          f'{did_you_mean(settings.opt, list_optimizers()) or "."}') from error
    if getattr(optimizer, 'is_second_order', False):
        raise ConfigError(f'--opt {settings.opt} needs second derivatives, which this script does not compute; '
                          f'choose another.')
    if settings.head_lr_scale != 1:
        head = set(map(id, classifier_of(model).parameters()))
        for group in list(optimizer.param_groups):
            inside = [p for p in group['params'] if id(p) in head]
            if inside:
                group['params'] = [p for p in group['params'] if id(p) not in head]
                # timm's schedulers multiply the learning rate of a group by its lr_scale
                scale = group.get('lr_scale', 1.) * settings.head_lr_scale
                optimizer.add_param_group({**group, 'params': inside, 'lr_scale': scale})
        optimizer.param_groups = [group for group in optimizer.param_groups if group['params']]
    return optimizer
