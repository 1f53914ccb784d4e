"""Results of the page for one image: top-5 predictions, explanation maps of the stages, and inference time."""
import io
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from timm.data import create_transform
from torch import nn

from coatnet_train.explain.maps import ExplainTarget, choose_target
from coatnet_train.explain.panels import Label, explain_image, open_classifier, read_labels
from coatnet_train.models.config import ModelSettings
from coatnet_train.plotting.plots import to_pixels
from coatnet_train.plotting.style import CYAN
from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo.models.backbone import Backbone

__all__ = ['Answer', 'Model', 'Panel', 'answer', 'open_models', 'position_in_image']

SEEN_SIDE = 448  # minimum width of the image to click on, in pixels
TEXT = '#7d8590'  # text of colour bars; legible on white and on near black


@dataclass(frozen=True)
class Model:
    """A model that the page offers."""

    title: str
    weights: str  # description of the weights
    settings: ModelSettings
    network: nn.Module
    data_config: dict
    labels: list[Label]
    targets: list[ExplainTarget]  # available explanations, the last one Grad-CAM

    @property
    def layout(self) -> str:
        return self.network.cfg.layout if isinstance(self.network, Backbone) else ''

    @property
    def positions(self) -> bool:
        """Whether a position can be chosen: a query of attention, or a kernel."""
        return len(self.targets) > 1


@dataclass(frozen=True)
class Panel:
    """A map drawn over the image: a PNG with its texts."""

    stage: str
    title: str
    subtitle: str
    png: bytes


@dataclass(frozen=True)
class Answer:
    """Results for one image."""

    top5: dict[str, float]  # probability by label, highest first
    seen: Image.Image  # the model's input, with a ring around the chosen position
    panels: list[Panel]
    milliseconds: float  # time of one forward pass of this image


def open_models(names: tuple[str, ...], released: tuple[str, ...], device: torch.device) -> dict[str, Model]:
    """Open models by their names, once for all requests; the keys are their titles on the page.

    Args:
        names: Names as for --model of predict.py; those in `released` get their weights.
        released: Names that have released weights.
        device: Device that the models run on.

    Raises ConfigError for a model that cannot be opened, reads grey images, or has the title of another.
    """
    models = {}
    for name in names:
        settings = ModelSettings(model=name, pretrained=name in released)
        network, data_config, weights = open_classifier(settings)
        title = name
        if name.startswith('local-dir:'):
            architecture, run = network.pretrained_cfg['architecture'], Path(name.removeprefix('local-dir:')).name
            title = architecture if run == architecture else f'{architecture} · {run}'
        if title in models:
            raise ConfigError(f'--model must not name two models of one title, got {title} twice; leave one out or '
                              f'rename its folder.')
        if data_config['input_size'][0] != 3:
            raise ConfigError(f'--model {name} reads grey images, and the page shows colour ones; leave it out.')
        layout = network.cfg.layout if isinstance(network, Backbone) else ''
        stages = [choose_target(network, name, stage=stage) for stage, block_type in enumerate(layout, 1)
                  if block_type in 'TD']
        models[title] = Model(
            title, weights, settings, network.to(device), data_config, read_labels(network),
            [*stages, choose_target(network, name, 'gradcam')])
    return models


def answer(model: Model, photo: Image.Image, at: tuple[float, float] | None = None) -> Answer:
    """Predict an image in RGB, and explain the prediction.

    Args:
        model: One of `open_models`; not thread-safe, because hooks are set inside the network.
        photo: Image that `read_upload` returned.
        at: (X, Y) of the query or kernel to show, as fractions of the model's input in 0..1; None shows all of them.
    """
    image = create_transform(**model.data_config)(photo)
    crop = to_pixels(image, model.data_config['mean'], model.data_config['std'])
    batch = image[None].to(next(model.network.parameters()).device)
    panels = []
    for target in model.targets:
        _, draw_callbacks = explain_image(model.network, target, batch, crop, model.labels, model.settings.model, at)
        stage = f'Stage {target.stage} · {model.layout[target.stage - 1]}' if target.stage else 'Before the head'
        panels += [draw_panel(draw, stage, crop.shape[0] / crop.shape[1]) for draw in draw_callbacks]

    with torch.inference_mode():
        start = time.perf_counter()
        probabilities = model.network(batch)[0].float().softmax(-1).cpu()  # cpu() synchronises a GPU
        milliseconds = 1000 * (time.perf_counter() - start)
    best = probabilities.topk(min(5, len(probabilities)))
    labels = [model.labels[i] for i in best.indices.tolist()]
    short = [label.short for label in labels]
    names = [label.short if short.count(label.short) == 1 else str(label) for label in labels]  # there are 2 cranes
    return Answer(
        top5=dict(zip(names, best.values.tolist(), strict=True)),
        seen=draw_seen(Image.fromarray((crop * 255).round().astype('uint8')), at), panels=panels,
        milliseconds=milliseconds)


def position_in_image(model: Model, index: tuple[float, float]) -> tuple[float, float]:
    """Position (X, Y), as fractions of `Answer.seen`, of a pixel (column, row) in it."""
    _, height, width = model.data_config['input_size']
    scale = seen_scale(width)
    return tuple(min(max((place + 0.5) / (size * scale), 0), 1) for place, size in zip(
        index, (width, height), strict=True))


def seen_scale(width: int) -> int:
    return -(-SEEN_SIDE // width)


def draw_seen(crop: Image.Image, at: tuple[float, float] | None) -> Image.Image:
    """Enlarge the model's input by nearest neighbours, and draw a ring at the chosen position."""
    scale = seen_scale(crop.width)
    seen = crop.resize((crop.width * scale, crop.height * scale), Image.Resampling.NEAREST)
    if at is not None:
        x, y, radius = at[0] * seen.width, at[1] * seen.height, seen.width / 28
        draw = ImageDraw.Draw(seen)
        for grown, colour, line in ((2, 'black', 8), (0, CYAN, 4)):
            reach = radius + grown
            draw.ellipse((x - reach, y - reach, x + reach, y + reach), outline=colour, width=line)
    return seen


def draw_panel(draw: partial, stage: str, aspect: float) -> Panel:
    """Draw one panel of predict.py's overlay as a PNG without its texts, which the page shows beside it."""
    figure = Figure(figsize=(3.2, 3.2 * aspect))
    axes = figure.add_axes((0, 0, 1, 1))
    draw(axes, title='', subtitle='')
    axes.set_title('', loc='left')  # remove the line break of an empty title, which takes space
    for scale in axes.child_axes:
        scale.tick_params(colors=TEXT, labelsize=9)
        scale.yaxis.label.set(color=TEXT, fontsize=9.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=160, transparent=True, bbox_inches='tight', pad_inches=0.02)
    return Panel(stage, draw.keywords['title'], draw.keywords['subtitle'], buffer.getvalue())
