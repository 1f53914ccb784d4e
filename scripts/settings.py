"""What the command lines of the scripts share: refusals in one sentence with the way out, and how a script ends."""
import ast
import difflib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = [
    'SettingsError', 'check_range', 'did_you_mean', 'earlier_results', 'end_with_sentence', 'flag', 'one_line',
    'parse_argument']


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


def earlier_results(results_file: str, *keys: str) -> dict | None:
    """What --results-file holds from an earlier call, None if nothing yet; refused if it cannot be read or written.

    Args:
        results_file: Name of a JSON file.
        keys: What the script wrote into it.
    """
    path = Path(results_file)
    if path.suffix != '.json':
        raise SettingsError(f'--results-file must end in .json, got {results_file!r}.')
    if not path.parent.is_dir():
        raise SettingsError(f'--results-file {path}: its folder does not exist; make it first.')
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else None
    except (OSError, ValueError) as error:
        raise SettingsError(f'--results-file {path} cannot be read or written: {one_line(error)}; give '
                            f'another.') from error
    if found is not None and not (isinstance(found, dict) and found.keys() >= set(keys)):
        raise SettingsError(f'--results-file {path} is no file that this script wrote, which has {", ".join(keys)}; '
                            f'give another.')
    return found


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
