"""teach.py and --teacher-outputs: stored logits are the teacher's logits for the images that a student sees."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import finetune
import teach
from coatnet_train.data.loader import EpochSampler
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime.cli import ConfigError, Preempted
from coatnet_train.training.distillation import BatchMixup, ResizedInput, StoredLogitDistillationTask, stored_kl_div
from coatnet_train.training.teach_config import read_settings
from coatnet_train.training.teacher_outputs import TeacherOutputs, compress
from coatnet_train.training.trainer import Trainer
from support.crashes import SimulatedCrash, crash_at_write
from support.finetune_runs import assert_same_run, read_checkpoint, read_metrics, run, write_shards
from support.images import write_images

NORMALISATION = dict(mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
VIEWS = dict(img_size=32, scale=(0.3, 0.9), color_jitter=0.3, interpolation='bilinear')


@pytest.fixture(scope='session')
def teacher(image_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp('teacher')
    return 'local-dir:' + str(run(finetune.FinetuneSettings(
        data_dir=str(image_folder), model='test_resnet', img_size=32, epochs=4, batch_size=8, lr=5e-3, workers=0,
        device='cpu', output=str(folder), experiment='run', scale=(0.6, 1.0))))


@pytest.fixture
def teaching(image_folder, teacher, tmp_path) -> teach.TeachSettings:
    return teach.TeachSettings(
        data_dir=str(image_folder), teacher=teacher, output=str(tmp_path / 'outputs'), views=3, shard_size=16,
        batch_size=8, workers=0, device='cpu', seed=7, **VIEWS)


def change(settings, **changes):
    return dataclasses.replace(settings, **changes)


def store(teaching: teach.TeachSettings, **changes) -> str:
    """Store outputs and return their folder."""
    settings = change(teaching, **changes)
    teach.main(settings)
    return settings.output


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).glob('*.safetensors')}


@pytest.mark.parametrize(('cached', 'workers', 'teacher_img_size'), [
    (False, 0, None), (False, 1, 48), (True, 0, None), (True, 0, 48)])
def test_stored_outputs_are_those_of_the_images_that_the_student_sees(
        settings, teaching, teacher, monkeypatch, cached, workers, teacher_img_size):
    folder = store(teaching, cache_images=cached, teacher_img_size=teacher_img_size, **NORMALISATION)
    batches, train_step = [], Trainer.train_step

    def watch(trainer, images, targets, *stored):
        batches.append((images.clone(), *stored))
        train_step(trainer, images, targets, *stored)

    monkeypatch.setattr(Trainer, 'train_step', watch)
    run(settings, teacher_outputs=folder, cache_images=cached, workers=workers, **VIEWS, **NORMALISATION)
    model, own = open_model(ModelSettings(model=teacher, pretrained=True))
    if teacher_img_size:
        model = ResizedInput(model, teacher_img_size)
    mean, std, own_mean, own_std = (torch.tensor(values).view(3, 1, 1) for values in (
        *NORMALISATION.values(), own['mean'], own['std']))
    assert len(batches) == 8
    for images, logits in batches:
        with torch.no_grad():
            live = model((images * std + mean - own_mean) / own_std)
        assert logits.dtype == torch.float16 and live.std() > 0.3
        live = live - live.amax(1, keepdim=True)
        torch.testing.assert_close(logits.float(), live, atol=1e-3, rtol=2e-3)
        assert (logits.flip(0).float() - live).abs().max() > 0.05  # other images have other logits


@pytest.mark.parametrize('cached', [False, True])
def test_other_sizes_show_the_same_crop(settings, teaching, monkeypatch, cached):
    folder = store(teaching, cache_images=cached)
    batches, train_step = [], Trainer.train_step

    def watch(trainer, images, targets, *stored):
        batches.append((images.clone(), stored[0]))
        train_step(trainer, images, targets, *stored)

    monkeypatch.setattr(Trainer, 'train_step', watch)
    for sizes in ((), (16,)):
        run(settings, experiment=f'size{sizes}', teacher_outputs=folder, cache_images=cached, train_img_sizes=sizes,
            **VIEWS)
    half = len(batches) // 2
    for (large, logits), (small, others) in zip(batches[:half], batches[half:], strict=True):
        assert torch.equal(logits, others) and small.shape[2:] == (16, 16)
        shrunk = F.avg_pool2d(large, 2)
        gap = (shrunk - small).abs().mean()
        assert gap < 0.35 * (shrunk.flip(0) - small).abs().mean()  # the distance to another crop


def test_every_view_has_its_turn_and_the_seed_chooses_the_first():
    orders = {seed: [] for seed in (0, 1)}
    for seed, order in orders.items():
        sampler = EpochSampler(50, seed, shuffle=True, views=4)
        for epoch in range(1, 5):
            sampler.epoch, sampler.start = epoch, 0
            keys = list(sampler)
            assert sorted(index for _, index in keys) == list(range(50))
            assert [index for _, index in keys] == [index for _, index in _order(50, seed, epoch)]
            sampler.start = 20
            assert list(sampler) == keys[20:]
            order.append(dict((index, view) for view, index in keys))
    for order in orders.values():
        assert all({views[index] for views in order} == {0, 1, 2, 3} for index in range(50))
        assert len(set(order[0].values())) == 4
    assert orders[0][0] != orders[1][0]


def _order(length: int, seed: int, epoch: int) -> EpochSampler:
    sampler = EpochSampler(length, seed, shuffle=True)
    sampler.epoch = epoch
    return sampler


def random_logits(batch: int = 6, classes: int = 10, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(batch, classes, generator=torch.Generator().manual_seed(seed))


def kl_div(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p * (p.log() - q.log())).sum(1).mean()


@pytest.mark.parametrize('temperature', [1.0, 2.0])
@pytest.mark.parametrize('top_k', [None, 1, 3, 9])
def test_loss_is_the_divergence_with_all_other_classes_as_one(temperature, top_k):
    student, teacher = random_logits(), random_logits(seed=1)
    columns = compress(teacher, top_k, (1.0, 2.0))
    if top_k:
        columns['rest'] = columns['rest'][:, int(temperature) - 1]
    found = stored_kl_div(student, list(columns.values()), temperature)

    p, q = ((logits.double() / temperature).softmax(1) for logits in (teacher, student))
    if top_k:
        top = teacher.topk(top_k).indices
        p, q = (torch.cat((x.gather(1, top), 1 - x.gather(1, top).sum(1, keepdim=True)), 1) for x in (p, q))
    torch.testing.assert_close(found.double(), kl_div(p, q) * temperature**2, atol=2e-3, rtol=2e-3)
    assert found > 0.1


def test_mixed_images_are_taught_by_both_of_their_images():
    logits, student, labels = random_logits(seed=1), random_logits().requires_grad_(), torch.arange(6)
    lam, temperature, weight = 0.3, 2.0, 0.8
    targets = lam * F.one_hot(labels, 10).float() + (1 - lam) * F.one_hot(labels, 10).float().flip(0)
    task = StoredLogitDistillationTask(
        torch.nn.Identity(), dict(soft_targets=True), weight, temperature, torch.device('cpu'))
    result = task(student, targets, [logits], lam)
    found, = torch.autograd.grad(result['loss'], student)

    p = (logits / temperature).softmax(1)
    kd_loss = kl_div(lam * p + (1 - lam) * p.flip(0), (student / temperature).softmax(1)) * temperature**2
    expected, = torch.autograd.grad(weight * kd_loss + (1 - weight) * F.cross_entropy(student, targets), student)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_loss_gets_the_fraction_of_the_mixed_labels(settings, teaching, monkeypatch):
    labels, fractions, train_step, forward = [], [], Trainer.train_step, StoredLogitDistillationTask.forward

    def watch(trainer, images, targets, *stored):
        labels.append(F.one_hot(targets, 3).float())
        train_step(trainer, images, targets, *stored)

    def compare(task, images, targets, stored, lam):
        torch.testing.assert_close(targets, lam * labels[-1] + (1 - lam) * labels[-1].flip(0))
        fractions.append(lam)
        return forward(task, images, targets, stored, lam)

    monkeypatch.setattr(Trainer, 'train_step', watch)
    monkeypatch.setattr(StoredLogitDistillationTask, 'forward', compare)
    run(settings, teacher_outputs=store(teaching), mixup=1.0, mixup_off_epoch=1, smoothing=0.0, **VIEWS)
    assert len({*fractions[:4]}) == 4 and fractions[4:] == [1.0] * 4


def test_the_fraction_of_a_mixed_batch_is_that_of_its_labels():
    fractions = set()
    for seed in range(8):
        torch.manual_seed(seed)
        mixup = BatchMixup(1.0, 1.0, prob=0.8, label_smoothing=0., num_classes=4)
        _, targets = mixup(torch.randn(4, 3, 8, 8), torch.arange(4))
        assert targets[0, 0] == pytest.approx(mixup.lam) and targets[0, 3] == pytest.approx(1 - mixup.lam)
        fractions.add(mixup.lam)
    assert len(fractions) > 4


@pytest.mark.parametrize('top_k', [None, 2])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(settings, teaching, teacher, top_k):
    folder = store(teaching, top_k=top_k, temperatures=(2.0, 4.0))
    same = dict(kd_loss_weight=1.0, kd_temperature=4.0, freeze_trunk=True, epochs=1,
                initial_checkpoint=teacher.removeprefix('local-dir:') + '/model.safetensors')
    row, = read_metrics(run(settings, teacher_outputs=folder, **VIEWS, **same))
    assert row['train_loss'] < 1e-4
    other = dict(kd_loss_weight=1.0, kd_temperature=2.0, epochs=1)
    row, = read_metrics(run(settings, experiment='other', teacher_outputs=folder, **VIEWS, **other))
    assert row['train_loss'] > 0.01


def test_recipe_says_what_is_seen_and_flags_win():
    settings = read_settings(['--teacher', 'x', '--recipe', 'tin200_dist', '--hflip', '0.25', '--top-k', '16'])
    assert (settings.cache_images, settings.img_size, settings.teacher_img_size) == (True, 64, 128)
    assert (settings.scale, settings.color_jitter, settings.hflip) == ((0.35, 1.0), 0.3, 0.25)
    assert not settings.amp and settings.batch_size == 64 and settings.top_k == 16
    with pytest.raises(ConfigError, match='--recipe must be one of'):
        read_settings(['--teacher', 'x', '--recipe', 'tin'])


def test_outputs_of_other_images_or_views_are_refused(settings, teaching, tmp_path):
    folder = store(teaching)
    taught = change(settings, teacher_outputs=folder, **VIEWS)
    for name, value, message in (
            ('scale', (0.2, 0.9), r'scale is \[0\.3, 0\.9\] there and \[0\.2, 0\.9\] here'),
            ('hflip', 0.0, r'hflip is 0\.5 there and 0\.0 here'), ('aa', 'rand-m3-n1', 'aa is None there and rand-m3'),
            ('cache_images', True, 'cache_images is False there and True here'),
            ('interpolation', 'bicubic', 'interpolation is bilinear there and bicubic here'),
            ('teacher_img_size', 48, 'teacher_img_size is 32 there and 48 here')):
        with pytest.raises(ConfigError, match=r'--teacher-outputs .* is of other images or views: ' + message):
            run(change(taught, **{name: value}))
    other = write_images(tmp_path / 'other', train=12)
    first, second = (other / 'train' / name / '0.png' for name in ('red', 'blue'))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ConfigError, match=r'training_images is \w{12}\.\.\. there and \w{12}\.\.\. here; give'):
        run(taught, data_dir=str(other))
    with pytest.raises(ConfigError, match=r'--teacher x and --teacher-outputs .* are two teachers; give one'):
        run(taught, teacher='x')
    with pytest.raises(ConfigError, match=r'--teacher-outputs needs images with an index'):
        run(taught, dataset='wds/', data_dir=str(write_shards(tmp_path / 'shards')))
    with pytest.raises(ConfigError, match=r'--teacher-outputs none must be a folder that teach.py wrote: .*; give'):
        run(taught, teacher_outputs='none')
    run(taught)  # the same flags are accepted, and another --seed too
    run(taught, seed=1, experiment='other_seed')


def test_erasing_needs_the_size_and_the_normalisation(settings, teaching):
    folder = store(teaching, reprob=0.5, cache_images=True)
    erased = change(settings, teacher_outputs=folder, reprob=0.5, cache_images=True, **VIEWS)
    with pytest.raises(ConfigError, match='img_size is 32 there and 40 here'):
        run(erased, img_size=40)
    with pytest.raises(ConfigError, match=r'std is \[.*\] there and \[0\.3, 0\.3, 0\.3\] here'):
        run(erased, std=(0.3, 0.3, 0.3))
    with pytest.raises(ConfigError, match=r'--reprob erases other pixels at other .* of 32 pixels, .*\(16, 32\)'):
        run(erased, train_img_sizes=(16, 32))


def test_temperature_of_the_other_classes_must_be_stored(settings, teaching):
    folder = store(teaching, top_k=2, temperatures=(1.0, 3.0))
    with pytest.raises(ConfigError, match=r'--kd-temperature must be one of .* --top-k, 1\.0, 3\.0, got 2\.0'):
        run(settings, teacher_outputs=folder, kd_temperature=2.0, **VIEWS)
    with pytest.raises(ConfigError, match='--top-k must be below the number of classes, 3, got 3'):
        store(teaching, top_k=3, output=teaching.output + '_3')


def test_outputs_that_are_damaged_or_not_whole_are_refused(settings, teaching):
    folder = Path(store(teaching))
    taught = change(settings, teacher_outputs=str(folder), **VIEWS)
    shard = folder / '00001-of-00003.safetensors'
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r'00001-of-00003\.safetensors is missing or not as it was written \(SHA'):
        run(taught)
    shard.unlink()
    with pytest.raises(ConfigError, match=r'00001-of-00003\.safetensors is missing'):
        run(taught)
    manifest = folder / 'manifest.json'
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {'complete': False}))
    with pytest.raises(ConfigError, match=r'has 3 of 3 shards; run teach\.py again, which goes on'):
        run(taught)
    store(teaching)
    run(taught)


def test_teaching_goes_on_with_the_same_settings_data_and_teacher_alone(teaching, teacher, tmp_path):
    folder = store(teaching)
    before = contents(folder)
    for name, value, message in (
            ('seed', 8, 'seed is 7 there and 8 here'), ('views', 2, 'views is 3 there and 2 here'),
            ('scale', (0.1, 0.2), r'scale is \[0\.3, 0\.9\] there'), ('top_k', 2, 'top_k is None there and 2 here')):
        with pytest.raises(ConfigError, match='was begun with other settings, data or teacher: ' + message):
            store(teaching, **{name: value})
    other = shutil.copytree(teacher.removeprefix('local-dir:'), tmp_path / 'other')
    state = load_file(other / 'model.safetensors')
    state['fc.bias'] += 1
    save_file(state, other / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ConfigError, match=r'teacher_weights is \w{12}\.\.\. there and \w{12}\.\.\. here'):
        store(teaching, teacher=f'local-dir:{other}')
    data = write_images(tmp_path / 'data', train=12)
    (data / 'train' / 'red' / '0.png').rename(data / 'train' / 'red' / 'z.png')
    with pytest.raises(ConfigError, match='training_images is'):
        store(teaching, data_dir=str(data))
    assert contents(folder) == before


def test_folders_of_others_are_refused(teaching, teacher):
    run_dir = teacher.removeprefix('local-dir:')
    with pytest.raises(ConfigError, match=r'^--output \S+ must be new, empty, or outputs that teach\.py began'):
        store(teaching, output=run_dir)


@pytest.mark.parametrize('cached', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_teaching_killed_at_any_write_goes_on_to_the_same_shards(teaching, monkeypatch, cached):
    teaching = change(teaching, cache_images=cached, top_k=2)
    whole = contents(store(teaching))
    assert list(whole) and len(whole) == 3
    for kill_at in range(1, 9):  # 8 writes: three shards, and the manifest five times
        folder = f'{teaching.output}_{kill_at}'
        with crash_at_write(monkeypatch, kill_at), pytest.raises(SimulatedCrash):
            store(teaching, output=folder)
        manifest = Path(folder) / 'manifest.json'
        assert not manifest.exists() or not json.loads(manifest.read_text())['complete']
        assert contents(store(teaching, output=folder)) == whole
    with crash_at_write(monkeypatch, 9) as calls:
        store(teaching, output=teaching.output + '_9')
    assert len(calls) == 8


@pytest.mark.parametrize('options', [
    dict(cache_images=True, mixup=0.2, cutmix=1.0, train_img_sizes=(16, 32)),
    pytest.param(dict(workers=1, mixup=0.5), marks=pytest.mark.slow),
    pytest.param(dict(class_balanced=True), marks=pytest.mark.slow)], ids=str)
def test_killed_student_goes_on_to_the_same_weights(settings, teaching, monkeypatch, options):
    folder = store(teaching, cache_images=options.get('cache_images', False), top_k=2)
    taught = change(settings, teacher_outputs=folder, kd_loss_weight=0.8, drop=0.2, **VIEWS, **options)
    whole = run(taught, experiment='whole')
    train_step = Trainer.train_step

    def stop_soon(trainer, *batch):
        if (trainer.progress.epoch, trainer.progress.batch) == (2, 1):
            trainer.accelerator.set_trigger()
        train_step(trainer, *batch)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(Trainer, 'train_step', stop_soon)
        run(taught)
    moved = shutil.move(folder, f'{folder}_moved')
    assert_same_run(whole, run(taught, resume='auto', teacher_outputs=moved))


def test_a_student_goes_on_with_the_same_outputs_alone(settings, teaching):
    first, second = store(teaching), store(teaching, seed=8, output=teaching.output + '_8')
    taught = change(settings, teacher_outputs=first, **VIEWS)
    run_dir = run(taught, last_epoch=1)
    signature = read_checkpoint(run_dir)['resume_signature']
    manifest = json.loads((Path(first) / 'manifest.json').read_text())
    assert signature['teacher_outputs'] == TeacherOutputs(Path(first), manifest, 1.0).digest
    for folder in (second, ''):
        with pytest.raises(ConfigError, match=r'--resume .* teacher_outputs was \w{64}, is'):
            run(taught, resume='auto', teacher_outputs=folder)
    run(taught, resume='auto')
    assert json.loads((run_dir / 'summary.json').read_text())['teacher'] == teaching.teacher


def test_unreadable_images_are_counted_and_replaced_alike(settings, teaching, tmp_path, capsys):
    data = write_images(tmp_path / 'own')
    (data / 'train' / 'red' / '3.png').write_bytes(b'no image')
    with pytest.raises(ConfigError, match=r'--max-bad-images .* allows 0 unreadable among 36'):
        store(teaching, data_dir=str(data), output=teaching.output + '_few')
    folder = store(teaching, data_dir=str(data), max_bad_images=0.1)
    assert str(data / 'train' / 'red' / '3.png') in capsys.readouterr().out
    run(settings, data_dir=str(data), teacher_outputs=folder, max_bad_images=0.1, **VIEWS)
