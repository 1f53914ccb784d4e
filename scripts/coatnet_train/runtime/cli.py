"""Command lines: flags in groups, error messages that say what to do, and exit codes.

Imports neither torch nor timm, which take seconds: --help and wrong values are handled before they are loaded.
"""
import ast
import dataclasses
import difflib
import inspect
import io
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_type_hints

from coatnet_train.runtime.packages import explain_missing_module

try:
    import tyro
except ModuleNotFoundError as missing:  # commands take tyro from here, so that it is missing in one place
    sys.exit(explain_missing_module(missing))

__all__ = [
    'PREEMPTED',
    'ConfigError',
    'Preempted',
    'changed_flags',
    'check_output',
    'check_range',
    'did_you_mean',
    'earlier_results',
    'exits_at_signals',
    'flag',
    'one_line',
    'parse_argument',
    'parse_flags',
    'run_cli',
    'tyro',
]

CommandSettings = TypeVar('CommandSettings')
PREEMPTED = 75  # exit code of finetune.py: stopped by SIGTERM, everything saved


class Preempted(Exception):
    """A run was stopped by SIGTERM and saved."""


class ConfigError(ValueError):
    """A request that cannot be carried out; the message names the setting, the rule, the value and the way out."""


def one_line(error: Exception) -> str:
    """The message of an exception, or its type, without line breaks."""
    return ' '.join(str(error).split()) or type(error).__name__


def did_you_mean(name: str, known: list[str]) -> str:
    """'; did you mean A or B?' if a known name is close to `name`, else ''."""
    close = difflib.get_close_matches(name, known, n=3)
    return f'; did you mean {" or ".join(close)}?' if close else ''


def flag(name: str) -> str:
    """The option of a field: batch_size is --batch-size."""
    return f'--{name.replace("_", "-")}'


def check_range(settings: object, name: str, minimum: float, maximum: float) -> None:
    """Raise ConfigError for a field outside [minimum, maximum], or NaN; None passes."""
    value = getattr(settings, name)
    if value is not None and not minimum <= value <= maximum:
        raise ConfigError(f'{flag(name)} must be from {minimum:g} to {maximum:g}, got {value}.')


def check_output(path: Path) -> None:
    """Raise ConfigError if the path of --output cannot be accessed: name too long, or no permission."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ConfigError(f'--output cannot be used: {one_line(error)}; choose another.') from error


def earlier_results(results_file: str, *keys: str) -> dict | None:
    """Content of --results-file from an earlier call, or None; raises ConfigError if it cannot be read or written.

    Args:
        results_file: Name of a JSON file.
        keys: Keys that a file written by this script must have.
    """
    path = Path(results_file)
    if path.suffix != '.json':
        raise ConfigError(f'--results-file must end in .json, got {results_file!r}.')
    if not path.parent.is_dir():
        raise ConfigError(f'--results-file {path}: its folder does not exist; make it first.')
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
        found = json.loads(path.read_text(encoding='utf-8')) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ConfigError(f'--results-file {path} cannot be read or written: {one_line(error)}; give '
                          f'another.') from error
    if found is not None and not (isinstance(found, dict) and found.keys() >= set(keys)):
        raise ConfigError(f'--results-file {path} is no file that this script wrote, which has {", ".join(keys)}; '
                          f'give another.')
    return found


def changed_flags(settings: Any, earlier: dict, names: Iterable[str]) -> list[str]:
    """A clause for each of these settings whose value in an earlier results file is another."""
    now = json.loads(json.dumps(dataclasses.asdict(settings)))  # tuples are lists there
    return [f'{flag(name)} was {earlier[name]!r} and is {now[name]!r}' for name in names if earlier[name] != now[name]]


def parse_argument(item: str) -> tuple[str, object]:
    """Read key=value as timm's train.py does: a Python literal if it is one, else a string."""
    key, value = item.split('=', 1)
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parse_flags(
        settings: type[CommandSettings], description: str | None, arguments: list[str] | None = None,
        defaults: dict[str, object] | None = None,
) -> CommandSettings:
    """Read a command line into a dataclass of settings; --help has a group of flags for each of its base classes.

    Args:
        settings: Dataclass whose fields have their help in a comment on the same line, or in tyro.conf.arg. A base
            class `DataSettings`, or `TrainingDataSettings`, makes the group "data options"; a field belongs to the
            class that declares it first. `Settings` itself makes no group.
        description: Text above the flags.
        arguments: The command line (sys.argv if not given).
        defaults: Values in place of the defaults of the fields.
    """
    fields = {field.name: field for field in dataclasses.fields(settings)}
    hints = get_type_hints(settings, include_extras=True)
    texts, groups = {}, {}
    for base in reversed(settings.__mro__):
        if not (annotations := inspect.get_annotations(base)):
            continue
        comments = re.finditer(r'^    (\w+): .*?  # (.+)$', inspect.getsource(base), re.MULTILINE)
        texts |= {found[1]: found[2] for found in comments}
        title = re.findall('[A-Z][a-z]+', base.__name__.removesuffix('Settings'))[-1:] or ['']
        new = [name for name in annotations if not any(name in names for names in groups.values())]
        groups.setdefault(title[0].lower(), []).extend(new)

    def option(name: str) -> tuple[str, object, dataclasses.Field]:
        default, factory = (defaults or {}).get(name, fields[name].default), fields[name].default_factory
        if default is dataclasses.MISSING and factory is not dataclasses.MISSING:
            default = factory()
        given = {} if default is dataclasses.MISSING else {'default': default}
        return name, Annotated[hints[name], tyro.conf.arg(help=texts.get(name))], dataclasses.field(**given)

    flat, parts = list(map(option, groups.pop('', ()))), {}
    for title, names in groups.items():
        parts[title] = dataclasses.make_dataclass(title, map(option, names), kw_only=True)
        parts[title].__doc__ = ' '  # dataclasses would write the signature there
    given = vars(tyro.cli(
        dataclasses.make_dataclass('Flags', [*flat, *parts.items()], kw_only=True), args=arguments,
        description=description, config=(tyro.conf.OmitArgPrefixes,)))
    values = {name: value for title in parts for name, value in vars(given.pop(title)).items()}
    return settings(**given, **values)


def run_cli(script: str, main: Callable[[], object]) -> None:
    """Run a command; a ConfigError goes to stderr as 'SCRIPT: message', and the exit code is 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # flush log files after each line; escape file names that are not UTF-8, as stderr does
        sys.stdout.reconfigure(line_buffering=True, errors='backslashreplace')
    try:
        main()
    except ConfigError as error:
        print(f'{script}: {error}', file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        sys.exit(explain_missing_module(error))
    except BrokenPipeError:  # the reader of stdout has closed it, as `| head` does; discard the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


@contextmanager
def exits_at_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into SystemExit, so that `finally` blocks can end the processes started here."""
    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
