"""Run scripts as commands: in this process, in a new one, and in several that work together."""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from support.constants import ROOT

__all__ = ['Processes', 'environment', 'fork_server', 'free_port', 'run_main', 'run_processes']

# New processes are forked from one that has imported these once: a script's imports take seven seconds of a core.
fork_server = multiprocessing.get_context('forkserver')
fork_server.set_forkserver_preload(['torch.distributed.fsdp', 'timm', 'accelerate', 'matplotlib.figure', 'coatnet_zoo'])


def environment(**changes: str) -> dict[str, str]:
    """Environment of a process that imports this checkout and computes in one thread."""
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **changes}


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def _run_script(script: str, arguments: list[str], variables: dict[str, str], output: Path) -> None:
    """Do in a forked process what `python SCRIPT` does, with stdout and stderr in files of that name."""
    for descriptor, name in ((1, 'stdout'), (2, 'stderr')):
        os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the default
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name='__main__')


class Processes:
    """A script in processes that work together, as torchrun starts them; one alone is an ordinary process.

    Args:
        script: Path from the root of the checkout.
        arguments: Of the script.
        count: Number of processes.
        changes: Environment variables to set.
    """

    def __init__(self, script: str, *arguments: object, count: int = 2, **changes: str) -> None:
        self.output = tempfile.TemporaryDirectory()
        self.processes = []
        together = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), WORLD_SIZE=str(count))
        for rank in map(str, range(count)):
            variables = environment(**changes, **(dict(together, RANK=rank, LOCAL_RANK=rank) if count > 1 else {}))
            body = str(ROOT / script), [*map(str, arguments)], variables, Path(self.output.name)
            self.processes.append(fork_server.Process(target=_run_script, args=body))
            self.processes[-1].start()

    def send(self, number: int) -> None:
        """Send a signal to each of them."""
        for process in self.processes:
            os.kill(process.pid, number)

    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def finish(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """Wait until all are through or one has failed; returns its exit code and what they printed.

        After that time, and half a minute after the first failure, those that are left are killed.
        """
        end, failed = time.monotonic() + seconds, False
        while self.running() and time.monotonic() < end:
            wait([process.sentinel for process in self.processes if process.is_alive()], 1)
            if not failed and any(process.exitcode for process in self.processes):
                failed, end = True, min(end, time.monotonic() + 30)
        for process in self.processes:
            process.kill()
            process.join()
        code = next((process.exitcode for process in self.processes if process.exitcode), 0)
        with self.output:
            printed = [Path(self.output.name, name).read_text() for name in ('stdout', 'stderr')]
        return subprocess.CompletedProcess([], code, *printed)


def run_processes(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script of scripts/ as two processes."""
    return Processes(f'scripts/{script}', *arguments).finish()


def run_main(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    """Run a script from its command line in this process, and return its exit code."""
    monkeypatch.setattr(sys, 'argv', [script, *map(str, arguments)])
    monkeypatch.setenv('COLUMNS', '200')
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / 'scripts' / script), run_name='__main__')
    return end.value.code
