"""Released weights, from releases.json to a loaded model: packaged weights, downloads, and rejected files."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import CommitOperationAdd, constants
from safetensors.torch import load_file, save_file
from timm.models import get_arch_pretrained_cfgs

import coatnet_zoo
from coatnet_zoo import kecam, releases
from support.constants import ROOT
from support.hub_server import READER_TOKEN

REPO = 'owner/coatnet_pico_64.digits'
NAME = 'coatnet_pico_64.digits'


@pytest.fixture(scope='session')
def weights(tmp_path_factory) -> Path:
    """coatnet_pico_64 for four classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'model.safetensors'
    save_file(timm.create_model('coatnet_pico_64', num_classes=4).state_dict(), path, metadata={'format': 'pt'})
    return path


def entry_for(weights: Path, **changed: object) -> dict:
    return {'repo': None, 'commit': None, 'file': 'model.safetensors', 'packaged': None,
            'sha256': releases.sha256_of(weights), 'size': weights.stat().st_size, 'pretrained_cfg': {
                'tag': 'digits', 'num_classes': 4, 'label_names': ['a', 'b', 'c', 'd'], 'input_size': [3, 64, 64],
                'crop_pct': .875, 'mean': [.1, .2, .3], 'std': [.5, .5, .5], 'license': 'cc-by-4.0',
                'first_conv': 'nonsense', 'fixed_input_size': False, 'architecture': 'coatnet_pico_64'}, **changed}


@pytest.fixture
def released(client, weights, monkeypatch) -> dict:
    """A release on the Hub that releases.json records."""
    client.create_repo(REPO)
    commit = client.create_commit(
        REPO, [CommitOperationAdd('model.safetensors', str(weights))], commit_message='release').oid
    entry = entry_for(weights, repo=REPO, commit=commit)
    # a separate dict: removing and restoring entries would change the order of the packaged ones
    monkeypatch.setattr(releases, 'RELEASES', {NAME: entry})
    return entry


def load(released: dict, **kwargs) -> torch.nn.Module:
    """Load as create_model(NAME, pretrained=True) does; a test below loads registered names in a new process."""
    return timm.create_model('coatnet_pico_64', pretrained=True, num_classes=4, **kwargs, pretrained_cfg_overlay=dict(
        hf_hub_id=f'{released["repo"]}@{released["commit"]}', hf_hub_filename=released['file'], num_classes=4))


def assert_same(model: torch.nn.Module, weights: Path) -> None:
    expected = load_file(weights)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_shipped_releases_are_whole():
    """Every entry of the real releases.json."""
    for name, entry in releases.RELEASES.items():
        architecture, _, tag = name.partition('.')
        releases.check_release(
            name, entry['pretrained_cfg'], timm.get_pretrained_cfg(f'{architecture}.untrained').to_dict())
        assert entry['pretrained_cfg']['tag'] == tag and entry['pretrained_cfg']['license']
        assert re.fullmatch('[0-9a-f]{64}', entry['sha256'])
        assert (entry['repo'] is None) == (entry['commit'] is None)
        assert entry['packaged'] or re.fullmatch('[0-9a-f]{40}', entry['commit'])
        if entry['packaged']:
            assert coatnet_zoo.verify_weights(name).stat().st_size == entry['size']
    packaged = {entry['packaged'] for entry in releases.RELEASES.values()} - {None}
    assert {path.name for path in releases.WEIGHTS.glob('*.safetensors')} == packaged
    assert set(coatnet_zoo.list_models(pretrained=True)) == {*releases.RELEASES, *kecam.WEIGHTS}


def test_no_name_for_224_pixels_changes_with_weights():
    for name in coatnet_zoo.list_models():
        default = next(iter(get_arch_pretrained_cfgs(name).values()))
        untrained = timm.get_pretrained_cfg(f'{name}.untrained')
        assert default.input_size == untrained.input_size
        assert default.num_classes == untrained.num_classes or name.endswith('_64')


def test_weights_that_would_change_their_architecture_are_refused():
    usual = dict(input_size=(3, 224, 224), num_classes=1000)
    releases.check_release('coatnet_0.in1k', dict(input_size=[3, 224, 224], num_classes=1000), usual)
    with pytest.raises(ValueError, match=r'200 classes would change the number of classes of coatnet_0, 1000; only'):
        releases.check_release('coatnet_0.tin200', dict(input_size=[3, 224, 224], num_classes=200), usual)
    with pytest.raises(ValueError, match=r'input size \(3, 64, 64\) would change the input size of coatnet_0'):
        releases.check_release('coatnet_0.in64', dict(input_size=[3, 64, 64], num_classes=1000), usual)
    small = dict(input_size=(3, 64, 64), num_classes=1000)
    releases.check_release('coatnet_pico_64.tin200', dict(input_size=[3, 64, 64], num_classes=200), small)
    with pytest.raises(ValueError, match='would change the input size'):
        releases.check_release('coatnet_pico_64.tin200', dict(input_size=[3, 32, 32], num_classes=200), small)


def test_the_hub_gives_the_very_weights_and_once_is_enough(hub, client, released, weights, offline):
    with pytest.raises(FileNotFoundError, match=r'owner/coatnet_pico_64.digits at \w{12} is not in the cache'):
        coatnet_zoo.verify_weights(NAME)
    assert_same(load(released), weights)
    assert coatnet_zoo.verify_weights(NAME) == coatnet_zoo.verify_weights('coatnet_pico_64')
    assert coatnet_zoo.verify_weights(NAME).samefile(
        Path(constants.HF_HUB_CACHE) / 'models--owner--coatnet_pico_64.digits/blobs' / released['sha256'])
    client.create_commit(REPO, [CommitOperationAdd('model.safetensors', b'other weights')], commit_message='moved on')
    offline()
    asked = len(hub.requests)
    assert_same(load(released), weights)
    assert len(hub.requests) == asked


def test_cache_dir_is_kept(released, weights, tmp_path):
    assert_same(load(released, cache_dir=tmp_path / 'here'), weights)
    assert coatnet_zoo.verify_weights(NAME, tmp_path / 'here').is_relative_to(tmp_path / 'here')
    with pytest.raises(FileNotFoundError):
        coatnet_zoo.verify_weights(NAME)


def test_a_damaged_download_is_not_loaded_and_the_way_out_works(hub, released, weights):
    hub.corrupted.add(released['sha256'])
    with pytest.raises(RuntimeError, match='is damaged and was not loaded: its sha256 is') as told:
        load(released)
    with pytest.raises(RuntimeError, match='is damaged'):
        coatnet_zoo.verify_weights(NAME)
    hub.corrupted.clear()
    with pytest.raises(RuntimeError, match='is damaged'):
        load(released)  # from the cache
    Path(re.search(r'delete (\S+) and load', str(told.value))[1]).unlink()
    assert_same(load(released), weights)


def test_what_the_hub_does_not_give_is_said_with_the_way_out(hub, released, offline, monkeypatch):
    def told() -> str:
        with pytest.raises(RuntimeError) as error:
            load(released)
        assert '\n' not in str(error.value) and str(error.value).startswith(f'{NAME}: ')
        assert all(token not in str(error.value) for token in ('hf_loopback', 'hf_wrong'))
        return str(error.value)

    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert 'the Hub refuses the token of HF_TOKEN or of your login; renew it' in told()
    hub.repos[REPO].private = True
    monkeypatch.delenv('HF_TOKEN')
    assert 'is private or gone; log in with `hf auth login` or set HF_TOKEN' in told()
    monkeypatch.setenv('HF_TOKEN', READER_TOKEN)
    assert 'is private or gone; your token may not see it' in told()
    hub.repos[REPO].private = False
    first = released['commit']
    released['commit'] = '0' * 40
    assert f'no longer has model.safetensors at commit {"0" * 40}; update coatnet_zoo' in told()
    released['commit'] = first
    offline()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert 'not in the cache and the Hub cannot be reached (HF_HUB_OFFLINE is set); go online once' in told()
    offline(False)
    del hub.repos[REPO]
    assert f'the Hub shows no repository {REPO}' in told()


def test_a_download_that_breaks_for_good_is_a_sentence(hub, released, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    hub.fail('GET', '/cdn/', 'before', times=100)
    with pytest.raises(RuntimeError, match=rf'{REPO} could not be downloaded \(.*\); try again'):
        load(released)


def test_sources_of_the_user_are_theirs(hub, client, released, weights, tmp_path):
    """Weights from other repositories and files are neither checked nor replaced by those of the release."""
    other = tmp_path / 'other.safetensors'
    save_file({key: torch.zeros_like(value) for key, value in load_file(weights).items()}, other)
    client.create_repo('owner/other')
    client.create_commit('owner/other', [CommitOperationAdd('model.safetensors', str(other))], commit_message='mine')
    for overlay in (dict(hf_hub_id='owner/other'), dict(file=str(other)), dict(state_dict=load_file(other))):
        model = timm.create_model('coatnet_pico_64', pretrained=True, num_classes=4,
                                  pretrained_cfg_overlay=dict(num_classes=4, **overlay))
        assert_same(model, other)


@pytest.mark.slow
def test_a_damaged_index_says_so_when_the_package_is_imported(weights, tmp_path):
    path = tmp_path / 'releases.json'
    path.write_text(json.dumps({NAME: entry_for(weights, packaged='small.safetensors')}))
    assert set(releases.read_releases(path)) == {NAME}
    path.write_text(json.dumps({NAME: entry_for(weights, repo=REPO)}))
    with pytest.raises(ValueError, match=rf'{NAME} must have repo and commit of 40 digits.*; reinstall coatnet_zoo'):
        releases.read_releases(path)
    with pytest.raises(ValueError, match=r'nothing.json is damaged \(FileNotFoundError.*reinstall coatnet_zoo'):
        releases.read_releases(tmp_path / 'nothing.json')
    package = shutil.copytree(ROOT / 'coatnet_zoo', tmp_path / 'site/coatnet_zoo')
    (package / 'weights/releases.json').write_text('<<<<<<< ours')
    done = subprocess.run([sys.executable, '-c', 'import coatnet_zoo'], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')})
    assert re.match(r'ValueError: \S+releases.json is damaged .*; reinstall coatnet_zoo', done.stderr.splitlines()[-1])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'coatnet_5' has no released weights\. Names that have some: "):
        coatnet_zoo.verify_weights('coatnet_5')


TRY = '''
import json, sys
from pathlib import Path
import timm, torch
from safetensors.torch import load_file, save_file
import coatnet_zoo
from huggingface_hub import constants, utils

weights, packaged = load_file(sys.argv[1]), Path(coatnet_zoo.__file__).parent / 'weights/small.safetensors'
def same(model):
    return all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
def told(call):
    try:
        call()
    except Exception as error:
        return f'{type(error).__name__}: {error}'

seen = dict(listed=[name for name in timm.list_pretrained('*') if 'coatnet_pico_64' in name])
seen['packaged_offline'] = same(timm.create_model('coatnet_pico_64.digits', pretrained=True))
seen['default_tag'] = same(timm.create_model('coatnet_pico_64', pretrained=True))
seen['verified'] = coatnet_zoo.verify_weights('coatnet_pico_64') == packaged
cfg = timm.get_pretrained_cfg('coatnet_pico_64')
seen['cfg'] = [cfg.num_classes, cfg.mean, cfg.crop_pct, cfg.label_names, cfg.license, cfg.tag, cfg.first_conv,
               cfg.fixed_input_size, cfg.input_size]
seen['untrained'] = timm.create_model('coatnet_pico_64.untrained', device='meta').num_classes
seen['fine_tune'] = timm.create_model('coatnet_pico_64', pretrained=True, num_classes=7, in_chans=1).num_classes
seen['hub_offline'] = told(lambda: timm.create_model('coatnet_pico_64.hub', pretrained=True))
seen['other_file'] = told(lambda: timm.create_model(
    'coatnet_pico_64', pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id='owner/nothing')))
constants.HF_HUB_OFFLINE = False
getattr(utils, 'reset_sessions', lambda: None)()  # versions before 1.0 would stay offline
seen['hub'] = same(timm.create_model('coatnet_pico_64.hub', pretrained=True))
seen['features'] = len(timm.create_model('coatnet_pico_64.hub', pretrained=True, features_only=True)(
    torch.zeros(1, 3, 64, 64)))
content = packaged.read_bytes()
packaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
seen['damaged'] = told(lambda: timm.create_model('coatnet_pico_64.digits', pretrained=True))
packaged.unlink()
seen['missing'] = told(lambda: timm.create_model('coatnet_pico_64.digits', pretrained=True))
print(json.dumps(seen))
'''


def test_registered_names_load_from_the_package_and_from_the_hub(hub, client, released, weights, environment, tmp_path):
    """Both names load in a copy of the package whose releases.json has one release of each kind."""
    package = shutil.copytree(ROOT / 'coatnet_zoo', tmp_path / 'site/coatnet_zoo',
                              ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    shutil.copy(weights, package / 'weights/small.safetensors')
    (package / 'weights/releases.json').write_text(json.dumps({
        NAME: entry_for(weights, packaged='small.safetensors'), 'coatnet_pico_64.hub': released}))
    done = subprocess.run(
        [sys.executable, '-c', TRY, str(weights)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, **environment, 'PYTHONPATH': str(tmp_path / 'site'), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen['listed'] == ['coatnet_pico_64.digits', 'coatnet_pico_64.hub']
    assert seen['packaged_offline'] and seen['default_tag'] and seen['verified'] and seen['hub']
    assert seen['cfg'] == [4, [.1, .2, .3], .875, ['a', 'b', 'c', 'd'], 'cc-by-4.0', 'digits', 'stem.conv1', True,
                           [3, 64, 64]]
    assert (seen['untrained'], seen['fine_tune'], seen['features']) == (1000, 7, 5)
    assert 'coatnet_pico_64.hub: the weights are not in the cache and the Hub cannot be reached' in seen['hub_offline']
    assert seen['other_file']
    assert seen['damaged'].startswith('RuntimeError: ') and seen['damaged'].endswith('; reinstall coatnet_zoo.')
    assert seen['missing'].startswith('FileNotFoundError: ') and 'is missing from the package' in seen['missing']
