"""Pictures whose colour tells the class, and scripts as commands, for the tests of all scripts."""
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
CLASSES = ('blue', 'green', 'red')
# torch 2.14's inductor writes C++ that names its vector types even where this setting leaves them out
needs_inductor = pytest.mark.skipif(
    os.environ.get('ATEN_CPU_CAPABILITY') == 'default',
    reason='torch.compile cannot build its sums with ATEN_CPU_CAPABILITY=default')


def write_pictures(folder: Path, classes=CLASSES, train: int = 12, val: int = 5) -> Path:
    """Write noisy pictures whose colour tells the class."""
    rng = np.random.default_rng(0)
    for split, count in (('train', train), ('val', val)):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 150, (36, 40, 3), dtype=np.uint8)
                pixels[..., 2 - number % 3] += 100
                Image.fromarray(pixels).save(folder / split / name / f'{index}.png')
    return folder


def run_processes(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as two processes."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    return subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master-addr', '127.0.0.1',
         '--master-port', str(port), str(ROOT / 'scripts' / script), *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)})


def run_main(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """Run a script from its command line in this process, and return its exit code."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'scripts' / script), run_name='__main__')
    return end.value.code
