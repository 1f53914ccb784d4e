"""Packaged weights: each is unchanged since its release, loads offline, and adapts to other models and inputs."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import get_arch_pretrained_cfgs

import coatnet_zoo
import eval_imagenet
import freeze_release
from coatnet_zoo import releases
from freeze_release import RELEASES as FROZEN
from freeze_release import predict_images, read_predictions, tensors_of
from support.closeness import assert_same_up_to_rounding
from support.constants import ROOT
from support.images import needs_images, unpack_images

SHIPPED = sorted(name for name, entry in releases.RELEASES.items() if entry['packaged'])


@torch.no_grad()
def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_every_packaged_release_is_frozen_and_no_other():
    for ending in ('.json', '.golden.safetensors', '.predictions.csv'):
        assert sorted(path.name.removesuffix(ending) for path in FROZEN.glob(f'*{ending}')) == SHIPPED


def test_together_they_are_small():
    sizes = {name: releases.RELEASES[name]['size'] for name in SHIPPED}
    assert sizes['coatnet_pico_64.dist_tin200'] <= 8e6
    assert max(sizes.values()) <= 8.5e6 and sum(sizes.values()) <= 24e6


@pytest.mark.parametrize('name', SHIPPED)
def test_names_types_and_shapes_are_frozen(name):
    path = releases.WEIGHTS / releases.RELEASES[name]['packaged']
    assert tensors_of(path) == json.loads((FROZEN / f'{name}.json').read_text())
    state = timm.create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: shape for key, (_, shape) in tensors_of(path).items()}


@pytest.mark.parametrize('name', SHIPPED)
def test_logits_are_golden(name):
    golden = load_file(FROZEN / f'{name}.golden.safetensors')
    found = logits_of(timm.create_model(name, pretrained=True), golden['input'])
    assert_same_up_to_rounding(found, golden['logits'])
    assert golden['logits'].std(0).min() > 0.01  # other images have other logits


@pytest.mark.parametrize('name', SHIPPED)
def test_they_adapt_to_other_classes_channels_and_sizes(name, image):
    whole = timm.create_model(name, pretrained=True)
    assert whole.num_classes == len(whole.pretrained_cfg['label_names']) == 200
    assert set(whole.pretrained_cfg['label_descriptions']) == set(whole.pretrained_cfg['label_names'])
    few, grey = (timm.create_model(name, pretrained=True, **changed) for changed in (
        dict(num_classes=7), dict(in_chans=1)))
    with torch.no_grad():
        expected = whole.eval().forward_features(image)
        assert_same_up_to_rounding(few.eval().forward_features(image), expected)
        one = image.mean(1, keepdim=True)  # a grey image equals a colour image with three equal channels
        torch.testing.assert_close(grey.eval()(one), whole(one.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)
    assert logits_of(few, image).shape == (2, 7)
    pyramid = timm.create_model(name, pretrained=True, features_only=True)
    assert_same_up_to_rounding(
        pyramid.eval()(image)[-1], whole.forward_intermediates(image, intermediates_only=True)[-1])
    features, maps = (  # unpooled, where the linear layers of the head are 1x1 convolutions
        logits_of(timm.create_model(name, pretrained=True, global_pool='', **changed), image)
        for changed in (dict(num_classes=0), {}))
    with torch.no_grad():
        torch.testing.assert_close(maps, whole.head.fc(features.movedim(1, -1)).movedim(-1, 1), rtol=1e-4, atol=1e-4)
        whole.reset_classifier(0, '')
        assert_same_up_to_rounding(features, whole(image))
    larger = timm.create_model(name, pretrained=True, img_size=96)
    assert logits_of(larger, torch.zeros(1, 3, 96, 96)).shape == (1, 200)


@pytest.mark.parametrize('name', SHIPPED)
def test_the_name_without_tag_means_them(name):
    architecture = name.partition('.')[0]
    assert architecture.endswith('_64')
    default = next(iter(get_arch_pretrained_cfgs(architecture).values()))
    assert default.tag == name.partition('.')[2] and default.num_classes == 200
    assert timm.create_model(f'{architecture}.untrained', device='meta').num_classes == 1000


def test_they_are_listed():  # test_package.py loads them without a network
    assert SHIPPED == sorted({*coatnet_zoo.list_models(pretrained=True)} - {*coatnet_zoo.kecam.WEIGHTS})


def test_what_ships_says_what_binds_it():
    terms = (releases.WEIGHTS / 'LICENSE').read_text()
    assert 'non-commercial research' in terms
    for name in SHIPPED:
        entry = releases.RELEASES[name]
        assert entry['pretrained_cfg']['license'] == 'other' and entry['release']['license_name'] in terms
        said = entry['release']
        assert said['recipe'] and said['hours'] > 0 and said['seed'] is not None and said['hardware']
        assert re.fullmatch('[0-9a-f]{12}', said['commit'])  # without -dirty
        assert said['command'].startswith('python scripts/finetune.py --recipe')


@pytest.mark.parametrize('name', SHIPPED)
def test_metrics_of_their_runs_are_kept_to_the_last_epoch(name):
    said = releases.RELEASES[name]['release']
    kept = sorted((ROOT / 'results' / said['recipe'] / name.split('.')[0]).glob('metrics*.csv'))
    epochs = [int(file.read_text().splitlines()[-1].partition(',')[0]) for file in kept]  # of the last row
    earlier = re.search(r': (\d+) epochs', said['started_from'])
    assert sum(epochs) == said['epochs'] + int(earlier[1] if earlier else 0) and min(epochs) > 0


@pytest.mark.parametrize('name', SHIPPED)
def test_frozen_predictions_are_of_the_weights_that_were_evaluated(name):
    rows = read_predictions(name)
    top1 = 100 * sum(row['file'].startswith(f'{row["prediction"]}/') for row in rows) / len(rows)
    recorded = releases.RELEASES[name]['release']['metrics']['top1']
    # three standard deviations of a binomial; the images are drawn evenly over the classes, which spreads less
    assert abs(top1 - recorded) <= 3 * (recorded * (100 - recorded) / len(rows)) ** .5


@pytest.fixture(scope='module')
def sample(tmp_path_factory) -> Path:
    return unpack_images(freeze_release.IMAGES, tmp_path_factory.mktemp('sample'), freeze_release.EVERY)


@needs_images(freeze_release.IMAGES)
@pytest.mark.parametrize('name', [
    SHIPPED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SHIPPED[1:])])
def test_predictions_of_500_images_are_found_again(name, sample):
    found, frozen = predict_images(name, sample), read_predictions(name)
    assert [row['file'] for row in found] == [row['file'] for row in frozen] and len(found) == 500
    # decoders round colours differently, so classes of nearly equal probability may change places
    alike = [pair for pair in zip(found, frozen, strict=True) if pair[0]['prediction'] == pair[1]['prediction']]
    assert len(alike) >= 495
    assert max(abs(row['confidence'] - before['confidence']) for row, before in alike) <= 0.02


@pytest.mark.slow
@needs_images(freeze_release.IMAGES)
def test_recorded_top1_is_found_again(tmp_path):
    # the whole split for one name; the next test and the 500 images above have the others too
    row = eval_imagenet.main(eval_imagenet.EvaluationSettings(
        data_dir=str(unpack_images(freeze_release.IMAGES, tmp_path)), model=(SHIPPED[0],), pretrained=True,
        device='cpu', workers=0, batch_size=32, reparam=True))[0]
    recorded = releases.RELEASES[SHIPPED[0]]['release']['metrics']
    assert row['images'] == recorded['images'] == 10_000
    assert abs(row['top1'] - recorded['top1']) <= 0.05  # as in the next test


@pytest.mark.parametrize('name', SHIPPED)
def test_recorded_top1_is_that_of_a_later_evaluation(name):
    # robustness.py reads all images of the split; the 500 above say whether the files still predict the same
    found = json.loads((ROOT / 'results' / 'robustness_tin200_cpu.json').read_text())
    recorded = releases.RELEASES[name]['release']['metrics']
    assert recorded['images'] == 10_000 and found['settings']['val_split'] == 'validation'
    # 5 images: other kernels change logits by about 1e-6 of the largest, so that two classes of nearly equal logits may
    # change places in one or two images; wrong weights cost whole points
    assert abs(found['top1'][name]['64 px'] - recorded['top1']) <= 0.05
