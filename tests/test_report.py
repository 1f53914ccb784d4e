"""The tables of the documents are what the results files say."""
import json
import subprocess
import sys
from pathlib import Path

import report
import timm

ROOT = Path(__file__).parents[1]


def test_documents_show_the_results():
    done = subprocess.run([sys.executable, 'scripts/report.py', '--check'], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_stale_table_is_noticed_and_mended():
    text = (ROOT / 'README.md').read_text()
    stale = text.replace('| `coatnet_0` | CCTT | 25.04 |', '| `coatnet_0` | CCTT | 24.04 |')
    assert stale != text and report.render(stale) == text == report.render(text)


def test_counts_are_of_today():
    recorded = json.loads((ROOT / 'results' / 'models.json').read_text())['models']
    assert recorded == report.count_models()['models'] and list(recorded) == sorted(
        timm.list_models(module='coatnet') + timm.list_models(module='lightconvnet'))


def test_results_name_their_origin():
    files = sorted((ROOT / 'results').glob('*.json'))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        missing = {'hardware', 'torch', 'timm', 'python', 'commit', 'command', 'date'} - content.keys()
        assert not missing and not content['commit'].endswith('-dirty'), (file.name, missing)


def test_releases_fill_the_table_of_weights(tmp_path, monkeypatch):
    (tmp_path / 'weights').mkdir()
    monkeypatch.setattr(report.coatnet_zoo, '__file__', str(tmp_path / '__init__.py'))
    release = {'evaluated_on': 'Digits, val', 'trained_on': 'Digits', 'metrics': {'top1': 98.333}, 'license_name': None}
    entry = {'repo': None, 'packaged': 'x.safetensors', 'sha256': 'ab' * 32, 'size': 7_654_321,
             'pretrained_cfg': {'license': 'apache-2.0'}, 'release': release}
    unknown = {**entry, 'repo': 'owner/x', 'packaged': None, 'release': {**release, 'metrics': {'top1': None}}}
    for releases, parts in (
            ({}, ['No weights are released yet']),
            ({'x_64.digits': entry}, ['| `x_64.digits` | 98.33 | Digits, val | Digits | 7.7 | the package |']),
            ({'x_64.digits': unknown}, ['| not measured |', '[owner/x](https://huggingface.co/owner/x)'])):
        (tmp_path / 'weights' / 'releases.json').write_text(json.dumps(releases))
        content = report.render('<!-- weights -->\n<!-- /weights -->')
        for part in parts:
            assert part in content
