"""The steps of gpu_report.py: each runs in its own process and writes rows into the results files."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from coatnet_train.benchmarks import ops
from coatnet_train.benchmarks.config import ModelPairSettings, OpsSettings
from coatnet_train.benchmarks.gpu_models import measure_models
from coatnet_train.benchmarks.gpu_plan import FULL, STEPS, TINY, GpuReportSettings, make_output
from coatnet_train.benchmarks.models import check_machine
from coatnet_train.benchmarks.rows import KEYS, card_slug, merge_rows
from coatnet_train.runtime.provenance import hardware, provenance

__all__ = ['ROOT', 'Steps', 'run_step']

ROOT = Path(__file__).parents[3]


class Steps:
    """Methods that run the steps, for one device, one set of sizes and one results folder.

    Args:
        settings: Settings of gpu_report.py.
    """

    def __init__(self, settings: GpuReportSettings):
        check_machine(settings.device)
        torch.set_num_threads(1 if settings.device == 'cpu' else torch.get_num_threads())
        self.settings, self.device, self.output = settings, settings.device, Path(settings.output)
        self.sizes = TINY if settings.tiny else FULL
        self.card = card_slug(hardware(settings.device))
        self.name = settings.run_step
        self.origin = {**provenance(settings.device), 'triton': ops.triton_version()}

    def store(self, kind: str, rows: list[dict]) -> None:
        merge_rows(self.output / f'{kind}_{self.card}.csv', rows, *KEYS[kind])

    def record(self, checks: Iterable[object]) -> None:
        """Print checks and write them into checks_<card>.csv, one by one."""
        start = time.perf_counter()
        for check in checks:
            row = {'step': self.name, **check._asdict(), 'seconds': round(time.perf_counter() - start, 1)}
            print(*(f'{value}' for value in row.values() if value != ''), sep='  ', flush=True)
            written = datetime.now(timezone.utc).isoformat()  # distinguishes this run's rows from earlier ones
            self.store('checks', [row | self.origin | {'written': written}])
            start = time.perf_counter()

    def show_versions(self) -> None:
        """Record versions and card; the last line printed is the provenance as JSON, for the parent process."""
        from coatnet_train.benchmarks.gpu_checks import Check
        facts = {'card': hardware(self.device), 'torch': torch.__version__, 'triton': ops.triton_version(),
                 'timm': self.origin['timm'], 'python': self.origin['python'], 'commit': self.origin['commit']}
        for package in ('pytest', 'pytest-xdist', 'accelerate'):
            try:
                facts[package] = version(package)
            except PackageNotFoundError:
                facts[package] = 'not installed'
        if self.device == 'cuda':
            card = torch.cuda.get_device_properties()
            facts |= {'compute capability': f'{card.major}.{card.minor}',
                      'memory': f'{card.total_memory / 2**30:.1f} GiB',
                      'multiprocessors': str(card.multi_processor_count), 'CUDA': torch.version.cuda,
                      'cuDNN': str(torch.backends.cudnn.version())}
            if shutil.which('nvidia-smi'):
                subprocess.run(['nvidia-smi'], check=False)
        self.record(Check(name, fact) for name, fact in facts.items())
        print(json.dumps(self.origin))

    def compare_operators(self) -> None:
        from coatnet_train.benchmarks.gpu_checks import check_operators
        self.record(check_operators(self.sizes, self.device))

    def compare_large_image(self) -> None:
        from coatnet_train.benchmarks.gpu_checks import check_large_image
        self.record(check_large_image(self.sizes.large_side, self.device))

    def compare_training(self) -> None:
        from coatnet_train.benchmarks.gpu_checks import check_training
        self.record(check_training(self.sizes, self.device))

    def run_kernel_tests(self) -> None:
        """Run pytest tests/ops -m gpu, in parallel if pytest-xdist is installed, and record the counts as they grow."""
        from coatnet_train.benchmarks.gpu_checks import Check
        several = ['-n', str(min(12, os.cpu_count() or 1)), '--dist', 'load'] if find_spec('xdist') else []
        several = several if self.device == 'cuda' else []  # on a CPU all are skipped, and one process is faster
        command = [sys.executable, '-m', 'pytest', 'tests/ops', '-m', 'gpu', '-k', 'not above_2_31', '-vv',
                   '--tb', 'short', '-p', 'no:cacheprovider', *several]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        counts, failed, last = dict.fromkeys(('PASSED', 'FAILED', 'ERROR', 'SKIPPED'), 0), [], 0.

        def result(finished: bool) -> Check:
            bad, good = counts['FAILED'] + counts['ERROR'], counts['PASSED']
            verdict = 'failed' if bad else 'unfinished' if not finished else 'passed' if good else 'skipped'
            if finished and not sum(counts.values()):
                raise RuntimeError(f'no result was found in what {" ".join(command)} printed.')
            figures = ', '.join(f'{count} {name.lower()}' for name, count in counts.items())
            return Check('tests/ops -m gpu', verdict, good, sum(counts.values()) - counts['SKIPPED'],
                         f'{figures}{"; " * bool(failed)}{", ".join(failed[:5])}')

        for line in process.stdout:
            print(line, end='', flush=True)
            # 'tests/ops/test_x.py::test PASSED [ 5%]', or from a process of xdist '[gw0] [ 5%] PASSED tests/ops/...'
            found = re.search(r'(?:^\[gw\d+\].*?\] | )(PASSED|FAILED|ERROR|SKIPPED)\b', line)
            if found and '::' in line and not line.startswith(('FAILED', 'ERROR')):
                counts[found[1]] += 1
                if found[1] in ('FAILED', 'ERROR'):
                    failed.append(re.search(r'\S+::.*?(?= (?:FAILED|ERROR)|$)', line)[0])
                if time.monotonic() - last > 2 or failed:
                    self.record([result(finished=False)])
                    last = time.monotonic()
        if process.wait() not in (0, 1):  # 1: some tests failed
            raise RuntimeError(f'{" ".join(command)} ended with exit code {process.returncode}.')
        self.record([result(finished=True)])

    def time_operators(self, op: str, kernel: int) -> None:
        sizes = self.sizes
        kernel = kernel if not self.settings.tiny else 3
        ops.main(OpsSettings(
            op=op, shapes=sizes.shapes, kernels=(kernel,), backends=sizes.backends, batch_size=sizes.operator_batch,
            dtype=sizes.dtype, device=self.device, rounds=sizes.rounds, window=sizes.window,
            input_sets=sizes.input_sets),
            store=partial(self.store, 'ops'))

    def time_models(self, group: str, mode: str, compiled: bool) -> None:
        sizes = self.sizes
        timing = ModelPairSettings(
            model='', against='', batch_size=sizes.model_batch, img_size=sizes.img_size, rounds=sizes.rounds,
            window=5 * sizes.window, amp=sizes.amp, compile=compiled, device=self.device)
        measure_models(sizes.models[group], mode, timing, lambda rows: self.store(
            'models', [row | self.origin for row in rows]))

    def run_sanitizer(self, tool: str) -> None:
        """Run the step `compare` at tiny shapes under compute-sanitizer, if that is installed."""
        from coatnet_train.benchmarks.gpu_checks import Check
        if shutil.which('compute-sanitizer') is None:
            self.record([Check(tool, 'skipped', detail='compute-sanitizer is not installed')])
            return
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(
                ['compute-sanitizer', '--tool', tool, '--target-processes', 'all', sys.executable,
                 str(ROOT / 'scripts' / 'gpu_report.py'), 'step', 'compare', '--tiny', '--device', self.device,
                 '--output', scratch],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                # without caching, an access outside of a tensor is one outside of its allocation
                env={**os.environ, 'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'})
        print(done.stdout)
        summaries = re.findall(r'(?:ERROR|RACECHECK) SUMMARY: (\d+)[^\n]*', done.stdout)
        ran = bool(summaries) and done.returncode == 0
        errors = sum(map(int, summaries))
        self.record([Check(tool, 'passed' if ran and not errors else 'failed', errors if summaries else '', 0,
                           f'exit code {done.returncode}' if ran else 'it did not run to its end')])


def run_step(settings: GpuReportSettings) -> None:
    """Run the step `settings.run_step` in this process."""
    make_output(settings)
    step = next(step for step in STEPS if step.name == settings.run_step)
    getattr(Steps(settings), step.function)(**step.arguments)
