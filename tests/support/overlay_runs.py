"""An image, small models of the zoo, and the panels that scripts/predict.py draws."""
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import resolve_input_data_config
from torch import nn

from coatnet_train.explain import panels, prediction
from coatnet_train.plotting import overlay
from coatnet_train.training.run_dir import write_config

SMALL = dict(img_size=32, depths=(1, 1, 1, 1), embed_dim=(16, 16, 32, 64), num_classes=4)
SMALL_FLAGS = ('depths=(1,1,1,1)', 'embed_dim=(16,16,32,64)')
NAMES = ['n01440764', 'my own class', 'n02102040', 'n03888257']


def write_image(path: Path, size: tuple[int, int] = (40, 36), seed: int = 0) -> Path:
    """Write a noisy image of (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def zoo(name: str = 'coatnet_pico_64', **options) -> nn.Module:
    return timm.create_model(name, **{**SMALL, **options}).eval()


def shown_panels(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Record every panel drawn from now on: its arguments, with the name of the draw function under 'draw'."""
    drawn = []

    def spy(draw, axes, *args, **kwargs):
        drawn.append({'draw': draw.__name__, **inspect.signature(draw).bind(axes, *args, **kwargs).arguments})
        return draw(axes, *args, **kwargs)

    for module, names in ((prediction, ('draw_image', 'draw_top5')),
                          (panels, ('draw_heatmap', 'draw_kernel', 'draw_kernels'))):
        for name in names:
            monkeypatch.setattr(module, name, partial(spy, getattr(overlay, name)))
    return drawn


def write_run(folder: Path, model: nn.Module, names: list[str]) -> str:
    """Write a run folder as finetune.py does; returns its name for --model."""
    folder.mkdir()
    write_config(folder / 'config.json', model, names, resolve_input_data_config(model, {}, use_test_size=True))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / 'model.safetensors')
    return f'local-dir:{folder}'


class Colours(nn.Module):
    """Model that predicts the strongest of red, green and blue; its feature map is the mean colour of 8 x 8 pixels."""

    num_features, num_classes, pretrained_cfg, cfg = 3, 3, {'label_names': ['red', 'green', 'blue']}, None

    def forward_features(self, x):
        return nn.functional.avg_pool2d(x.relu(), 8)

    def forward_head(self, x):
        return x.mean((2, 3)) @ (3 * torch.eye(3) - 1)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))
