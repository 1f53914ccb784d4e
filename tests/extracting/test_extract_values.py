"""Features of scripts/extract_features.py: their values, the effect of model options, and the accuracies."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import coatnet_zoo  # noqa: F401  registers the zoo's names with timm
from coatnet_train.evaluation.features import PROBE_STRENGTHS, PooledFeatures, PyramidFeatures, knn_top1, linear_probe
from coatnet_train.runtime.cli import ConfigError
from support.constants import CLASSES
from support.feature_runs import brute_force_knn, expected_rows, read_index, read_rows, run, seeded_model


def norm_of(model: torch.nn.Module, values: torch.Tensor) -> torch.Tensor:
    norm = model.head.norm
    return F.layer_norm(values, (values.shape[-1],), norm.weight, norm.bias, norm.eps)


POOLED = {  # name: pooled features from forward_features, written out
    'test_resnet': lambda model, x: x.mean((2, 3)),
    'test_efficientnet': lambda model, x: x.mean((2, 3)),
    'test_convnext': lambda model, x: norm_of(model, x.mean((2, 3))),
    'test_mambaout': lambda model, x: norm_of(model, x.mean((1, 2))),
    'mambaout_femto': lambda model, x: norm_of(model, x.mean((1, 2))),
    'test_vit': lambda model, x: x[:, 0],
    'test_coatnet': lambda model, x: x.mean((2, 3)),
    'coatnet_0_224': lambda model, x: norm_of(model, x.mean((2, 3))),
    'swin_tiny_patch4_window7_224': lambda model, x: x.mean((1, 2)),
    'coatnet_pico_64': lambda model, x: norm_of(model, x.mean((2, 3))),
    'dynamicconvnet_pico_64': lambda model, x: norm_of(model, x.mean((2, 3))),
}


@pytest.mark.parametrize('name', POOLED)
def test_pooled_features_are_what_the_definition_gives(name, randomize):
    size = {} if name in ('test_vit', 'test_efficientnet', 'test_resnet', 'test_convnext', 'mambaout_femto',
                          'test_mambaout') else {'img_size': 64}
    model = randomize(timm.create_model(name, num_classes=5, **size)).eval()
    input_size = model.pretrained_cfg['input_size'] if name == 'test_vit' else (3, 64, 64)
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(1))
    hidden = getattr(getattr(model, 'head', None), 'pre_logits', None)
    with torch.no_grad():
        maps = model.forward_features(images)
        expected = POOLED[name](model, maps)
        logits = model(images)
        if isinstance(hidden, torch.nn.Sequential):  # `expected` is right if the rest of the head gives the logits
            classified = model.head.fc(hidden(expected))
        else:
            classified = model.get_classifier()(expected)
        torch.testing.assert_close(classified, logits, rtol=1e-4, atol=1e-4)
        found = PooledFeatures(model).eval()(images)
    assert list(found) == ['embedding'] and found['embedding'].std() > 1e-3
    torch.testing.assert_close(found['embedding'], expected, rtol=1e-4, atol=1e-4)


def test_hidden_layer_of_the_zoo_would_change_the_features():
    """Without our rule the features would change: timm's own methods keep the tanh layer, or also drop the norm."""
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model('coatnet_pico_64').eval()
    with torch.no_grad():
        before = model.forward_head(model.forward_features(images), pre_logits=True)
        found = PooledFeatures(model)(images)['embedding']
    assert before.abs().max() <= 1 < found.abs().max() and not torch.allclose(before, found, atol=0.1)


@pytest.mark.parametrize(('name', 'out_indices', 'levels'), [
    ('coatnet_pico_64', (), [0, 1, 2, 3, 4]), ('coatnet_pico_64', (1, 3), [1, 3]), ('test_resnet', (-1, 2), [4, 2]),
    ('test_convnext', (), [0, 1, 2, 3]), ('test_vit', (1, 3), [1, 3]),
], ids=str)
def test_pyramid_is_that_of_features_only(name, out_indices, levels, randomize):
    model = randomize(timm.create_model(name)).eval()
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    reference = timm.create_model(
        name, features_only=True, pretrained=True, pretrained_cfg_overlay={'state_dict': model.state_dict()},
        out_indices=sorted(levels)).eval()
    with torch.no_grad():
        expected = dict(zip((f'level_{level}' for level in sorted(levels)), reference(images), strict=True))
        found = PyramidFeatures(model, out_indices)(images)
    assert sorted(found) == sorted(expected)
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-4)


# Options


def test_checkpoint_is_loaded_strictly(settings, image_folder, tmp_path):
    model = seeded_model(7, num_classes=3)
    save_file(model.state_dict(), tmp_path / 'weights.safetensors')
    changes = dict(checkpoint=str(tmp_path / 'weights.safetensors'), num_classes=3)
    columns, _ = read_rows(run(settings, **changes))
    values = expected_rows(image_folder / 'train', model)[0]
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r'does not fit .*: it has 3 classes and the model 4.*--num-classes 3'):
        run(settings, **changes | {'num_classes': 4, 'output': settings.output + '2'})
    pyramid = run(settings, features='pyramid', out_indices=(4,), output=settings.output + '3', **changes)
    maps = read_rows(pyramid)[0]['level_4']  # the same weights, whose maps have this mean
    torch.testing.assert_close(maps.mean((2, 3)), values, rtol=1e-4, atol=1e-5)
    assert read_index(pyramid)['weights'] == read_index(Path(settings.output) / 'train')['weights']


def test_local_dir_and_pretrained(settings, image_folder, tmp_path, capsys):
    model = seeded_model(7, num_classes=3)
    timm.models.save_for_hf(model, tmp_path / 'run', {'label_names': list(CLASSES)}, safe_serialization=True)
    columns, _ = read_rows(run(settings, model=f'local-dir:{tmp_path / "run"}', pretrained=True))
    assert 'RANDOM' not in capsys.readouterr().out
    named = read_rows(run(settings, model=f'local-dir:{tmp_path / "run"}', output=settings.output + '2'))[0]
    assert 'RANDOM' not in capsys.readouterr().out  # a folder's name stands for its weights
    assert torch.equal(named['embedding'], columns['embedding'])
    run(settings, output=settings.output + '3')
    assert 'RANDOM WEIGHTS, pooled features' in capsys.readouterr().out
    values = expected_rows(image_folder / 'train', model)[0]
    torch.testing.assert_close(columns['embedding'], values, rtol=1e-4, atol=1e-5)


def test_grey_images_model_kwargs_and_seed(settings, image_folder):
    folder = run(settings, in_chans=1, model_kwargs=('act_layer=silu',), seed=3, mean=(0.5,), std=(0.5,))
    model = seeded_model(3, in_chans=1, act_layer='silu')
    model.pretrained_cfg |= {'mean': (0.5,), 'std': (0.5,)}
    values = expected_rows(image_folder / 'train', model, 'L')[0]
    torch.testing.assert_close(read_rows(folder)[0]['embedding'], values, rtol=1e-4, atol=1e-5)
    assert read_index(folder)['model_kwargs'] == ['act_layer=silu'] and read_index(folder)['mean'] == [0.5]


def test_mixed_precision_changes_the_features_a_little(settings):
    exact, mixed = (read_rows(run(settings, amp=amp, output=f'{settings.output}{amp}'))[0]['embedding']
                    for amp in (False, True))
    assert mixed.dtype == torch.float32 and not torch.equal(exact, mixed)
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.05)


def test_class_map_gives_the_labels(settings, tmp_path):
    (tmp_path / 'names.txt').write_text('red\nblack\nblue\ngreen\n')
    folder = run(settings, class_map=str(tmp_path / 'names.txt'))
    assert read_rows(folder)[0]['label'].tolist() == [2] * 12 + [3] * 12 + [0] * 12
    assert read_index(folder)['class_names'] == ['red', 'black', 'blue', 'green']


def test_batch_size_and_workers_leave_the_features(settings):
    first, second = (read_rows(run(settings, batch_size=size, workers=workers, output=f'{settings.output}{size}'))
                     for size, workers in ((4, 0), (7, 1)))
    assert first[1] == second[1]
    torch.testing.assert_close(first[0]['embedding'], second[0]['embedding'], rtol=1e-4, atol=1e-5)


# Accuracy


@pytest.mark.parametrize(('k', 'temperature'), [(1, 0.07), (20, 0.07), (20, 10.), (60, 0.07)])
def test_knn_equals_its_definition(k, temperature):
    torch.manual_seed(0)
    centres = torch.randn(4, 8)
    train_labels, val_labels = torch.arange(60) % 4, torch.arange(300) % 4
    train = centres[train_labels] + torch.randn(60, 8) * 1.5
    val = centres[val_labels] + torch.randn(300, 8) * 1.5
    found = knn_top1(train, train_labels, val, val_labels, k, temperature)
    assert found == pytest.approx(brute_force_knn(train, train_labels, val, val_labels, k, temperature))
    assert 30 < found < 95


def test_knn_weighs_near_neighbours_more():
    train = torch.tensor([[1., 0.], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1])
    query, answer = torch.tensor([[1., 0.1]]), torch.tensor([0])
    assert knn_top1(train, labels, query, answer, k=3, temperature=0.07) == 100  # one near one outweighs two far ones
    assert knn_top1(train, labels, query, answer, k=3, temperature=10.) == 0     # but not if the votes are nearly equal


def test_linear_probe_of_two_images_a_class():
    pytest.importorskip('sklearn')
    labels = np.arange(20) % 10  # a fifth of them would leave out most classes
    features = np.eye(10)[labels] + np.random.default_rng(0).normal(scale=0.01, size=(20, 10))
    assert linear_probe(features, labels, np.eye(10), np.arange(10))['top1'] == 100


def test_linear_probe_is_a_logistic_regression_that_never_saw_val():
    pytest.importorskip('sklearn')
    rng = np.random.default_rng(0)
    centres, labels = rng.normal(size=(3, 20)), np.arange(240) % 3
    scale = 10. ** rng.integers(-3, 3, 20)  # standardising matters
    features = (centres[labels] * 0.6 + rng.normal(size=(240, 20))) * scale
    train, train_labels, val, val_labels = features[:150], labels[:150], features[150:], labels[150:]
    found = linear_probe(train, train_labels, val, val_labels)
    shuffled = linear_probe(train, train_labels, val[::-1] * 3, np.roll(val_labels, 1))
    assert found['converged'] and found['C'] in PROBE_STRENGTHS
    assert (found['C'], found['held_out_top1']) == (shuffled['C'], shuffled['held_out_top1'])
    assert shuffled['top1'] < found['top1']

    # the same minimum by torch: cross-entropy, plus half the squared weights / C
    x, v = (torch.tensor((part - train.mean(0)) / train.std(0)) for part in (train, val))
    weight, bias = torch.zeros(3, 20, dtype=torch.double), torch.zeros(3, dtype=torch.double)
    optimizer = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=500,
                                  line_search_fn='strong_wolfe', tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, torch.tensor(train_labels), reduction='sum')
        loss = loss + weight.square().sum() / 2 / found['C']
        loss.backward()
        return loss

    optimizer.step(closure)
    top1 = 100 * ((v @ weight.T + bias).argmax(1) == torch.tensor(val_labels)).double().mean().item()
    assert found['top1'] == pytest.approx(top1, abs=1.2) and 60 < top1 < 99


def test_knn_and_probe_of_the_shards_in_one_go(settings, image_folder, capsys):
    pytest.importorskip('sklearn')
    run(settings, knn=True, knn_k=5, knn_temperature=0.1, linear_probe=True)
    out = capsys.readouterr().out
    summary = json.loads((Path(settings.output) / 'summary.json').read_text())
    model = seeded_model()
    (train, train_labels, _), (val, val_labels, _) = (expected_rows(image_folder / s, model) for s in ('train', 'val'))
    expected = brute_force_knn(train, torch.tensor(train_labels), val, torch.tensor(val_labels), 5, 0.1)
    assert summary['knn'] == {'top1': pytest.approx(expected), 'k': 5, 'temperature': 0.1}
    assert summary['linear_probe']['top1'] > 90 and summary['rows'] == {'train': 36, 'validation': 15}
    assert f'5 nearest neighbours: top-1 {expected:.2f} %' in out
    assert f'linear probe: top-1 {summary["linear_probe"]["top1"]:.2f} %' in out
    assert read_index(Path(settings.output) / 'validation')['rows'] == 15


def test_val_split_is_left_alone_without_a_score(settings):
    run(settings, val_split='no such split')
    assert not (Path(settings.output) / 'validation').exists()
