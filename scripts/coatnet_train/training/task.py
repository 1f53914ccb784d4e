"""What finetune.py trains: timm's task with its loss and teacher, and an optimizer that knows trunk from head."""
import copy

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.task import ClassificationTask, LogitDistillationTask
from timm.task.task import TrainingTask
from torch import nn
from torch.nn import functional as F

from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime.cli import SettingsError, did_you_mean, one_line
from coatnet_train.training.config import Settings

__all__ = [
    'build_optimizer', 'build_task', 'check_training', 'freeze_trunk', 'open_teacher',
    'set_bn_momentum', 'set_trunk_to_eval']


def classifier_of(model: nn.Module) -> nn.Module:
    """The last layer; refuses models that have none of their own, or several."""
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Module) or not list(classifier.parameters()):
        raise SettingsError('--freeze-trunk and --head-lr-scale need a model with one classifier that has weights.')
    return classifier


def freeze_trunk(model: nn.Module) -> None:
    """Let nothing but the classifier learn."""
    classifier = classifier_of(model)
    model.requires_grad_(False)
    classifier.requires_grad_(True)


def set_trunk_to_eval(model: nn.Module) -> None:
    """Keep the statistics of a frozen trunk's BatchNorms, and its dropout off; the classifier trains."""
    model.eval()
    classifier_of(model).train()


def set_bn_momentum(model: nn.Module, momentum: float) -> None:
    """How much a batch adds to BatchNorm's running statistics; in no config, so that the run's model opens as ever."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = momentum


def check_training(settings: Settings, model: nn.Module, data_config: dict) -> None:
    """Refuse what would fail in the first step."""
    if settings.batch_size > 1:
        return
    # statistics of BatchNorm need two values, which a map of 1 x 1 gives only from two pictures
    try:
        copy.deepcopy(model).train()(torch.zeros(1, *data_config['input_size']))
    except ValueError as error:
        raise SettingsError(f'--batch-size {settings.batch_size} is too small for --model {settings.model}: '
                            f'{one_line(error)}; give at least 2.') from error


def build_optimizer(settings: Settings, model: nn.Module, batch_size: int) -> torch.optim.Optimizer:
    """timm's optimizer; its learning rate is --lr times pictures per update / --lr-base-size, where that is given.

    Args:
        settings: Of finetune.py.
        model: On its device.
        batch_size: Pictures of a step over all processes.
    """
    lr = settings.lr
    if settings.lr_base_size is not None:
        lr *= batch_size * settings.grad_accum_steps / settings.lr_base_size
    try:
        optimizer = create_optimizer_v2(
            model, settings.opt, lr=lr, weight_decay=settings.weight_decay, momentum=settings.momentum,
            layer_decay=settings.layer_decay)
    except (ValueError, TypeError, AssertionError) as error:
        raise SettingsError(f'--opt {settings.opt}: {one_line(error)}; see timm.optim.list_optimizers()'
                            f'{did_you_mean(settings.opt, list_optimizers()) or "."}') from error
    if getattr(optimizer, 'is_second_order', False):
        raise SettingsError(f'--opt {settings.opt} needs second derivatives, which this script does not compute; '
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


class ResizedInput(nn.Module):
    """A model that sees its images resized to a square of `size` pixels: (B, C, H, W) -> its output.

    Bicubic and antialiased, which is timm's default way to evaluate.
    """

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size
        self.num_classes, self.pretrained_cfg = model.num_classes, model.pretrained_cfg

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode='bicubic', antialias=True)
        return self.model(images)


def open_teacher(settings: Settings, class_names: list[str], data_config: dict) -> nn.Module:
    """The model of --teacher, once it is clear that it knows the classes and takes the pictures."""
    try:
        teacher, own = open_model(ModelSettings(
            model=settings.teacher, pretrained=True, in_chans=settings.in_chans, img_size=settings.teacher_img_size))
        if settings.teacher_img_size:
            teacher = ResizedInput(teacher, settings.teacher_img_size)
        channels = data_config['input_size'][0]
        if own['input_size'][0] != channels:
            raise SettingsError(f'it takes {own["input_size"][0]} channels, --model {settings.model} takes {channels}; '
                                f'--in-chans gives both the same')
        with torch.no_grad():
            teacher(torch.zeros(1, *data_config['input_size']))
            for size in settings.train_img_sizes:
                teacher(torch.zeros(1, channels, size, size))
    except (SettingsError, RuntimeError, AssertionError) as error:
        sizes = f'{data_config["input_size"]} {settings.train_img_sizes or ""}'.strip()
        raise SettingsError(f'--teacher {settings.teacher} cannot look at pictures of {sizes}: '
                            f'{one_line(error)}') from error
    # timm's task normalises with these, and they must have a value for each channel that the teacher has now
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': own['mean'], 'std': own['std']}
    if teacher.num_classes != len(class_names):
        raise SettingsError(f'--teacher {settings.teacher} has {teacher.num_classes} classes, the data have '
                            f'{len(class_names)}; fine-tune it on them first.')
    names = teacher.pretrained_cfg.get('label_names')
    if names and list(names) != class_names:
        raise SettingsError(f'--teacher {settings.teacher} must have the classes of the data in their order '
                            f'({", ".join(class_names[:3])}, ...), but has {", ".join(names[:3])}, ...; fine-tune it.')
    return teacher


def build_task(settings: Settings, model: nn.Module, teacher: nn.Module | None, data_config: dict,
               device: torch.device) -> TrainingTask:
    """Cross-entropy, on soft targets where pictures are mixed, with a share of the teacher's logits if there is one."""
    loss = dict(soft_targets=True) if settings.mixup or settings.cutmix else dict(smoothing=settings.smoothing)
    if teacher is None:
        return ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    # the task reads there what it takes the student's normalisation back with
    model.pretrained_cfg = {**model.pretrained_cfg, 'mean': data_config['mean'], 'std': data_config['std']}
    teacher.to(device, memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format)
    if settings.torchcompile:
        teacher.compile()
    return LogitDistillationTask(
        model, teacher, criterion_kwargs=loss, task_loss_weight=1 - settings.kd_loss_weight,
        temperature=settings.kd_temperature, device=device, verbose=False)
