"""hub/export.py: contents of a release, and its loading through timm and transformers."""
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config

import eval_imagenet
import export
import export_run
import finetune
import model_card
import onnx_files
import verification
from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo.models import coatnet
from support.closeness import assert_same_up_to_rounding, same_up_to_rounding
from support.constants import CLASSES
from support.constants import RELEASE_NAME as NAME

IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
FILES = {'README.md', 'config.json', 'model.safetensors', 'golden.safetensors', 'curves.png'}


@torch.no_grad()
def answer(name: str, images: torch.Tensor = IMAGES, **options) -> torch.Tensor:
    return timm.create_model(name, pretrained=True, **options).eval()(images)


def plain_model(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    model = timm.create_model('coatnet_pico_64', num_classes=3, img_size=32).eval()
    model.load_state_dict(state)
    return model


def make(run_dir: Path, **options) -> Path:
    return export.main(export.ExportSettings(
        run_dir=run_dir, **{'name': NAME, 'output': run_dir.parent / 'made', **options}))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def release_of(folder: Path) -> dict:
    return json.loads((folder / 'config.json').read_text())['release']


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What is released is what was trained


def test_folder_holds_its_files_and_the_very_weights(exported, trained):
    assert {path.name for path in exported.iterdir()} == FILES
    assert [path.name for path in exported.parent.iterdir()] == [NAME]
    before, after = load_file(trained / 'model.safetensors'), load_file(exported / 'model.safetensors')
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    for name in ('model.safetensors', 'golden.safetensors'):
        with safe_open(exported / name, 'pt') as file:
            assert file.metadata() == {'format': 'pt'}
    assert (exported / 'curves.png').read_bytes() == (trained / 'curves.png').read_bytes()


def test_timm_loads_the_trained_model_from_a_folder_and_from_the_cache_of_the_hub(exported, trained, tmp_path):
    expected = answer(f'local-dir:{trained}')
    assert expected.std() > 0
    assert_same_up_to_rounding(answer(f'local-dir:{exported}'), expected)
    commit = 'a' * 40  # a pinned commit in the cache needs no server
    shutil.copytree(exported, tmp_path / 'models--me--colours' / 'snapshots' / commit)
    assert_same_up_to_rounding(answer(f'hf-hub:me/colours@{commit}', cache_dir=tmp_path), expected)


def test_bare_name_takes_the_weights(exported):
    overlay = dict(file=str(exported / 'model.safetensors'), num_classes=3)
    expected = answer(f'local-dir:{exported}')
    assert_same_up_to_rounding(answer('coatnet_pico_64', pretrained_cfg_overlay=overlay, img_size=32), expected)
    larger = answer('coatnet_pico_64', torch.randn(2, 3, 64, 64), pretrained_cfg_overlay=overlay)
    assert larger.shape == (2, 3) and larger.std() > 0


def test_transformers_loads_the_trained_model(exported):
    transformers = pytest.importorskip('transformers', reason='transformers is optional')
    model, report = transformers.AutoModelForImageClassification.from_pretrained(exported, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(IMAGES).logits
    assert not any(report.values())
    assert_same_up_to_rounding(logits, answer(f'local-dir:{exported}'))
    assert model.config.id2label == dict(enumerate(CLASSES)) and model.config.num_labels == 3


def test_config_is_of_these_weights_alone(exported, run_settings):
    config = json.loads((exported / 'config.json').read_text())
    assert config['label_names'] == list(CLASSES) and config['num_classes'] == 3
    assert config['model_args'] == {'img_size': [32, 32], 'in_chans': 3}
    cfg = config['pretrained_cfg']
    assert (cfg['tag'], cfg['license'], cfg['custom_load']) == ('colours', 'apache-2.0', False)
    assert cfg['input_size'] == [3, 32, 32] and cfg['fixed_input_size'] is True and cfg['crop_pct'] == 0.9
    assert tuple(cfg['mean']) == run_settings.mean and tuple(cfg['std']) == run_settings.std
    assert not {'origin_url', 'url', 'file', 'hf_hub_id', 'test_input_size', 'test_crop_pct', 'description'} & {*cfg}

    model = timm.create_model(f'local-dir:{exported}', pretrained=True)
    data = resolve_data_config(model=model, use_test_size=True)
    assert tuple(data['mean']) == run_settings.mean and data['crop_pct'] == 0.9
    assert model.pretrained_cfg['tag'] == 'colours' and list(model.pretrained_cfg['label_names']) == list(CLASSES)


def test_synsets_are_described_and_the_card_prints_words(run_dir, exported, monkeypatch):
    synsets = ['n01440764', 'n02123045', 'n07920052']
    change_json(run_dir / 'config.json', label_names=synsets)
    made = make(run_dir)
    words = json.loads((made / 'config.json').read_text())['label_descriptions']
    assert words == dict(zip(synsets, ('tench, Tinca tinca', 'tabby, tabby cat', 'espresso'), strict=True))
    monkeypatch.setattr(verification, 'check_in_fresh_process', lambda folder: verification.check_answers(folder)[0])
    verification.verify(made)
    assert timm.create_model(f'local-dir:{made}', pretrained=True).pretrained_cfg['label_descriptions'] == words
    assert '{words[names[index]]}' in (made / 'README.md').read_text()
    assert '{names[index]}' in (exported / 'README.md').read_text()
    # with a name that is no synset, none is described
    change_json(run_dir / 'config.json', label_names=[*synsets[:2], 'green'])
    assert 'label_descriptions' not in json.loads((make(run_dir) / 'config.json').read_text())


def test_release_tells_how_the_run_went(exported, trained):
    release, summary = release_of(exported), json.loads((trained / 'summary.json').read_text())
    assert release['metrics']['top1'] == round(summary['top1'], 4) and release['metrics']['ece'] is None
    assert release['picked_best_epoch'] is True and release['evaluated_on'] == 'Colours, validation'
    assert (release['seed'], release['epochs'], release['best_epoch']) == (42, 1, 1)
    assert (release['commit'], release['hardware']) == (summary['commit'], summary['hardware'])
    assert release['hours'] == pytest.approx(summary['train_seconds'] / 3600, abs=1e-4)
    assert (release['trained_on'], release['data_license'], release['recipe']) == ('Colours', None, None)
    assert (release['dtype'], release['started_from'], release['teacher']) == ('float32', 'random weights', None)


def test_release_tells_of_the_run_that_it_went_on_from(run_dir, tmp_path):
    first = Path(shutil.copytree(run_dir, tmp_path / 'first'))
    change_json(first / 'summary.json', epochs=7, train_seconds=7200.0, seed=5, commit='c0ffee',
                command='python scripts/finetune.py --data-dir /home/me/colours --recipe early')
    change_json(run_dir / 'args.json', initial_checkpoint=str(first / 'model.safetensors'))
    change_json(run_dir / 'summary.json', train_seconds=1800.0)
    release = release_of(make(run_dir))
    assert release['hours'] == 2.5 and release['started_from'] == (
        'the weights that `python scripts/finetune.py --data-dir colours --recipe early` left: 7 epochs, 2.00 hours, '
        'seed 5, commit c0ffee')
    (first / 'summary.json').unlink()
    release = release_of(make(run_dir))
    assert (release['started_from'], release['hours']) == ('weights of model.safetensors', 0.5)


def test_what_started_from_released_weights_keeps_their_licence(run_dir, tmp_path, monkeypatch):
    weights = tmp_path / 'weights' / 'any.safetensors'
    weights.parent.mkdir()
    weights.write_bytes(b'released')
    entry = {'pretrained_cfg': {'license': 'other'}, 'release': {'license_name': 'terms', 'license_link': 'https://x.y'},
             'sha256': hashlib.sha256(b'released').hexdigest(), 'repo': 'owner/photos'}
    monkeypatch.setattr(export_run, 'RELEASES', {'coatnet_pico_64.photos': entry})

    def licence(**options) -> tuple:
        made = make(run_dir, **options)
        said = release_of(made)
        cfg = json.loads((made / 'config.json').read_text())['pretrained_cfg']
        return cfg['license'], said['license_name'], said['license_link']

    assert licence() == ('apache-2.0', None, None)  # from random weights, although releases have the same name
    second = Path(shutil.copytree(run_dir, tmp_path / 'second'))
    change_json(second / 'args.json', model='coatnet_pico_64', pretrained=True)
    random = dict(model='coatnet_pico_64', pretrained=False)
    for start in (dict(model='coatnet_pico_64.photos', pretrained=True), dict(model='coatnet_pico_64', pretrained=True),
                  dict(model=f'local-dir:{second}', pretrained=True),
                  dict(model='hf-hub:owner/photos', pretrained=True),
                  random | dict(initial_checkpoint=str(weights)),
                  random | dict(initial_checkpoint=str(second / 'model.safetensors'))):
        change_json(run_dir / 'args.json', **start)
        assert export_run.license_of_start(json.loads((run_dir / 'args.json').read_text())) == {
            'license': 'other', 'license_name': 'terms', 'license_link': 'https://x.y'}, start
    assert licence() == ('other', 'terms', 'https://x.y')
    assert licence(license='mit') == ('mit', None, None)  # an explicit licence wins
    weights.write_bytes(b'another')
    for start in (dict(pretrained=False, initial_checkpoint=str(weights)), dict(
            pretrained=True, initial_checkpoint='', model='hf-hub:owner/other'), dict(model=f'local-dir:{tmp_path}')):
        change_json(run_dir / 'args.json', **start)
        with pytest.raises(ConfigError, match='--license must be named: the run started from'):
            make(run_dir)


def test_golden_logits_are_those_of_the_file(exported):
    golden = load_file(exported / 'golden.safetensors')
    with torch.no_grad():
        logits = plain_model(load_file(exported / 'model.safetensors'))(golden['input'])
    assert_same_up_to_rounding(logits, golden['logits'])
    assert golden['input'].shape == (4, 3, 32, 32)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.4, 0.5, 0.6), (0.3, 0.3, 0.2)))
    pixels = golden['input'] * std + mean
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6
    steps = pixels.diff(dim=-1).abs().mean((1, 2, 3))
    assert steps[:2].max() < 0.2 * steps[2:].min()  # images are smooth, noise is not


def test_grey_model_of_a_word_without_attention(image_folder, tmp_path, run_settings):
    settings = dataclasses.replace(
        run_settings, model='lightconvnet_pico_64', in_chans=1, mean=(0.5,), std=(0.25,), model_kwargs=(),
        output=str(tmp_path))
    finetune.main(settings)
    folder = make(tmp_path / 'run', name='lightconvnet_pico_64.grey')
    images = IMAGES[:, :1]
    expected = answer(f'local-dir:{tmp_path}/run', images)
    assert expected.std() > 0
    assert_same_up_to_rounding(answer(f'local-dir:{folder}', images), expected)
    assert verification.check_answers(folder)[0].startswith('timm ')


# 16 bits


def spoil_16_bits(run_dir: Path) -> None:
    """Write a classifier that predicts blue for every image, and green after rounding to bfloat16."""
    state = load_file(run_dir / 'model.safetensors')
    state['head.pre_logits.fc.weight'].zero_()  # the same features for every image
    state['head.pre_logits.fc.bias'].fill_(0.01)
    state['head.fc.weight'] = torch.tensor([[1001.5], [1000.], [998.5]]).expand(3, 320).contiguous()
    state['head.fc.bias'] = torch.tensor([0., 0.01, 0.])
    save_file(state, run_dir / 'model.safetensors', metadata={'format': 'pt'})


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_weights_of_convolutions_and_linear_layers_alone_are_rounded(trained, tmp_path, dtype):
    folder = make(trained, dtype=dtype, output=tmp_path / NAME)
    before, after = load_file(trained / 'model.safetensors'), load_file(folder / 'model.safetensors')
    short = getattr(torch, dtype)
    for key, value in before.items():
        matrix = key.endswith('.weight') and value.ndim in (2, 4)  # norms and biases are vectors
        kept = torch.int64 if key.endswith('num_batches_tracked') else torch.float32
        assert after[key].dtype == (short if matrix else kept), key
        assert torch.equal(after[key], value.to(short) if matrix else value), key
    assert after['stages.2.blocks.0.attn.rel_bias.table'].dtype == torch.float32

    golden = load_file(folder / 'golden.safetensors')
    with torch.no_grad():
        assert_same_up_to_rounding(plain_model(after)(golden['input']), golden['logits'])
        assert not same_up_to_rounding(plain_model(before)(golden['input']), golden['logits'])
    assert release_of(folder)['dtype'] == dtype and release_of(folder)['metrics']['top1_change'] is None
    text = ' '.join((folder / 'README.md').read_text().split())
    assert f'change of top-1 by rounding to {dtype} (points) | not measured' in text
    assert f'those of the float32 weights, before they were rounded to {dtype}' in text


def test_cost_of_rounding_is_measured_and_figures_are_of_the_rounded_file(run_dir, image_folder, tmp_path):
    spoil_16_bits(run_dir)
    for name in ('blue', 'red'):
        shutil.copytree(image_folder / 'val' / name, tmp_path / 'held_out' / name)
    folder = make(run_dir, dtype='bfloat16', data_dir=str(tmp_path / 'held_out'), workers=0)
    release = release_of(folder)
    metrics = release['metrics']
    assert (metrics['top1'], metrics['images'], metrics['top1_change']) == (0, 8, -50)
    assert release['evaluated_on'] == 'held_out' and release['picked_best_epoch'] is False
    verification.check_card(folder, json.loads((folder / 'config.json').read_text()))
    text = (folder / 'README.md').read_text()
    assert '(points) | -50.000 |' in text and '| top-1 accuracy (%) | 0.00 |' in text


def test_values_beyond_float16_are_refused(run_dir):
    state = load_file(run_dir / 'model.safetensors')
    state['head.fc.weight'][0, 0] = 1e5
    save_file(state, run_dir / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ConfigError, match=r'--dtype float16 cannot hold the values of head.fc.weight; use bfloat16'):
        make(run_dir, dtype='float16')
    assert not (run_dir.parent / 'made').exists()


# Figures of an evaluation


def evaluate(run_dir: Path, data_dir: Path, **options) -> Path:
    eval_imagenet.main(eval_imagenet.EvaluationSettings(
        model=(f'local-dir:{run_dir}',), data_dir=str(data_dir), workers=0, device='cpu',
        results_file=str(run_dir / 'evaluation.json'), **options))
    return run_dir / 'evaluation.json'


def test_figures_of_an_evaluation_come_first(run_dir, image_folder, tmp_path):
    shutil.copytree(image_folder / 'train', tmp_path / 'unseen' / 'val')
    row = json.loads(evaluate(run_dir, tmp_path / 'unseen').read_text())
    release = release_of(make(run_dir))
    assert release['metrics'] == {name: row[name] for name in ('top1', 'top5', 'loss', 'ece', 'images')} | {
        'top1_change': None}
    assert row['images'] == 24 and release['evaluated_on'] == 'unseen' and release['picked_best_epoch'] is False
    evaluate(run_dir, image_folder / 'val')
    release = release_of(make(run_dir, evaluated_on='Colours, val'))
    assert release['evaluated_on'] == 'Colours, val' and release['picked_best_epoch'] is True


@pytest.mark.parametrize(('options', 'changes', 'said'), [
    ({'crop_pct': 0.5}, {}, 'crop_pct 0.5'), ({}, {'model': 'local-dir:another'}, 'has 0'),
    ({}, {'top1': float('nan')}, 'top1 is not'), ({}, {'provenance': None}, 'not as')])
def test_evaluation_of_something_else_is_refused(run_dir, image_folder, options, changes, said):
    change_json(evaluate(run_dir, image_folder, **options), **changes)
    with pytest.raises(ConfigError, match='RUN_DIR.*evaluation.json.*' + said if 'top1' not in changes else said):
        make(run_dir)


# What is refused, before anything is written


@pytest.mark.parametrize(('changes', 'parts'), [
    ({'name': 'coatnet_pico_46.colours'}, ['--name', 'mean coatnet_pico_64']),
    ({'name': 'resnet18.colours'}, ['--name', 'name of the zoo']),
    ({'name': 'coatnet_pico_64'}, ['--name', 'tag', 'coatnet_pico_64.tin200']),
    ({'name': 'coatnet_pico_64.untrained'}, ['--name', 'tag']),
    ({'name': 'coatnet_pico_64.Tin 200'}, ['--name', 'small letters']),
    ({'name': 'lightconvnet_pico_64.colours'}, ['--name', 'is coatnet_pico_64', 'coatnet_pico_64.TAG']),
    ({'dtype': 'int8'}, ['--dtype', 'float16', "'int8'"]),
    ({'data_dir': 'images'}, ['--data-dir', '--dtype', 'eval_imagenet.py']),
    ({'license': 'Apache 2'}, ['--license', 'apache-2.0', "'Apache 2'"]),
    ({'license': 'other'}, ['--license-name', '--license-link']),
    ({'license_name': 'mine', 'license_link': 'LICENSE'}, ['--license other', 'apache-2.0']),
    ({'trained_on': 'two\nlines'}, ['--trained-on must be one line', 'leave it out']),
    ({'data_license': ' '}, ['--data-license must be one line']),
    ({'evaluated_on': 'a\ttab'}, ['--evaluated-on must be one line']),
    ({'source': "https://x.y/zoo' 'z"}, ['--source', 'without blanks and quotes']),
    ({'repo': 'colours'}, ['--repo', 'OWNER/NAME', "'colours'"]),
    ({'run_dir': Path('no/run')}, ['RUN_DIR no/run', 'summary.json', '--resume auto']),
], ids=lambda value: '-'.join(map(str, value.values())) if isinstance(value, dict) else '')
def test_bad_setting_is_refused_in_one_sentence(trained, tmp_path, changes, parts):
    with pytest.raises(ConfigError) as error:
        export.main(export.ExportSettings(**{'run_dir': trained, 'name': NAME, 'output': tmp_path / 'made', **changes}))
    for part in parts:
        assert part in str(error.value) and '\n' not in str(error.value)
    assert not any(tmp_path.iterdir())


def cut_weights(run_dir):
    path = run_dir / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-9])


def put_nan(run_dir):
    state = load_file(run_dir / 'model.safetensors')
    state['stages.1.blocks.0.norm1.running_mean'][2] = float('nan')
    save_file(state, run_dir / 'model.safetensors', metadata={'format': 'pt'})


def drop_tensor(run_dir):
    state = load_file(run_dir / 'model.safetensors')
    del state['head.norm.bias']
    save_file(state, run_dir / 'model.safetensors', metadata={'format': 'pt'})


def change_eps(run_dir):
    args = json.loads((run_dir / 'config.json').read_text())['model_args']
    change_json(run_dir / 'config.json', model_args={**args, 'conv_norm_eps': 2e-3})


@pytest.mark.parametrize(('damage', 'said'), [
    (cut_weights, 'not a checkpoint'), (put_nan, 'finite throughout, but stages.1.blocks.0.norm1.running_mean'),
    (drop_tensor, 'head.norm.bias'), (change_eps, 'another model than coatnet_pico_64.*conv_norm_eps'),
    (lambda run_dir: (run_dir / 'summary.json').unlink(), 'lacks summary.json; give one, or finish it with --resume'),
    (lambda run_dir: (run_dir / 'args.json').write_text('{"dataset"'), 'args.json cannot be read'),
    (lambda run_dir: (run_dir / 'args.json').write_text('{}'), 'not as finetune.py'),
    (lambda run_dir: change_json(run_dir / 'config.json', label_names=None), 'name each of its 3 classes'),
])
def test_damaged_or_different_run_is_refused_and_leaves_nothing(run_dir, damage, said):
    damage(run_dir)
    with pytest.raises(ConfigError, match=said):
        make(run_dir)
    assert [path.name for path in run_dir.parent.iterdir()] == ['run']


# Again


def test_second_export_takes_the_place_of_the_first_with_the_same_bytes(folder, trained):
    first = digests(folder)
    leftover = folder.with_name(f'.{NAME}.tmp')
    leftover.mkdir()
    (leftover / 'half.bin').touch()
    make(trained, output=folder, trained_on='Colours')
    assert digests(folder) == first and len(first) == 5
    make(trained, output=folder, license='mit')
    assert digests(folder).keys() == first.keys() and digests(folder)['config.json'] != first['config.json']
    assert [path.name for path in folder.parent.iterdir()] == [NAME]


@pytest.mark.parametrize('step', ['write_golden', 'write_card', 'replace_dir'])
def test_interrupted_export_leaves_the_earlier_one(folder, trained, monkeypatch, step):
    first = digests(folder)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_run, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(trained, output=folder, license='mit')
    assert digests(folder) == first and [path.name for path in folder.parent.iterdir()] == [NAME]


def test_swap_that_fails_half_way_puts_the_earlier_export_back(folder, trained, monkeypatch):
    first, rename = digests(folder), Path.rename

    def fail(path, target):
        if path.name.endswith('.tmp'):
            raise OSError(28, 'No space left on device')
        return rename(path, target)

    monkeypatch.setattr(Path, 'rename', fail)
    with pytest.raises(ConfigError, match=r'--output .* cannot be written: .*No space left.*choose another'):
        make(trained, output=folder, license='mit')
    assert digests(folder) == first and [path.name for path in folder.parent.iterdir()] == [NAME]


def test_output_that_is_no_export_is_left_alone(trained, folder, tmp_path):
    (folder / 'notes.txt').write_text('mine')
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'config.json').write_text('{}')
    (tmp_path / 'empty').mkdir()
    for output in (folder, tmp_path / 'file', tmp_path / 'other', trained):
        with pytest.raises(ConfigError, match=r'--output .* must not exist, be empty, or be an earlier export'):
            make(trained, output=output)
    assert (folder / 'notes.txt').read_text() == (tmp_path / 'file').read_text() == 'mine'
    assert {path.name for path in make(trained, output=tmp_path / 'empty').iterdir()} == FILES


def test_paths_of_the_machine_stay_at_home(run_dir):
    summary = json.loads((run_dir / 'summary.json').read_text())
    change_json(run_dir / 'summary.json', command=(
        'python /home/me/zoo/scripts/finetune.py --data-dir=/mnt/disk/colours --output output/x --dataset hfds/a/b'))
    assert str(run_dir) not in summary['command']
    folder = make(run_dir)
    assert release_of(folder)['command'] == (
        'python finetune.py --data-dir=colours --output output/x --dataset hfds/a/b')
    for path in (folder / 'README.md', folder / 'config.json'):
        assert '/home/' not in path.read_text() and '/mnt/' not in path.read_text()
        assert str(run_dir.parent) not in path.read_text()


@pytest.mark.parametrize(('data', 'trained_on', 'name'), [
    ({'data_dir': '../data/flowers'}, 'Oxford Flowers', 'Oxford Flowers, validation'),
    ({'data_dir': '../data/flowers'}, None, 'flowers, validation'),
    ({'data_dir': 'data/flowers/'}, None, 'flowers, validation'),
    ({'dataset': 'hfds/me/flowers', 'data_dir': '../cache'}, None, 'me/flowers, validation'),
    ({'dataset': 'hfds/me/flowers', 'data_dir': '../cache'}, 'Flowers', 'Flowers, validation')])
def test_data_are_named_without_the_folders_of_the_machine(run_dir, data, trained_on, name):
    change_json(run_dir / 'args.json', **data, teacher='local-dir:../runs/large', model='local-dir:../runs/base',
                pretrained=True)
    folder = make(run_dir, trained_on=trained_on, license='mit')
    release = release_of(folder)
    assert release['evaluated_on'] == name
    assert (release['teacher'], release['started_from']) == ('local-dir:large', 'pretrained weights of local-dir:base')
    metadata = ModelCard.load(folder / 'README.md').data
    assert {result.dataset_name for result in metadata.eval_results} == {name}
    assert '../' not in (folder / 'README.md').read_text().replace(release['command'], '')


def test_teacher_in_words_is_for_distilled_runs(run_dir):
    with pytest.raises(ConfigError, match=r'^--teacher .* had none; leave it out\.$'):
        make(run_dir, teacher='EfficientNet-Lite2')
    change_json(run_dir / 'args.json', teacher='local-dir:../runs/large')
    folder = make(run_dir, teacher='EfficientNet-Lite2, trained on ImageNet-1k')
    assert '| teacher | EfficientNet-Lite2, trained on ImageNet-1k |' in (folder / 'README.md').read_text()


def test_teacher_of_stored_outputs_is_named(run_dir):
    change_json(run_dir / 'args.json', teacher_outputs='../outputs')
    change_json(run_dir / 'summary.json', teacher='local-dir:../runs/large')
    assert release_of(make(run_dir))['teacher'] == 'local-dir:large'


def test_rounding_a_rounded_run_changes_nothing(run_dir):
    change = 'change of top-1 by rounding to float16 (points)'
    folder = make(run_dir, dtype='float16')
    assert f'| {change} | +0.000 |' not in (folder / 'README.md').read_text()
    shutil.copyfile(folder / 'model.safetensors', run_dir / 'model.safetensors')
    folder = make(run_dir, dtype='float16')
    assert f'| {change} | +0.000 |' in (folder / 'README.md').read_text()


@pytest.mark.parametrize(('data', 'split', 'name', 'picked'), [
    ('../data/colours', '', 'Colours, validation', True), ('colours/val', '', 'Colours, val', True),
    ('/mnt/colours', '--split test', 'Colours, test', False), ('../../imagenet/val', '', 'imagenet, val', False),
    ('hfds/me/other', '', 'hfds/me/other', False), ('../photos', '', 'photos', False)])
def test_data_of_an_evaluation_are_named_without_folders_too(run_dir, data, split, name, picked):
    row = {'checkpoint': '', 'model': f'local-dir:{run_dir}', 'img_size': 32, 'crop_pct': 0.9,
           'interpolation': json.loads((run_dir / 'config.json').read_text())['pretrained_cfg']['interpolation'],
           'valid_labels': 'all', 'real_labels': '', 'top1': 50., 'top5': 90., 'loss': 1., 'ece': 2., 'images': 9,
           'data': data, 'provenance': {'command': f'python scripts/eval_imagenet.py --data-dir {data} {split}'}}
    (run_dir / 'evaluation.json').write_text(json.dumps(row))
    settings = export.ExportSettings(run_dir=run_dir, name=NAME, trained_on='Colours')
    release = export_run.describe_release(settings, json.loads((run_dir / 'config.json').read_text()))
    assert (release['evaluated_on'], release['picked_best_epoch']) == (name, picked)


# ONNX and torch.export


def test_onnx_and_torch_export_give_the_golden_logits(run_settings, tmp_path, monkeypatch):
    small = dataclasses.replace(coatnet.model_cfgs['coatnet_pico_64'], depths=(1, 1, 1, 1), embed_dim=(32,) * 4)
    monkeypatch.setitem(coatnet.model_cfgs, 'coatnet_pico_64', small)
    finetune.main(dataclasses.replace(run_settings, output=str(tmp_path)))
    try:
        folder = make(tmp_path / 'run', with_onnx=True)
    except ConfigError as error:
        if torch.__version__ >= '2.15' or 'writes pickled data into model.pt2' not in str(error):
            raise
        pytest.skip(str(error))
    assert {path.name for path in folder.iterdir()} == {*FILES, 'model.onnx', 'model.pt2'}
    assert 'take `(N, 3, 32, 32)` for any N' in ' '.join((folder / 'README.md').read_text().split())
    expected = answer(f'local-dir:{folder}')
    for count in (1, 5):
        answers = onnx_files.onnx_answers(folder, IMAGES[:count])
        assert {*answers} == {'torch.export', 'onnxruntime'}
        for logits in answers.values():
            assert_same_up_to_rounding(logits, expected[:count])
    here = [str(Path(place).parent).encode() for place in (timm.__file__, coatnet.__file__, __file__)]
    for name in ('model.onnx', 'model.pt2'):
        assert not any(place in (folder / name).read_bytes() for place in here)

    verification.list_files(folder)
    onnx_files.check_no_pickles(folder / 'model.pt2')
    program = torch.export.load(folder / 'model.pt2')
    program.example_inputs = ((IMAGES,), {})
    torch.export.save(program, tmp_path / 'pickled.pt2')
    with pytest.raises(ConfigError, match=r'pickled.pt2 must hold no pickled data, but .*sample_inputs'):
        onnx_files.check_no_pickles(tmp_path / 'pickled.pt2')
    (folder / 'model.onnx').unlink()
    with pytest.raises(ConfigError, match=r'lacks model.onnx'):
        verification.list_files(folder)
    model_card.write_card(folder)
    assert 'model.onnx' not in (folder / 'README.md').read_text()
