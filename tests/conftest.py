"""Fixtures of all tests: random weights that expose mistakes, names of parametrised tests, and cheap figures."""
import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

if capability := os.environ.get('ATEN_CPU_CAPABILITY'):
    # inductor's cache ignores this setting, and code compiled under another one gives NaN
    os.environ.setdefault('TORCHINDUCTOR_CACHE_DIR', str(Path(tempfile.gettempdir(), f'inductor-{capability}')))

torch.set_num_threads(1)  # the models are tiny: starting a second thread takes longer than their work
os.environ.setdefault('OMP_NUM_THREADS', '1')  # the same for processes that tests start
# Without network, requests to the Hub would wait for retries. huggingface_hub reads this when it is imported, later on.
os.environ.setdefault('HF_HUB_OFFLINE', '1')


def pytest_collection_finish() -> None:
    """Keep the imported modules out of garbage collections, which would walk over all of them again and again."""
    gc.collect()
    gc.freeze()


def plain_text(value: object) -> str | None:
    """Short text of a parameter, the same in every process; None for values without one, such as functions."""
    if isinstance(value, bytes):
        return f'{len(value)} bytes'
    if isinstance(value, torch.dtype):
        return str(value).removeprefix('torch.')
    if isinstance(value, torch.Tensor):  # its values may be random, and xdist wants the same names in all workers
        return f'{plain_text(value.dtype)}{list(value.shape)}'
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value)
    if isinstance(value, dict):
        parts = [plain_text(item) for item in value.values()]
        return None if None in parts else ','.join(f'{key}={part}' for key, part in zip(value, parts, strict=True))
    if isinstance(value, (tuple, list)):
        parts = [plain_text(item) for item in value]
        return None if None in parts else ','.join(parts)
    return None


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name parametrised tests by their values where pytest would number them."""
    if isinstance(val, (dict, tuple, list, bytes, torch.dtype, torch.Tensor)) and (text := plain_text(val)) is not None:
        return text[:80] or 'none'
    return None


@pytest.fixture
def randomize() -> Callable[[nn.Module], nn.Module]:
    """Give a model random norms, biases, running statistics and large weights, so that no term is hidden by zeros."""

    @torch.no_grad()
    def fill(model: nn.Module, seed: int = 0) -> nn.Module:
        draws = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        position = 0

        def noise(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal position  # the draws are used in turn, over and over: 275 M parameters fill in a second
            position = (position + 7919) % 1024
            part = draws[position:position + tensor.numel()].to(tensor.dtype)
            return part.repeat(-(-tensor.numel() // len(part)))[:tensor.numel()].view(tensor.shape)

        for name, parameter in model.named_parameters():
            if name.endswith('table'):
                parameter.copy_(noise(parameter) * .5)
            elif parameter.ndim == 1:
                parameter.copy_(noise(parameter) * .2 + name.endswith('weight'))
            else:
                parameter.copy_(noise(parameter) * (parameter[0].numel() ** -.5))
        for name, buffer in model.named_buffers():
            if name.endswith('running_mean'):
                buffer.copy_(noise(buffer) * .3)
            elif name.endswith('running_var'):
                buffer.copy_(noise(buffer).abs() + .3)
        return model

    return fill


@pytest.fixture(autouse=True)
def empty_figures_of_runs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training runs draw empty figures, unless the test is marked draws_figures: axes are slow to make."""
    run, run_dir = (sys.modules.get(f'coatnet_train.training.{name}') for name in ('run', 'run_dir'))
    if run and run_dir and not request.node.get_closest_marker('draws_figures'):
        for module, name in (
                (run, 'confusion_figure'), (run, 'misclassified_figure'), (run_dir, 'curves_figure')):
            monkeypatch.setattr(module, name, lambda *args: Figure())


@pytest.fixture
def plain_figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save a white pixel for every figure unless the test is marked draws_figures: drawing is half of a short run."""
    pixel = Image.new('L', (1, 1), 255)
    if not request.node.get_closest_marker('draws_figures'):
        monkeypatch.setattr(Figure, 'savefig', lambda self, path, **kwargs: pixel.save(path, 'PNG'))


@pytest.fixture
def skip_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the initialisation of parameters, for tests that fill or load all of them."""
    for name in ('normal_', 'trunc_normal_', 'uniform_', 'kaiming_uniform_', 'xavier_uniform_'):
        monkeypatch.setattr(f'torch.nn.init.{name}', lambda tensor, *args, **kwargs: tensor)
