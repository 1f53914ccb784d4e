"""scripts/bundle.py without network: packed files, size limit, and run.sh in another place."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bundle
from coatnet_train.runtime import provenance
from coatnet_train.runtime.cli import ConfigError
from support.constants import ROOT


@pytest.fixture(autouse=True)
def known_commit(monkeypatch):
    monkeypatch.setattr(provenance, 'commit', lambda: 'abc123def456')


@pytest.fixture
def shelf(tmp_path) -> Path:
    """A folder with one wheel, whose package is a single module."""
    (tmp_path / 'shelf').mkdir()
    with zipfile.ZipFile(tmp_path / 'shelf' / 'carried_one-1.0-py3-none-any.whl', 'w') as wheel:
        wheel.writestr('carried_one.py', 'print("the carried package")\n')
        info = 'carried_one-1.0.dist-info'
        wheel.writestr(f'{info}/METADATA', 'Metadata-Version: 2.1\nName: carried-one\nVersion: 1.0\n')
        wheel.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr(f'{info}/RECORD', '')
    return tmp_path / 'shelf'


def pack(folder: Path, **changes) -> dict[str, int]:
    return bundle.main(bundle.BundleSettings(**{'output': str(folder), 'wheels': (), **changes}))


def test_a_bundle_has_code_and_commit_and_no_weights(tmp_path, capsys):
    parts = pack(tmp_path / 'b')
    assert (tmp_path / 'b' / 'COMMIT').read_text() == 'abc123def456\n'
    assert (tmp_path / 'b' / 'tests' / 'ops' / 'test_kernels.py').is_file() and sum(parts.values()) < 8 * 2**20
    names = [path.name for path in (tmp_path / 'b').rglob('*')]
    assert not [name for name in names if name.startswith('.git') or name.endswith(('.safetensors', '.pyc'))]
    assert f'{sum(parts.values()) / 2**20:.2f} MiB' in capsys.readouterr().out
    (tmp_path / 'shard.zip').write_bytes(bytes(1000))
    parts = pack(tmp_path / 'b', weights=True, data=(str(tmp_path / 'shard.zip'),))  # replaces the earlier bundle
    assert parts['data/shard.zip'] == (tmp_path / 'b' / 'data' / 'shard.zip').stat().st_size == 1000
    assert list((tmp_path / 'b' / 'coatnet_zoo' / 'weights').glob('*.safetensors'))


def test_what_is_too_large_is_named_and_leaves_nothing(tmp_path):
    for name in ('a.zip', 'b.zip'):
        (tmp_path / name).write_bytes(bytes(3 * 2**20))
    data = tuple(str(tmp_path / name) for name in ('a.zip', 'b.zip'))
    with pytest.raises(ConfigError, match=r'at most 5 MiB \(--max-mib\), but takes 6.0: a.zip 3.0, b.zip 3.0; leave'):
        pack(tmp_path / 'b', data=data, max_mib=5)
    assert not (tmp_path / 'b').exists()
    with pytest.raises(ConfigError, match=r'at most 6 MiB .* but takes \d+\..: data/a.zip 3.0, data/b.zip 3.0, '):
        pack(tmp_path / 'b', data=data, max_mib=6)
    assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('changes,message', [
    (dict(data=('no.zip',)), '--data no.zip must be a file'),
    (dict(data=(str(ROOT / 'README.md'), str(ROOT / 'README.md'))), '--data must have names that differ'),
    (dict(wheels=('absent_one',)), '--wheels absent_one cannot be had for Python 3.12: .*see --wheels-from'),
], ids=str)
def test_bad_settings_end_in_one_sentence(tmp_path, changes, message):
    (tmp_path / 'shelf').mkdir()
    with pytest.raises(ConfigError, match=message):
        pack(tmp_path / 'b', wheels_from=str(tmp_path / 'shelf'), **changes)
    assert not (tmp_path / 'b').exists()


@pytest.mark.parametrize('changes,message', [
    (dict(max_mib=float('nan')), '--max-mib must be from 0.01 to 1e.06, got nan'),
    (dict(max_mib=0.), '--max-mib must be from 0.01'), (dict(python='3.12.1'), "such as 3.12, got '3.12.1'"),
    (dict(output=str(ROOT)), 'outside of what is packed'), (dict(output=str(ROOT.parent)), 'outside of what is packed'),
    (dict(output=str(ROOT / 'scripts' / 'b')), 'outside of what is packed'),
    (dict(output='file'), 'must be a folder, but is a file'), (dict(output='file/b'), 'cannot be made: '),
], ids=str)
def test_settings_that_cannot_work_touch_nothing(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('kept')
    with pytest.raises(ConfigError, match=message):
        pack(tmp_path / 'b', **changes)
    assert [path.name for path in tmp_path.iterdir()] == ['file'] and (tmp_path / 'file').read_text() == 'kept'


@pytest.mark.parametrize('name', ['thesis.txt', 'COMMIT'])
def test_other_files_are_never_replaced(tmp_path, name):
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / name).write_text('')
    with pytest.raises(ConfigError, match='must be new, empty, or an earlier bundle'):
        pack(tmp_path / 'b')
    assert (tmp_path / 'b' / name).exists()


def test_an_earlier_bundle_stays_until_the_new_one_is_whole(tmp_path):
    pack(tmp_path / 'b')
    (tmp_path / 'b' / 'data' / 'only.zip').write_bytes(b'the only copy')
    with pytest.raises(ConfigError, match=r'only\.zip must be outside of --output'):
        pack(tmp_path / 'b', data=(str(tmp_path / 'b' / 'data' / 'only.zip'),))
    with pytest.raises(ConfigError, match='--wheels absent_one cannot be had'):
        pack(tmp_path / 'b', wheels=('absent_one',), wheels_from=str(tmp_path))
    with pytest.raises(ConfigError, match=r'must be at most 0\.1 MiB'):
        pack(tmp_path / 'b', max_mib=.1)
    assert (tmp_path / 'b' / 'data' / 'only.zip').exists() and (tmp_path / 'b' / 'run.sh').exists()
    (tmp_path / 'b' / 'runs').mkdir()
    with pytest.raises(ConfigError, match='but holds other files: runs; name'):
        pack(tmp_path / 'b')
    (tmp_path / 'b' / 'runs').rmdir()
    pack(tmp_path / 'b')
    assert not list((tmp_path / 'b' / 'data').iterdir()) and [path.name for path in tmp_path.iterdir()] == ['b']


@pytest.mark.slow
def test_the_run_line_works_without_git_network_and_checkout(tmp_path, shelf):
    pack(tmp_path / 'made', wheels=('carried_one',), wheels_from=str(shelf))
    there = tmp_path / 'elsewhere' / 'bundle'
    shutil.copytree(tmp_path / 'made', there)
    (there / 'coatnet_zoo' / '__init__.py').open('a').write('import carried_one\n')
    (tmp_path / 'bin').mkdir()
    for name in ('sh', 'dirname', 'ls', 'mv'):
        (tmp_path / 'bin' / name).symlink_to(shutil.which(name))
    (tmp_path / 'bin' / 'python3').write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / 'bin' / 'python3').chmod(0o755)
    environment = {'PATH': str(tmp_path / 'bin'), 'HOME': str(tmp_path), 'OMP_NUM_THREADS': '1',
                   'TRITON_INTERPRET': '1'}
    command = ['sh', there / 'run.sh', 'gpu_report.py', 'step', 'versions']
    done = subprocess.run(
        [*command, '--tiny', '--device', 'cpu', '--output', 'out'], capture_output=True, text=True, cwd=tmp_path,
        env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    # the bundle's own package, which found the wheel
    assert 'the carried package' in done.stdout and 'versions  commit  abc123def456' in done.stdout
    assert (there / '.site' / 'carried_one.py').is_file() and list((tmp_path / 'out').glob('checks_*.csv'))
