"""Panels of an overlay: the labels of a model, and the draw callbacks of its explanation maps."""
import dataclasses
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from coatnet_train.evaluation.imagenet_labels import describe_synsets
from coatnet_train.explain.maps import (
    ExplainTarget,
    attention_weights,
    dynamic_kernels,
    expected_distance,
    fraction_on_padding,
    gradcam,
    run_with_input,
    tap_distances,
)
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import means_weights, open_model
from coatnet_train.plotting.overlay import draw_heatmap, draw_kernel, draw_kernels
from coatnet_train.runtime.cli import ConfigError

__all__ = ['RANDOM', 'Label', 'explain_image', 'open_classifier', 'read_labels']

RANDOM = 'RANDOM WEIGHTS: the predictions mean nothing'


@dataclass(frozen=True)
class Label:
    """A class: its name in the data, such as n01440764, and its description, if one is known."""

    name: str
    description: str = ''

    def __str__(self) -> str:
        return f'{self.name}  {self.description}' if self.description else self.name

    @property
    def short(self) -> str:
        return self.description.split(', ')[0] or self.name


def read_labels(model: nn.Module) -> list[Label]:
    """Classes of a model in logit order, named by its config, else by ImageNet's synsets, else by number."""
    count, config = model.num_classes, model.pretrained_cfg
    names, descriptions = config.get('label_names') or (), config.get('label_descriptions') or {}
    if len(names) != count:
        subset = infer_imagenet_subset(model)
        names = ImageNetInfo(subset).label_names() if subset else [f'class {i}' for i in range(count)]
    known = describe_synsets(names)
    return [Label(str(name), descriptions.get(name) or known.get(name, '')) for name in names]


def open_classifier(settings: ModelSettings, checkpoint: str = '') -> tuple[nn.Module, dict, str]:
    """Open a model with a classifier; returns the model, its data config, and a description of its weights.

    A name that stands for weights (NAME.TAG, hf-hub:, local-dir:) loads them unless a checkpoint is given. Raises
    ConfigError for a model without classes, or a --num-classes that the weights do not have.
    """
    stored = means_weights(settings.model) and not checkpoint
    settings = dataclasses.replace(settings, pretrained=settings.pretrained or stored)
    model, data_config = open_model(settings, checkpoint, num_classes=settings.num_classes)
    if not model.num_classes:
        raise ConfigError(f'--model {settings.model} has no classes to predict; give a model with a classifier.')
    if checkpoint:
        return model, data_config, f'weights of {checkpoint}'
    if not settings.pretrained:
        return model, data_config, RANDOM
    if settings.num_classes not in (None, known := model.pretrained_cfg['num_classes']):
        raise ConfigError(f'--num-classes must be that of the weights, {known}, got {settings.num_classes}: another '
                          f'classifier would be random; leave it out.')
    return model, data_config, 'its own weights'


def explain_image(
        model: nn.Module, target: ExplainTarget, image: torch.Tensor, pixels: np.ndarray, labels: list[Label],
        name: str, at: tuple[float, float] | None = None) -> tuple[torch.Tensor, list[partial]]:
    """Predict an image, and prepare the panels that explain the prediction.

    Args:
        model: Model in eval mode.
        target: What `choose_target` returned.
        image: (1, C, H, W), normalised.
        pixels: The same image as (H, W, 3) or (H, W) in 0..1, as background.
        labels: What `read_labels` returned.
        name: Name of the model, for error messages.
        at: (X, Y) of one query or kernel, as fractions of width and height; None shows all of them.

    Returns:
        Logits (classes,), and for each panel a callback `draw(axes)`, a partial with keywords `title` and `subtitle`.
    """
    if target.kind == 'gradcam':
        logits, maps = gradcam(model, image, name)
        return logits[0], [gradcam_panel(maps[0].cpu().numpy(), pixels, labels[int(logits[0].argmax())])]
    logits, x = run_with_input(model, target.module, image)
    panels = attention_panels if target.kind == 'attention' else kernel_panels
    return logits[0], panels(target, x, pixels, at)


def gradcam_panel(heatmap: np.ndarray, pixels: np.ndarray, label: Label) -> partial:
    """Panel of a Grad-CAM map (h, w) of the predicted class, scaled to a maximum of 1."""
    size = ' x '.join(map(str, heatmap.shape))
    return partial(
        draw_heatmap, pixels=pixels, heatmap=heatmap / (heatmap.max() or 1), smooth=True, vmin=0,
        title=f'Grad-CAM of {label.short}', unit='evidence for the class, 1 = strongest here',
        subtitle=f'last feature map, {size}' if heatmap.any() else 'nothing in the image speaks for this class')


def attention_panels(target: ExplainTarget, x: torch.Tensor, pixels: np.ndarray,
                     at: tuple[float, float] | None) -> list[partial]:
    """Panel of the attention of one query, or the mean over all; x (1, H, W, dim) is the attention module's input."""
    feat_size = tuple(x.shape[1:3])
    weights = attention_weights(target.module, x)[0].mean(0)
    position = position_of(at, feat_size)
    row = weights.mean(0) if position is None else weights[position[0] * feat_size[1] + position[1]]
    heatmap = (row * len(row)).view(feat_size).cpu().numpy()
    mean_of = f'{target.module.num_heads} heads' + (f' and {len(row)} queries' if position is None else '')
    return [partial(
        # the colour scale starts at 0, or uniform attention would look uneven
        draw_heatmap, pixels=pixels, heatmap=heatmap, vmin=min(0, heatmap.min()), vmax=max(2, heatmap.max()),
        frame=position, title=f'Where {"all positions look" if position is None else "the framed position looks"}',
        subtitle=f'attention of stage {target.stage}, mean of {mean_of}; no class', unit='attention, 1 = even')]


def kernel_panels(target: ExplainTarget, x: torch.Tensor, pixels: np.ndarray,
                  at: tuple[float, float] | None) -> list[partial]:
    """Panels of the kernels predicted from the input x (1, C, H, W) of a DynamicConv2d, and of their mean distance."""
    taps = dynamic_kernels(target.module, x)
    feat_size = tuple(taps.shape[-2:])
    mean = taps[0].mean(0).cpu().numpy()
    step = pixels.shape[0] / feat_size[0], pixels.shape[1] / feat_size[1]
    distance, reach = expected_distance(taps, step)[0], tap_distances(target.module.kernel_size, step)
    subtitle = f'stage {target.stage}, mean of {taps.shape[1]} heads; no class'
    position = position_of(at, feat_size)
    padding = fraction_on_padding(taps)[0]
    if position is None:
        padding, whose = padding.mean(), 'their'
        first = partial(draw_kernels, pixels=pixels, kernels=mean, title='Kernels predicted at positions',
                        subtitle=f'{subtitle}, not to scale')
    else:
        padding, whose = padding[position], 'its'
        first = partial(draw_kernel, pixels=pixels, kernel=mean[(..., *position)], position=position,
                        feat_size=feat_size, title='Kernel predicted at the frame', subtitle=subtitle)
    return [first, partial(
        draw_heatmap, pixels=pixels, heatmap=distance.cpu().numpy(), frame=position, vmin=0, vmax=reach.max().item(),
        title='How far the kernels look', unit=f'expected distance (pixels), {reach.mean():.0f} = even',
        subtitle=f'{100 * padding:.0f} % of {whose} weight falls on the padding')]


def position_of(at: tuple[float, float] | None, feat_size: tuple[int, int]) -> tuple[int, int] | None:
    """(row, column) in a map (h, w) of the point `at` (X, Y), given as fractions; None if `at` is None."""
    if at is None:
        return None
    return tuple(min(int(fraction * size), size - 1) for fraction, size in zip(reversed(at), feat_size, strict=True))
