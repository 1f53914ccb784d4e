"""Runs the steps of a GPU report: a process each, with its own time limit; none stops the others.

Nothing here imports torch, so that no fault of a step reaches this process and no card is held by it.
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
SHOWN_OF_FAILURE = 15  # lines


def start_step(step: Step, settings: GpuReportSettings, log: Path, limit: float) -> str:
    """Run a step in a process group of its own, its output in the log; returns 'done' or how it ended."""
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
    finally:  # also where this process is stopped: compilers and test processes of the step go with it
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


Start = Callable[[Step, GpuReportSettings, Path, float], str]


def main(settings: GpuReportSettings, start: Start = start_step) -> int:
    """Run all steps of the plan; returns how many did not end well.

    Args:
        settings: Settings of gpu_report.py.
        start: Runs one step, given the log and a limit in seconds.
    """
    check_gpu_report(settings)
    if settings.list:
        print_plan()
        return 0
    output = make_output(settings)
    if settings.collect:
        return collect(Path(settings.collect), output)
    with exits_at_signals():  # the step in progress is ended too
        return run_steps(settings, output, start)


def run_steps(settings: GpuReportSettings, output: Path, start: Start) -> int:
    """Run the steps of the plan one after the other; returns how many steps and checks failed."""
    log, begun, bad, planned = output / 'gpu_report.log', time.monotonic(), 0, 0.
    steps, origin, card, earlier = plan(settings), {'hardware': 'unknown'}, 'unknown', {''}
    print(f'{len(steps)} steps, at most {sum(minutes for _, minutes in steps):.1f} minutes; all output: {log}')
    for step, minutes in steps:
        started, before = time.monotonic(), log.stat().st_size if log.exists() else 0
        planned += 60 * minutes
        limit = planned - (started - begun)  # its own, and what the steps before have left
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
    """Add the rows of the files in one folder to those in another; a new row replaces the one it measures again."""
    files = [(path, kind) for kind in KEYS for path in sorted(source.glob(f'{kind}_*.csv'))]
    if not files:
        raise ConfigError(f'--collect {source} must hold files such as ops_h200.csv, but has none.')
    found = []
    for path, (key, value) in ((path, KEYS[kind]) for path, kind in files):  # all are read before any is written
        found.append((output / path.name, read_rows(path, (*key, value)), key, value))
        read_rows(output / path.name, ('hardware', value))  # an older file may lack the other columns
    for path, rows, key, value in found:
        merge_rows(path, rows, key, value)
        print(f'{len(rows)} rows of {source / path.name} -> {path}')
    return 0
