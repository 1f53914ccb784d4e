"""scripts/benchmark.py: measurements, files and rejected settings."""

import pytest
import torch
from PIL import Image

from coatnet_train.benchmarks import distillation as benchmark_distillation
from coatnet_train.benchmarks import loader as benchmark_loader
from coatnet_train.benchmarks import models as benchmark_models
from coatnet_train.benchmarks import runtimes as benchmark_runtimes
from coatnet_train.benchmarks.config import (
    DistillationSettings,
    LoaderSettings,
    ModelPairSettings,
    RuntimesSettings,
)
from coatnet_train.runtime.cli import ConfigError
from support.commands import fork_server


def settings(**changes) -> ModelPairSettings:
    return ModelPairSettings(**{
        'model': 'coatnet_pico_64', 'against': 'test_resnet', 'batch_size': 2, 'img_size': 32, 'rounds': 2,
        'window': 0.01, **changes})


@pytest.mark.slow
def test_both_sides_are_measured(tmp_path, capsys, monkeypatch):
    file = tmp_path / 'results.json'
    # its four processes would import torch again
    monkeypatch.setattr(benchmark_models.multiprocessing, 'get_context', {'spawn': fork_server}.get)
    report = benchmark_models.main(settings(results_file=str(file)))
    assert file.is_file() and set(report['results']) == {'inference', 'training'}
    for mode, row in report['results'].items():
        pace = row['images_per_second']
        assert min(pace.values()) > 0 and row['ratio'] == pytest.approx(pace['model'] / pace['against'], rel=1e-2)
        assert all(len(windows) == 2 for windows in row['windows'].values())
        assert all(m == 'not measured' or m > 0 for m in row['peak_memory_mib'].values())
        assert f'{mode}, batch 2 at 32' in capsys.readouterr().out or mode == 'training'


@pytest.mark.parametrize('changes,message', [
    (dict(model='coatnett'), r"timm.list_models\(\), got 'coatnett'; did you mean"),
    (dict(rounds=0), '--rounds must be greater than 0, got 0'),
    (dict(device='cuda:99'), '--device cuda:99'), (dict(results_file='no/such/file.json'), 'folder does not exist'),
], ids=str)
def test_bad_settings_end_in_one_sentence(changes, message, monkeypatch):
    monkeypatch.setattr(benchmark_models.torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match=message):
        benchmark_models.main(settings(**changes))


def write_images(folder, count: int = 24) -> None:
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new('RGB', (40, 40), (index, 0, 0)).save(folder / split / name / f'{index}.png')


def test_loader_is_timed_beside_training(tmp_path):
    write_images(tmp_path / 'images')
    report = benchmark_loader.main(LoaderSettings(
        data_dir=str(tmp_path / 'images'), workers=(0, 1), batch_size=4, rounds=2, window=0.05,
        results_file=str(tmp_path / 'loader.json')))
    assert set(report['images_per_second']) == {'0 workers', '1 workers', 'training'}
    assert min(report['images_per_second'].values()) > 0 and (tmp_path / 'loader.json').is_file()
    with pytest.raises(ConfigError, match='--data-dir no/where'):
        benchmark_loader.main(LoaderSettings(data_dir='no/where'))


@pytest.mark.parametrize('cached', [False, True])
def test_steps_from_stored_outputs_are_timed_beside_plain_ones(tmp_path, cached):
    report = benchmark_distillation.main(DistillationSettings(
        model='test_vit', classes=4, batch_size=4, top_k=2, views=2, steps=3, rounds=2, cache_images=cached,
        results_file=str(tmp_path / 'distillation.json')))
    assert set(report['results']) == set(report['rounds']) == {'labels', 'all_logits', 'top_2'}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in report['rounds'].values())
    assert report['results']['labels']['over_labels'] == 0 and (tmp_path / 'distillation.json').is_file()


def test_runtimes_are_timed_beside_eager_and_a_missing_one_is_named(tmp_path, monkeypatch, capsys):
    pytest.importorskip('onnxruntime', reason='onnxruntime comes with the test extra')
    monkeypatch.setattr(benchmark_runtimes, 'is_installed', lambda module: module != 'openvino')
    report = benchmark_runtimes.main(RuntimesSettings(
        models=('test_resnet',), runtimes=('eager', 'onnxruntime', 'openvino'), batch_sizes=(2,), img_size=32, rounds=2,
        window=0.01, results_file=str(tmp_path / 'runtimes.json')))
    row, = report['rows']
    assert row['ms'].pop('openvino') == 'not measured' and min(row['ms'].values()) > 0
    assert {*row['ms']} == {*row['windows']} == {*row['difference']} == {'eager', 'onnxruntime'}
    assert (tmp_path / 'runtimes.json').is_file() and set(report['versions']) == {'onnxruntime'}
    assert "openvino is not installed, so it is not measured; in a checkout of coatnet_zoo: pip install '.[runtimes]'" \
        in capsys.readouterr().out


def test_openvino_gives_the_logits_of_eager():
    pytest.importorskip('openvino', reason="openvino comes with the runtimes extra: pip install '.[runtimes]'")
    pytest.importorskip('onnxscript', reason='onnxscript comes with the test extra')
    settings = RuntimesSettings(img_size=32)
    with torch.no_grad():
        calls = benchmark_runtimes.build('test_resnet', 2, ['eager', 'openvino'], settings)
        assert 0 < benchmark_runtimes.compare('test_resnet', calls)['openvino'] < 1e-4


def test_a_model_that_cannot_be_exported_is_named():
    pytest.importorskip('onnxscript', reason='onnxscript comes with the test extra')

    class Branch(torch.nn.Module):
        def forward(self, x):
            return x if x.mean().item() > 0 else -x  # depends on values: no graph

    with pytest.raises(ConfigError, match=r'--models: branch must be one that torch exports to ONNX, found: .+ Leave'):
        benchmark_runtimes.export_onnx('branch', Branch().eval(), torch.randn(1, 3, 4, 4))


def test_runtime_with_other_logits_is_not_timed():
    eager = torch.tensor([[1., -2.]])
    calls = {'eager': lambda: eager, 'onnxruntime': lambda: eager + 1e-3}
    assert benchmark_runtimes.compare('x', calls)['onnxruntime'] == pytest.approx(5e-4, rel=1e-2)
    for off in (3e-3, float('nan')):
        with pytest.raises(ConfigError, match=r'onnxruntime: logits of x must be those of eager up to 0\.001'):
            benchmark_runtimes.compare('x', {**calls, 'onnxruntime': lambda off=off: eager + off})


@pytest.mark.parametrize('changes,message', [
    (dict(runtimes=('compiled',)), '--runtimes must have eager'), (dict(batch_sizes=()), 'must name at least one each'),
    (dict(models=('coatnett',)), r"timm.list_models\(\), got 'coatnett'; did you mean"),
    (dict(models=('test_vit', 'test_vit')), '--models must be different from each other, got test_vit test_vit'),
    (dict(batch_sizes=(1, 1)), '--batch-sizes must be different from each other, got 1 1'),
    (dict(results_file='runtimes.csv'), '--results-file must end in .json, got runtimes.csv'),
    (dict(results_file='.'), '--results-file must be a file, got the folder .; give a name in it'),
    (dict(models=('coatnet_pico',), img_size=33), '--img-size 33: coatnet_pico: img_size must be a multiple'),
], ids=str)
def test_runtimes_that_cannot_be_compared_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        benchmark_runtimes.main(RuntimesSettings(**changes))
