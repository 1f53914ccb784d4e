"""Run steps of gpu_report.py at their tiny sizes in one process: in_one_process.py FOLDER STEP ...

test_gpu_report.py starts it with TRITON_INTERPRET=1, so that kernels run in Triton's interpreter.
"""
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from coatnet_train.benchmarks import gpu_report, gpu_steps
from coatnet_train.benchmarks.gpu_plan import GpuReportSettings, Step


def start(step: Step, settings: GpuReportSettings, log: Path, limit: float) -> str:
    """Run a step in this process, with its output in the log."""
    with log.open('a') as file, redirect_stdout(file):
        gpu_steps.run_step(replace(settings, run_step=step.name))
    return 'done'


if __name__ == '__main__':
    settings = GpuReportSettings(steps=tuple(sys.argv[2:]), output=sys.argv[1], device='cpu', tiny=True)
    sys.exit(gpu_report.main(settings, start))
