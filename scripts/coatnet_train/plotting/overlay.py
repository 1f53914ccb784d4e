"""The picture that predict.py leaves: what the model saw, what it looked at, and its five best guesses."""
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from coatnet_train.plotting.plots import use_fonts

__all__ = ['draw_guesses', 'draw_heat', 'draw_kernel', 'draw_kernels', 'draw_picture', 'panels']

BLUE, GREY, DARK = '#2563eb', '#cbd5e1', '#374151'
COLOURS = 'inferno'


def panels(headline: str, count: int, aspect: float = 1) -> tuple[Figure, list[Axes]]:
    """A row of `count` panels for pictures of this aspect (height / width) and one, of the same height, for bars."""
    use_fonts([headline])
    figure = Figure(figsize=(3.9 * count + 2.6, 3.1 * aspect + 1.1), layout='compressed')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    headline = textwrap.fill(headline, int(11 * figure.get_figwidth()))  # wrap=True would read dollars as formulas
    figure.suptitle(headline, fontsize=11, x=0.01, ha='left', color=DARK, parse_math=False)
    row = list(figure.subplots(1, count + 1, width_ratios=[1] * count + [0.8]))
    row[-1].set_box_aspect(aspect / 0.8)
    return figure, row


def set_title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(f'{title}\n', fontsize=10.5, loc='left', parse_math=False)
    axes.text(0, 1.015, subtitle, fontsize=8, color='#6b7280', transform=axes.transAxes, va='bottom',
              parse_math=False).set_in_layout(False)  # or a long one would push the panels apart


def draw_picture(axes: Axes, picture: np.ndarray, title: str, subtitle: str, strength: float = 1) -> None:
    """The picture (H, W, 3) or (H, W) in 0..1; a strength below 1 makes it grey and pale, to draw over."""
    height, width = picture.shape[:2]
    if strength < 1:
        grey = picture @ (0.299, 0.587, 0.114) if picture.ndim == 3 else picture
        picture = 1 - strength * (1 - grey)
    axes.imshow(picture, cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    set_title(axes, title, subtitle)


def draw_scale(axes: Axes, image: AxesImage, unit: str) -> None:
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0.05, 0.03, 0.9)))
    bar.outline.set_visible(False)
    bar.set_label(unit, fontsize=8.5, color=DARK)
    bar.ax.tick_params(labelsize=8, length=2, color=DARK, labelcolor=DARK)


def draw_heat(axes: Axes, picture: np.ndarray, heat: np.ndarray, title: str, subtitle: str, unit: str,
              smooth: bool = False, least: float | None = None, most: float | None = None,
              frame: tuple[int, int] | None = None) -> None:
    """A map (h, w) over the picture, each value on the part of the picture it stands for, or `smooth` between them.

    Args:
        axes: To draw on.
        picture: (H, W, 3) or (H, W) in 0..1.
        heat: (h, w); NaN is left clear.
        title: What it is.
        subtitle: Of what.
        unit: Of the values.
        smooth: Interpolate.
        least: Value of the darkest colour (the least of the map if not given).
        most: Value of the brightest.
        frame: (row, column) to put a frame around.
    """
    height, width = picture.shape[:2]
    draw_picture(axes, picture, title, subtitle, 0.9)
    image = axes.imshow(heat, cmap=COLOURS, alpha=0.6, vmin=least, vmax=most, extent=(0, width, height, 0),
                        interpolation='bilinear' if smooth else 'nearest')
    draw_scale(axes, image, unit)
    if frame:
        height, width = height / heat.shape[0], width / heat.shape[1]
        axes.add_patch(Rectangle((frame[1] * width, frame[0] * height), width, height, fill=False, color='#22d3ee',
                                 linewidth=2))


def draw_kernels(axes: Axes, picture: np.ndarray, kernels: np.ndarray, title: str, subtitle: str,
                 most: int = 5) -> None:
    """Kernels (K, K, h, w), as small pictures in one scale of colour, at up to `most` x `most` of the positions."""
    height, width = picture.shape[:2]
    draw_picture(axes, picture, title, subtitle, 0.6)
    rows, columns = (spread(size, most) for size in kernels.shape[2:])
    side = 0.8 * min(height / len(rows), width / len(columns))
    shown = kernels[:, :, rows][..., columns]
    scale = Normalize(min(0, shown.min()), shown.max())
    for i, j in np.ndindex(shown.shape[2:]):
        left, top = (j + 0.5) * width / len(columns) - side / 2, (i + 0.5) * height / len(rows) - side / 2
        image = axes.imshow(shown[:, :, i, j], cmap=COLOURS, norm=scale, extent=(left, left + side, top + side, top))
        axes.add_patch(Rectangle((left, top), side, side, fill=False, color='white', linewidth=1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    draw_scale(axes, image, 'weight of a tap')


def spread(size: int, most: int) -> list[int]:
    """Up to `most` of `size` positions, evenly spread."""
    count = min(size, most)
    return [int((i + 0.5) * size / count) for i in range(count)]


def draw_kernel(axes: Axes, picture: np.ndarray, kernel: np.ndarray, position: tuple[int, int],
                feat_size: tuple[int, int], title: str, subtitle: str) -> None:
    """The kernel (K, K) of one position (row, column) of a map (h, w), its taps on the parts of the picture they see.

    Taps on the padding are not shown, but may have the largest weight, which the scale of colour ends with.
    """
    heat = np.full(feat_size, np.nan)
    for u, v in np.ndindex(kernel.shape):
        row, column = position[0] + u - kernel.shape[0] // 2, position[1] + v - kernel.shape[1] // 2
        if 0 <= row < feat_size[0] and 0 <= column < feat_size[1]:
            heat[row, column] = kernel[u, v]
    draw_heat(axes, picture, heat, title, subtitle, 'weight of a tap', least=min(0, kernel.min()), most=kernel.max(),
              frame=position)


def draw_guesses(axes: Axes, labels: list[str], shares: list[float], title: str, subtitle: str) -> None:
    """Bars of probability in 0..1, best first, with the label over each."""
    places = np.arange(len(shares))
    axes.barh(places, [1] * len(shares), 0.34, color='#f1f5f9')
    axes.barh(places, shares, 0.34, color=[BLUE] + [GREY] * (len(shares) - 1))
    for place, label, share in zip(places, labels, shares, strict=True):
        axes.text(0, place - 0.24, textwrap.shorten(label, 30, placeholder=' …'), fontsize=9, va='bottom',
                  parse_math=False)
        axes.text(1, place - 0.24, f'{100 * share:.1f} %', fontsize=9, va='bottom', ha='right', color=DARK)
    axes.set(xlim=(0, 1), ylim=(4.4, -0.8), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    set_title(axes, title, subtitle)
