"""Side effects of `import coatnet_zoo`, import order of the sub-packages, and the wheel outside of the checkout."""
import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from support.constants import ROOT

PACKAGE = ROOT / 'coatnet_zoo'


def python(code: str, *args: str, **kwargs) -> str:
    done = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def import_effects() -> dict[str, list[str] | str]:
    """Effects of `import coatnet_zoo` after `import timm`, in a process of its own."""
    code = '''
import contextlib, io, json, sys, warnings
import timm
from timm.models import get_arch_pretrained_cfgs, list_modules
def registry():
    names = timm.list_models()
    return {n: {t: repr(c) for t, c in get_arch_pretrained_cfgs(n).items()} for n in names}, list_modules()
before, modules_before = registry()
imported = set(sys.modules)
out, err = io.StringIO(), io.StringIO()
with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    warnings.simplefilter('error')
    import coatnet_zoo
imported = sorted(set(sys.modules) - imported)
after, modules_after = registry()
print(json.dumps(dict(
    changed=[n for n in before if after.get(n) != before[n]], added=sorted(set(after) - set(before)),
    modules=sorted(set(modules_after) - set(modules_before)), imported=imported,
    said=out.getvalue() + err.getvalue())))
'''
    return json.loads(python(code, cwd=ROOT))


def test_import_leaves_timms_registry_as_it_was_and_is_silent(import_effects):
    assert import_effects['changed'] == [] and import_effects['said'] == ''
    assert import_effects['modules'] == ['coatnet', 'lightconvnet'] and 'coatnet_0' in import_effects['added']


def test_import_is_light(import_effects):
    """After timm, importing coatnet_zoo imports no other top-level package."""
    assert {name.partition('.')[0] for name in import_effects['imported']} == {'coatnet_zoo'}


def test_no_kernels_are_imported_before_they_are_used(import_effects):
    assert 'coatnet_zoo.ops.dynamicconv2d.eager' in import_effects['imported']
    assert not [name for name in import_effects['imported'] if 'kernels' in name or 'triton' in name]


def test_only_the_api_imports_kernels_and_inside_a_branch():
    found = []
    for file in sorted(PACKAGE.rglob('*.py')):
        tree = ast.parse(file.read_text())
        at_top = {id(node) for node in tree.body}
        found += [(str(file.relative_to(PACKAGE)), id(node) in at_top) for node in ast.walk(tree)
                  if isinstance(node, (ast.Import, ast.ImportFrom)) and 'kernels' in ast.unparse(node)]
    assert found == [(f'ops/{name}.py', False) for name in (
        'dynamicconv2d/api', 'dynamicconv2d/projected', 'lightconv2d/api')]


def upward_imports(package: Path) -> list[str]:
    """Imports that violate the order ops < blocks < models, or of scripts, hub or the package's own name."""
    above = {'ops': {'blocks', 'models'}, 'blocks': {'models'}}
    found = []
    for file in sorted(package.rglob('*.py')):
        room = file.relative_to(package).parts[0]
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or '']
            else:
                continue
            for top in (name.partition('.')[0] for name in names):
                relative = isinstance(node, ast.ImportFrom) and node.level > 1
                if top in (above.get(room, ()) if relative else ('scripts', 'hub', 'coatnet_zoo')):
                    found.append(f'{file.relative_to(package)}: {ast.unparse(node)}')
    return found


def test_data_flows_one_way(tmp_path):
    assert upward_imports(PACKAGE) == []
    (tmp_path / 'blocks').mkdir()
    (tmp_path / 'blocks' / 'mbconv.py').write_text('from ..models import backbone\nfrom .folding import fold\n')
    (tmp_path / 'weights.py').write_text('import scripts.finetune\nimport torch\n')
    assert upward_imports(tmp_path) == [
        'blocks/mbconv.py: from ..models import backbone', 'weights.py: import scripts.finetune']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip('hatchling', reason='hatchling, the build backend, comes with the test extra')
    folder = tmp_path_factory.mktemp('wheel')
    project = folder / 'project'  # a copy, to which a weights file that belongs to no release is added
    shutil.copytree(PACKAGE, project / 'coatnet_zoo', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE', '.gitignore'):
        shutil.copy(ROOT / name, project)
    (project / 'coatnet_zoo/weights/some.safetensors').write_bytes(b'weights')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', str(project), '--no-deps', '--no-build-isolation', '-q', '-w',
         str(folder)], check=True, capture_output=True)
    return next(folder.glob('*.whl'))


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    """Every packaged release loads from the wheel alone, without cache or network."""
    assert wheel.stat().st_size < 30e6
    site = tmp_path / 'site'
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert {n.partition('/')[0] for n in names if '.dist-info/' not in n} == {'coatnet_zoo'}
    assert any(n.endswith('licenses/LICENSE') for n in names)
    files = {'py.typed', 'weights/releases.json', 'weights/kecam.json', 'weights/LICENSE', 'weights/some.safetensors'}
    assert {f'coatnet_zoo/{file}' for file in files} <= set(names)
    code = '''
import socket, sys
def refuse(*args, **kwargs): raise OSError('the network was asked')
socket.getaddrinfo = socket.socket.connect = refuse
import timm, torch
from coatnet_zoo import releases
assert releases.__file__.startswith(sys.argv[1]), releases.__file__
for name in (name for name, entry in releases.RELEASES.items() if entry['packaged']):
    logits = timm.create_model(name, pretrained=True).eval()(torch.zeros(1, 3, 64, 64))
    print(name, tuple(logits.shape), logits.isfinite().all().item())
'''
    said = python(code, str(site), cwd=tmp_path,
                  env={**os.environ, 'PYTHONPATH': str(site), 'HF_HOME': str(tmp_path / 'cache')})
    shipped = json.loads((PACKAGE / 'weights' / 'releases.json').read_text())
    assert said.splitlines() == [f'{name} (1, 200) True' for name, entry in shipped.items() if entry['packaged']] != []
