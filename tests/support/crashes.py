"""Simulated crashes: an exception in place of the end of the process."""
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coatnet_train.runtime import files

__all__ = ['SimulatedCrash', 'crash_at_write']


class SimulatedCrash(BaseException):
    """Takes the place of a killed process; a BaseException, so that the scripts do not catch it."""


@contextmanager
def crash_at_write(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[list]:
    """Raise SimulatedCrash before the number-th file takes its final name; yields the arguments of each call."""
    replace, calls = os.replace, []

    def crash(*args: object) -> None:
        calls.append(args)
        if len(calls) == number:
            raise SimulatedCrash
        replace(*args)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, 'replace', crash)
        yield calls
