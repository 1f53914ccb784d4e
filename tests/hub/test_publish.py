"""hub/publish.py against the loopback Hub: uploads, rejected pushes, and reruns after any interruption."""
import dataclasses
import errno
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import CommitOperationAdd, ModelCard, constants
from safetensors.torch import save_file

import model_card
import publish
import publish_run
import verification
from coatnet_train.runtime.cli import ConfigError
from support.constants import ROOT
from support.hub_server import OWNER_TOKEN, READER_TOKEN

NAME = 'coatnet_pico_64.digits'
REPO = f'owner/{NAME}'
CARD = '---\nlibrary_name: timm\nlicense: apache-2.0\ntags:\n- image-classification\n- timm\n---\n# A model\n'


def checksums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope='session')
def made(tmp_path_factory) -> Path:
    """A folder as hub/export.py makes it; read-only."""
    folder = tmp_path_factory.mktemp('made')
    torch.manual_seed(0)
    model = timm.create_model('coatnet_pico_64', num_classes=4, depths=(1, 1, 1, 1), embed_dim=(16, 16, 32, 64)).eval()
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_config={
        'label_names': list('abcd'), 'pretrained_cfg': {'tag': 'digits', 'license': 'apache-2.0'}})
    config = json.loads((folder / 'config.json').read_text())
    del config['model_args']['num_classes']
    config['release'] = {'metrics': {'top1': 98.3}, 'commit': 'c0ffee', 'repo': REPO, 'hours': None}
    (folder / 'config.json').write_text(json.dumps(config))
    golden = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        save_file({'input': golden, 'logits': model(golden)}, folder / 'golden.safetensors')
    (folder / 'README.md').write_text(CARD)
    (folder / 'curves.png').write_bytes(b'an image')
    return folder


@pytest.fixture
def ready(made, tmp_path) -> Path:
    folder = tmp_path / 'folder'
    folder.mkdir()
    for path in made.iterdir():
        os.link(path, folder / path.name)  # change by unlink and write
    return folder


@pytest.fixture
def settings(client, ready, tmp_path, monkeypatch) -> publish.PublishSettings:
    """Settings that push that folder, with a package that has no releases."""
    monkeypatch.setattr(publish_run, 'WEIGHTS', tmp_path / 'weights')
    monkeypatch.setattr(publish_run, 'verify', checksums)
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights/releases.json').write_text('{}\n')
    return publish.PublishSettings(folder=ready, repo=REPO, push=True)


def change(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def recorded() -> dict:
    return publish_run.read_releases()


def refused(settings: publish.PublishSettings) -> str:
    with pytest.raises(ConfigError) as told:
        publish.main(settings)
    sentence = str(told.value)
    assert '\n' not in sentence and 'hf_' not in sentence.replace('hf_hub', '') and sentence.endswith('.')
    return sentence


def asked(hub, method: str, part: str) -> list:
    return [request for request in hub.requests if request.method == method and part in request.path]


def assert_published(hub, folder: Path) -> None:
    """Assert that the repository has one commit after the first, with its tag and its record in releases.json."""
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2
    head = repo.branches['main']
    assert repo.tags == {'v1': head}
    files = {name: blob.content for name, blob in repo.files().items() if name != '.gitattributes'}
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    entry = recorded()[NAME]
    assert (entry['repo'], entry['commit'], entry['packaged']) == (REPO, head, None)
    assert entry['sha256'] == checksums(folder)['model.safetensors']


def test_dry_run_changes_nothing_and_says_what_would_be(hub, settings, capsys):
    publish.main(dataclasses.replace(settings, push=False))
    said = capsys.readouterr().out
    for name, sha256 in checksums(settings.folder).items():
        size = (settings.folder / name).stat().st_size
        assert re.search(rf'{re.escape(name)} +{size:,} bytes  sha256 {sha256}', said)
    assert f'{REPO} on the Hub: does not exist, or your token may not see it; --push would make it' in said
    assert not hub.repos and recorded() == {}
    assert {request.method for request in hub.requests} == {'GET'}
    hub.create(REPO)
    publish.main(dataclasses.replace(settings, push=False))
    assert '--push would upload README.md, config.json, curves.png' in capsys.readouterr().out
    assert {request.method for request in hub.requests} == {'GET'} and len(hub.repos[REPO].commits) == 1


def test_push_uploads_once_and_records_what_came_back(hub, client, settings, capsys):
    publish.main(settings)
    assert not Path(constants.HF_HUB_CACHE).exists()  # the user's cache was neither read nor filled
    assert_published(hub, settings.folder)
    assert not hub.repos[REPO].private
    entry = recorded()[NAME]
    assert entry['size'] == (settings.folder / 'model.safetensors').stat().st_size
    assert entry['pretrained_cfg']['label_names'] == list('abcd') and entry['pretrained_cfg']['num_classes'] == 4
    assert entry['release'] == {'metrics': {'top1': 98.3}, 'commit': 'c0ffee', 'repo': REPO, 'hours': None}
    assert ModelCard.load(REPO).data.license == 'apache-2.0'
    assert [ref.name for ref in client.list_repo_refs(REPO).tags] == ['v1']
    said = capsys.readouterr().out
    assert all(word in said for word in ('uploaded 5 files in commit', 'tagged v1', 'golden logits met', 'recorded in'))

    before = (publish_run.WEIGHTS / 'releases.json').read_bytes()
    hub.requests.clear()
    publish.main(settings)
    assert_published(hub, settings.folder)
    assert not asked(hub, 'PUT', '') and not asked(hub, 'POST', '/commit/') and not asked(hub, 'POST', '/tag/')
    assert (publish_run.WEIGHTS / 'releases.json').read_bytes() == before
    assert 'nothing to upload' in capsys.readouterr().out


def test_private_makes_a_private_repository(hub, settings):
    publish.main(dataclasses.replace(settings, private=True))
    assert hub.repos[REPO].private
    assert_published(hub, settings.folder)


STEPS = ('create_repo', 'upload', 'create_tag', 'check_download', 'record')


@pytest.mark.parametrize('step', STEPS)
@pytest.mark.parametrize('moment', ['before', 'after'])
def test_interrupted_at_any_step_it_ends_in_the_same_state(hub, client, settings, monkeypatch, step, moment):
    owner = publish_run.HfApi if step.startswith('create') else publish_run
    done = getattr(owner, step)

    def interrupted(*args, **kwargs):
        if moment == 'after':
            done(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish.main(settings)
    assert (NAME in recorded()) == ((step, moment) == ('record', 'after'))
    publish.main(settings)
    assert_published(hub, settings.folder)


@pytest.mark.parametrize(('method', 'path'), [
    ('GET', '/whoami'), ('POST', '/repos/create'), ('GET', '/refs'), ('POST', '/preupload/'), ('POST', 'objects/batch'),
    ('PUT', '/lfs/'), ('POST', '/commit/'), ('POST', '/tag/'), ('HEAD', '/resolve/'), ('GET', '/cdn/')])
@pytest.mark.parametrize('kind', [pytest.param('before', marks=pytest.mark.slow), 'answer'])
def test_a_connection_that_breaks_for_good_is_a_sentence_and_is_made_up_for(
        hub, settings, monkeypatch, method, path, kind):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # between the client's retries
    hub.fail(method, path, kind, times=1000)
    assert refused(settings).startswith(f'--repo {REPO}')
    assert recorded() == {}
    hub.faults.clear()
    publish.main(settings)
    assert_published(hub, settings.folder)


def test_an_upload_cut_in_the_middle_is_sent_again(hub, settings):
    hub.fail('PUT', '/lfs/', 'half')
    publish.main(settings)
    assert sorted(request.status for request in asked(hub, 'PUT', '/lfs/')) == [0, 200, 200]
    assert_published(hub, settings.folder)


def test_a_download_cut_in_the_middle_is_resumed(hub, settings, monkeypatch):
    monkeypatch.setattr(constants, 'DOWNLOAD_CHUNK_SIZE', 1 << 16)
    hub.fail('GET', '/cdn/', 'half')
    try:
        publish.main(settings)
    except ConfigError:  # clients before 1.0 give up
        publish.main(settings)
    assert_published(hub, settings.folder)


def test_a_corrupted_download_is_not_recorded(hub, settings):
    sha256 = checksums(settings.folder)['model.safetensors']
    hub.corrupted.add(sha256)
    assert re.match(rf'--repo {REPO}: model\.safetensors came back from commit \w+ with sha256 \w+ in place of '
                    rf'{sha256}; nothing was recorded', refused(settings))
    assert recorded() == {}
    hub.corrupted.clear()
    publish.main(settings)
    assert_published(hub, settings.folder)


def test_logits_other_than_the_golden_ones_are_not_recorded(hub, settings):
    golden = torch.randn(2, 3, 64, 64)
    (settings.folder / 'golden.safetensors').unlink()
    save_file({'input': golden, 'logits': torch.randn(2, 4)}, settings.folder / 'golden.safetensors')
    assert 'its logits differ from the golden ones by' in refused(settings)
    assert recorded() == {}


def test_a_repository_that_moves_meanwhile_is_not_overwritten(hub, client, settings):
    hub.create(REPO)

    def someone_else(method: str, path: str) -> None:
        if '/commit/' in path:
            hub.before = lambda method, path: None
            client.create_commit(REPO, [CommitOperationAdd('README.md', b'theirs')], commit_message='theirs')

    hub.before = someone_else
    assert 'somebody committed to it meanwhile; nothing was overwritten' in refused(settings)
    assert hub.repos[REPO].files()['README.md'].content == b'theirs'
    assert hub.repos[REPO].tags == {} and recorded() == {}
    head = hub.repos[REPO].branches['main']
    assert f'holds files that no release recorded, and they would be overwritten; look at it, and add --parent {head}' \
        in refused(settings)
    assert '--parent ' + 'a' * 40 + ' is not where' in refused(dataclasses.replace(settings, parent='a' * 40))
    publish.main(dataclasses.replace(settings, parent=head))
    assert recorded()[NAME]['commit'] == hub.repos[REPO].branches['main']


def test_the_next_release_builds_upon_the_recorded_one_only(hub, client, settings):
    """Tags never move; files that no export writes are kept, stale files of an earlier export are deleted."""
    (settings.folder / 'model.onnx').write_bytes(b'a graph')
    publish.main(settings)
    first = recorded()[NAME]['commit']
    (settings.folder / 'model.onnx').unlink()
    change(settings.folder / 'README.md', CARD.encode() + b'more')
    assert re.search(r'--release v1: the tag exists in \S+, at a commit with other files \(README\.md, model\.onnx\), '
                     r'and is never moved; give another', refused(settings))
    second = dataclasses.replace(settings, release='v2')
    client.create_commit(REPO, [CommitOperationAdd('NOTES.md', b'notes')], commit_message='theirs')
    moved = hub.repos[REPO].branches['main']
    assert f'has moved since it was recorded at {first}' in refused(second)
    publish.main(dataclasses.replace(second, parent=moved))
    files = hub.repos[REPO].files()
    assert files['NOTES.md'].content == b'notes' and 'model.onnx' not in files
    assert hub.repos[REPO].tags == {'v1': first, 'v2': recorded()[NAME]['commit']}
    publish.main(settings := dataclasses.replace(second, push=False))
    client.create_commit(REPO, [CommitOperationAdd('NOTES.md', b'more notes')], commit_message='theirs')
    publish.main(dataclasses.replace(settings, push=True))  # the tag, not the branch, identifies the release
    assert recorded()[NAME]['commit'] == hub.repos[REPO].tags['v2']


def test_tokens_and_owners(hub, settings, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    assert refused(settings).startswith('--push needs a token that may write, and there is none; log in')
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    assert 'the Hub refuses the token of HF_TOKEN or of your login' in refused(settings)
    monkeypatch.setenv('HF_TOKEN', READER_TOKEN)
    assert 'your token may not write to owner; take one that may' in refused(settings)
    hub.create(REPO, private=True)
    assert 'your token may not write to owner' in refused(settings)
    assert len(hub.repos[REPO].commits) == 1 and recorded() == {}
    Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(constants.HF_TOKEN_PATH).write_text(OWNER_TOKEN)  # as `hf auth login` leaves it
    monkeypatch.delenv('HF_TOKEN')
    publish.main(settings)
    assert_published(hub, settings.folder)


def test_offline(settings, offline):
    offline()
    assert 'the Hub cannot be reached' in refused(settings)
    assert 'the Hub cannot be reached' in refused(dataclasses.replace(settings, push=False))


def test_package_needs_no_network_and_a_push_fills_in_the_rest(hub, settings, offline):
    offline()
    publish.main(dataclasses.replace(settings, repo='', push=False, package=True))
    offline(False)
    entry, weights = recorded()[NAME], publish_run.WEIGHTS / f'{NAME}.safetensors'
    assert (entry['repo'], entry['commit'], entry['packaged']) == (None, None, weights.name) and not hub.requests
    assert weights.read_bytes() == (settings.folder / 'model.safetensors').read_bytes()
    publish.main(settings)
    entry = recorded()[NAME]
    assert (entry['repo'], entry['packaged']) == (REPO, weights.name)
    assert entry['commit'] == hub.repos[REPO].branches['main']
    publish.main(dataclasses.replace(settings, repo='', push=False, package=True))
    assert recorded()[NAME] == entry and sorted(path.name for path in publish_run.WEIGHTS.iterdir()) == sorted(
        [weights.name, 'releases.json'])
    change(settings.folder / 'model.safetensors', b'other weights')
    assert 'has other weights than' in refused(settings)


@pytest.mark.parametrize('moment', ['before', 'after'])
def test_packaging_interrupted_ends_in_the_same_state(settings, monkeypatch, moment):
    settings, done = dataclasses.replace(settings, repo='', push=False, package=True), publish_run.write_file

    def interrupted(*args):
        if moment == 'after':
            done(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publish_run, 'write_file', interrupted)
        with pytest.raises(KeyboardInterrupt):
            publish.main(settings)
    assert recorded() == {}
    publish.main(settings)
    assert recorded()[NAME]['packaged'] == f'{NAME}.safetensors'


def test_what_may_not_be_released_is_refused(settings, monkeypatch):
    config = json.loads((settings.folder / 'config.json').read_text())
    for architecture, told in (('coatnet_0', 'would change the input size of coatnet_0'),
                               ('coatnet_7', 'coatnet_7')):
        change(settings.folder / 'config.json', json.dumps({**config, 'architecture': architecture}).encode())
        assert told in refused(settings)


@pytest.mark.parametrize('before', [None, 'other/colours'])
def test_push_writes_its_repository_into_the_card_of_an_export_that_names_another_or_none(
        hub, settings, folder, monkeypatch, before, capsys):
    monkeypatch.setattr(publish_run, 'verify', verification.verify)
    monkeypatch.setattr(verification, 'check_in_fresh_process', lambda folder: 'left out')
    monkeypatch.setattr(publish_run, 'check_release', lambda *_: None)  # would reject its 32 pixels
    config = json.loads((folder / 'config.json').read_text())
    config['release']['repo'] = before
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    model_card.write_card(folder)
    old, settings = checksums(folder), dataclasses.replace(settings, folder=folder, repo='owner/colours')

    publish.main(dataclasses.replace(settings, push=False))
    said = f'README.md and config.json name {before or "no repository"}: '
    assert said + '--push would write owner/colours' in capsys.readouterr().out and checksums(folder) == old
    publish.main(dataclasses.replace(settings, push=False, package=True))
    entry, = recorded().values()
    assert entry['repo'] is None and entry['release']['repo'] == before  # nothing was pushed there
    capsys.readouterr()

    with monkeypatch.context() as patch:  # killed between the two files
        patch.setattr(publish_run, 'write_json', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            publish.main(settings)
    capsys.readouterr()
    publish.main(settings)
    assert said + 'owner/colours is written' in capsys.readouterr().out
    new = checksums(folder)
    assert {name for name in old if old[name] != new[name]} == {'README.md', 'config.json'} and {*old} == {*new}
    config['release']['repo'] = 'owner/colours'
    assert json.loads((folder / 'config.json').read_text()) == config
    assert "timm.create_model('hf-hub:owner/colours', pretrained=True)" in (folder / 'README.md').read_text()
    there = hub.repos['owner/colours'].files()
    assert {name: hashlib.sha256(there[name].content).hexdigest() for name in new} == new
    publish.main(dataclasses.replace(settings, push=False))
    said = capsys.readouterr().out
    assert 'would write' not in said and 'holds these files; --push would upload nothing' in said


@pytest.mark.parametrize('change', [
    lambda entry: entry.pop('sha256'), lambda entry: entry.update(sha256=entry['sha256'][:9]),
    lambda entry: entry.update(packaged=None), lambda entry: entry.update(packaged='../x.safetensors'),
    lambda entry: entry.update(repo=REPO), lambda entry: entry.pop('pretrained_cfg'),
    lambda entry: entry.update(size='large'), lambda entry: entry['pretrained_cfg'].pop('input_size')], ids=range(8))
def test_record_damaged_by_hand_is_a_sentence_and_left_as_it_is(settings, change):
    settings = dataclasses.replace(settings, repo='', push=False, package=True)
    publish.main(settings)
    path, releases = publish_run.WEIGHTS / 'releases.json', recorded()
    change(releases[NAME])
    for damaged in (json.dumps(releases), '<<<<<<< ours\n', '[]'):
        path.write_text(damaged)
        assert re.match(r'what is released already cannot be read: \S+releases.json is damaged', refused(settings))
        assert path.read_text() == damaged


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize('step', ['hf_hub_download', 'write_file', 'write_json'])
def test_a_disk_that_takes_nothing_is_a_sentence_and_is_made_up_for(hub, settings, monkeypatch, step, number):
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    settings = dataclasses.replace(settings, package=True)
    with monkeypatch.context() as patch:
        patch.setattr(publish_run, step, full)
        assert re.match(rf'a file of this machine cannot be written: .*{os.strerror(number)}', refused(settings))
    publish.main(settings)
    assert recorded()[NAME]['commit'] == hub.repos[REPO].tags['v1'] and recorded()[NAME]['packaged']


@pytest.mark.parametrize(('changed', 'told'), [
    (dict(release='a b'), "--release must be a git tag of letters, digits"), (dict(release=''), 'such as v2'),
    (dict(release='main'), '--release must be a git tag'),
    (dict(repo='', push=False), '--repo must name a repository'), (dict(repo=''), '--push needs --repo'),
    (dict(repo='model'), 'put the owner in front'), (dict(repo='owner/a--b'), '--repo must be OWNER/NAME as the Hub')])
def test_options_that_cannot_work(settings, changed, told):
    assert told in refused(dataclasses.replace(settings, **changed))


def test_command_line_ends_with_a_sentence(tmp_path, environment):
    done = subprocess.run([sys.executable, 'hub/publish.py', str(tmp_path)], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, **environment})
    assert done.returncode == 2 and done.stderr.startswith('publish.py: --repo must name a repository as OWNER/NAME')
