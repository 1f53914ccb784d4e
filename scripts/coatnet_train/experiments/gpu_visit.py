"""A visit to a GPU that is there for minutes: unpack images, train what is not finished, save, and pack the state."""
import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from coatnet_train.experiments.gpu_runs import DATA_SETS, RUNS, Run, VisitSettings, check_visit, flags_of
from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.parts import join_parts, write_parts

__all__ = ['state', 'visit']

SCRIPTS = Path(__file__).parents[2]
PREEMPTED = 75  # exit code of finetune.py: stopped by SIGTERM, everything saved
SAVING_SECONDS = 30.0  # before the end of the visit, in which a run is told to save itself
FINISHED = 'finished'


def state(run: Run, output: Path) -> str:
    """'not begun', how far a run is, or 'finished' and its result; a file that cannot be read is named."""
    return progress(run, output)[1]


def progress(run: Run, output: Path) -> tuple[tuple[bool, int, float], str]:
    """How far a run is: finished, rows of metrics.csv or shards, time of its checkpoint; and the same in words."""
    folder = output / run.name
    checkpoint = folder / 'last' / 'checkpoint.pt'
    saved, rows = checkpoint.stat().st_mtime if checkpoint.exists() else 0., 0
    words = 'begun' if saved else 'not begun'
    for name in ('manifest.json',) if run.script == 'teach.py' else ('metrics.csv', 'summary.json'):
        if not (folder / name).exists():
            continue
        try:
            text = (folder / name).read_text(encoding='utf-8')
            if name == 'metrics.csv':
                epochs = [int(row['epoch']) for row in csv.DictReader(text.splitlines())]
                rows, words = len(epochs), f'epoch {epochs[-1]} evaluated' if epochs else 'begun'
            elif name == 'manifest.json':
                manifest = json.loads(text)
                rows = len(manifest['shards'])
                if manifest['complete']:
                    return (True, rows, saved), FINISHED
                words = f'{rows} shards'
            else:
                return (True, rows, saved), f'{FINISHED}, top-1 {json.loads(text)["top1"]:.2f} %'
        except (OSError, ValueError, TypeError, KeyError, csv.Error):
            words = f'{name} is damaged'
    return (False, rows, saved), words


def unpack(parts: Path, output: Path) -> None:
    """Join parts into the folder of runs; a run that is further on there than in the parts stays as it is."""
    temporary = output / '.unpacked.tmp'
    shutil.rmtree(temporary, ignore_errors=True)  # of a visit that was killed
    try:
        files = join_parts(parts, temporary)
        taken = 0
        for run in RUNS:
            count = sum(path.is_file() for path in (temporary / run.name).rglob('*'))
            (here, words), (packed, packed_words) = progress(run, output), progress(run, temporary)
            if count and here > packed:
                print(f'{run.name}: stays as it is in --output ({words}), further on than in --unpack ({packed_words})')
            elif count:
                shutil.copytree(temporary / run.name, output / run.name, dirs_exist_ok=True, copy_function=os.replace)
                taken += count
    except OSError as error:
        raise ConfigError(f'--output {output} cannot be written: {one_line(error)}.') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f'{taken} of {len(files)} files of earlier visits -> {output}')


def unpack_shards(shards: tuple[str, ...], data: Path) -> None:
    """Extract zip files of SPLIT/CLASS/IMAGE as they are; what was held out of a set before is drawn anew."""
    for shard in map(Path, shards):
        name = next(name for name in DATA_SETS if shard.name.startswith(name))
        with zipfile.ZipFile(shard) as archive:
            archive.extractall(data / name)
            count = len(archive.namelist())
        shutil.rmtree(data / DATA_SETS[name][0], ignore_errors=True)
        print(f'{shard.name}: {count} images -> {data / name}')


def hold_out(data: Path) -> None:
    """Make the folders that train, of those sets whose images are there."""
    for name, (folder, per_class) in DATA_SETS.items():
        if (data / name / 'train').is_dir() and not (data / folder).exists():
            classes = [path for path in (data / name / 'train').iterdir() if path.is_dir()]
            # a rehearsal has fewer images
            per_class = min(per_class, min(len(list(path.iterdir())) for path in classes) // 2)
            subprocess.run([sys.executable, SCRIPTS / 'hold_out.py', data / name / 'train', data / folder,
                            '--per-class', str(per_class)], check=True)


@contextmanager
def exits_at_signals() -> Iterator[None]:
    """SIGTERM and SIGINT end this process by SystemExit, so that the run in progress is saved and ended too."""
    def stop(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def start(run: Run, settings: VisitSettings, seconds: float) -> int:
    """Run a command for at most so long; it is told to save itself before that. Its output goes to NAME.log."""
    def save() -> int:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(SAVING_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL

    log = Path(settings.output) / f'{run.name.replace("/", "-")}.log'
    with log.open('ab') as file:  # a session of its own: Ctrl-C reaches this process alone, which lets the run save
        process = subprocess.Popen([sys.executable, os.path.relpath(SCRIPTS / run.script), *flags_of(run, settings)],
                                   stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(max(1., seconds - SAVING_SECONDS))
    except subprocess.TimeoutExpired:
        return save()
    except SystemExit:
        print(f'{run.name}: told to stop, is being saved', flush=True)
        save()
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its loader processes too
        process.wait()


def print_list(settings: VisitSettings) -> None:
    total = 0.
    for run in RUNS:
        now = state(run, Path(settings.output))
        total += 0 if now.startswith(FINISHED) else run.minutes
        print(f'{run.name:46s}{run.minutes:5.0f} min  {now}')
        print(f'    python scripts/{run.script} {shlex.join(flags_of(run, settings))}')
    print(f'{total:.0f} minutes to go')


def pack(settings: VisitSettings) -> None:
    """Pack runs into parts: all files of those that are finished but their checkpoint, and of others that too."""
    output, files = Path(settings.output), {}
    for run in (run for run in RUNS if run.name in (settings.runs or [run.name for run in RUNS])):
        left_out = 'last' if state(run, output).startswith(FINISHED) else None
        found = sorted(path for path in (output / run.name).rglob('*') if path.is_file())
        files |= {str(path.relative_to(output)): path for path in found
                  if left_out not in path.relative_to(output / run.name).parts}
    if not files:
        raise ConfigError(f'--pack: none of the runs has begun in --output {output}.')
    parts = write_parts(files, Path(settings.pack), int(settings.part_mib * 2**20))
    size = sum(path.stat().st_size for path in parts) / 2**20
    print(f'{len(files)} files, {size:.1f} MiB in {len(parts)} parts -> {settings.pack}')


def visit(settings: VisitSettings) -> int:
    """Make the runs that are not finished, one after the other, while there is time; returns how many failed."""
    check_visit(settings)
    begun, output = time.monotonic(), Path(settings.output)
    if settings.list:
        print_list(settings)
        return 0
    output.mkdir(parents=True, exist_ok=True)
    if settings.unpack:
        unpack(Path(settings.unpack), output)
    if settings.pack:
        pack(settings)
        return 0
    with exits_at_signals():
        return train(settings, begun)


def train(settings: VisitSettings, begun: float) -> int:
    """Make the runs of a visit that began then, by time.monotonic; returns how many failed."""
    output = Path(settings.output)
    unpack_shards(settings.shards, Path(settings.data))
    hold_out(Path(settings.data))
    failed, states = 0, {run.name: state(run, output) for run in RUNS}
    for run in (run for run in RUNS if not settings.runs or run.name in settings.runs):
        if states[run.name].startswith(FINISHED):
            continue
        if missing := [name for name in run.needs if not states[name].startswith(FINISHED)]:
            print(f'{run.name}: waits for {", ".join(missing)}')
            continue
        seconds = 60 * settings.minutes - (time.monotonic() - begun)
        if seconds < 2 * SAVING_SECONDS and not settings.tiny:
            break
        started = time.monotonic()
        code = start(run, settings, seconds)
        states[run.name] = state(run, output)
        failed += code not in (0, PREEMPTED)
        ended = '' if code in (0, PREEMPTED) else f', ended with exit code {code}, see {run.name.replace("/", "-")}.log'
        print(f'{run.name}: {states[run.name]}, {(time.monotonic() - started) / 60:.1f} minutes{ended}', flush=True)
    return failed
