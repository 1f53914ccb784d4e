"""Progress bar of all scripts: shown on a terminal only, so that log files hold plain lines."""
from collections.abc import Iterable

from tqdm import tqdm

__all__ = ['progress_bar']


def progress_bar(iterable: Iterable | None = None, quiet: bool = False, **options: object) -> tqdm:
    """A bar on stderr if that is a terminal; its `write` prints a line in any case.

    Args:
        iterable: Iterable to count, or None to count by `update`.
        quiet: Show no bar on a terminal either, for processes other than the main one.
        options: Keyword arguments of tqdm.
    """
    options = dict(dynamic_ncols=True, mininterval=0.5, unit_scale=options.get('unit') == 'img') | options
    return tqdm(iterable, disable=True if quiet else None, **options)
