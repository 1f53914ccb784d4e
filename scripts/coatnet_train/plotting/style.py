"""Style of all figures: palette, axes, and fonts with the characters of class and file names."""
import warnings
from collections.abc import Iterable
from functools import cache

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes

from coatnet_train.runtime.console import note

__all__ = [
    'BLUE', 'COLORMAP', 'CYAN', 'DARK', 'GREEN', 'GREY', 'LIGHT', 'ORANGE', 'PURPLE', 'RED', 'SLATE', 'clean_axes',
    'escape_math', 'use_fonts', 'use_integer_epochs']

BLUE, GREY, ORANGE, GREEN, PURPLE, RED, CYAN = (
    '#2563eb', '#9ca3af', '#d97706', '#059669', '#7c3aed', '#dc2626', '#22d3ee')
LIGHT, SLATE, DARK = '#e5e7eb', '#6b7280', '#374151'  # grid, second line of text, text
COLORMAP = 'inferno'  # for heatmaps and kernels


def clean_axes(axes: Axes, grid: str = 'y') -> None:
    """Remove the frame at the top and right, and draw the grid of one axis behind the data."""
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis=grid, color=LIGHT)
    axes.set_axisbelow(True)


def use_integer_epochs(axes: Axes) -> None:
    """Put ticks of the horizontal axis on whole numbers."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def use_fonts(texts: Iterable[str]) -> None:
    """Add installed fonts to Matplotlib's defaults until these texts can be drawn; prints a note if no font can."""
    family = matplotlib.rcParams['font.family']
    known = [font_manager.findfont(font_manager.FontProperties(family=[name])) for name in family]
    missing = {character for text in texts for character in text if character.isprintable()}
    missing -= {character for path in known for character in characters_of(path)}
    if not missing:
        return
    # the regular face of each family; Matplotlib's "Last Resort" draws a box for every character
    faces = sorted(font_manager.fontManager.ttflist, key=lambda face: face.style == 'normal' and face.weight == 400)
    fonts = {face.name: face.fname for face in faces if 'LastResort' not in face.fname}
    while missing:
        name = max(fonts, key=lambda name: len(missing & characters_of(fonts[name])))
        if not missing & characters_of(fonts[name]):
            note('no installed font has all characters of these class or file names: plots have boxes in their place; '
                 f'install one, such as Noto Sans CJK, and remove {matplotlib.get_cachedir()}, where Matplotlib lists '
                 f'fonts')
            warnings.filterwarnings('ignore', r'Glyph \d+ .* missing from')
            break
        missing -= characters_of(fonts[name])
        matplotlib.rcParams['font.family'] = family = [*family, name]


@cache
def characters_of(path: str) -> frozenset[str]:
    """Characters that a font file has glyphs for; none if it cannot be read."""
    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError):
        return frozenset()  # a damaged or vanished font


def escape_math(name: str) -> str:
    """Escape the dollar signs of a name, which Matplotlib would take for a formula."""
    return name.replace('$', r'\$')
