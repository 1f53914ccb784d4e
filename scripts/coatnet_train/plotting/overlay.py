"""The overlay of predict.py: panels of the image, its explanation maps, and the top-5 predictions."""
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle

from coatnet_train.plotting.style import BLUE, COLORMAP, CYAN, DARK, SLATE, use_fonts

__all__ = ['create_panels', 'draw_heatmap', 'draw_image', 'draw_kernel', 'draw_kernels', 'draw_top5']

PALE = '#cbd5e1'  # bars of the classes after the first


def create_panels(title: str, count: int, aspect: float = 1) -> tuple[Figure, list[Axes]]:
    """Figure with a row of `count` panels for images of this aspect (height / width), and one for the top-5 bars."""
    use_fonts([title])
    figure = Figure(figsize=(3.9 * count + 2.6, 3.1 * aspect + 1.1), layout='compressed')
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    title = textwrap.fill(title, int(11 * figure.get_figwidth()))  # wrap=True would take dollar signs for formulas
    figure.suptitle(title, fontsize=11, x=0.01, ha='left', color=DARK, parse_math=False)
    row = list(figure.subplots(1, count + 1, width_ratios=[1] * count + [0.8]))
    row[-1].set_box_aspect(aspect / 0.8)
    return figure, row


def set_title(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(f'{title}\n', fontsize=10.5, loc='left', parse_math=False)
    axes.text(0, 1.015, subtitle, fontsize=8, color=SLATE, transform=axes.transAxes, va='bottom',
              parse_math=False).set_in_layout(False)  # a long subtitle would push the panels apart


def draw_image(axes: Axes, pixels: np.ndarray, title: str, subtitle: str, strength: float = 1) -> None:
    """Draw pixels (H, W, 3) or (H, W) in 0..1; a strength below 1 makes them grey and pale, as a background."""
    height, width = pixels.shape[:2]
    if strength < 1:
        grey = pixels @ (0.299, 0.587, 0.114) if pixels.ndim == 3 else pixels
        pixels = 1 - strength * (1 - grey)
    axes.imshow(pixels, cmap='gray', vmin=0, vmax=1, extent=(0, width, height, 0))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    set_title(axes, title, subtitle)


def draw_colorbar(axes: Axes, image: AxesImage, unit: str) -> None:
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0.05, 0.03, 0.9)))
    bar.outline.set_visible(False)
    bar.set_label(unit, fontsize=8.5, color=DARK)
    bar.ax.tick_params(labelsize=8, length=2, color=DARK, labelcolor=DARK)


def draw_heatmap(axes: Axes, pixels: np.ndarray, heatmap: np.ndarray, title: str, subtitle: str, unit: str,
                 smooth: bool = False, vmin: float | None = None, vmax: float | None = None,
                 frame: tuple[int, int] | None = None) -> None:
    """Draw a map (h, w) over an image, each value on its cell of the image or interpolated.

    Args:
        axes: Axes to draw on.
        pixels: Image (H, W, 3) or (H, W) in 0..1.
        heatmap: Values (h, w); NaN is transparent.
        title: First line above.
        subtitle: Second line above.
        unit: Unit of the values, for the colour bar.
        smooth: Interpolate between the values.
        vmin: Value of the darkest colour (the minimum of the map if not given).
        vmax: Value of the brightest colour (the maximum of the map if not given).
        frame: (row, column) of a cell to frame.
    """
    height, width = pixels.shape[:2]
    draw_image(axes, pixels, title, subtitle, 0.9)
    image = axes.imshow(heatmap, cmap=COLORMAP, alpha=0.6, vmin=vmin, vmax=vmax, extent=(0, width, height, 0),
                        interpolation='bilinear' if smooth else 'nearest')
    draw_colorbar(axes, image, unit)
    if frame:
        height, width = height / heatmap.shape[0], width / heatmap.shape[1]
        axes.add_patch(Rectangle((frame[1] * width, frame[0] * height), width, height, fill=False, color=CYAN,
                                 linewidth=2))


def draw_kernels(axes: Axes, pixels: np.ndarray, kernels: np.ndarray, title: str, subtitle: str,
                 max_count: int = 5) -> None:
    """Draw kernels (K, K, h, w) as small images with a common colour scale, at up to `max_count`^2 positions."""
    height, width = pixels.shape[:2]
    draw_image(axes, pixels, title, subtitle, 0.6)
    rows, columns = (spread(size, max_count) for size in kernels.shape[2:])
    side = 0.8 * min(height / len(rows), width / len(columns))
    shown = kernels[:, :, rows][..., columns]
    scale = Normalize(min(0, shown.min()), shown.max())
    for i, j in np.ndindex(shown.shape[2:]):
        left, top = (j + 0.5) * width / len(columns) - side / 2, (i + 0.5) * height / len(rows) - side / 2
        image = axes.imshow(shown[:, :, i, j], cmap=COLORMAP, norm=scale, extent=(left, left + side, top + side, top))
        axes.add_patch(Rectangle((left, top), side, side, fill=False, color='white', linewidth=1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    draw_colorbar(axes, image, 'weight of a tap')


def spread(size: int, max_count: int) -> list[int]:
    """Up to `max_count` of `size` positions, evenly spread."""
    count = min(size, max_count)
    return [int((i + 0.5) * size / count) for i in range(count)]


def draw_kernel(axes: Axes, pixels: np.ndarray, kernel: np.ndarray, position: tuple[int, int],
                feat_size: tuple[int, int], title: str, subtitle: str) -> None:
    """Draw the kernel (K, K) of one position (row, column) of a map (h, w), each tap on the image cell that it weights.

    Taps on the padding are not shown, but count for the range of the colour scale.
    """
    heatmap = np.full(feat_size, np.nan)
    for u, v in np.ndindex(kernel.shape):
        row, column = position[0] + u - kernel.shape[0] // 2, position[1] + v - kernel.shape[1] // 2
        if 0 <= row < feat_size[0] and 0 <= column < feat_size[1]:
            heatmap[row, column] = kernel[u, v]
    draw_heatmap(axes, pixels, heatmap, title, subtitle, 'weight of a tap', vmin=min(0, kernel.min()),
                 vmax=kernel.max(), frame=position)


def draw_top5(axes: Axes, labels: list[str], probabilities: list[float], title: str, subtitle: str) -> None:
    """Draw bars of the probabilities in 0..1, highest first, with the label above each."""
    places = np.arange(len(probabilities))
    axes.barh(places, [1] * len(probabilities), 0.34, color='#f1f5f9')
    axes.barh(places, probabilities, 0.34, color=[BLUE] + [PALE] * (len(probabilities) - 1))
    for place, label, probability in zip(places, labels, probabilities, strict=True):
        axes.text(0, place - 0.24, textwrap.shorten(label, 30, placeholder=' …'), fontsize=9, va='bottom',
                  parse_math=False)
        axes.text(1, place - 0.24, f'{100 * probability:.1f} %', fontsize=9, va='bottom', ha='right', color=DARK)
    axes.set(xlim=(0, 1), ylim=(4.4, -0.8), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    set_title(axes, title, subtitle)
