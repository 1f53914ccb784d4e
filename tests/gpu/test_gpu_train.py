"""scripts/gpu_train.py: commands of the runs, sessions that end during a run, and the transfer of their state."""
import csv
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

import finetune
from coatnet_train.experiments import gpu_train
from coatnet_train.experiments.gpu_runs import PEERS, RUNS, SMALL, GpuTrainSettings, Run, check_gpu_train, flags_of
from coatnet_train.runtime.cli import ConfigError
from coatnet_train.runtime.parts import join_parts, write_parts
from coatnet_train.training import config, teach_config

CHECKS = {'finetune.py': (config.read_settings, config.check_values),
          'teach.py': (teach_config.read_settings, teach_config.check_values)}


def settings(folder: Path, **changes) -> GpuTrainSettings:
    return GpuTrainSettings(**{'data': str(folder / 'data'), 'output': str(folder / 'runs'), **changes})


@pytest.mark.parametrize('tiny', [False, True])
@pytest.mark.parametrize('run', RUNS, ids=lambda run: run.name)
def test_every_command_line_is_one(tmp_path, run, tiny):
    read, check = CHECKS[run.script]
    found = read(flags_of(run, settings(tmp_path / 'a b', tiny=tiny)))
    check(found)
    if run.script == 'finetune.py':
        assert Path(found.output) / found.experiment == tmp_path / 'a b' / 'runs' / run.name
        assert found.resume == 'auto' and found.cache_images and found.torchcompile == (
            not tiny and run.name != 'teacher')
    assert Path(found.data_dir).parent == tmp_path / 'a b' / 'data'


def test_rows_of_the_table_differ_in_model_teacher_and_size_alone(tmp_path):
    assert len({run.name for run in RUNS}) == len(RUNS)
    found = [config.read_settings(flags_of(run, settings(tmp_path))) for run in RUNS if run.name.startswith('tin200')]
    assert [(row.model, bool(row.teacher_outputs)) for row in found] == [
        (model, taught) for models in (SMALL, PEERS) for taught in (True, False) for model in models]
    shared = {(row.epochs, row.lr, row.batch_size, row.mixup, row.cutmix, row.reprob, row.scale) for row in found}
    assert len(shared) == 1 and next(iter(shared))[0] == 100
    teacher = teach_config.read_settings(flags_of(RUNS[1], settings(tmp_path)))
    for row in found:  # the teacher's views are those of the students
        assert all(getattr(row, name) == getattr(teacher, name) for name in (
            'scale', 'hflip', 'color_jitter', 'aa', 'reprob', 'cache_images'))
        assert not row.teacher_outputs or row.kd_temperature in teacher.temperatures


@pytest.mark.parametrize('changes,message', [
    (dict(runs=('teachr',)), "--runs must be among teacher, .*got 'teachr'; did you mean teacher"),
    (dict(shards=('digits.zip',)), '--shards digits.zip must be a zip file whose name begins with tiny-imagenet or'),
    (dict(unpack='no/where'), '--unpack no/where must be a folder'), (dict(minutes=0), '--minutes must be from 0.1'),
], ids=str)
def test_bad_settings_end_in_one_sentence(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_gpu_train(settings(tmp_path, **changes))


def write_shard(path: Path, classes: int = 3, images: int = 8) -> Path:
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, 'w') as archive:
        for index in range(classes * images):
            content = BytesIO()
            Image.new('RGB', (64, 64), (9 * index, 70, 70)).save(content, 'WEBP')
            archive.writestr(f'train/n{index % classes}/n{index % classes}_{index}.webp', content.getvalue())
    return path


STUB = '''
import json, pathlib, signal, sys, time
flags = dict(zip(sys.argv[1::1], sys.argv[2::1]))
folder = pathlib.Path(flags['--output'], flags.get('--experiment', ''))
(folder / 'last').mkdir(parents=True, exist_ok=True)
if 'teach' in sys.argv[0]:
    (folder / 'manifest.json').write_text(json.dumps({'complete': True, 'shards': {}}))
    sys.exit()
if 'lightconv' in flags['--model']:
    sys.exit(2)
def save(*_):
    (folder / 'last' / 'checkpoint.pt').write_bytes(bytes(100_000))
    (folder / 'metrics.csv').write_text('epoch,eval_top1\\n1,1.0\\n7,2.0\\n')
    sys.exit(75)
if 'dynamicconv' in flags['--model'] and not (folder / 'last' / 'checkpoint.pt').exists():
    signal.signal(signal.SIGTERM, save)
    time.sleep(30)
(folder / 'summary.json').write_text(json.dumps({'top1': 61.5}))
(folder / 'model.safetensors').write_bytes(b'weights')
(folder / 'last' / 'checkpoint.pt').write_bytes(b'state')
'''


@pytest.mark.slow
def test_a_session_saves_what_is_not_through_and_the_next_one_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / 'scripts').mkdir()
    for name in ('finetune.py', 'teach.py'):
        (tmp_path / 'scripts' / name).write_text(STUB)
    (tmp_path / 'scripts' / 'hold_out.py').symlink_to(gpu_train.SCRIPTS / 'hold_out.py')
    monkeypatch.setenv('PYTHONPATH', str(gpu_train.SCRIPTS))
    monkeypatch.setattr(gpu_train, 'SCRIPTS', tmp_path / 'scripts')
    monkeypatch.setattr(gpu_train, 'SAVING_SECONDS', 1.)
    wanted = [f'tin200_taught/{name}_pico_64-seed42' for name in ('coatnet', 'lightconvnet', 'dynamicconvnet')]
    shard = write_shard(tmp_path / 'shards' / 'tiny-imagenet-train-0.zip')
    first = settings(tmp_path, runs=('teacher_outputs', *wanted), minutes=.1, shards=(str(shard),))
    gpu_train.run_session(first)
    assert 'teacher_outputs: waits for teacher' in capsys.readouterr().out
    (tmp_path / 'lite2').write_bytes(b'')
    first = settings(tmp_path, runs=('teacher', *first.runs), minutes=.1, weights=str(tmp_path / 'lite2'))
    assert gpu_train.run_session(first) == 1  # lightconvnet's
    printed = capsys.readouterr().out
    assert 'teacher: finished, top-1 61.50 %' in printed and f'{wanted[0]}: finished, top-1 61.50 %' in printed
    assert f'{wanted[1]}: not begun' in printed and 'ended with exit code 2' in printed
    assert f'{wanted[2]}: epoch 7 evaluated' in printed
    splits = {path.name: len(list(path.rglob('*.webp'))) for path in (tmp_path / 'data' / 'tin200').iterdir()}
    assert splits == {'train': 12, 'validation': 12}

    gpu_train.run_session(settings(tmp_path, pack=str(tmp_path / 'parts'), part_mib=.05))
    assert max(path.stat().st_size for path in (tmp_path / 'parts').iterdir()) <= .05 * 2**20
    there = tmp_path / 'next'
    again = settings(there, unpack=str(tmp_path / 'parts'), runs=(wanted[0], wanted[2]), minutes=.1,
                     data=str(tmp_path / 'data'))
    assert gpu_train.run_session(again) == 0
    assert (there / 'runs' / wanted[2] / 'last' / 'checkpoint.pt').stat().st_size == len(b'state')  # it was resumed
    assert not (there / 'runs' / wanted[0] / 'last').exists()  # finished, so its checkpoint was not packed
    gpu_train.run_session(settings(there, list=True))
    printed = capsys.readouterr().out
    assert f'{wanted[2]:46s}   12 min  finished, top-1 61.50 %' in printed and '--resume auto' in printed


SESSION = '''
import pathlib, sys
from coatnet_train.experiments import gpu_train
from coatnet_train.experiments.gpu_runs import GpuTrainSettings
folder = pathlib.Path(sys.argv[1])
gpu_train.SCRIPTS, gpu_train.SAVING_SECONDS = folder / 'scripts', 3.
gpu_train.run_session(GpuTrainSettings(
    runs=('nette/coatnet_nano',), output=str(folder / 'runs'), data=str(folder / 'data')))
'''
ASKED = '''
import os, pathlib, signal, sys, time
def save(*_):
    pathlib.Path('saved').touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
pathlib.Path('pid.new').write_text(str(os.getpid()))
os.replace('pid.new', 'pid')
time.sleep(60)
'''


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_session_that_is_stopped_saves_its_run_and_leaves_no_process(tmp_path, number):
    (tmp_path / 'scripts').mkdir()
    (tmp_path / 'scripts' / 'finetune.py').write_text(ASKED)
    (tmp_path / 'data' / 'nette' / 'train').mkdir(parents=True)  # an empty folder is enough for this script
    session = subprocess.Popen([sys.executable, '-c', SESSION, tmp_path], cwd=tmp_path, start_new_session=True,
                             env={**os.environ, 'PYTHONPATH': str(gpu_train.SCRIPTS)})
    try:
        for _ in range(400):
            if (tmp_path / 'pid').exists():
                break
            time.sleep(.05)
        os.killpg(session.pid, number)
        assert session.wait(20) == 128 + number and (tmp_path / 'saved').exists()
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / 'pid').read_text()), 0)
    finally:
        session.kill()
        session.wait()


def test_damaged_and_missing_parts_are_named(tmp_path):
    (tmp_path / 'a').write_bytes(bytes(range(256)) * 300)
    parts = write_parts({'run/a': tmp_path / 'a'}, tmp_path / 'parts', 30_000)
    assert len(parts) == 3 and join_parts(tmp_path / 'parts', tmp_path / 'out') == ['run/a']
    assert (tmp_path / 'out' / 'run' / 'a').read_bytes() == (tmp_path / 'a').read_bytes()
    parts[1].write_bytes(parts[1].read_bytes()[::-1])
    with pytest.raises(ConfigError, match=r'part-001 is missing or not as it was written'):
        join_parts(tmp_path / 'parts', tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
    with pytest.raises(ConfigError, match=r'must hold parts\.json'):
        join_parts(tmp_path, tmp_path / 'other')


def test_a_pack_replaces_earlier_parts_alone_and_only_when_it_is_whole(tmp_path, monkeypatch):
    (tmp_path / 'a').write_bytes(bytes(range(256)) * 300)
    folder = tmp_path / 'parts'
    write_parts({'run/a': tmp_path / 'a'}, folder, 30_000)
    with pytest.raises(ConfigError, match=r'cannot be written: .*gone'):
        write_parts({'run/a': tmp_path / 'a', 'run/b': tmp_path / 'gone'}, folder, 10_000)
    assert join_parts(folder, tmp_path / 'out') == ['run/a'] and len(list(folder.iterdir())) == 4
    write_parts({'run/b': tmp_path / 'a'}, folder, 100_000)
    assert sorted(path.name for path in folder.iterdir()) == ['part-000', 'parts.json']
    (folder / 'part-book').write_text('')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'part-000').write_text('kept')
    for place, name in ((folder, 'part-book'), (tmp_path / 'other', 'part-000')):
        with pytest.raises(ConfigError, match=f'earlier parts alone, but has {name}; name another'):
            write_parts({'run/b': tmp_path / 'a'}, place, 100_000)
        assert (place / name).exists()
    for place in (tmp_path / 'a', tmp_path / 'a' / 'b'):
        with pytest.raises(ConfigError, match=r'must be a folder, but is a file|cannot be written: '):
            write_parts({'run/b': tmp_path / 'a'}, place, 100_000)


@pytest.mark.parametrize('content', ['[]', '{"parts": {}, "files": []}', '{"parts": {"../a": "0"}, "files": []}',
                                     '{"parts": ["part-000"], "files": []}', '{"parts": {"part-000": "0"}}'])
def test_a_manifest_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / 'parts.json').write_text(content)
    with pytest.raises(ConfigError, match='must name parts and files, as --pack writes it'):
        join_parts(tmp_path, tmp_path / 'out')


def write_run(folder: Path, epochs: int | None = None, finished: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if epochs is not None:
        (folder / 'metrics.csv').write_text('epoch\n' + ''.join(f'{epoch}\n' for epoch in range(1, epochs + 1)))
    if finished:
        (folder / 'summary.json').write_text('{"top1": 50}')


def test_unpacking_leaves_runs_that_are_further_on(tmp_path, capsys):
    names = [run.name for run in RUNS if run.script == 'finetune.py'][:5]
    packed = {names[0]: (3,), names[1]: (9,), names[2]: (2, True), names[3]: (4,), names[4]: (8,)}
    here = {names[0]: (99,), names[1]: (5,), names[2]: (9,), names[3]: (3, True)}  # the last one is new
    for folder, runs in (('away', packed), ('runs', here)):
        for name, state in runs.items():
            write_run(tmp_path / folder / name, *state)
    (tmp_path / 'runs' / names[1] / 'notes.txt').write_text('kept')
    gpu_train.run_session(settings(tmp_path, output=str(tmp_path / 'away'), pack=str(tmp_path / 'parts')))
    # parts of an earlier version, which had another run
    files = {str(path.relative_to(tmp_path / 'away')): path for path in (tmp_path / 'away').rglob('*.*')}
    write_parts(files | {'gone/summary.json': tmp_path / 'away' / names[2] / 'summary.json'}, tmp_path / 'parts', 2**20)
    for _ in range(2):  # the second call changes nothing
        gpu_train.run_session(settings(tmp_path, unpack=str(tmp_path / 'parts'), pack=str(tmp_path / 'all')))
        found = [gpu_train.state(run, tmp_path / 'runs') for run in RUNS if run.name in names]
        assert found == ['epoch 99 evaluated', 'epoch 9 evaluated', 'finished, top-1 50.00 %',
                         'finished, top-1 50.00 %', 'epoch 8 evaluated']
        printed = capsys.readouterr().out
        assert f'{names[0]}: stays as it is in --output (epoch 99 evaluated), further on than in --unpack (epoch 3 ev' \
            in printed and printed.count('stays as it is') == 2 and '4 of 7 files of earlier sessions' in printed
        assert 'not of a run of this version, so they stay packed: gone/summary.json' in printed
    assert (tmp_path / 'runs' / names[1] / 'notes.txt').exists() and not list((tmp_path / 'runs').glob('.*'))


def test_damaged_files_of_a_run_are_named_and_do_not_stop_the_list(tmp_path, capsys):
    for run, name, content in zip(RUNS[2:], ('metrics.csv', 'metrics.csv', 'summary.json', 'summary.json'),
                                  ('epoch,eval_top1\n', 'a,b\n1,2\n', '{"top1": ', '[]'), strict=False):
        (tmp_path / 'runs' / run.name).mkdir(parents=True)
        (tmp_path / 'runs' / run.name / name).write_text(content)
    (tmp_path / 'runs' / 'teacher_outputs').mkdir()
    (tmp_path / 'runs' / 'teacher_outputs' / 'manifest.json').write_text('{}')
    gpu_train.run_session(settings(tmp_path, list=True))
    states = [line[56:].strip() for line in capsys.readouterr().out.splitlines() if not line.startswith(' ')]
    assert states[:-1] == ['not begun', 'manifest.json is damaged', 'begun', 'metrics.csv is damaged',
                           *['summary.json is damaged'] * 2, *['not begun'] * (len(RUNS) - 6)]


def make_broken(place: Path) -> dict:
    write_shard(place)
    content = place.read_bytes()
    place.write_bytes(content[:60] + bytes(20) + content[80:])
    return {'shards': (str(place),)}


def make_set(folder: Path, images: int) -> dict:
    with zipfile.ZipFile(write_shard(folder / 'shards' / 'imagenette-0.zip', images=images)) as archive:
        archive.extractall(folder / 'data' / 'imagenette')
    return {}


def make_interrupted(folder: Path) -> dict:
    (folder / 'data').mkdir()
    (folder / 'data' / '.imagenette-0.zip.unfinished').touch()  # as a killed session leaves it
    return make_set(folder, 4)


@pytest.mark.parametrize('make,message', [
    (lambda folder: make_broken(folder / 'imagenette-0.zip'), r'--shards .*0\.zip cannot be unpacked .*; fetch the'),
    (lambda folder: (folder / 'data' / 'imagenette' / 'train').mkdir(parents=True) or {}, 'but has 0 in one of 0 clas'),
    (lambda folder: make_set(folder, 1), 'must have two images of a class at least, but has 1 in one of 3 classes'),
    (make_interrupted, 'must have all images of imagenette-0.zip, but unpacking it was interrupted; give it by --sha'),
    (lambda folder: {'output': __file__}, '--output .* cannot be made: '),
    (lambda folder: {'runs': ('nette/coatnet_nano',)}, '--data .* must have the images of imagenette for nette/coatne'),
    (lambda folder: {}, '--weights no.safetensors must be the weights that import_weights.py wrote, for teacher'),
], ids=['zip', 'no class', 'one image', 'interrupted', 'output', 'data', 'weights'])
def test_what_is_missing_or_broken_is_said_before_the_first_run(tmp_path, monkeypatch, make, message):
    monkeypatch.setattr(gpu_train, 'start', lambda *_: pytest.fail('a run was started'))
    with pytest.raises(ConfigError, match=message):
        gpu_train.run_session(settings(tmp_path, **{'weights': 'no.safetensors', **make(tmp_path)}))


def test_runs_on_absent_images_are_left_out_and_half_a_split_is_made_anew(tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(gpu_train, 'start', lambda run, *_: started.append(run.name) or 0)
    (tmp_path / 'lite2').write_bytes(b'')
    make_set(tmp_path, images=4)
    (tmp_path / 'data' / '.nette.tmp' / 'train' / 'half').mkdir(parents=True)
    gpu_train.run_session(settings(tmp_path, weights=str(tmp_path / 'lite2')))
    assert started == [run.name for run in RUNS if run.name.startswith('nette')]
    assert ' runs wait for --shards of tiny-imagenet: teacher, ' in capsys.readouterr().out
    found = [path.relative_to(tmp_path / 'data' / 'nette') for path in (tmp_path / 'data' / 'nette').rglob('*.webp')]
    assert len([path for path in found if (tmp_path / 'data' / 'nette' / path).is_file()]) == 12
    assert not list((tmp_path / 'data').glob('.*')) and not (tmp_path / 'data' / 'nette' / 'train' / 'half').exists()
    started.clear()
    gpu_train.run_session(settings(tmp_path, runs=('nette/coatnet_nano',), minutes=.9))
    assert not started and 'nette/coatnet_nano: 54 s are left, fewer than the 60' in capsys.readouterr().out


# every model once, with or without a teacher: flags_of writes the flags of all in one way
TRIED = (
    'teacher', 'teacher_outputs', 'tin200_taught/coatnet_pico_64-seed42', 'tin200_taught/resnet18-seed42',
    'tin200_taught/mobilenetv3_small_100-seed42', 'tin200/lightconvnet_pico_64-seed42',
    'tin200/dynamicconvnet_pico_64-seed42', 'tin200/convnextv2_femto-seed42', 'nette/coatnet_nano',
    'nette/coatnet_nano_rw_224', 'nette/convnext_nano')


def test_the_runs_that_are_tried_have_every_model():
    models = {run.name: config.read_settings(flags_of(run, settings(Path('x')))).model for run in RUNS
              if run.script == 'finetune.py'}
    assert {models[name] for name in TRIED if name in models} == {*models.values()}


@pytest.mark.slow
def test_runs_train_at_a_hundredth_of_the_size(tmp_path, monkeypatch):
    import timm
    from safetensors.torch import save_file
    save_file(timm.create_model('tf_efficientnet_lite2').state_dict(), tmp_path / 'lite2.safetensors')
    shards = [write_shard(tmp_path / 'shards' / name) for name in ('tiny-imagenet-train-0.zip', 'imagenette-train.zip')]
    session = settings(tmp_path, tiny=True, runs=TRIED, minutes=60, weights=str(tmp_path / 'lite2.safetensors'),
                     shards=tuple(map(str, shards)))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    in_a_process = gpu_train.start

    def start(run: Run, settings: GpuTrainSettings, seconds: float) -> int:
        """The first run of each script in a process of its own, and the others here, which saves the imports."""
        if run.name in ('teacher', 'teacher_outputs'):
            return in_a_process(run, settings, seconds)
        finetune.main(config.read_settings(flags_of(run, settings)))
        return 0

    monkeypatch.setattr(gpu_train, 'start', start)
    assert gpu_train.run_session(session) == 0
    for run in (run for run in RUNS if run.name in TRIED):
        assert gpu_train.state(run, tmp_path / 'runs').startswith('finished'), run.name
        if run.script == 'finetune.py':
            with (tmp_path / 'runs' / run.name / 'metrics.csv').open() as lines:
                assert [row['epoch'] for row in csv.DictReader(lines)] == ['1', '2']
            summary = json.loads((tmp_path / 'runs' / run.name / 'summary.json').read_text())
            assert bool(summary['teacher']) == ('taught' in run.name)
