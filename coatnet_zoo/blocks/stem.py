"""The two stems of the paper, and the validation of the input batch before them."""
from collections.abc import Callable

import torch
from torch import nn

from .activation import GELU
from .inference import fold_norm_into_previous

__all__ = ['ConvStem', 'InputCheck', 'PatchStem', 'check_size']


def check_size(height: int, width: int, total_stride: int, divisible: bool) -> None:
    """Raise ValueError unless a layout can take an image of this size (pixels).

    Args:
        height: Image height.
        width: Image width.
        total_stride: Reduction of the last stage.
        divisible: Require multiples of the stride, as the bias tables of attention and the patch stem do.
    """
    if height < total_stride or width < total_stride:
        raise ValueError(
            f'img_size must be at least the total stride of the model ({total_stride}), got {height} x {width}.')
    if divisible and (height % total_stride or width % total_stride):
        down = (height // total_stride * total_stride, width // total_stride * total_stride)
        raise ValueError(
            f'img_size must be a multiple of the total stride of the model ({total_stride}) in both directions, '
            f'got {height} x {width}; the next smaller size that works is {down[0]} x {down[1]}.')


@torch.fx.wrap  # one node in the graph of every torch.fx tracer, not only timm's
def check_input(x: torch.Tensor, in_chans: int, height: int, width: int, stride: int, rule: str) -> torch.Tensor:
    """Return `x` if the model accepts it, else raise ValueError (torch.jit.Error once scripted).

    Args:
        x: Images, expected to be (B, in_chans, H, W), floating point.
        in_chans: Image channels of the model.
        height: Image height of the model, in pixels.
        width: Image width of the model, in pixels.
        stride: Total stride of the model.
        rule: Accepted sizes: 'fixed' height x width only, 'multiple' multiples of `stride`, 'free' `stride` and larger.
    """
    if x.dim() != 4:
        raise ValueError(f'images must be a batch (B, C, H, W), got {x.dim()} dimensions.')
    if not x.is_floating_point():
        raise ValueError('images must be floating point (scaled to 0..1 and normalised), got an integer or bool dtype.')
    C, H, W = x.shape[1], x.shape[2], x.shape[3]
    if C != in_chans:
        raise ValueError(f'images must have in_chans={in_chans} channels, got {C}; create the model with in_chans={C}.')
    if H < stride or W < stride:
        raise ValueError(f'images must be at least {stride} x {stride}, the total stride of the model, got {H} x {W}.')
    if rule != 'free' and (H % stride != 0 or W % stride != 0):
        raise ValueError(
            f'image sizes must be multiples of {stride}, the total stride of the model, got {H} x {W}; '
            f'the next smaller size that works is {H // stride * stride} x {W // stride * stride}.')
    if rule == 'fixed' and (H != height or W != width):
        raise ValueError(
            f'images must be {height} x {width}, the img_size of the model, got {H} x {W}; call '
            f'set_input_size(({H}, {W})) or create the model with img_size=({H}, {W}) or dynamic_img_size=True.')
    return x


class InputCheck(nn.Module):
    """Validates the input batch and converts it to channels_last."""

    def __init__(self, in_chans: int, img_size: tuple[int, int], stride: int, rule: str):
        super().__init__()
        self.in_chans = in_chans
        self.img_size = img_size
        self.stride = stride
        self.rule = rule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = check_input(x, self.in_chans, self.img_size[0], self.img_size[1], self.stride, self.rule)
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # no copy if already channels_last

    def extra_repr(self) -> str:
        return f'in_chans={self.in_chans}, img_size={self.img_size}, stride={self.stride}, rule={self.rule!r}'


class ConvStem(nn.Module):
    """S0: 3x3 convolution (stride 2 in the paper) -> norm -> GELU -> 3x3 convolution, no norm or GELU after it.

    (B, in_chans, H, W) -> (B, width, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
            self,
            check: InputCheck,
            width: int,
            stride: int = 2,
            bias: bool = True,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            act_layer: Callable[[], nn.Module] = GELU,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.folded = False
        self.check = check
        self.conv1 = nn.Conv2d(check.in_chans, width, 3, stride, 1, bias=bias, **dd)
        self.norm1 = norm_layer(width, **dd)
        self.act1 = act_layer()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=bias, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.act1(self.norm1(self.conv1(self.check(x)))))

    def fuse(self) -> nn.Module:
        """Fold the BatchNorm, in place."""
        if self.folded:
            return self
        self.norm1 = fold_norm_into_previous(self.conv1, self.norm1)
        self.folded = True
        return self


class PatchStem(nn.Module):
    """Stem of ViT_REL: one convolution whose kernel size and stride are `patch_size`.

    (B, in_chans, H, W) -> (B, width, H / patch_size, W / patch_size).
    """

    def __init__(
            self, check: InputCheck, width: int, patch_size: int = 16, bias: bool = True, device=None, dtype=None):
        super().__init__()
        self.check = check
        self.conv1 = nn.Conv2d(check.in_chans, width, patch_size, patch_size, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv1(self.check(x))
