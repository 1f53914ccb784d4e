"""Run scripts as commands: in this process, in a new one, and in several that work together."""
import os
import runpy
import socket
import subprocess
import sys

import pytest

from support.constants import ROOT

__all__ = ['environment', 'free_port', 'needs_inductor', 'run_main', 'run_processes', 'torchrun']

# inductor of torch 2.14 generates C++ with vector types even where this setting excludes them
needs_inductor = pytest.mark.skipif(
    os.environ.get('ATEN_CPU_CAPABILITY') == 'default',
    reason='torch.compile cannot build its sums with ATEN_CPU_CAPABILITY=default')


def environment(**changes: str) -> dict[str, str]:
    """Environment of a process that imports this checkout and computes in one thread."""
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **changes}


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def torchrun(processes: int) -> list[str]:
    """Command line prefix that starts a script in several processes."""
    return [sys.executable, '-m', 'torch.distributed.run', f'--nproc-per-node={processes}', '--master-addr=127.0.0.1',
            f'--master-port={free_port()}']


def run_processes(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script as two processes."""
    return subprocess.run(
        [*torchrun(2), str(ROOT / 'scripts' / script), *map(str, arguments)], capture_output=True, text=True, cwd=ROOT,
        timeout=300, env=environment())


def run_main(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """Run a script from its command line in this process, and return its exit code."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'scripts' / script), run_name='__main__')
    return end.value.code
