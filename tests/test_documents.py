"""README and docs/: Python blocks and the notebook run, links are not broken, and each table appears once."""
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
import timm
import torch
from safetensors.torch import save_file

from coatnet_train.report.documents import SECTIONS, documents
from coatnet_train.training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*documents(ROOT), ROOT / 'CONTRIBUTING.md', ROOT / 'scripts' / 'launch' / 'README.md']
PYTHON = [path for path in DOCUMENTS if '```python' in path.read_text()]
NOTEBOOK = json.loads((ROOT / 'docs' / 'quickstart.ipynb').read_text())


def blocks(path: Path) -> list[str]:
    return re.findall(r'```python\n(.*?)```', path.read_text(), re.DOTALL)


def code_cells() -> list[dict]:
    return [cell for cell in NOTEBOOK['cells'] if cell['cell_type'] == 'code']


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a document reaches for the network')

    monkeypatch.setattr('socket.socket.connect', refuse)


def test_readme_is_short_and_in_order():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 150
    assert re.findall(r'^## (.*)$', text, re.MULTILINE) == [
        'Status', 'Install', 'Quick start', 'Your own images', 'Which model', 'Evaluate, extract, publish',
        'Block types', 'Troubleshooting', 'Links']


def test_python_blocks_are_found_and_short():
    assert {path.name for path in PYTHON} == {'README.md', 'models.md', 'operators.md', 'training.md'}
    found = [block for path in PYTHON for block in blocks(path)]
    assert len(found) >= 9 and all(len(block.splitlines()) <= 20 for block in found)


@pytest.mark.parametrize(('path', 'number'), [
    pytest.param(path, number, id=f'{path.stem}-{number}') for path in PYTHON for number in range(len(blocks(path)))])
def test_python_block_runs(path, number, tmp_path, monkeypatch, no_network):
    block = blocks(path)[number]
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'local-dir:([\w/]+)', block):
        timm.models.save_for_hf(timm.create_model('coatnet_pico'), name, safe_serialization=True)
    if 'coatnet_0_224.safetensors' in block:
        save_file(timm.create_model('coatnet_0_224').state_dict(), 'coatnet_0_224.safetensors')
    exec(compile(block, f'{path.name}, block {number}', 'exec'), {})


@pytest.mark.slow
def test_notebook_prints_what_it_shows(tmp_path, monkeypatch, no_network):
    """Cells run in order in one namespace; printed words must equal those stored, numbers may differ between CPUs."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use('agg')
    namespace, numbers = {}, re.compile(r'[\d.]+')
    assert len(code_cells()) >= 4
    for cell in code_cells():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(''.join(cell['source']), 'quickstart.ipynb', 'exec'), namespace)
        stored = ''.join(line for output in cell['outputs'] if output.get('name') == 'stdout'
                         for line in output['text'])
        assert numbers.sub('0', printed.getvalue()).split() == numbers.sub('0', stored).split()


def anchors(path: Path) -> set[str]:
    """Anchors of the headings of a document, by GitHub's rule."""
    titles = re.findall(r'^#+ (.*)$', re.sub(r'```.*?```', '', path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


def broken_links(path: Path) -> Iterator[str]:
    """Relative links and images whose target does not exist."""
    for link in re.findall(r'\]\(([^)\s]+)\)', path.read_text()):
        if not link.startswith(('http://', 'https://')):
            name, _, anchor = link.partition('#')
            target = path.parent / name if name else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                yield link


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert list(broken_links(path)) == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / 'a.md').write_text(
        '# One two\n[x](#one-two) [y](#one) [z](b.md) [w](https://b.md) ![v](a.md#one-two)\n')
    assert list(broken_links(tmp_path / 'a.md')) == ['#one', 'b.md']


def test_each_table_stands_in_one_place():
    markers = [name for path in documents(ROOT) for name in re.findall(r'<!-- (\w+) -->', path.read_text())]
    assert sorted(markers) == sorted(SECTIONS)


def test_no_output_is_left_to_fill_in():
    assert [path.name for path in DOCUMENTS if '@@' in path.read_text()] == []


def recipe_comments() -> dict[str, str]:
    """The comment above each recipe."""
    text = (ROOT / 'scripts' / 'coatnet_train' / 'training' / 'recipes.py').read_text()
    return {name: comment for comment, name in re.findall(r"((?: *#.*\n)+) *'(\w+)': ", text)}


def test_recipes_say_what_they_gave():
    """A recipe's comment has command, hardware and a result that its file confirms, or says that it was not run."""
    comments = recipe_comments()
    assert set(comments) == set(RECIPES)
    for name, comment in comments.items():
        assert f'--recipe {name}' in comment, name
        if 'not run' in comment:
            continue
        assert re.search(r'# hardware: .+', comment), name
        results = re.findall(r'([\d.]+) % \((results/\S+\.(?:csv|json))\)', comment)
        assert results, name
        for figure, file in results:
            assert figure in figures(ROOT / file), (name, figure, file)


def figures(path: Path) -> set[str]:
    """Numbers in a results file, rounded to two decimals and to one."""
    numbers = [float(number) for number in re.findall(r'\d+\.\d+', path.read_text())]
    return {f'{number:.{digits}f}' for number in numbers for digits in (1, 2)}


def test_hub_entrypoints_build_models():
    model = torch.hub.load(str(ROOT), 'coatnet_pico_64', source='local', num_classes=3)
    assert model.num_classes == 3 and len((ROOT / 'hubconf.py').read_text().splitlines()) < 10
    sys.modules.pop('hubconf', None)


def test_architecture_names_every_module_of_coatnet_train():
    text = (ROOT / 'docs' / 'architecture.md').read_text()
    for folder in sorted((ROOT / 'scripts' / 'coatnet_train').glob('*/__init__.py')):
        row, = re.findall(rf'^\| `{folder.parent.name}` \|(.*)$', text, re.MULTILINE)
        modules = {file.stem for file in folder.parent.glob('*.py')} - {'__init__'}
        if 'and their settings' in row:
            modules = {module for module in modules if not module.endswith('_config')}
        assert modules <= set(re.findall(r'`(\w+)`', row)), folder.parent.name
