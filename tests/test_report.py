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
