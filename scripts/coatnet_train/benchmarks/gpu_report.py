"""Runs the steps of a GPU report, each as a process with a time limit; a failing step does not stop the others.

Nothing here imports torch, so that this process holds no GPU memory and survives crashes of a step.
"""
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from coatnet_train.benchmarks.gpu_plan import (
    BUDGETS,
    STEPS,
    GpuReportSettings,
    Step,
    check_gpu_report,
    make_output,
    plan,
)
from coatnet_train.benchmarks.rows import KEYS, card_slug, merge_rows, read_rows
from coatnet_train.runtime.cli import ConfigError, exits_at_signals

__all__ = ['collect', 'main', 'start_step']

SCRIPT = Path(__file__).parents[2] / 'gpu_report.py'
SHOWN_OF_FAILURE = 15  # lines of a failed step's log that are printed


def start_step(step: Step, settings: GpuReportSettings, log: Path, limit: float) -> str:
    """Run a step in its own process group for at most `limit` seconds, with its output in the log.

    Returns 'done', or how it ended.
    """
    words = ['step', step.name, '--device', settings.device, '--output', settings.output,
             *['--tiny'] * settings.tiny]
    with log.open('ab') as file:
        process = subprocess.Popen(
            [sys.executable, os.path.relpath(SCRIPT), *words], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONUNBUFFERED': '1'}, preexec_fn=os.setpgrp)
    try:
        code = process.wait(limit)
        return 'done' if code == 0 else f'ended with exit code {code}'
    except subprocess.TimeoutExpired:
        return f'stopped at its limit of {limit:.0f} s'
    finally:  # also if this process is stopped: end the compilers and test processes of the step too
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


Start = Callable[[Step, GpuReportSettings, Path, float], str]


def main(settings: GpuReportSettings, start: Start = start_step) -> int:
    """List the steps, collect results or run the steps; returns the number of failed steps and checks.

    Args:
        settings: Settings of gpu_report.py.
        start: Function that runs one step, as `start_step`.
    """
    check_gpu_report(settings)
    if settings.list:
        print_plan()
        return 0
    output = make_output(settings)
    if settings.collect:
        return collect(Path(settings.collect), output)
    with exits_at_signals():  # so that a signal ends the running step too
        return run_steps(settings, output, start)


def run_steps(settings: GpuReportSettings, output: Path, start: Start) -> int:
    """Run the steps of the plan one after the other; returns the number of failed steps and checks."""
    log, begun, bad, planned = output / 'gpu_report.log', time.monotonic(), 0, 0.
    steps, origin, card, earlier = plan(settings), {'hardware': 'unknown'}, 'unknown', {''}
    print(f'{len(steps)} steps, at most {sum(minutes for _, minutes in steps):.1f} minutes; all output: {log}')
    for step, minutes in steps:
        started, before = time.monotonic(), log.stat().st_size if log.exists() else 0
        planned += 60 * minutes
        limit = planned - (started - begun)  # its own limit, and the unused time of earlier steps
        ended = start(step, settings, log, limit)
        seconds = time.monotonic() - started
        text = log.read_bytes()[before:].decode(errors='replace').rstrip().splitlines() if log.exists() else []
        print(f'{step.name:28s} {ended}, {seconds:.0f} of {limit:.0f} s', flush=True)
        if ended != 'done':
            bad += 1
            for line in text[-SHOWN_OF_FAILURE:]:
                print(f'    {line}')
        if step.name == 'versions':
            if ended != 'done':
                raise ConfigError(f'the first step, which looks at the card, {ended}; see above and {log}.')
            origin = json.loads(text[-1])
            card = card_slug(origin['hardware'])
            earlier |= {row.get('written', '') for row in read_rows(output / f'checks_{card}.csv')}
        row = dict(step=step.name, check='step', result=ended, value='', limit=f'{limit:.0f} s', detail='',
                   seconds=round(seconds, 1), **origin)
        merge_rows(output / f'checks_{card}.csv', [row], *KEYS['checks'])
    failed = [row for row in read_rows(output / f'checks_{card}.csv')
              if row['result'] == 'failed' and row.get('written', '') not in earlier]
    for row in failed:
        print(f'failed: {row["step"]}: {row["check"]}: {row["value"]}, at most {row["limit"]}; {row["detail"]}')
    print(f'{len(steps) - bad} of {len(steps)} steps ended well, {len(failed)} checks failed, '
          f'{(time.monotonic() - begun) / 60:.1f} minutes; {output}/*_{card}.csv; python scripts/report.py shows them')
    return bad + len(failed)


def print_plan() -> None:
    print(f'{"step":28s}{"".join(f"{budget:>8d}" for budget in BUDGETS)}   minutes at most, with --budget')
    for step in STEPS:
        print(step.name.ljust(28), *(f'{limit or "-":>7}' for limit in step.minutes))
    sums = (sum(column) for column in zip(*(step.minutes for step in STEPS), strict=True))
    print(f'{"":28s}{"".join(f"{total:8.1f}" for total in sums)}')


def collect(source: Path, output: Path) -> int:
    """Merge the results files of one folder into another; a new row replaces the one with the same key.

    Returns 0, an exit code; raises ConfigError for a folder without such files, or files that cannot be read.
    """
    files = [(path, kind) for kind in KEYS for path in sorted(source.glob(f'{kind}_*.csv'))]
    if not files:
        raise ConfigError(f'--collect {source} must hold files such as ops_h200.csv, but has none.')
    found = []
    for path, (key, value) in ((path, KEYS[kind]) for path, kind in files):  # read all before writing any
        found.append((output / path.name, read_rows(path, (*key, value)), key, value))
        read_rows(output / path.name, ('hardware', value))  # an older file may lack the other columns
    for path, rows, key, value in found:
        merge_rows(path, rows, key, value)
        print(f'{len(rows)} rows of {source / path.name} -> {path}')
    return 0
