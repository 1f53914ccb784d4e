"""What the command lines of the scripts share: refusals in one sentence with the way out, and how a script ends."""
import ast
import difflib
import sys
from collections.abc import Callable

__all__ = ['SettingsError', 'check_range', 'did_you_mean', 'end_with_sentence', 'flag', 'one_line', 'parse_argument']


class SettingsError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence with the way out."""


def one_line(error: Exception) -> str:
    """The message of an exception, or its type, without line breaks."""
    return ' '.join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: list[str]) -> str:
    """'; did you mean A or B?' if something known is close to `name`."""
    close = difflib.get_close_matches(name, known, n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def flag(name: str) -> str:
    """The option of a field: batch_size is --batch-size."""
    return f'--{name.replace("_", "-")}'


def check_range(settings: object, name: str, least: float, most: float) -> None:
    """Refuse a field outside [least, most] (NaN is); None passes."""
    value = getattr(settings, name)
    if value is not None and not least <= value <= most:
        raise SettingsError(f'{flag(name)} must be from {least:g} to {most:g}, got {value}.')


def parse_argument(item: str) -> tuple[str, object]:
    """Read key=value as timm's train.py does: a Python literal if it is one, else a string."""
    key, value = item.split('=', 1)
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def end_with_sentence(script: str, main: Callable[[], object]) -> None:
    """Run a script; a refusal goes to stderr as 'SCRIPT: sentence' and ends it with exit code 2."""
    try:
        main()
    except SettingsError as error:
        print(f'{script}: {error}', file=sys.stderr)
        sys.exit(2)
