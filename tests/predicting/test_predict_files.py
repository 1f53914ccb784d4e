"""scripts/predict.py: files read and written, rejected settings, command line, and several processes."""
import csv
import dataclasses
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import tyro
from PIL import Image
from timm.data import create_transform, resolve_input_data_config

import predict
from coatnet_train.models import released
from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo.releases import RELEASES
from support.commands import run_main, run_processes
from support.overlay_runs import NAMES, write_image, write_run, zoo


def test_folders_are_searched_and_bad_images_named_while_others_go_on(settings, image_path, tmp_path, capsys):
    folder = image_path.parent
    write_image(folder / 'deeper' / 'KITE.JPG', seed=1)
    write_image(folder / 'deeper' / 'kite.png', seed=2)
    (folder / 'deeper' / 'notes.txt').write_text('no image')
    (folder / 'empty.png').write_bytes(b'')
    whole = write_image(folder / 'cut.jpg', size=(200, 200)).read_bytes()
    (folder / 'cut.jpg').write_bytes(whole[:len(whole) // 2])
    (tmp_path / 'bare').mkdir()
    images = (folder, image_path, tmp_path / 'missing.jpg', tmp_path / 'bare')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert predict.main(dataclasses.replace(settings, images=images)) == 1
    out, err = capsys.readouterr()
    assert {path.name for path in settings.output.iterdir()} == {
        'kite-attention.png', 'KITE-attention.png', 'kite-attention-2.png', 'predictions.csv'}
    assert out.count(' -> ') == 3  # the image that is named twice is read once
    for name, reason in (('empty.png', 'cannot identify'), ('cut.jpg', 'truncated'), ('missing.jpg', 'No such file'),
                         ('bare', 'no images in this folder, but no files at all')):
        assert sum(name in line and reason in line for line in err.splitlines()) == 1, (name, err)
    assert 'notes.txt' not in err + out
    assert before == {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_table_has_a_row_for_each_image_that_was_read(settings, image_path, tmp_path, randomize):
    """Rows are in the order of the images, with up to five labels, their descriptions and confidences."""
    name = write_run(tmp_path / 'run', randomize(zoo()), NAMES)
    other = write_image(tmp_path / 'a, "b".png', seed=1)
    own = dict(model=name, model_kwargs=(), num_classes=None, img_size=None,
               images=(image_path, tmp_path / 'no.png', other))
    assert predict.main(dataclasses.replace(settings, **own)) == 1
    with (settings.output / 'predictions.csv').open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['file'] for row in rows] == [str(image_path), str(other)]
    assert [*rows[0]] == ['file', *(f'{column}_{rank}' for rank in range(1, 5)
                                    for column in ('label', 'description', 'confidence'))]
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_input_data_config(model, {}, use_test_size=True))
    for row, path in zip(rows, (image_path, other), strict=True):
        with torch.no_grad():
            shares, best = model(transform(Image.open(path).convert('RGB'))[None])[0].softmax(-1).sort(descending=True)
        assert [row[f'label_{rank}'] for rank in range(1, 5)] == [NAMES[index] for index in best]
        assert [float(row[f'confidence_{rank}']) for rank in range(1, 5)] == pytest.approx(shares.tolist(), abs=1e-5)
        described = {row[f'label_{rank}']: row[f'description_{rank}'] for rank in range(1, 5)}
        assert described['n01440764'] == 'tench, Tinca tinca' and described['my own class'] == ''
    (settings.output / 'predictions.csv').unlink()
    (settings.output / 'predictions.csv').mkdir()
    with pytest.raises(ConfigError, match=r'--output: .*predictions.csv cannot be written'):
        predict.main(dataclasses.replace(settings, **own))


def test_the_best_release_is_opened_unless_another_is_named(tmp_path, monkeypatch):
    """The best release is packaged, has the most classes, then the highest top-1; coatnet_zoo is not imported."""
    def entry(top1: float | None, classes: int = 200, packaged: str | None = 'file') -> dict:
        return {'packaged': packaged, 'pretrained_cfg': {'num_classes': classes},
                'release': {'metrics': {'top1': top1}}}

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    assert predict.PredictionSettings(images=()).model == released.best_release() == max(
        RELEASES, key=lambda name: RELEASES[name]['release']['metrics']['top1'])
    package = tmp_path / 'coatnet_zoo'
    (package / 'weights').mkdir(parents=True)
    monkeypatch.setattr(released, 'find_spec', lambda name: SimpleNamespace(origin=package / '__init__.py'))
    with pytest.raises(ConfigError, match='--model must be given where no weights are released'):
        released.best_release()
    releases = {'worse': entry(30.), 'digits': entry(99., 10), 'far': entry(80., 1000, None), 'best': entry(40.),
                'unknown': entry(None)}
    (package / 'weights' / 'releases.json').write_text(json.dumps(releases))
    assert released.released_models() == ('best', 'worse', 'unknown', 'digits', 'far')
    assert predict.PredictionSettings(images=()).model == 'best'
    published = {f'coatnet_0_kecam.{tag}': {'url': '', 'md5': '0123456789', 'top1': top1}
                 for tag, top1 in (('small', 80.), ('in1k', 83.), ('absent', 90.))}
    (package / 'weights' / 'kecam.json').write_text(json.dumps(published))
    cache = tmp_path / 'torch/hub/checkpoints'
    cache.mkdir(parents=True)
    for name in ('small', 'in1k', 'absent'):
        (cache / f'coatnet_0_kecam-{name}-01234567.safetensors').touch()
        if name != 'absent':  # its conversion was interrupted
            (cache / f'coatnet_0_kecam-{name}-01234567.safetensors.sha256').touch()
    assert released.released_models() == (
        'best', 'worse', 'unknown', 'digits', 'coatnet_0_kecam.in1k', 'coatnet_0_kecam.small', 'far')
    (package / 'weights' / 'releases.json').write_text('{"best": {}}')
    with pytest.raises(ConfigError, match=r'releases\.json is damaged .*reinstall coatnet_zoo'):
        released.best_release()


def test_one_complaint_is_enough_for_exit_code_1(settings, image_path, tmp_path):
    (tmp_path / 'bare').mkdir()
    for other in (tmp_path / 'bare', tmp_path / 'missing.png'):
        assert predict.main(dataclasses.replace(settings, images=(image_path, other))) == 1
    assert predict.main(settings) == 0


def test_no_image_that_is_read_is_ever_written_over(settings, image_path):
    folder = image_path.parent
    taken = write_image(folder / 'kite-attention.png', seed=1)
    (folder / 'link').symlink_to(folder)
    before = taken.read_bytes(), image_path.read_bytes()
    for output in (folder, folder / 'link'):
        assert predict.main(dataclasses.replace(settings, images=(image_path, taken), output=output)) == 0
    assert before == (taken.read_bytes(), image_path.read_bytes())
    assert {path.name for path in folder.iterdir()} - {'link'} == {
        'kite.png', 'kite-attention.png', 'kite-attention-2.png', 'kite-attention-attention.png', 'predictions.csv'}


def test_a_long_name_ends_no_run(settings, image_path, tmp_path, capsys):
    folder = image_path.parent
    for name in (f'{"a" * 240}1.png', f'{"a" * 240}2.png', f'{"ä" * 120}.png'):
        (folder / name).write_bytes(image_path.read_bytes())
    images = (tmp_path / ('x' * 300 + '.png'), folder)
    assert predict.main(dataclasses.replace(settings, images=images)) == 1
    out, err = capsys.readouterr()
    assert out.count(' -> ') == 4 and len(list(settings.output.glob('*.png'))) == 4
    assert 'File name too long' in err


def test_names_that_are_no_utf8_are_escaped(settings, image_path, tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b'caf\xe9')
    folder.mkdir()
    for name, content in ((b'good\xff.png', image_path.read_bytes()), (b'bad\xff.png', b'')):
        (folder / os.fsdecode(name)).write_bytes(content)
    assert predict.main(dataclasses.replace(settings, images=(folder,))) == 1
    out, err = capsys.readouterr()
    assert r'caf\xe9/good\xff.png -> ' in out and r'caf\xe9/bad\xff.png: cannot be read' in err
    out.encode()  # contains no surrogates
    assert (settings.output / os.fsdecode(b'good\xff-attention.png')).is_file()


def test_overlays_are_whole_or_absent(settings, monkeypatch):
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, path, **_: (
        path.write_bytes(b'half'), (_ for _ in ()).throw(KeyboardInterrupt))[0])
    with pytest.raises(KeyboardInterrupt):
        predict.main(settings)
    assert not [path for path in settings.output.iterdir() if not path.name.startswith('.')]


# Refusals


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(images=()), 'IMAGES must name at least one image'),
    (dict(explain='saliency'), "--explain must be auto, attention, kernels, gradcam, got 'saliency'"),
    (dict(explain='kernels'),
     '--explain kernels needs a stage of block type D, but coatnet_pico_64 has the layout CCTT'),
    (dict(stage=2), '--explain auto needs --stage 2 to be one of block type T or D, but .* the layout CCTT'),
    (dict(stage=5), '--stage must be from 1 to 4, got 5'),
    (dict(explain='gradcam', stage=4), '--stage chooses a stage .* Grad-CAM is shown'),
    (dict(explain='gradcam', at=(0.5, 0.5)), '--at chooses a query or a kernel'),
    (dict(at=(0.5, 1.5)), r'--at must be two fractions of the image from 0 to 1.*got \(0.5, 1.5\)'),
    (dict(model='test_vit', model_kwargs=(), explain='attention'), 'test_vit is not a model of this zoo'),
    (dict(model='coatnet_pico_65'), 'did you mean coatnet_pico_64'),
    (dict(num_classes=0), 'has no classes to predict'),
    (dict(device='tpu'), '--device must be auto, cpu or cuda'),
    (dict(checkpoint='nowhere.pth'), '--checkpoint nowhere.pth is not a file'),
    (dict(images=(Path('nowhere.png'),)), 'IMAGES must name at least one image that can be read'),
])
def test_refusals_name_the_option_and_the_way_out(settings, changes, message):
    with pytest.raises(ConfigError, match=message):
        predict.main(dataclasses.replace(settings, **changes))
    assert not list(settings.output.glob('*'))


def test_a_run_folder_keeps_its_own_predictions(settings):
    settings.output.mkdir(parents=True)
    (settings.output / 'args.json').write_text('{}')
    (settings.output / 'predictions.csv').write_text('of the run')
    with pytest.raises(ConfigError, match=r'--output .* must not be the run folder of finetune.py'):
        predict.main(settings)
    assert (settings.output / 'predictions.csv').read_text() == 'of the run'


def test_output_that_cannot_be_written_is_refused(settings, image_path):
    with pytest.raises(ConfigError, match=r'--output .* cannot be written'):
        predict.main(dataclasses.replace(settings, output=image_path / 'overlays'))
    (settings.output / 'kite-attention.png').mkdir(parents=True)
    with pytest.raises(ConfigError, match=r'--output: .*kite-attention.png cannot be written'):
        predict.main(settings)


@pytest.mark.parametrize('content', [b'', b'hello'])
def test_a_file_without_weights_is_refused(settings, tmp_path, content):
    (tmp_path / 'weights.pth').write_bytes(content)
    with pytest.raises(ConfigError, match=r'--checkpoint .*weights.pth holds no weights that torch or safetensors'):
        predict.main(dataclasses.replace(settings, checkpoint=str(tmp_path / 'weights.pth')))


def test_pretrained_is_passed_on_and_its_failure_is_a_sentence(settings):
    with pytest.raises(ConfigError, match=r'cannot be built: .*[Pp]retrained'):
        predict.main(dataclasses.replace(settings, model='coatnet_pico', pretrained=True))


def test_a_name_with_a_tag_means_its_weights(image_path, tmp_path, capsys):
    settings = predict.PredictionSettings(images=(image_path,), output=tmp_path / 'out', device='cpu')
    assert predict.main(settings) == 0
    said = capsys.readouterr().out
    assert f'{settings.model}: its own weights' in said and len(re.findall(r'n\d{8}  \w', said)) == 5
    assert predict.main(dataclasses.replace(settings, model=f'{settings.model.partition(".")[0]}.untrained')) == 0
    assert '--pretrained' not in (said := capsys.readouterr().out) and 'RANDOM WEIGHTS' in said
    assert predict.main(dataclasses.replace(settings, model=settings.model.partition('.')[0])) == 0
    assert 'RANDOM WEIGHTS: the predictions mean nothing; --pretrained loads its weights' in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"has no tag 'nonsense'; give one of {re.escape(settings.model)}, "):
        predict.main(dataclasses.replace(settings, model=f'{settings.model.partition(".")[0]}.nonsense'))


# The command line, and several processes


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_share_the_images(settings, image_path, tmp_path, randomize, capsys):
    name = write_run(tmp_path / 'run', randomize(zoo()), NAMES)
    paths = [write_image(image_path.parent / f'{i}.png', seed=i) for i in range(3)] + [tmp_path / 'missing.png']
    own = dict(images=tuple(paths), model=name, model_kwargs=(), num_classes=None, img_size=None)
    assert predict.main(dataclasses.replace(settings, **own)) == 1
    one = capsys.readouterr().out.splitlines()
    pngs = {path.name: path.read_bytes() for path in settings.output.iterdir()}
    assert len(one) == 17 and len(pngs) == 4  # with predictions.csv

    for path in settings.output.iterdir():
        path.unlink()
    two = run_processes('predict.py', *paths, '--model', name, '--output', settings.output, '--device', 'cpu')
    assert two.returncode == 1
    said = [line for line in two.stdout.splitlines() if line and line in one]  # gloo may add that it is connected
    assert sorted(said) == sorted(filter(None, one))
    assert two.stderr.count('missing.png: cannot be read') == 1
    assert pngs == {path.name: path.read_bytes() for path in settings.output.iterdir()}


def test_command_line_ends_with_a_sentence(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, 'predict.py', tmp_path / 'a.png', tmp_path / 'b.png', '--model', 'test_resnet',
                    '--img-size', 32, '--output', tmp_path / 'out', '--device', 'cpu') == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        'predict.py: IMAGES must name at least one image that can be read, and none of these can; see above for the '
        'reasons.')


def test_flags_are_read_in_any_order():
    settings = tyro.cli(predict.PredictionSettings, args=[
        'a.png', 'folder', '--model', 'test_vit', '--at', '0.25', '0.5', '--explain', 'gradcam', '--stage', '3',
        '--checkpoint', 'w.pth', '--output', 'out', '--pretrained', '--device', 'cpu'])
    assert settings.images == (Path('a.png'), Path('folder')) and settings.at == (0.25, 0.5)
    assert (settings.explain, settings.stage, settings.checkpoint, settings.output, settings.pretrained) == (
        'gradcam', 3, 'w.pth', Path('out'), True)
