"""Pack code, tests, wheels and data files into one folder, for a machine without network.

    python scripts/bundle.py
    python scripts/bundle.py --data tiny-imagenet-train-0.zip tiny-imagenet-train-1.zip --weights
    sh output/bundle/run.sh                                  # on that machine: gpu_report.py --budget 8
    sh output/bundle/run.sh gpu_report.py --budget 25 --output out
    sh output/bundle/run.sh finetune.py --recipe tin200 --data-dir ...

The other machine needs python3 of the version --python with these packages: torch with triton, torchvision, numpy,
Pillow, safetensors, huggingface_hub and filelock; pytest for gpu_report.py; accelerate, tqdm and matplotlib for
finetune.py, teach.py and gpu_train.py. List missing ones in --wheels, with their own dependencies. The wheels have the
versions installed on this machine. run.sh installs them into the folder and changes nothing else. Results record the
commit from the folder's file COMMIT.
"""
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, check_output, check_range, one_line, parse_flags, run_cli
from coatnet_train.runtime.files import replace_dir

ROOT = Path(__file__).resolve().parents[1]
PACKED = ('coatnet_zoo', 'scripts', 'tests', 'hub', 'pyproject.toml', 'Makefile', 'README.md', 'LICENSE')
LEFT_OUT = ('__pycache__', '*.pyc', '.git*', '.*_cache')
WEIGHTS = ('*.safetensors', '*.h5', '*.npz')
MARKS = ('COMMIT', 'run.sh', 'scripts/bundle.py')  # files that identify an earlier bundle
RUN = '''#!/bin/sh
# sh run.sh [SCRIPT [ARGUMENTS]]: install the wheels into .site beside this file, once, and run a script of scripts/.
set -e
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -d "$here/.site" ] && ls "$here"/wheels/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$here/.new" "$here"/wheels/*.whl
    mv "$here/.new" "$here/.site"
fi
export PYTHONPATH="$here:$here/.site${PYTHONPATH:+:$PYTHONPATH}"
[ $# -gt 0 ] || set -- gpu_report.py --budget 8
script=$1; shift
exec python3 "$here/scripts/$script" "$@"
'''


@dataclass(frozen=True)
class BundleSettings:
    output: str = 'output/bundle'  # Folder to make; an earlier bundle there is replaced.
    python: str = '3.12'  # Version of Python on the other machine.
    wheels: tuple[str, ...] = ('tyro', 'docstring_parser', 'typeguard', 'timm')  # Packages that are missing there.
    wheels_from: str = ''  # Folder of wheels to take them from, in place of the package index.
    weights: bool = False  # Pack the released weights too.
    data: tuple[str, ...] = ()  # Files to pack into data/, such as shards of images or stored outputs of a teacher.
    max_mib: float = 64.0  # Maximum size of the folder.


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob('*')) if file.is_file())


def check_size(parts: dict[str, int], max_mib: float) -> None:
    """Raise ConfigError, naming the largest parts, if the sizes in bytes add up to more than `max_mib`."""
    total = sum(parts.values()) / 2**20
    if total > max_mib:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
        raise ConfigError(
            f'the bundle must be at most {max_mib:g} MiB (--max-mib), but takes {total:.1f}: '
            f'{", ".join(f"{name} {size / 2**20:.1f}" for name, size in largest)}; leave out some --data or --weights, '
            f'or pack two bundles.')


def download_wheels(settings: BundleSettings, folder: Path) -> None:
    """Download wheels of the installed versions for the Python of --python; raises ConfigError if pip fails."""
    def pinned(name: str) -> str:
        try:
            return f'{name}=={version(name)}'
        except PackageNotFoundError:
            return name

    folder.mkdir()
    if not settings.wheels:
        return
    source = ['--no-index', '--find-links', settings.wheels_from] if settings.wheels_from else []
    done = subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '-q', '--disable-pip-version-check', '--no-deps',
         '--only-binary=:all:', '--python-version', settings.python, '--dest', str(folder), *source,
         *map(pinned, settings.wheels)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f'--wheels {" ".join(settings.wheels)} cannot be had for Python {settings.python}: '
                          f'{one_line(RuntimeError(done.stderr[-500:]))}; see --wheels-from.')


def check_bundle(settings: BundleSettings, output: Path) -> None:
    """Raise ConfigError for settings that cannot work, or an --output whose replacement would delete other files."""
    check_range(settings, 'max_mib', 0.01, 1e6)
    if not re.fullmatch(r'3\.\d{1,2}', settings.python):
        raise ConfigError(f'--python must be a version such as 3.12, got {settings.python!r}.')
    if output.exists() and not output.is_dir():
        raise ConfigError(f'--output {output} must be a folder, but is a file; name another.')
    if ROOT.is_relative_to(output) or any(output.is_relative_to(ROOT / name) for name in PACKED):
        raise ConfigError(f'--output {output} must be outside of what is packed; name another folder.')
    if output.exists() and any(output.iterdir()):
        made = {*PACKED, 'COMMIT', 'run.sh', 'wheels', 'data'}
        others = sorted(path.name for path in output.iterdir() if path.name not in made and path.name[0] != '.')
        if others or not all((output / name).is_file() for name in MARKS):
            raise ConfigError(f'--output {output} must be new, empty, or an earlier bundle, but holds other files'
                              f'{": " * bool(others)}{", ".join(others[:4])}; name another folder.')
    files = [Path(file) for file in settings.data]
    for file in files:
        if not file.is_file():
            raise ConfigError(f'--data {file} must be a file; pack a folder into an archive first.')
    if len({file.name for file in files}) < len(files):
        raise ConfigError(f'--data must have names that differ, got {" ".join(settings.data)}.')
    for option, name in [*(('data', name) for name in settings.data), ('wheels-from', settings.wheels_from)]:
        path = Path(name)
        if name and any(place.is_relative_to(output) for place in (path.resolve(), path.absolute())):
            raise ConfigError(f'--{option} {path} must be outside of --output {output}, which is replaced; move it.')
    check_size({file.name: file.stat().st_size for file in files}, settings.max_mib)  # before anything is copied


def fill(folder: Path, settings: BundleSettings) -> dict[str, int]:
    """Write the bundle into a new folder; returns the size of each part in bytes."""
    from coatnet_train.runtime.provenance import commit  # here: torch and timm take seconds to import
    folder.mkdir(parents=True)
    (folder / 'COMMIT').write_text(f'{commit()}\n', encoding='utf-8')
    ignored = shutil.ignore_patterns(*LEFT_OUT, *(() if settings.weights else WEIGHTS))
    for name in PACKED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder)
    (folder / 'run.sh').write_text(RUN, encoding='utf-8')
    download_wheels(settings, folder / 'wheels')
    (folder / 'data').mkdir()
    for file in settings.data:
        shutil.copy(file, folder / 'data')
    parts = {path.name: size_of(path) for path in sorted(folder.iterdir()) if path.name != 'data'}
    parts |= {f'data/{path.name}': path.stat().st_size for path in sorted((folder / 'data').iterdir())}
    check_size(parts, settings.max_mib)
    return parts


def main(settings: BundleSettings) -> dict[str, int]:
    """Make the folder, replacing an earlier bundle; returns the size of each part in bytes."""
    check_output(Path(settings.output))
    check_bundle(settings, output := Path(settings.output).resolve())
    temporary = output.with_name(f'.{output.name}.tmp')
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed call
        parts = fill(temporary, settings)
        replace_dir(temporary, output)
    except OSError as error:
        raise ConfigError(f'--output {output} cannot be made: {one_line(error)}; name another.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for name, size in parts.items():
        print(f'{size / 2**20:8.2f} MiB  {name}')
    total = f'{sum(parts.values()) / 2**20:8.2f} MiB  {settings.output}'
    print(f'{total}; there: sh run.sh, which is gpu_report.py --budget 8')
    return parts


if __name__ == '__main__':
    run_cli('bundle.py', lambda: main(parse_flags(BundleSettings, __doc__)))
