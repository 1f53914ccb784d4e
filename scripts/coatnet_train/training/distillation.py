"""Distillation: the teacher, checked against the data of the student, and the loss of its stored outputs."""
from collections.abc import Sequence

import torch
from timm.data import Mixup
from timm.task import ClassificationTask
from torch import nn
from torch.nn import functional as F

from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime.cli import ConfigError, one_line

__all__ = ['BatchMixup', 'ResizedInput', 'StoredLogitDistillationTask', 'check_teacher_classes', 'check_teacher_input',
           'create_teacher', 'stored_kl_div']


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


def create_teacher(name: str, *, img_size: int | None = None, in_chans: int | None = None) -> tuple[nn.Module, dict]:
    """The model of --teacher with weights, and its data settings.

    Args:
        name: As --teacher names it.
        img_size: Size in pixels that images are resized to for it (--teacher-img-size).
        in_chans: As --in-chans.
    """
    try:
        teacher, data_config = open_model(
            ModelSettings(model=name, pretrained=True, in_chans=in_chans, img_size=img_size))
    except ConfigError as error:
        reason = str(error).replace(f'--model {name}', 'it').replace('--img-size', '--teacher-img-size')
        raise ConfigError(f'--teacher {name} cannot be opened with weights: {reason}') from error
    if img_size:
        teacher = ResizedInput(teacher, img_size)
    # timm's task normalises with these, and they must have a value for each channel that the teacher has now
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': data_config['mean'], 'std': data_config['std']}
    return teacher, data_config


def check_teacher_input(
        teacher: nn.Module, name: str, channels: int, input_size: tuple[int, int, int],
        try_sizes: tuple[int, ...] = (), student: str = '') -> None:
    """Raise ConfigError for a teacher that does not take the images.

    Args:
        teacher: What `create_teacher` returned.
        name: As --teacher names it.
        channels: That the teacher takes.
        input_size: (C, H, W) of the images.
        try_sizes: Other sizes in pixels that they will have.
        student: As --model names it, for messages.
    """
    try:
        if channels != input_size[0]:
            raise ConfigError(f'it takes {channels} channels, --model {student} takes {input_size[0]}; --in-chans '
                              f'gives both the same')
        with torch.no_grad():
            for shape in (input_size, *((channels, size, size) for size in try_sizes)):
                teacher(torch.zeros(1, *shape))
    except (ConfigError, RuntimeError, AssertionError) as error:
        sizes = f'{input_size} {try_sizes or ""}'.strip()
        raise ConfigError(f'--teacher {name} cannot look at images of {sizes}: {one_line(error)}') from error


def check_teacher_classes(teacher: nn.Module, name: str, class_names: list[str]) -> None:
    """Raise ConfigError for a teacher of other classes, or of another order, than the data's `class_names`."""
    if teacher.num_classes != len(class_names):
        raise ConfigError(f'--teacher {name} has {teacher.num_classes} classes, the data have '
                          f'{len(class_names)}; fine-tune it on them first.')
    names = teacher.pretrained_cfg.get('label_names')
    if names and list(names) != class_names:
        raise ConfigError(f'--teacher {name} must have the classes of the data in their order '
                          f'({", ".join(class_names[:3])}, ...), but has {", ".join(names[:3])}, ...; fine-tune it.')


class BatchMixup(Mixup):
    """timm's mixup and cutmix of whole batches; `lam` is the fraction that the last images kept of their own."""

    def _mix_batch(self, images: torch.Tensor) -> float:
        self.lam = super()._mix_batch(images)
        return self.lam


def stored_kl_div(logits: torch.Tensor, stored: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """T^2 KL(p || q), p of the teacher and q = softmax(logits / T) of the student, the mean over a batch: a scalar.

    Args:
        logits: Of the student, (B, C).
        stored: Logits of the teacher for all classes (B, C); or for the k largest (B, k), their classes (B, k), and
            the logsumexp of the others divided by T (B,). Then all others together are one class, in p and q alike.
        temperature: T.
    """
    student, teacher = F.log_softmax(logits.float() / temperature, 1), stored[0].float() / temperature
    if len(stored) > 1:
        _, classes, rest = stored
        classes = classes.long()
        others = student.scatter(1, classes, -torch.inf).logsumexp(1, keepdim=True)
        student = torch.cat((student.gather(1, classes), others), 1)
        teacher = torch.cat((teacher, rest.float().unsqueeze(1)), 1)
    teacher = F.log_softmax(teacher, 1)
    return F.kl_div(student, teacher, reduction='batchmean', log_target=True) * temperature**2


class StoredLogitDistillationTask(ClassificationTask):
    """timm's LogitDistillationTask, with stored logits in place of a teacher.

    A mixed image is taught by both of its images: lam KL(p1 || q) + (1 - lam) KL(p2 || q), with lambda and permutation
    of its labels. That has the gradients of KL(lam p1 + (1 - lam) p2 || q), from which it differs by what no weight
    changes, and it also holds where p1 and p2 name different classes.

    Args:
        model: The student.
        criterion_kwargs: Of timm's `create_classification_loss`.
        kd_loss_weight: Weight of the teacher; the labels have the rest.
        temperature: Divides the logits of both.
        device: Of the loss.
    """

    def __init__(self, model: nn.Module, criterion_kwargs: dict, kd_loss_weight: float, temperature: float,
                 device: torch.device):
        super().__init__(model, criterion_kwargs=criterion_kwargs, device=device, verbose=False)
        self.kd_loss_weight, self.temperature = kd_loss_weight, temperature

    def forward(self, images: torch.Tensor, targets: torch.Tensor, stored: Sequence[torch.Tensor],
                lam: float = 1.) -> dict[str, torch.Tensor]:
        """Loss of images (B, C, H, W), already mixed, and of what is stored for them unmixed (`stored_kl_div`)."""
        result = super().forward(images, targets)
        kd_loss = stored_kl_div(result['output'], stored, self.temperature)
        if lam != 1:
            flipped = [column.flip(0) for column in stored]
            kd_loss = lam * kd_loss + (1 - lam) * stored_kl_div(result['output'], flipped, self.temperature)
        loss = (1 - self.kd_loss_weight) * result['loss'] + self.kd_loss_weight * kd_loss
        return {'loss': loss, 'output': result['output'], 'task_loss': result['loss'], 'kd_loss': kd_loss}
