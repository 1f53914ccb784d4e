"""Every script reads grey images for a grey model without --in-chans, as a comparison with the model itself shows."""
import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import answer
import eval_imagenet
import export
import extract_features
import finetune
import predict
import robustness
import transfer
from coatnet_train.explain import panels
from coatnet_train.models.config import ModelSettings
from coatnet_train.models.open_model import open_model
from coatnet_train.runtime.cli import ConfigError
from support.constants import CLASSES
from support.feature_runs import read_rows
from support.finetune_runs import read_metrics, write_shards
from support.images import write_images

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def settings(tmp_path_factory) -> finetune.FinetuneSettings:
    """Settings of a first run on grey images, whose colours also differ in grey."""
    folder = tmp_path_factory.mktemp('grey')
    return finetune.FinetuneSettings(
        data_dir=str(write_images(folder / 'colours')), model='lightconvnet_pico_64', img_size=32, in_chans=1,
        epochs=1, batch_size=12, lr=1e-3, warmup_epochs=0.0, mean=(0.4,), std=(0.3,), workers=0, device='cpu',
        scale=(0.6, 1.0), output=str(folder), experiment='run')


@pytest.fixture(scope='module')
def run(settings) -> str:
    finetune.main(settings)
    return f'local-dir:{settings.output}/run'


@pytest.fixture(scope='module')
def by_hand(settings, run):
    """Model, images and labels of the validation split, and the logits, computed without the scripts."""
    model = timm.create_model(run, pretrained=True).eval()
    transform = create_transform(**resolve_data_config({}, model=model))
    files = [(path, label) for label, name in enumerate(CLASSES)
             for path in sorted(Path(settings.data_dir, 'val', name).iterdir())]
    images = torch.stack([transform(Image.open(path).convert('L')) for path, _ in files])
    with torch.no_grad():
        logits = model(images)
    return model, images, torch.tensor([label for _, label in files]), logits


@pytest.fixture
def again(settings, run) -> finetune.FinetuneSettings:
    """Settings of a second run that starts from the first one, without its flags for the images."""
    return dataclasses.replace(settings, model=run, pretrained=True, in_chans=None, img_size=None, mean=(), std=())


def input_size(folder: Path) -> list[int]:
    return json.loads((folder / 'config.json').read_text())['pretrained_cfg']['input_size']


def test_eval(settings, run, by_hand):
    *_, labels, logits = by_hand
    row, = eval_imagenet.main(eval_imagenet.EvaluationSettings(
        data_dir=settings.data_dir, model=(run,), workers=0, device='cpu'))
    assert row['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-3)
    assert row['top1'] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-3)


def test_eval_of_a_stream_for_a_grey_and_a_colour_model(run, tmp_path):
    """Each model reads the stream in its own mode."""
    folder = write_shards(tmp_path / 'shards')
    rows = eval_imagenet.main(eval_imagenet.EvaluationSettings(
        data_dir=str(folder), dataset='wds/', model=(run, 'lightconvnet_pico_64', run), pretrained=False, num_classes=3,
        img_size=32, workers=0, device='cpu'))
    assert [row['images'] for row in rows] == [24] * 3


def test_predict(settings, run, by_hand, tmp_path, capsys):
    path = sorted(Path(settings.data_dir, 'val', CLASSES[0]).iterdir())[0]
    assert predict.main(predict.PredictionSettings(images=(path,), model=run, output=tmp_path, device='cpu')) == 0
    share = 100 * by_hand[-1][0].softmax(-1).max().item()
    assert f'1  {share:5.1f} %  {CLASSES[by_hand[-1][0].argmax()]}' in capsys.readouterr().out


def test_extract(settings, run, by_hand, tmp_path):
    model, images, *_ = by_hand
    extract_features.main(extract_features.ExtractionSettings(
        data_dir=settings.data_dir, model=run, split='validation', workers=0, device='cpu', output=str(tmp_path)))
    columns, _ = read_rows(tmp_path / 'validation')
    with torch.no_grad():
        expected = model.head.norm(model.forward_features(images).mean((2, 3), keepdim=True)).flatten(1)
    torch.testing.assert_close(columns['embedding'], expected, rtol=1e-3, atol=1e-4)


def test_export_writes_the_figures_of_grey_images_into_the_card(settings, run, by_hand, tmp_path):
    *_, labels, logits = by_hand
    folder = export.main(export.ExportSettings(
        run_dir=Path(settings.output) / 'run', name='lightconvnet_pico_64.grey', output=tmp_path / 'out',
        dtype='bfloat16', data_dir=settings.data_dir, workers=0))
    found = json.loads((folder / 'config.json').read_text())['release']['metrics']
    assert found['loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=0.02)
    assert input_size(folder) == [1, 32, 32]


def test_second_fine_tune(settings, again):
    finetune.main(dataclasses.replace(again, experiment='second', lr=1e-12, warmup_lr=0.0, min_lr=0.0))
    first, second = (read_metrics(Path(settings.output) / name)[-1] for name in ('run', 'second'))
    assert input_size(Path(settings.output) / 'second') == [1, 32, 32]
    assert second['eval_top1'] == first['eval_top1'] and second['train_loss'] != first['train_loss']


def test_second_fine_tune_on_a_stream(settings, again, tmp_path):
    finetune.main(dataclasses.replace(
        again, data_dir=str(write_shards(tmp_path / 'shards')), dataset='wds/', num_classes=3, experiment='stream'))
    assert input_size(Path(settings.output) / 'stream') == [1, 32, 32]


def test_initial_checkpoint_of_a_name_that_is_grey_by_its_flag_alone(settings, run):
    finetune.main(dataclasses.replace(
        settings, initial_checkpoint=f'{settings.output}/run/model.safetensors', experiment='from_file'))
    with pytest.raises(ConfigError, match=r'--initial-checkpoint .* takes images of 1 channels and the model of 3'):
        finetune.main(dataclasses.replace(
            settings, initial_checkpoint=f'{settings.output}/run/model.safetensors', experiment='other', in_chans=None,
            mean=(), std=()))


def test_teacher_is_grey_by_itself_and_a_colour_student_refused(settings, run, again):
    """If the whole loss comes from a teacher that equals the student, the loss on grey images is zero."""
    finetune.main(dataclasses.replace(
        again, teacher=run, kd_loss_weight=1.0, experiment='taught', freeze_trunk=True))
    assert read_metrics(Path(settings.output) / 'taught')[0]['train_loss'] < 1e-3
    with pytest.raises(ConfigError, match=r'--teacher .* takes 1 channels, --model lightconvnet\S+ takes 3; --in'):
        finetune.main(dataclasses.replace(
            settings, teacher=run, in_chans=None, mean=(), std=(), experiment='colour'))


def test_colour_teacher_made_grey_by_the_flag(settings, tmp_path):
    """timm reports three means for such a teacher, but its single input channel needs one."""
    finetune.main(dataclasses.replace(
        settings, in_chans=None, mean=(), std=(), output=str(tmp_path), experiment='colour'))
    finetune.main(dataclasses.replace(
        settings, teacher=f'local-dir:{tmp_path}/colour', output=str(tmp_path), experiment='grey'))
    assert input_size(tmp_path / 'grey') == [1, 32, 32]


def test_robustness(settings, run, by_hand):
    found = robustness.main(robustness.RobustnessSettings(
        data_dir=settings.data_dir, model=(run,), sizes=(32,), workers=0, device='cpu'))
    top1 = 100 * (by_hand[-1].argmax(1) == by_hand[2]).float().mean().item()
    assert found['top1'][run]['32 px'] == pytest.approx(top1, abs=1e-3) and 'noise' in found['top1'][run]


def test_transfer_starts_at_random_with_the_same_model(settings, run, tmp_path):
    transfer.main(transfer.TransferSettings(
        data_dir=settings.data_dir, model=run, fractions=(0.5,), subsets=(1,), updates=(1,), batch_size=6, workers=0,
        methods=('random start',), device='cpu', output=str(tmp_path)))
    folder, = tmp_path.rglob('*-random')
    assert input_size(folder) == [1, 32, 32]


def test_space_refuses_grey_models(run):
    with pytest.raises(ConfigError, match='reads grey images, and the page shows colour ones'):
        answer.open_models((run,), (), CPU)


def test_the_flag_wins_and_other_channels_are_refused(run, tmp_path):
    _, config = open_model(ModelSettings(model=run, pretrained=True, in_chans=3))
    assert config['input_size'] == (3, 32, 32)
    model = timm.create_model('test_resnet', in_chans=2)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    with pytest.raises(ConfigError, match='takes images of 2 channels, and these scripts read RGB'):
        open_model(ModelSettings(model=f'local-dir:{tmp_path}', pretrained=True))


def test_page_and_command_read_by_the_models_channels(run, by_hand):
    network, config, _ = panels.open_classifier(ModelSettings(model=run))
    assert config['input_size'] == (1, 32, 32)
    assert torch.equal(network(by_hand[1]), by_hand[-1])
