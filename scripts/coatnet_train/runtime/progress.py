"""The progress bar of all scripts: on a terminal alone, so that log files hold whole lines and nothing else."""
from collections.abc import Iterable

from tqdm import tqdm

__all__ = ['progress_bar']


def progress_bar(iterable: Iterable | None = None, quiet: bool = False, **options: object) -> tqdm:
    """A bar on stderr if that is a terminal; its `write` prints a line in any case.

    Args:
        iterable: What is counted, or None for `update`.
        quiet: No bar on a terminal either, for processes that are not the first.
        options: Keyword arguments of tqdm.
    """
    options = dict(dynamic_ncols=True, mininterval=0.5, unit_scale=options.get('unit') == 'img') | options
    return tqdm(iterable, disable=True if quiet else None, **options)
