"""hub/convert.py: third-party weights as a run folder, which is then released and fine-tuned."""
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

import app
import convert
import convert_run
import export
import export_run
import finetune
import predict
import publish
import publish_run
import verification
import verify
from coatnet_train.models import released
from coatnet_train.runtime.cli import ConfigError
from coatnet_zoo import kecam
from coatnet_zoo.models import coatnet
from support.constants import ROOT
from support.images import write_images
from support.keras_files import write_published

pytest.importorskip('h5py', reason='h5py comes with the test extra')

NAME = 'coatnet_0_kecam.in1k'
FILES = ROOT / 'tests/models/kecam'
TINY = ('depths=(1,2,2,1)', 'embed_dim=(64,32,64,96)', 'stem_width=32')
TOLERANCE = 2e-5  # as in tests/models/test_kecam.py
IMAGENET = {'license': 'other', 'license_name': 'imagenet-non-commercial',
            'license_link': 'https://www.image-net.org/download.php'}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of torch.hub."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    assert torch.hub.get_dir() == str(tmp_path / 'torch/hub')
    return tmp_path / 'torch/hub/checkpoints'


def class_names(folder: Path, count: int = 10) -> Path:
    path = folder / 'classes.txt'
    path.write_text('\n'.join(f'class {i}' for i in range(count)) + '\n')
    return path


def tiny(tmp_path: Path, **options) -> convert.ConvertSettings:
    """Settings that convert the small file that kecam wrote."""
    return convert.ConvertSettings(**{
        'source': str(FILES / 'coatnet_tiny_weights.h5'), 'model_kwargs': TINY, 'class_names': class_names(tmp_path),
        'output': tmp_path / 'run', **options})


def origin_of(folder: Path) -> dict:
    return json.loads((folder / 'origin.json').read_text())


@pytest.fixture
def small_kecam(monkeypatch) -> None:
    """Shrink the registered architecture to the size of kecam's small file."""
    monkeypatch.setitem(coatnet.model_cfgs, 'coatnet_0_kecam', dataclasses.replace(
        coatnet.model_cfgs['coatnet_0_kecam'], depths=(1, 2, 2, 1), embed_dim=(64, 32, 64, 96), stem_width=32))


# the run folder


def test_the_run_folder_gives_the_logits_of_kecam(tmp_path, capsys):
    run = convert.main(tiny(tmp_path))
    assert {path.name for path in run.iterdir()} == {'config.json', 'model.safetensors', 'origin.json'}
    model = timm.create_model(f'local-dir:{run}', pretrained=True).eval()
    with np.load(FILES / 'coatnet_tiny_reference.npz') as arrays, torch.no_grad():
        logits = model(torch.from_numpy(arrays['images']))
        assert (logits - torch.from_numpy(arrays['logits'])).abs().max() <= TOLERANCE
    assert model.img_size == (64, 64)  # from its bias tables
    assert tuple(model.pretrained_cfg['mean']) == (0.485, 0.456, 0.406)
    assert list(model.pretrained_cfg['label_names']) == [f'class {i}' for i in range(10)]
    origin, file = origin_of(run), FILES / 'coatnet_tiny_weights.h5'
    assert origin['md5'] == hashlib.md5(file.read_bytes()).hexdigest() and origin['file'] == file.name
    assert (origin['url'], origin['top1'], origin['chelsea'], origin['trained_on']) == (None,) * 4
    assert origin.items() >= IMAGENET.items()
    assert 'is of no file that keras_cv_attention_models published' in capsys.readouterr().out


def test_a_published_file_is_known_by_its_md5(tmp_path, monkeypatch):
    md5 = hashlib.md5((FILES / 'coatnet_tiny_model.h5').read_bytes()).hexdigest()
    monkeypatch.setitem(kecam.WEIGHTS, NAME, kecam.KecamWeights('https://x.y/z.h5', md5, 82.79))
    origin = origin_of(convert.main(tiny(tmp_path, source=str(FILES / 'coatnet_tiny_model.h5'))))
    assert (origin['url'], origin['top1'], origin['trained_on']) == ('https://x.y/z.h5', 82.79, 'ImageNet-1k')
    said = dict(origin='https://a.b', trained_on='Noise', license='mit', source=str(FILES / 'coatnet_tiny_model.h5'))
    origin = origin_of(convert.main(tiny(tmp_path, **said)))  # replaces the earlier one
    assert (origin['url'], origin['trained_on'], origin['license'], origin['license_name']) == (
        'https://a.b', 'Noise', 'mit', None)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_timms_coatnet_goes_into_ours(suffix, tmp_path):
    sizes = dict(depths=(1, 1, 1, 1), num_classes=4, img_size=96)
    torch.manual_seed(0)
    theirs = timm.create_model('coatnet_0_224', **sizes).eval()
    file = tmp_path / f'theirs{suffix}'
    (save_file if suffix == '.safetensors' else torch.save)(theirs.state_dict(), file)
    settings = convert.ConvertSettings(
        source=str(file), model='coatnet_0', model_kwargs=('flavor=timm', 'depths=(1,1,1,1)'), license='mit',
        class_names=class_names(tmp_path, 4), output=tmp_path / 'run', origin='https://x.y', trained_on='Noise')
    run = convert.main(settings)
    ours, images = timm.create_model(f'local-dir:{run}', pretrained=True).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() <= 1e-5 * theirs(images).abs().max() + 1e-6
    assert ours.img_size == (96, 96)
    origin = origin_of(run)
    assert (origin['url'], origin['license'], origin['trained_on'], origin['data_license']) == (
        'https://x.y', 'mit', 'Noise', None)
    with pytest.raises(ConfigError, match=r"--model-kwargs flavor=timm"):
        convert.main(dataclasses.replace(settings, model_kwargs=('depths=(1,1,1,1)',)))
    with pytest.raises(ConfigError, match=r'is not a checkpoint of coatnet_0 with .*flavor'):  # a tag changes no model
        export.main(export.ExportSettings(run_dir=run, name='coatnet_0.noise', output=tmp_path / 'release'))


def test_timms_coatnet_with_a_stem_bias_is_exported(tmp_path, monkeypatch):
    """A stem bias implies the official choices, which are those of the registered architecture."""
    monkeypatch.setitem(coatnet.model_cfgs, 'coatnet_0', dataclasses.replace(
        coatnet.model_cfgs['coatnet_0'], depths=(1, 1, 1, 1)))
    theirs = timm.create_model('coatnet_0_224', stem_bias=True, depths=(1, 1, 1, 1), num_classes=4, img_size=64)
    torch.save({'state_dict': theirs.state_dict()}, tmp_path / 'theirs.pth')
    run = convert.main(convert.ConvertSettings(
        source=str(tmp_path / 'theirs.pth'), model='coatnet_0', license='mit', origin='https://x.y',
        class_names=class_names(tmp_path, 4), output=tmp_path / 'run'))
    folder = export.main(export.ExportSettings(run_dir=run, name='coatnet_0.noise', output=tmp_path / 'release'))
    monkeypatch.setattr(verification, 'check_in_fresh_process', lambda folder: 'left out')
    assert 'model.safetensors' in verification.verify(folder)
    assert torch.equal(load_file(folder / 'model.safetensors')['stem.conv1.bias'], theirs.stem.conv1.bias)
    config, text = json.loads((folder / 'config.json').read_text()), (folder / 'README.md').read_text()
    assert config['pretrained_cfg']['license'] == 'mit' and '| address | https://x.y |' in text
    assert 'chelsea' not in text and 'Training data (not stated): licence not stated' in text


@pytest.mark.parametrize(('options', 'said'), [
    (dict(source='missing.h5'), 'SOURCE missing.h5 is not a file; give one'),
    (dict(source='coatnet_0'), r'SOURCE must be a file that ends in \.h5'),
    (dict(source='coatnet_0_kecam.in22k'), '--model-kwargs must be left out'),
    (dict(source='coatnet_0_kecam.in22k', model_kwargs=()), 'SOURCE coatnet_0_kecam.in22k is none of coatnet_0_kecam'),
    (dict(source=NAME, model='coatnet_0', model_kwargs=()), '--model must be coatnet_0_kecam for SOURCE'),
    (dict(source=NAME, model_kwargs=('layout=CCDD',)), '--model-kwargs must be left out for SOURCE'),
    (dict(source=__file__[:-3] + '.pth'), 'is not a file'),
    (dict(model='coatnet_0_kekam'), '--model coatnet_0_kekam must be a name of the zoo.*did you mean coatnet_0_kecam'),
    (dict(model='coatnet_0'), 'Create the model as coatnet_0_kecam|is of another architecture|it has other layers'),
    (dict(model_kwargs=()), 'does not fit --model coatnet_0_kecam'),
    (dict(class_names=None), r'each of the 10 classes of SOURCE .* those of ImageNet-1k are 1000'),
    (dict(class_names=Path('nothing.txt')), '--class-names nothing.txt is not a file'),
    (dict(license='other'), '--license other needs --license-name'),
    (dict(origin='a\nb'), '--origin must be one line of text'),
    (dict(check_chelsea=True), r'--check-chelsea is for weights of 1000 classes .* SOURCE has 10 and \(3, 64, 64\)'),
], ids=range(15))
def test_what_cannot_be_converted_is_a_sentence_and_writes_nothing(options, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        convert.main(tiny(tmp_path, **options))
    assert not (tmp_path / 'run').exists()


def test_files_of_others_need_what_they_do_not_tell(tmp_path):
    file = tmp_path / 'theirs.pth'
    torch.save({'weight': torch.zeros(1)}, file)
    said = dict(source=str(file), model='coatnet_0', license='mit', class_names=class_names(tmp_path))
    for name in ('model', 'license', 'class_names'):
        with pytest.raises(ConfigError, match=rf'--{name.replace("_", "-")} must be given for SOURCE'):
            convert.main(convert.ConvertSettings(**{**said, name: None}))
    with pytest.raises(ConfigError, match='--check-chelsea knows what weights of kecam see'):
        convert.main(convert.ConvertSettings(**said, check_chelsea=True))
    with pytest.raises(ConfigError, match=r'no head\.fc\.weight and no stem\.conv1\.weight'):
        convert.main(convert.ConvertSettings(**said))


def test_nothing_but_a_conversion_is_replaced(tmp_path):
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/model.safetensors').write_text('of somebody')
    with pytest.raises(ConfigError, match='must not exist, be empty, or be an earlier conversion'):
        convert.main(tiny(tmp_path))
    assert (tmp_path / 'run/model.safetensors').read_text() == 'of somebody'


def test_values_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    read = kecam.read_h5
    monkeypatch.setattr(kecam, 'read_h5', lambda path: read(path) | {'head.fc.bias': torch.full((10,), torch.nan)})
    with pytest.raises(ConfigError, match=r'must be finite throughout, but head\.fc\.bias is not'):
        convert.main(tiny(tmp_path))


def test_chelsea_goes_into_the_model_as_kecam_shows_it():
    """The whole image of 300 x 451 is resized without antialiasing; probabilities are those of classes 285 and 282."""
    seen = []

    class Looks(torch.nn.Module):
        num_classes = 1000

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            seen.append(image)
            logits = torch.full((1, 1000), -torch.inf)
            logits[0, 285], logits[0, 282], logits[0, 0] = torch.tensor([0.99324566, 0.00381939, 0.00293495]).log()
            return logits

    config = dict(input_size=(3, 224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    shares = convert_run.see_chelsea(Looks(), config)
    assert shares == pytest.approx((0.99324566, 0.00381939), abs=1e-6)
    convert_run.check_chelsea(shares, 'it')
    from skimage.data import chelsea
    pixels, rows = chelsea() / 255, (np.arange(224) + .5) * 300 / 224 - .5
    top = rows.astype(int)
    columns = (np.arange(224) + .5) * 451 / 224 - .5
    left = columns.astype(int)
    down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
    expected = ((pixels[top][:, left] * (1 - right) + pixels[top][:, left + 1] * right) * (1 - down)
                + (pixels[top + 1][:, left] * (1 - right) + pixels[top + 1][:, left + 1] * right) * down)
    expected = (expected - config['mean']) / config['std']
    assert np.abs(seen[0][0].permute(1, 2, 0).numpy() - expected).max() < 1e-4
    for wrong in ((0.9921, 0.00381939), (0.99324566, 0.0049)):
        with pytest.raises(ConfigError, match=r'^--check-chelsea: SOURCE it sees .* nothing was written\.$'):
            convert_run.check_chelsea(wrong, 'it')


# released, and fine-tuned


def test_export_and_verify_take_it_and_the_card_says_where_it_comes_from(
        tmp_path, small_kecam, monkeypatch):
    run = convert.main(tiny(tmp_path, model_kwargs=()))
    with pytest.raises(ConfigError, match=r'^--name coatnet_0_kecam\.in1k is that of published weights, of MD5'):
        export.main(export.ExportSettings(run_dir=run, name=NAME, output=tmp_path / 'release'))
    folder = export.main(export.ExportSettings(run_dir=run, name='coatnet_0_kecam.small', output=tmp_path / 'release'))
    assert {path.name for path in folder.iterdir()} == {
        'README.md', 'config.json', 'model.safetensors', 'golden.safetensors'}
    monkeypatch.setattr(verification, 'check_in_fresh_process', lambda folder: verification.check_answers(folder)[0])
    assert verification.verify(folder).keys() == {path.name for path in folder.iterdir()}
    config, text = json.loads((folder / 'config.json').read_text()), (folder / 'README.md').read_text()
    origin = origin_of(run)
    assert config['release']['origin'] == {key: origin[key] for key in ('file', 'md5', 'url', 'top1', 'chelsea')}
    assert set(config['release']['metrics'].values()) == {None} and config['release']['evaluated_on'] is None
    card = ModelCard.load(folder / 'README.md').data
    assert (card.license, card.license_name, card.license_link) == tuple(IMAGENET.values())
    for part in (f'| MD5 of the file | {origin["md5"]} |', '| file | coatnet_tiny_weights.h5 |',
                 '## Where it comes from', 'python hub/convert.py coatnet_tiny_weights.h5 --check-chelsea',
                 'Nobody is known to have reported'):
        assert part in text, part
    for part in ('curves.png', 'How it was trained', 'Measured on', 'None'):
        assert part not in text, part
    with pytest.raises(ConfigError, match=r'--teacher describes .* made by convert\.py; leave it out'):
        export.main(export.ExportSettings(
            run_dir=run, name='coatnet_0_kecam.small', output=tmp_path / 'release', teacher='somebody'))
    (folder / 'curves.png').write_bytes(b'of another run')
    with pytest.raises(ConfigError, match=r'curves\.png must not be there: these weights were converted'):
        verification.verify(folder)


def test_the_card_of_a_published_file_says_what_its_author_reports(tmp_path, small_kecam):
    run = convert.main(tiny(tmp_path, model_kwargs=()))
    (run / 'origin.json').write_text(json.dumps({**origin_of(run), 'top1': 82.79, 'chelsea': [0.99324, 0.00382]}))
    folder = export.main(export.ExportSettings(
        run_dir=run, name='coatnet_0_kecam.small', output=tmp_path / 'release', dtype='float16'))
    text = (folder / 'README.md').read_text()
    assert 'Top-1 accuracy as its author reports: 82.79 %. To measure it: `python scripts/eval_imagenet.py' in text
    assert 'float32 weights, before' not in text  # neither dtype was measured
    assert 'Egyptian cat 0.99324, tiger cat 0.00382' in text and '| top-1 accuracy (%) | not measured |' in text
    assert ModelCard.load(folder / 'README.md').data.eval_results is None  # the author's figure is not our result


def test_figures_of_an_evaluation_go_into_the_release(tmp_path, small_kecam):
    run = convert.main(tiny(tmp_path, model_kwargs=()))
    row = {'checkpoint': '', 'model': f'local-dir:{run}', 'img_size': 64, 'crop_pct': 0.95, 'interpolation': 'bicubic',
           'valid_labels': 'all', 'real_labels': '', 'top1': 50., 'top5': 90., 'loss': 1., 'ece': 2., 'images': 9,
           'data': '/mnt/imagenet/val', 'provenance': {'command': 'python scripts/eval_imagenet.py'}}
    (run / 'evaluation.json').write_text(json.dumps(row))
    folder = export.main(export.ExportSettings(run_dir=run, name='coatnet_0_kecam.small', output=tmp_path / 'release'))
    release = json.loads((folder / 'config.json').read_text())['release']
    assert (release['metrics']['top1'], release['evaluated_on'], release['picked_best_epoch']) == (
        50., 'imagenet, val', False)
    assert 'Measured on: imagenet, val.' in (folder / 'README.md').read_text()


def test_a_damaged_origin_is_a_sentence(tmp_path, small_kecam):
    run = convert.main(tiny(tmp_path, model_kwargs=()))
    for content in ('{}', '[', '{"file": 1}'):
        (run / 'origin.json').write_text(content)
        with pytest.raises(ConfigError, match=r'origin\.json is not as convert\.py writes it: .*; convert again'):
            export.main(export.ExportSettings(run_dir=run, name='coatnet_0_kecam.small', output=tmp_path / 'release'))


def test_licence_of_a_run_that_started_from_it(tmp_path):
    run = convert.main(tiny(tmp_path))
    for start in (dict(model=NAME, pretrained=True), dict(model='coatnet_0_kecam', pretrained=True),
                  dict(model=f'local-dir:{run}', pretrained=True),
                  dict(model='coatnet_0_kecam', initial_checkpoint=str(run / 'model.safetensors'))):
        assert export_run.license_of_start(start) == IMAGENET, start
    assert export_run.license_of_start(dict(model='coatnet_0_kecam')) == {'license': 'apache-2.0'}


@pytest.mark.parametrize(('layout', 'fresh'), [
    pytest.param('CCTT', '', marks=pytest.mark.slow), ('CCDD', '2|3')])
def test_fine_tuning_starts_from_the_weights_of_each_stage(layout, fresh, tmp_path, small_kecam, caplog):
    """CCDD: C stages come from the weights, D stages are initialised, and a log message names the latter."""
    path = kecam.cached_path(NAME)
    path.parent.mkdir(parents=True)
    weights = kecam.read_h5(FILES / 'coatnet_tiny_weights.h5')
    kecam._write(path, weights, kecam.WEIGHTS[NAME])
    with caplog.at_level(logging.WARNING, 'coatnet_zoo'):
        finetune.main(finetune.FinetuneSettings(
            data_dir=str(write_images(tmp_path / 'colours', train=4, val=2)), model=NAME, pretrained=True, img_size=64,
            model_kwargs=(f'layout={layout}',), epochs=1, batch_size=12, lr=1e-12, min_lr=0., warmup_epochs=0.,
            workers=0, device='cpu', output=str(tmp_path), experiment='tuned'))
    assert caplog.messages == ['Not in the checkpoint and randomly initialised: stages.2 (D in place of T), '
                               'stages.3 (D in place of T).'][:bool(fresh)]
    tuned = load_file(tmp_path / 'tuned/model.safetensors')
    kept = [key for key in weights if not key.startswith('head') and 'running' not in key and 'tracked' not in key
            and not any(key.startswith(f'stages.{stage}') for stage in fresh.split('|') if stage)]
    assert len(kept) > 40
    for key in kept:
        assert torch.allclose(tuned[key], weights[key], atol=1e-6), key
    assert len(tuned['head.fc.weight']) == 3
    assert timm.create_model(f'local-dir:{tmp_path / "tuned"}', pretrained=True).cfg.layout == layout


# with a file of full size


@pytest.mark.slow
def test_from_nothing_to_a_dry_run_of_publishing(hub, client, tmp_path, monkeypatch, capsys):
    """A full-size file of random numbers: converted, exported, verified in a fresh process, packaged."""
    source = write_published(tmp_path / 'coatnet0_224_imagenet.h5')
    with pytest.raises(ConfigError, match=r'--check-chelsea: SOURCE .* nothing was written'):
        convert.main(convert.ConvertSettings(source=str(source), output=tmp_path / 'run', check_chelsea=True))
    run = convert.main(convert.ConvertSettings(source=str(source), output=tmp_path / 'run'))
    expected = kecam.read_h5(source)
    found = load_file(run / 'model.safetensors')
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    folder = export.main(export.ExportSettings(
        run_dir=run, name='coatnet_0_kecam.in1k_random', output=tmp_path / 'release'))
    verify.main(verify.VerifySettings(folder=folder))

    monkeypatch.setattr(publish_run, 'WEIGHTS', tmp_path / 'weights')
    monkeypatch.setattr(publish_run, 'verify', lambda folder: {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())})
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights/releases.json').write_text('{}\n')
    publish.main(publish.PublishSettings(folder=folder, repo='owner/kecam', package=True))
    said = capsys.readouterr().out
    assert 'owner/kecam on the Hub: does not exist' in said and 'nothing on the Hub was changed' in said
    assert not hub.repos
    entry = publish_run.read_releases()['coatnet_0_kecam.in1k_random']
    assert entry['release']['origin']['md5'] == hashlib.md5(source.read_bytes()).hexdigest()
    assert entry['pretrained_cfg']['license'] == 'other' and len(entry['pretrained_cfg']['label_names']) == 1000
    assert entry['release']['license_name'] == 'imagenet-non-commercial'


@pytest.mark.slow
def test_the_space_and_predict_offer_it_once_it_is_in_the_cache(tmp_path, monkeypatch):
    assert NAME not in released.released_models() and app.choose_models(app.AppSettings()) == released.released_models()
    path = kecam.cached_path(NAME)
    path.parent.mkdir(parents=True)
    kecam._write(path, kecam.read_h5(write_published(tmp_path / 'some.h5')), kecam.WEIGHTS[NAME])
    assert released.cached_kecam() == (NAME,) and NAME in app.choose_models(app.AppSettings())
    assert released.best_release() != NAME
    image = next(write_images(tmp_path / 'colours', train=1, val=1).rglob('*.png'))
    settings = predict.PredictionSettings(images=(image,), model=NAME, output=tmp_path / 'seen', device='cpu')
    assert predict.main(settings) == 0
    assert len((tmp_path / 'seen/predictions.csv').read_text().splitlines()) == 2
    # needs neither network nor .h5 file
    run = convert.main(convert.ConvertSettings(source=NAME, output=tmp_path / 'run'))
    assert origin_of(run).items() >= dict(
        file='coatnet0_224_imagenet.h5', md5=kecam.WEIGHTS[NAME].md5, url=kecam.WEIGHTS[NAME].url, top1=82.79,
        trained_on='ImageNet-1k').items()
