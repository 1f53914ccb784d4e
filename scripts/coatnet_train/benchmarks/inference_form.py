"""Optimisations of the inference form, timed: the chunked tanh GELU, and batches split to stay in cache."""
import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from time import process_time

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from coatnet_train.benchmarks.config import InferenceFormSettings, check_inference_form
from coatnet_train.runtime.files import write_json
from coatnet_train.runtime.provenance import provenance
from coatnet_zoo.blocks import ConvStem, MBConv
from coatnet_zoo.blocks.inference import InplaceGELU

CACHE = 6 << 20  # maximum bytes of the widest map of a split batch


def candidates(model: nn.Module) -> dict[str, Callable]:
    """The inference form of a model and its variants, by name."""
    class TorchGELU(nn.Module):
        def forward(self, x):
            return torch.ops.aten.gelu_(x, approximate='tanh')

    class WholeGELU(nn.Module):
        def forward(self, x):
            gate = torch.addcmul(x.new_tensor(1.5957691216057308), x, x, value=0.07135481282405256)
            return x.mul_(gate.mul_(x).sigmoid_())

    class SplitBatch(nn.Module):
        def __init__(self, block: nn.Module, widest: float):
            super().__init__()
            self.block, self.widest = block, widest

        def forward(self, x):
            image = self.widest * x.shape[-2] * x.shape[-1] * x.element_size()
            parts = x.split(max(1, int(CACHE // image)))
            return torch.cat([self.block(part) for part in parts]) if len(parts) > 1 else self.block(x)

    def replaced(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        other = copy.deepcopy(folded)
        for parent in list(other.modules()):
            for name, child in parent.named_children():
                setattr(parent, name, change(child))
        return other

    def split(child: nn.Module) -> nn.Module:
        conv = child.expand if isinstance(child, MBConv) else child.conv1 if isinstance(child, ConvStem) else None
        return child if conv is None else SplitBatch(child, conv.out_channels / (conv.stride[0] * conv.stride[1]))

    folded = reparameterize_model(model.eval()).to(memory_format=torch.channels_last)
    return {
        'package': folded,
        "torch's GELU": replaced(lambda child: TorchGELU() if isinstance(child, InplaceGELU) else child),
        'GELU without chunks': replaced(lambda child: WholeGELU() if isinstance(child, InplaceGELU) else child),
        'split batches': replaced(split)}


def measure(model_name: str, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of one batch by candidate, a value for each round; all candidates must agree to 1e-5."""
    torch.manual_seed(0)
    model = timm.create_model(model_name)
    models = candidates(model)
    images = torch.randn(batch_size, 3, *model.img_size).contiguous(memory_format=torch.channels_last)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        expected = models['package'](images)
        for name, model in models.items():
            gap = (model(images) - expected).abs().max() / expected.abs().max()
            assert gap < 1e-5, f'{name} computes something else: {gap:.1e}'
        for turn in range(rounds):
            for name in list(models)[::1 if turn % 2 else -1]:
                begun = process_time()
                models[name](images)
                seconds[name].append(process_time() - begun)
    return seconds


def main(settings: InferenceFormSettings) -> dict:
    """Print and store the median time of each candidate, and its ratio to the package's time."""
    check_inference_form(settings)
    torch.set_num_threads(1)
    rows = []
    for model in settings.models:
        for batch_size in settings.batch_sizes:
            seconds = measure(model, batch_size, settings.rounds)
            row = dict(model=model, batch_size=batch_size, cpu_ms={}, of_package={}, quartiles={})
            for name, values in seconds.items():
                ratios = [value / package for value, package in zip(values, seconds['package'], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                row['cpu_ms'][name] = round(1e3 * statistics.median(values), 1)
                row['of_package'][name], row['quartiles'][name] = round(middle, 3), [round(low, 3), round(high, 3)]
                print(f'{model:12} {batch_size:3}  {name:20} {row["cpu_ms"][name]:8.1f} ms  {middle - 1:+.1%} of the '
                      f'package, quartiles {low - 1:+.1%} to {high - 1:+.1%}')
            rows.append(row)
    report = dict(rows=rows, settings=asdict(settings), clock='time.process_time, one thread', **provenance('cpu'))
    if settings.results_file:
        write_json(Path(settings.results_file), report)
    return report
