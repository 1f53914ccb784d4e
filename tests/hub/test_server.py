"""The loopback Hub with the real clients: pushes and downloads agree, and faults raise errors or are retried."""
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save

from support.hub_server import OWNER_TOKEN, READER_TOKEN

REPO = 'owner/model.tag'
CARD = '---\nlibrary_name: timm\nlicense: apache-2.0\ntags:\n- image-classification\n- timm\n---\n# A model\n'
WEIGHTS = save({'weight': torch.randn(300, 300, generator=torch.Generator().manual_seed(0))})


def operations(**changed: bytes) -> list[CommitOperationAdd]:
    files = {'README.md': CARD.encode(), 'config.json': b'{"a": 1}', 'model.safetensors': WEIGHTS}
    for name, content in changed.items():
        files[name.replace('_', '.')] = content
    return [CommitOperationAdd(path, content) for path, content in files.items()]


@pytest.fixture
def pushed(client):
    client.create_repo(REPO)
    return client.create_commit(REPO, operations(), commit_message='first').oid


def asked(hub, method: str, part: str) -> list:
    return [request for request in hub.requests if request.method == method and part in request.path]


def test_what_is_pushed_comes_back(hub, client, pushed):
    assert client.whoami()['name'] == 'owner'
    assert client.list_repo_files(REPO) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']
    info = client.model_info(REPO, files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert info.sha == pushed and files['model.safetensors'].lfs.size == len(WEIGHTS)
    assert files['config.json'].lfs is None and files['config.json'].size == 8
    assert (info.library_name, info.card_data.license) == ('timm', 'apache-2.0')
    assert info.tags == ['image-classification', 'timm']
    assert Path(hf_hub_download(REPO, 'model.safetensors')).read_bytes() == WEIGHTS
    assert ModelCard.load(REPO).data.tags == ['image-classification', 'timm']
    assert ModelCard.load(REPO).text.strip() == '# A model'
    [put] = asked(hub, 'PUT', '/lfs/')
    assert put.status == 200 and asked(hub, 'POST', '/lfs/verify')
    # large files come from another host, which must never get the token
    assert not any(request.token for request in hub.requests if request.path.startswith(('/cdn/', '/lfs/')))
    assert asked(hub, 'GET', '/cdn/')[0].host.startswith('localhost:')
    assert all(request.token for request in asked(hub, 'HEAD', '/resolve/'))


def test_blobs_are_named_as_git_names_them(hub, client, pushed, tmp_path):
    """Blob ids agree with git hash-object, for a plain file and for the LFS pointer of a large one."""
    pointer = (f'version https://git-lfs.github.com/spec/v1\noid sha256:'
               f'{hub.repos[REPO].files()["model.safetensors"].sha256}\nsize {len(WEIGHTS)}\n')
    said = {entry.path: entry.blob_id for entry in client.list_repo_tree(REPO)}
    for path, content in (('config.json', b'{"a": 1}'), ('model.safetensors', pointer.encode())):
        done = subprocess.run(['git', 'hash-object', '--stdin'], input=content, capture_output=True, check=True)
        assert said[path] == done.stdout.decode().strip()


def test_a_pin_holds_and_tags_are_read_back(hub, client, pushed):
    client.create_tag(REPO, tag='v1', revision=pushed)
    second = client.create_commit(REPO, operations(config_json=b'{"a": 2}'), commit_message='second').oid
    assert second != pushed and [commit.title for commit in client.list_repo_commits(REPO)] == [
        'second', 'first', 'initial commit']
    for revision, content in ((pushed, b'{"a": 1}'), ('v1', b'{"a": 1}'), ('main', b'{"a": 2}'), (second, b'{"a": 2}')):
        path = Path(hf_hub_download(REPO, 'config.json', revision=revision))
        assert path.read_bytes() == content
        assert path.parent.name == (pushed if content == b'{"a": 1}' else second)
    [tag] = client.list_repo_refs(REPO).tags
    assert (tag.name, tag.target_commit) == ('v1', pushed)
    with pytest.raises(HfHubHTTPError) as told:
        client.create_tag(REPO, tag='v1', revision=second)
    assert told.value.response.status_code == 409
    client.create_tag(REPO, tag='v1', revision=second, exist_ok=True)
    assert hub.repos[REPO].tags == {'v1': pushed}  # a tag never moves


def test_a_commit_in_the_cache_needs_no_request(hub, client, pushed):
    hf_hub_download(REPO, 'model.safetensors', revision=pushed)
    before = len(hub.requests)
    hf_hub_download(REPO, 'model.safetensors', revision=pushed)
    assert len(hub.requests) == before


def test_second_push_of_the_same_makes_no_commit(hub, client, pushed):
    puts = len(asked(hub, 'PUT', ''))
    assert client.create_commit(REPO, operations(), commit_message='again').oid == pushed
    assert len(asked(hub, 'POST', '/commit/')) == 1 and len(asked(hub, 'PUT', '')) == puts


def test_a_moved_parent_is_a_conflict(hub, client, pushed):
    client.create_commit(REPO, operations(config_json=b'other'), commit_message='someone else', parent_commit=pushed)
    with pytest.raises(HfHubHTTPError) as told:
        client.create_commit(REPO, operations(config_json=b'mine'), commit_message='mine', parent_commit=pushed)
    assert told.value.response.status_code == 412
    assert hub.repos[REPO].files()['config.json'].content == b'other'


def test_deleting_and_folders(client, pushed):
    client.create_commit(REPO, [CommitOperationAdd('a/b.txt', b'b'), CommitOperationAdd('a/c/d.txt', b'd')],
                         commit_message='folder')
    assert [entry.path for entry in client.list_repo_tree(REPO)][:2] == ['.gitattributes', 'README.md']
    assert 'a/c/d.txt' in client.list_repo_files(REPO)
    client.create_commit(REPO, [CommitOperationDelete('a/')], commit_message='gone')
    assert not any(path.startswith('a/') for path in client.list_repo_files(REPO))
    with pytest.raises(EntryNotFoundError):
        client.create_commit(REPO, [CommitOperationDelete('nothing.txt')], commit_message='gone')


def test_a_broken_download_is_resumed_where_it_broke(hub, client, pushed, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'DOWNLOAD_CHUNK_SIZE', 4096)  # an incomplete chunk is lost
    hub.fail('GET', '/cdn/', 'half')
    try:
        path = hf_hub_download(REPO, 'model.safetensors')
    except Exception:  # clients before 1.0 fail here, and resume in the next call
        path = hf_hub_download(REPO, 'model.safetensors')
    assert Path(path).read_bytes() == WEIGHTS
    first, second = asked(hub, 'GET', '/cdn/')
    assert (first.range, first.status) == (None, 200)
    assert (second.range, second.status) == (f'bytes={len(WEIGHTS) // 2 // 4096 * 4096}-', 206)


def test_ranges(hub, client, pushed):
    url = huggingface_hub.hf_hub_url(REPO, 'config.json')
    session = huggingface_hub.utils.get_session()
    part = session.get(url, headers={'Range': 'bytes=2-4', 'Authorization': f'Bearer {OWNER_TOKEN}'})
    assert (part.status_code, part.content, part.headers['Content-Range']) == (206, b'a":', 'bytes 2-4/8')
    assert session.get(url, headers={'Range': 'bytes=8-'}).status_code == 416


def test_a_corrupted_file_of_the_same_size_passes_the_client_and_not_a_checksum(hub, client, pushed):
    blob = hub.repos[REPO].files()['model.safetensors']
    hub.corrupted.add(blob.sha256)
    got = Path(hf_hub_download(REPO, 'model.safetensors', revision=pushed)).read_bytes()
    assert len(got) == len(WEIGHTS) and got != WEIGHTS
    if not hasattr(client, 'verify_repo_checksums'):
        pytest.skip('this huggingface_hub cannot verify its cache')
    [wrong] = client.verify_repo_checksums(REPO, revision=pushed).mismatches
    assert (wrong['path'], wrong['expected']) == ('model.safetensors', blob.sha256)


@pytest.mark.parametrize('kind', ['before', 'half', 'answer'])
def test_an_upload_that_is_cut_is_sent_again(hub, client, kind):
    client.create_repo(REPO)
    hub.fail('PUT', '/lfs/', kind)
    oid = client.create_commit(REPO, operations(), commit_message='first').oid
    assert [request.status for request in asked(hub, 'PUT', '/lfs/')] == [200 if kind == 'answer' else 0, 200]
    assert hub.repos[REPO].files(oid)['model.safetensors'].content == WEIGHTS


def test_a_wrong_sha256_is_refused(hub, client):
    put = huggingface_hub.utils.get_session().put
    assert put(f'{hub.cdn}/lfs/{"0" * 64}', data=b'content').status_code == 400 and not hub.objects
    client.create_repo(REPO)
    line = {'key': 'lfsFile', 'value': {'path': 'a.safetensors', 'algo': 'sha256', 'oid': '0' * 64, 'size': 7}}
    header = {'key': 'header', 'value': {'summary': 'no such object', 'description': ''}}
    answer = huggingface_hub.utils.get_session().post(
        f'{hub.endpoint}/api/models/{REPO}/commit/main', data='\n'.join(map(json.dumps, (header, line))).encode(),
        headers={'Authorization': f'Bearer {OWNER_TOKEN}'})
    assert answer.status_code == 400 and len(hub.repos[REPO].commits) == 1


def test_who_may_do_what(hub, client, pushed, monkeypatch):
    def status(call, *args, **kwargs) -> int:
        with pytest.raises(HfHubHTTPError.__bases__) as told:  # whoami of version 0.30 raises a base class
            call(*args, **kwargs)
        return told.value.response.status_code

    assert status(client.create_repo, REPO) == 409
    assert client.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert status(client.create_repo, 'somebody/else') == 403
    assert status(client.whoami, token='hf_wrong') == 401
    assert status(client.create_commit, REPO, operations(config_json=b'x'), commit_message='x', token='hf_wrong') == 401
    assert status(client.create_commit, REPO, operations(config_json=b'x'), commit_message='x',
                  token=READER_TOKEN) == 403
    assert status(client.create_commit, REPO, operations(config_json=b'x'), commit_message='x', token=False) == 401
    hub.repos[REPO].private = True
    for token, code in ((False, 401), (READER_TOKEN, 404)):
        with pytest.raises(RepositoryNotFoundError) as told:
            client.model_info(REPO, token=token)
        assert told.value.response.status_code == code
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, 'config.json', token=token)
    assert client.model_info(REPO).private
    with pytest.raises(RepositoryNotFoundError):
        client.model_info('owner/nothing')


def test_what_is_not_there(client, pushed):
    assert not client.file_exists(REPO, 'missing.json') and client.file_exists(REPO, 'config.json')
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, 'missing.json')
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, 'config.json', revision='0' * 40)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download('owner/nothing', 'config.json')


def test_offline(pushed, offline):
    offline()
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, 'config.json')


def test_a_card_that_is_no_yaml_is_refused(client):
    client.create_repo(REPO)
    with pytest.raises(ValueError, match='Invalid metadata in README'):
        client.create_commit(REPO, operations(README_md=b'---\na: [\n---\n'), commit_message='bad card')
    with pytest.warns(UserWarning, match='empty or missing yaml metadata'):
        client.create_commit(REPO, operations(README_md=b'no card'), commit_message='no card')


def test_timm_pushes_and_loads_bit_for_bit(hub, client, tmp_path):
    model = timm.create_model('test_resnet', num_classes=3).eval()
    timm.models.push_to_hf_hub(model, REPO, safe_serialization=True)
    sha = client.model_info(REPO).sha
    again = timm.create_model(f'hf-hub:{REPO}@{sha}', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert sorted(hub.repos[REPO].files()) == ['.gitattributes', 'README.md', 'config.json', 'model.safetensors']


@pytest.mark.slow
def test_transformers_loads_what_timm_reads(hub, client, environment, tmp_path):
    pytest.importorskip('transformers')
    model = timm.create_model('test_resnet', num_classes=3).eval()
    timm.models.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    config = json.loads((tmp_path / 'saved/config.json').read_text())
    config['model_args'] = {}  # num_classes in there breaks transformers' TimmWrapper
    client.create_repo(REPO)
    client.create_commit(REPO, commit_message='for transformers', operations=[
        CommitOperationAdd('config.json', json.dumps(config).encode()),
        CommitOperationAdd('model.safetensors', str(tmp_path / 'saved/model.safetensors'))])
    code = f'''
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({REPO!r}).eval()
save_file({{'logits': model(torch.ones(1, 3, 160, 160)).logits.detach()}}, {str(tmp_path / 'out.safetensors')!r})
'''
    done = subprocess.run(
        [sys.executable, '-c', code], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(load_file(tmp_path / 'out.safetensors')['logits'], model(torch.ones(1, 3, 160, 160)))
