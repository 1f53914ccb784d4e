"""scripts/benchmark.py: what it measures, writes and refuses."""

import benchmark
import pytest


def settings(**changes) -> benchmark.Settings:
    return benchmark.Settings(**{
        'model': 'coatnet_pico_64', 'against': 'test_resnet', 'batch_size': 2, 'img_size': 32, 'rounds': 2,
        'window': 0.01, **changes})


def test_both_sides_are_measured(tmp_path, capsys):
    file = tmp_path / 'results.json'
    report = benchmark.main(settings(results_file=str(file)))
    assert file.is_file() and set(report['results']) == {'inference', 'training'}
    for mode, row in report['results'].items():
        pace = row['images_per_second']
        assert min(pace.values()) > 0 and row['ratio'] == pytest.approx(pace['model'] / pace['against'], rel=1e-2)
        assert all(len(windows) == 2 for windows in row['windows'].values())
        assert all(m == 'not measured' or m > 0 for m in row['peak_memory_mib'].values())
        assert f'{mode}, batch 2 at 32' in capsys.readouterr().out or mode == 'training'


@pytest.mark.parametrize('changes,message', [
    (dict(model='coatnett'), 'coatnett is not a name'), (dict(rounds=0), '--rounds must be greater than 0, got 0'),
    (dict(device='cuda:99'), '--device cuda:99'), (dict(results_file='no/such/file.json'), 'folder does not exist'),
], ids=str)
def test_bad_settings_end_in_one_sentence(changes, message, monkeypatch):
    monkeypatch.setattr(benchmark.torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit, match=message):
        benchmark.main(settings(**changes))
