"""Provenance of a measurement, for every file under results/: hardware, versions, commit, command and date."""
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

__all__ = ['hardware', 'provenance']


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's with the instruction set that torch uses."""
    if device != 'cpu':
        return torch.cuda.get_device_name()
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        name = next(line.split(': ', 1)[1] for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def commit() -> str:
    """Short hash of the checkout, with -dirty if code in it has changed."""
    root = Path(__file__).parents[3]

    def git(*arguments: str) -> str:
        return subprocess.run(['git', *arguments], capture_output=True, text=True, cwd=root).stdout.strip()

    if bundled := os.environ.get('COATNET_ZOO_COMMIT'):  # a copy of the code without git history
        return bundled
    if (written := root / 'COMMIT').is_file():  # by bundle.py; git might describe a checkout around the copy
        return written.read_text(encoding='utf-8').strip()
    if shutil.which('git') is None:
        return 'not in a checkout'
    changed = git('status', '--porcelain', '--untracked-files=no', '--', 'coatnet_zoo', 'scripts')
    return f'{git("rev-parse", "--short=12", "HEAD")}{"-dirty" if changed else ""}' or 'not in a checkout'


def provenance(device: str) -> dict[str, str]:
    """Hardware, versions, commit, command line and date of this process."""
    return dict(
        hardware=hardware(device), python=platform.python_version(), torch=torch.__version__, timm=timm.__version__,
        commit=commit(), command=' '.join(['python', *sys.argv]), date=time.strftime('%Y-%m-%d', time.gmtime()))
