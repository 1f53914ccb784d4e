"""Check and time the package on any CUDA GPU within a budget of minutes.

    python scripts/gpu_report.py --budget 8
    python scripts/gpu_report.py --list
    python scripts/gpu_report.py --steps dynamic-7 light-7 --output output/borrowed
    python scripts/gpu_report.py --collect output/borrowed
    TRITON_INTERPRET=1 python scripts/gpu_report.py --tiny --device cpu --output output/dry_run

It writes ops_<card>.csv, models_<card>.csv, checks_<card>.csv and gpu_report.log, row by row, into --output; then
`python scripts/report.py` shows them in docs/results.md. Each step is a process with a time limit, and a failing step
does not stop the others. A new row replaces the earlier row of the same measurement on the same card. The exit code is
1 if a step or a check failed.
"""
import sys
from dataclasses import replace

from coatnet_train.benchmarks.gpu_plan import GpuReportSettings, check_gpu_report
from coatnet_train.runtime.cli import parse_flags, run_cli


def read_settings(arguments: list[str]) -> GpuReportSettings:
    """Read a command line; `step NAME` before the flags sets `run_step`, by which step processes are started."""
    if arguments[:1] == ['step'] and len(arguments) > 1:
        return replace(parse_flags(GpuReportSettings, __doc__, arguments[2:]), run_step=arguments[1])
    return parse_flags(GpuReportSettings, __doc__, arguments)


def main(settings: GpuReportSettings) -> int:
    """Run the steps as processes, or the one of `run_step` in this process; returns the exit code."""
    check_gpu_report(settings)
    if settings.run_step:
        from coatnet_train.benchmarks.gpu_steps import run_step  # here: torch and timm take seconds to import
        run_step(settings)
        return 0
    from coatnet_train.benchmarks.gpu_report import main as run_report
    return int(run_report(settings) > 0)


if __name__ == '__main__':
    run_cli('gpu_report.py', lambda: sys.exit(main(read_settings(sys.argv[1:]))))
