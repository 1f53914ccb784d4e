"""timm's training task with loss and teacher, and helpers for frozen trunks and BatchNorm's momentum."""
import copy

import torch
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from torch import nn

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.training.config import FinetuneSettings
from coatnet_train.training.distillation import StoredLogitDistillationTask

__all__ = ['build_task', 'check_training', 'classifier_of', 'freeze_trunk', 'set_bn_momentum', 'set_trunk_to_eval']


def classifier_of(model: nn.Module) -> nn.Module:
    """The classifier of a model; raises ConfigError if it has no single classifier with weights."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Module) or not list(classifier.parameters()):
        raise ConfigError('--freeze-trunk and --head-lr-scale need a model with one classifier that has weights.')
    return classifier


def freeze_trunk(model: nn.Module) -> None:
    """Freeze all weights but those of the classifier."""
    classifier = classifier_of(model)
    model.requires_grad_(False)
    classifier.requires_grad_(True)


def set_trunk_to_eval(model: nn.Module) -> None:
    """Put a frozen trunk into eval mode (fixed BatchNorm statistics, no dropout) and the classifier into train mode."""
    model.eval()
    classifier_of(model).train()


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """Set the momentum of every BatchNorm (weight of a batch in the running statistics); no config records it."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = momentum


def check_training(settings: FinetuneSettings, model: nn.Module, data_config: dict) -> None:
    """Raise ConfigError for a batch of one image, if a BatchNorm of the model cannot train on it."""
    if settings.batch_size > 1:
        return
    # BatchNorm needs two values a channel; a 1 x 1 map of one image has a single one
    try:
        copy.deepcopy(model).train()(torch.zeros(1, *data_config['input_size']))
    except ValueError as error:
        raise ConfigError(f'--batch-size {settings.batch_size} is too small for --model {settings.model}: '
                          f'{one_line(error)}; give at least 2.') from error


def build_task(settings: FinetuneSettings, model: nn.Module, teacher: nn.Module | None, data_config: dict,
               device: torch.device) -> TrainingTask:
    """Cross-entropy, on soft targets where images are mixed, plus the distillation loss where there is a teacher."""
    loss = dict(soft_targets=True) if settings.mixup or settings.cutmix else dict(smoothing=settings.smoothing)
    if settings.teacher_outputs:
        return StoredLogitDistillationTask(model, loss, settings.kd_loss_weight, settings.kd_temperature, device)
    if teacher is None:
        return ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    # the task inverts the student's normalisation with these
    model.pretrained_cfg = {**model.pretrained_cfg, 'mean': data_config['mean'], 'std': data_config['std']}
    teacher.to(device, memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format)
    if settings.torchcompile:
        teacher.compile()
    return LogitDistillationTask(
        model, teacher, criterion_kwargs=loss, task_loss_weight=1 - settings.kd_loss_weight,
        temperature=settings.kd_temperature, device=device, verbose=False)
