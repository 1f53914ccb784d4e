"""Distillation: the teacher, its checks against the student's data, and the loss from stored outputs."""
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
    """Resize images (B, C, H, W) to a square of `size` pixels and apply `model`.

    The resize is bicubic and antialiased, as in timm's default evaluation.
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
    """Create the model of --teacher with its weights; returns it with its data settings.

    Raises ConfigError if it cannot be opened.

    Args:
        name: Name given by --teacher.
        img_size: Height and width in pixels that its images are resized to (--teacher-img-size).
        in_chans: Input channels (--in-chans).
    """
    try:
        teacher, data_config = open_model(
            ModelSettings(model=name, pretrained=True, in_chans=in_chans, img_size=img_size))
    except ConfigError as error:
        reason = str(error).replace(f'--model {name}', 'it').replace('--img-size', '--teacher-img-size')
        raise ConfigError(f'--teacher {name} cannot be opened with weights: {reason}') from error
    if img_size:
        teacher = ResizedInput(teacher, img_size)
    # timm's task normalises with these, so they need one value for each input channel of the teacher
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': data_config['mean'], 'std': data_config['std']}
    return teacher, data_config


def check_teacher_input(
        teacher: nn.Module, name: str, channels: int, input_size: tuple[int, int, int],
        try_sizes: tuple[int, ...] = (), student: str = '') -> None:
    """Raise ConfigError for a teacher that does not accept the student's images.

    Args:
        teacher: What `create_teacher` returned.
        name: Name given by --teacher.
        channels: Input channels of the teacher.
        input_size: (C, H, W) of the images.
        try_sizes: Other image sizes in pixels that training uses.
        student: Name given by --model, for messages.
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
    """Raise ConfigError unless the teacher has the classes `class_names` of the data, in this order."""
    if teacher.num_classes != len(class_names):
        raise ConfigError(f'--teacher {name} has {teacher.num_classes} classes, the data have '
                          f'{len(class_names)}; fine-tune it on them first.')
    names = teacher.pretrained_cfg.get('label_names')
    if names and list(names) != class_names:
        raise ConfigError(f'--teacher {name} must have the classes of the data in their order '
                          f'({", ".join(class_names[:3])}, ...), but has {", ".join(names[:3])}, ...; fine-tune it.')


class BatchMixup(Mixup):
    """timm's mixup and cutmix of whole batches; `lam` holds the mixing coefficient of the last batch."""

    def _mix_batch(self, images: torch.Tensor) -> float:
        self.lam = super()._mix_batch(images)
        return self.lam


def stored_kl_div(logits: torch.Tensor, stored: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """T^2 KL(p || q), the mean over a batch (a scalar): p of the teacher, q = softmax(logits / T) of the student.

    Args:
        logits: Logits (B, C) of the student.
        stored: Logits (B, C) of the teacher; or its k largest logits (B, k), their classes (B, k), and the logsumexp of
            the other logits / T (B,). In the second case all other classes are merged into one, in both p and q.
        temperature: Temperature T.
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

    A mixed image has the loss lam KL(p1 || q) + (1 - lam) KL(p2 || q), with the lam and the permutation of its labels.
    Its gradients are those of KL(lam p1 + (1 - lam) p2 || q), from which it differs by a term without weights, and it
    is also defined where the top k of p1 and p2 are different classes.

    Args:
        model: The student.
        criterion_kwargs: Keyword arguments of timm's `create_classification_loss`.
        kd_loss_weight: Weight of the distillation loss; that of the label loss is 1 - kd_loss_weight.
        temperature: Temperature of both softmaxes.
        device: Device of the loss.
    """

    def __init__(self, model: nn.Module, criterion_kwargs: dict, kd_loss_weight: float, temperature: float,
                 device: torch.device):
        super().__init__(model, criterion_kwargs=criterion_kwargs, device=device, verbose=False)
        self.kd_loss_weight, self.temperature = kd_loss_weight, temperature

    def forward(self, images: torch.Tensor, targets: torch.Tensor, stored: Sequence[torch.Tensor],
                lam: float = 1.) -> dict[str, torch.Tensor]:
        """Losses and output for mixed images (B, C, H, W), given the stored outputs of the unmixed images.

        Args:
            images: Images after mixup and cutmix.
            targets: Labels (B,), or soft targets (B, C) if images are mixed.
            stored: Stored outputs, as in `stored_kl_div`.
            lam: Mixing coefficient; 1 for images that are not mixed.
        """
        result = super().forward(images, targets)
        kd_loss = stored_kl_div(result['output'], stored, self.temperature)
        if lam != 1:
            flipped = [column.flip(0) for column in stored]
            kd_loss = lam * kd_loss + (1 - lam) * stored_kl_div(result['output'], flipped, self.temperature)
        loss = (1 - self.kd_loss_weight) * result['loss'] + self.kd_loss_weight * kd_loss
        return {'loss': loss, 'output': result['output'], 'task_loss': result['loss'], 'kd_loss': kd_loss}
