"""Console output: notes on stderr, and file names that may not be UTF-8."""
import os
import sys
from functools import cache

from coatnet_train.runtime.cli import ConfigError

__all__ = ['check_utf8', 'note', 'printable']


@cache  # each message once
def note(message: str) -> None:
    """Print a message once to stderr, in the main process only."""
    if os.environ.get('RANK', '0') == '0':
        print(f'note: {message}', file=sys.stderr)


def printable(name: str) -> str:
    r"""Reversible form of a file name that JSON, CSV, Parquet and the console can hold.

    A UTF-8 name stays as it is. In a name that is not UTF-8, or that contains the two characters \x, every backslash is
    doubled and each byte that is not UTF-8 becomes \xNN: b'caf\xe9' is written caf\xe9.
    """
    raw = os.fsencode(name)
    try:
        raw.decode()
    except UnicodeDecodeError:
        pass
    else:
        if '\\x' not in name:
            return name
    return raw.replace(b'\\', b'\\\\').decode(errors='backslashreplace')


def check_utf8(path: str | os.PathLike, name: str) -> None:
    """Raise ConfigError unless a path is UTF-8, which safetensors requires; `name` is its flag, for the message."""
    if (shown := printable(os.fspath(path))).encode() != os.fsencode(path):
        raise ConfigError(f'{name} {shown} must be a path in UTF-8, as safetensors opens no other; rename it.')
