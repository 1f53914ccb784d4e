"""Parameters and multiply-adds of a model, counted on the meta device."""
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coatnet_zoo.blocks import DynamicConv2d

__all__ = ['model_size']


def model_size(name: str, **kwargs) -> tuple[int, int, nn.Module]:
    """(parameters, multiply-adds for one image of the default size, the model on the meta device)."""
    model = timm.create_model(name, device='meta', **kwargs).eval()
    summed = []

    def count_taps(module: DynamicConv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        summed.append(output.numel() * module.kernel_size[0] * module.kernel_size[1])

    for module in model.modules():
        if isinstance(module, DynamicConv2d):  # a sum of shifted products, which torch's counter does not count
            module.register_forward_hook(count_taps)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, model.in_chans, *model.img_size, device='meta'))
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2 + sum(summed), model
