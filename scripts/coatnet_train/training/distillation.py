"""Distillation: the teacher, checked against the data of the student."""
import torch
from torch import nn
from torch.nn import functional as F

from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.training.config import Settings

__all__ = ['create_teacher']


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


def create_teacher(settings: Settings, class_names: list[str], data_config: dict) -> nn.Module:
    """The model of --teacher, once it is clear that it knows the classes and takes the images."""
    try:
        teacher, own = open_model(ModelSettings(
            model=settings.teacher, pretrained=True, in_chans=settings.in_chans, img_size=settings.teacher_img_size))
        if settings.teacher_img_size:
            teacher = ResizedInput(teacher, settings.teacher_img_size)
        channels = data_config['input_size'][0]
        if own['input_size'][0] != channels:
            raise ConfigError(f'it takes {own["input_size"][0]} channels, --model {settings.model} takes {channels}; '
                              f'--in-chans gives both the same')
        with torch.no_grad():
            teacher(torch.zeros(1, *data_config['input_size']))
            for size in settings.train_img_sizes:
                teacher(torch.zeros(1, channels, size, size))
    except (ConfigError, RuntimeError, AssertionError) as error:
        sizes = f'{data_config["input_size"]} {settings.train_img_sizes or ""}'.strip()
        raise ConfigError(f'--teacher {settings.teacher} cannot look at images of {sizes}: '
                          f'{one_line(error)}') from error
    # timm's task normalises with these, and they must have a value for each channel that the teacher has now
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': own['mean'], 'std': own['std']}
    if teacher.num_classes != len(class_names):
        raise ConfigError(f'--teacher {settings.teacher} has {teacher.num_classes} classes, the data have '
                          f'{len(class_names)}; fine-tune it on them first.')
    names = teacher.pretrained_cfg.get('label_names')
    if names and list(names) != class_names:
        raise ConfigError(f'--teacher {settings.teacher} must have the classes of the data in their order '
                          f'({", ".join(class_names[:3])}, ...), but has {", ".join(names[:3])}, ...; fine-tune it.')
    return teacher
