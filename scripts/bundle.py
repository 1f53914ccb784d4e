"""Pack what a machine without network needs into one folder: code, tests, wheels, and data files.

    python scripts/bundle.py
    python scripts/bundle.py --data tiny-imagenet-train-0.zip tiny-imagenet-train-1.zip --weights
    sh output/bundle/run.sh                                  # there: gpu_report.py --budget 8
    sh output/bundle/run.sh gpu_report.py --budget 25 --output out
    sh output/bundle/run.sh finetune.py --recipe tin200 --data-dir ...

The folder runs on any machine with the --python named, torch, triton and what --wheels does not name: run.sh installs
the wheels into the folder itself, and nothing else changes there. Results name the commit in its file COMMIT. Wheels
are of the versions that are installed here.
"""
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, check_output, one_line, parse_flags, run_cli

ROOT = Path(__file__).parents[1]
PACKED = ('coatnet_zoo', 'scripts', 'tests', 'hub', 'pyproject.toml', 'Makefile', 'README.md', 'LICENSE')
LEFT_OUT = ('__pycache__', '*.pyc', '.git*', '.*_cache')
WEIGHTS = ('*.safetensors', '*.h5', '*.npz')
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
    max_mib: float = 64.0  # Most that the folder may take.


def size_of(path: Path) -> int:
    """Bytes of a file or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob('*')) if file.is_file())


def check_size(parts: dict[str, int], max_mib: float) -> None:
    """Raise ConfigError where the parts, in bytes, are larger together than allowed; it names the largest ones."""
    total = sum(parts.values()) / 2**20
    if total > max_mib:
        largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
        raise ConfigError(
            f'the bundle must be at most {max_mib:g} MiB (--max-mib), but takes {total:.1f}: '
            f'{", ".join(f"{name} {size / 2**20:.1f}" for name, size in largest)}; leave out some --data or --weights, '
            f'or pack two bundles.')


def download_wheels(settings: BundleSettings, folder: Path) -> None:
    """Wheels of the versions that are installed here, for the other machine's Python."""
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


def main(settings: BundleSettings) -> dict[str, int]:
    """Make the folder; returns the bytes of each of its parts."""
    check_output(output := Path(settings.output))
    if output.exists() and any(output.iterdir()) and not (output / 'COMMIT').is_file():
        raise ConfigError(f'--output {output} must be new, empty, or an earlier bundle, but holds other files; name '
                          f'another folder.')
    files = [Path(file) for file in settings.data]
    for file in files:
        if not file.is_file():
            raise ConfigError(f'--data {file} must be a file; pack a folder into an archive first.')
    if len({file.name for file in files}) < len(files):
        raise ConfigError(f'--data must have names that differ, got {" ".join(settings.data)}.')
    check_size({file.name: file.stat().st_size for file in files}, settings.max_mib)  # before anything is copied
    from coatnet_train.runtime.provenance import commit  # here: torch and timm take seconds to import
    shutil.rmtree(output, ignore_errors=True)
    try:
        output.mkdir(parents=True)
        (output / 'COMMIT').write_text(f'{commit()}\n', encoding='utf-8')
        ignored = shutil.ignore_patterns(*LEFT_OUT, *(() if settings.weights else WEIGHTS))
        for name in PACKED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, output / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, output)
        (output / 'run.sh').write_text(RUN, encoding='utf-8')
        download_wheels(settings, output / 'wheels')
        (output / 'data').mkdir()
        for file in files:
            shutil.copy(file, output / 'data')
        parts = {path.name: size_of(path) for path in sorted(output.iterdir())}
        parts |= {f'data/{file.name}': file.stat().st_size for file in files}
        del parts['data']
        check_size(parts, settings.max_mib)
    except ConfigError:
        shutil.rmtree(output)
        raise
    for name, size in parts.items():
        print(f'{size / 2**20:8.2f} MiB  {name}')
    print(f'{sum(parts.values()) / 2**20:8.2f} MiB  {output}; there: sh run.sh, which is gpu_report.py --budget 8')
    return parts


if __name__ == '__main__':
    run_cli('bundle.py', lambda: main(parse_flags(BundleSettings, __doc__)))
