"""A session of gpu_train.py, some minutes on a GPU: unpack images, continue unfinished runs, and pack the results."""
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
import zlib
from contextlib import suppress
from pathlib import Path

from coatnet_train.experiments.gpu_runs import DATA_SETS, RUNS, GpuTrainSettings, Run, check_gpu_train, flags_of
from coatnet_train.runtime.cli import PREEMPTED, ConfigError, check_output, exits_at_signals, one_line
from coatnet_train.runtime.parts import join_parts, write_parts

__all__ = ['run_session', 'state']

SCRIPTS = Path(__file__).parents[2]
SAVING_SECONDS = 30.0  # time before the end of the session at which a run gets SIGTERM, to save itself
FINISHED = 'finished'
UNFINISHED = '.unfinished'  # ends the name of a file that marks a shard whose images are not all unpacked


def state(run: Run, output: Path) -> str:
    """State of a run in words: 'not begun', its progress, 'finished' with its result, or the name of a damaged file."""
    return progress(run, output)[1]


def progress(run: Run, output: Path) -> tuple[tuple[bool, int, float], str]:
    """Progress of a run as a sort key (finished, rows of metrics.csv or shards, time of checkpoint), and in words."""
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
    """Join parts into the folder of runs, except runs whose progress there is ahead of that in the parts."""
    temporary = output / '.unpacked.tmp'
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed session
    try:
        files = join_parts(parts, temporary)
        taken = 0
        if unknown := sorted({name for name in files if not name.startswith(tuple(f'{run.name}/' for run in RUNS))}):
            print('not of a run of this version, so they stay packed:', *unknown[:3])
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
    print(f'{taken} of {len(files)} files of earlier sessions -> {output}')


def unpack_shards(shards: tuple[str, ...], data: Path) -> None:
    """Extract zip files of SPLIT/CLASS/IMAGE, and delete the hold-out folders of their sets, which are made again.

    A shard has a file .SHARD.unfinished beside its images until all of them are there, for `hold_out`.
    """
    data.mkdir(parents=True, exist_ok=True)
    for shard in map(Path, shards):
        (data / f'.{shard.name}{UNFINISHED}').touch()
    for shard in map(Path, shards):
        name = next(name for name in DATA_SETS if shard.name.startswith(name))
        try:
            with zipfile.ZipFile(shard) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f'{damaged} is damaged')
                if (data / DATA_SETS[name][0]).exists():
                    shutil.rmtree(data / DATA_SETS[name][0])
                archive.extractall(data / name)
                count = len(archive.namelist())
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise ConfigError(f'--shards {shard} cannot be unpacked into --data {data}: {one_line(error)}; fetch the '
                              f'file again, or name another folder.') from error
        (data / f'.{shard.name}{UNFINISHED}').unlink()
        print(f'{shard.name}: {count} images -> {data / name}')


def hold_out(data: Path) -> None:
    """Run hold_out.py for each data set that is unpacked and not yet split; raises ConfigError if it fails."""
    for name, (folder, per_class) in DATA_SETS.items():
        train, temporary = data / name / 'train', data / f'.{folder}.tmp'
        if not train.is_dir() or (data / folder).exists():
            continue
        if unfinished := sorted(data.glob(f'.{name}*{UNFINISHED}')):
            shard = unfinished[0].name.removeprefix('.').removesuffix(UNFINISHED)
            raise ConfigError(f'--data: {train} must have all images of {shard}, but unpacking it was interrupted; '
                              f'give it by --shards again.')
        classes = [path for path in train.iterdir() if path.is_dir()]
        fewest = min((len(list(path.iterdir())) for path in classes), default=0)
        if fewest < 2:
            raise ConfigError(f'--data: {train} must have two images of a class at least, but has {fewest} in one of '
                              f'{len(classes)} classes; unpack it again by --shards.')
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed session
        # a dry run has fewer images; the links are relative, so they survive the rename
        done = subprocess.run([sys.executable, SCRIPTS / 'hold_out.py', train, temporary, '--per-class',
                               str(min(per_class, fewest // 2))], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise ConfigError(f'--data {data}: {one_line(RuntimeError(done.stderr[-500:]))}')
        temporary.rename(data / folder)


def pending(settings: GpuTrainSettings, output: Path) -> list[Run]:
    """Unfinished runs of this session whose requirements are met; raises ConfigError if weights or images are missing.

    Without --runs, runs on a data set that is missing are left out instead.
    """
    chosen = [run for run in RUNS if not settings.runs or run.name in settings.runs]
    runs = [run for run in chosen if not state(run, output).startswith(FINISHED)]
    finished = {run.name for run in RUNS if state(run, output).startswith(FINISHED)}
    while waiting := [run for run in runs if not finished.union(run.name for run in runs).issuperset(run.needs)]:
        print(*(f'{run.name}: waits for {", ".join(run.needs)}' for run in waiting), sep='\n')
        runs = [run for run in runs if run not in waiting]
    if any('{weights}' in run.flags for run in runs) and not Path(settings.weights).is_file():
        raise ConfigError(f'--weights {settings.weights} must be the weights that import_weights.py wrote, for '
                          f'{runs[0].name}; make them, or name other --runs.')
    for name, (folder, _) in DATA_SETS.items():
        without = [run for run in runs if f'{{data}}/{folder}' in run.flags.split()]
        if not without or (Path(settings.data) / folder / 'train').is_dir():
            continue
        runs = [run for run in runs if run not in without]
        if settings.runs or not runs:
            raise ConfigError(f'--data {settings.data} must have the images of {name} for {without[0].name}; give its '
                              f'--shards, or name other --runs.')
        print(f'{len(without)} runs wait for --shards of {name}: {", ".join(run.name for run in without)}')
    return runs


def start(run: Run, settings: GpuTrainSettings, seconds: float) -> int:
    """Run a command and return its exit code; its output goes to NAME.log.

    After `seconds` minus SAVING_SECONDS it gets SIGTERM, to save itself, and at the end SIGKILL.
    """
    def save() -> int:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(SAVING_SECONDS)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL

    log = Path(settings.output) / f'{run.name.replace("/", "-")}.log'
    with log.open('ab') as file:  # a session of its own: Ctrl-C reaches this process alone, and the run can save
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
            os.killpg(process.pid, signal.SIGKILL)  # and its loader processes
        process.wait()


def print_list(settings: GpuTrainSettings) -> None:
    total = 0.
    for run in RUNS:
        now = state(run, Path(settings.output))
        total += 0 if now.startswith(FINISHED) else run.minutes
        print(f'{run.name:46s}{run.minutes:5.0f} min  {now}')
        print(f'    python scripts/{run.script} {shlex.join(flags_of(run, settings))}')
    print(f'{total:.0f} minutes to go')


def pack(settings: GpuTrainSettings) -> None:
    """Pack the files of the runs into parts; checkpoints are left out for finished runs."""
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


def run_session(settings: GpuTrainSettings) -> int:
    """Run a session (list, unpack, pack or train); returns the number of failed runs."""
    check_gpu_train(settings)
    check_output(output := Path(settings.output))
    begun = time.monotonic()
    if settings.list:
        print_list(settings)
        return 0
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f'--output {output} cannot be made: {one_line(error)}; name another folder.') from error
    if settings.unpack:
        unpack(Path(settings.unpack), output)
    if settings.pack:
        pack(settings)
        return 0
    with exits_at_signals():
        return train(settings, begun)


def train(settings: GpuTrainSettings, begun: float) -> int:
    """Run the unfinished runs one after the other while time is left; returns the number of failed runs.

    Args:
        settings: Settings of gpu_train.py.
        begun: Start of the session by time.monotonic().
    """
    output = Path(settings.output)
    unpack_shards(settings.shards, Path(settings.data))
    hold_out(Path(settings.data))
    runs, failed = pending(settings, output), 0
    for run in runs:
        if missing := [other.name for other in RUNS
                       if other.name in run.needs and not state(other, output).startswith(FINISHED)]:
            print(f'{run.name}: waits for {", ".join(missing)}')
            continue
        seconds = 60 * settings.minutes - (time.monotonic() - begun)
        if seconds < 2 * SAVING_SECONDS and not settings.tiny:
            print(f'{run.name}: {max(0., seconds):.0f} s are left, fewer than the {2 * SAVING_SECONDS:.0f} that a run '
                  f'takes to begin and to save; it is the next session\'s')
            break
        started = time.monotonic()
        code = start(run, settings, seconds)
        failed += code not in (0, PREEMPTED)
        ended = '' if code in (0, PREEMPTED) else f', ended with exit code {code}, see {run.name.replace("/", "-")}.log'
        print(f'{run.name}: {state(run, output)}, {(time.monotonic() - started) / 60:.1f} minutes{ended}', flush=True)
    return failed
