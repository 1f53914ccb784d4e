"""Imports inside scripts/: the sub-packages of coatnet_train have an order, and no modules import each other."""
import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.constants import ROOT

SCRIPTS = ROOT / 'scripts'
# sub-packages by level; each may import from its own level and from those below
LEVELS = ({'runtime'}, {'data', 'models'}, {'training', 'evaluation', 'explain', 'plotting', 'report'}, {'benchmarks'},
          {'experiments'})


def level_of(module: str) -> int:
    """Level of coatnet_train.PACKAGE.MODULE; commands have the highest level."""
    parts = module.split('.')
    return next((level for level, names in enumerate(LEVELS) if parts[0] == 'coatnet_train' and parts[1] in names),
                len(LEVELS))


def imports(folder: Path) -> Iterator[tuple[str, str]]:
    """(module, module of coatnet_train or command that it imports), also inside functions."""
    names = {'.'.join(file.relative_to(folder).with_suffix('').parts) for file in folder.rglob('*.py')}
    for name in sorted(names):
        for node in ast.walk(ast.parse((folder / f'{name.replace(".", "/")}.py').read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f'{name}: {ast.unparse(node)}: imports name the package'
                found = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
            else:
                continue
            yield from ((name, module) for module in found if module in names)


def upward(folder: Path) -> list[str]:
    """Imports that violate the order of the sub-packages, and imports of commands."""
    return [f'{name} imports {module}' for name, module in imports(folder)
            if level_of(module) > level_of(name) or level_of(module) == len(LEVELS)]


def check_acyclic(folder: Path) -> None:
    graph = {}
    for name, module in imports(folder):
        graph.setdefault(name, set()).add(module)
    TopologicalSorter(graph).prepare()


def test_imports_go_one_way():
    assert {name for names in LEVELS for name in names} == {
        file.parent.name for file in (SCRIPTS / 'coatnet_train').glob('*/__init__.py')}
    assert len(list(imports(SCRIPTS))) > 200
    assert upward(SCRIPTS) == []


def test_no_modules_import_each_other():
    check_acyclic(SCRIPTS)


def test_what_goes_the_wrong_way_is_found(tmp_path):
    files = {
        'finetune.py': 'from coatnet_train.training.run import run\n',
        'coatnet_train/training/run.py': 'def run():\n    from coatnet_train.training import trainer\n',
        'coatnet_train/training/trainer.py': 'from coatnet_train.training.run import run\nimport finetune\n',
        'coatnet_train/runtime/cli.py': 'from coatnet_train.data.config import DataSettings\n',
        'coatnet_train/data/config.py': ''}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert upward(tmp_path) == ['coatnet_train.runtime.cli imports coatnet_train.data.config',
                                'coatnet_train.training.trainer imports finetune']
    with pytest.raises(CycleError, match=r'coatnet_train\.training\.trainer'):
        check_acyclic(tmp_path)
