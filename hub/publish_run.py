"""A release on the Hub: state of the repository, upload in one commit, verification by download, and its record."""
import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import timm
import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import load_file

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_file, write_json
from coatnet_zoo import releases as released
from coatnet_zoo.releases import check_release, sha256_of
from model_card import write_card
from publish_settings import PublishSettings
from verification import verify

WEIGHTS = Path(__file__).parents[1] / 'coatnet_zoo/weights'
OPTIONAL = ('model.onnx', 'model.pt2', 'curves.png')  # deleted from the repository if this export has none
# errors of the client's HTTP library: those of requests (before version 1) are OSErrors, those of httpx2 are not
TRANSPORT = (*HfHubHTTPError.__bases__, OSError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Release:
    """An exported folder: its NAME.TAG, its config.json, and the sha256 of every file."""

    folder: Path
    name: str
    config: dict
    files: dict[str, str]

    def entry(self, old: dict | None) -> dict:
        """Entry of releases.json; locations of an earlier entry are kept if it has the same weights."""
        where = {'repo': None, 'commit': None, 'file': 'model.safetensors', 'packaged': None}
        if old and old['sha256'] == self.files['model.safetensors']:
            where = {key: old[key] for key in where}
        described = {key: self.config[key] for key in ('num_classes', 'label_names', 'label_descriptions')
                     if key in self.config}
        return {**where, 'sha256': self.files['model.safetensors'],
                'size': (self.folder / 'model.safetensors').stat().st_size,
                'pretrained_cfg': {**self.config['pretrained_cfg'], **described}, 'release': self.config['release']}


@dataclass(frozen=True)
class State:
    """A commit of the repository compared with the folder.

    Attributes:
        commit: Commit of the release tag if it exists, else the latest one.
        tagged: Whether the release tag exists.
        changed: Files of the folder that are missing in the commit, or differ.
        stale: Files of the commit that an earlier export wrote and this one does not have.
        others: Files of the commit that no export writes.
        empty: Whether the commit has no files but .gitattributes.
    """

    commit: str
    tagged: bool
    changed: tuple[str, ...]
    stale: tuple[str, ...]
    others: tuple[str, ...]
    empty: bool

    @property
    def up_to_date(self) -> bool:
        return not self.changed and not self.stale


def read_release(folder: Path) -> Release:
    """Verify the folder and read it; raises ConfigError if its weights cannot be released under their name."""
    files = verify(folder)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    architecture, cfg = config['architecture'], config['pretrained_cfg']
    name = f'{architecture}.{cfg["tag"]}'
    try:
        check_release(name, {**cfg, 'num_classes': config.get('num_classes', cfg.get('num_classes'))},
                      timm.get_pretrained_cfg(f'{architecture}.untrained', allow_unregistered=False).to_dict())
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f'FOLDER {folder} cannot be released: {one_line(error)}') from error
    return Release(folder, name, config, files)


def write_address(release: Release, repo: str) -> Release:
    """Write the repository into README.md and config.json, and verify the folder again."""
    config = {**release.config, 'release': {**release.config['release'], 'repo': repo}}
    write_card(release.folder, config)  # first, so that the card names the repository whenever config.json does
    write_json(release.folder / 'config.json', config)
    return read_release(release.folder)


def read_releases() -> dict[str, dict]:
    try:
        return released.read_releases(WEIGHTS / 'releases.json')
    except (OSError, ValueError) as error:
        raise ConfigError(f'what is released already cannot be read: {one_line(error)}') from error


def call_hub(repo: str, call: Callable, /, **arguments: object) -> object:
    """Call the Hub; raises ConfigError with advice for errors of the Hub, the token or the network."""
    try:
        return call(**arguments)
    except LocalTokenNotFoundError as error:
        raise ConfigError('--push needs a token that may write, and there is none; log in with `hf auth login` or '
                          'set HF_TOKEN.') from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f'--repo {repo}: the Hub shows no such repository; it is gone, or private and not yours; '
                          f'check the name and the token.') from error
    except (*TRANSPORT, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # an error of this machine, not of the Hub
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        message = {
            401: 'the Hub refuses the token of HF_TOKEN or of your login; renew it with `hf auth login` or set '
                 'another',
            403: f'your token may not write to {repo.partition("/")[0]}; take one that may, or another --repo',
            409: 'what was to be made was made by somebody else meanwhile; run this again',
            412: 'somebody committed to it meanwhile; nothing was overwritten; look at it and run this again',
        }.get(status)
        if message is None and status is None and isinstance(error, TRANSPORT):
            message = (f'the Hub cannot be reached, or the connection broke ({type(error).__name__}: '
                       f'{one_line(error)}); check the network and run this again')
        cause = f'{one_line(error)} ({one_line(error.__cause__)})' if error.__cause__ else one_line(error)
        raise ConfigError(f'--repo {repo}: {message or cause}.') from error


def read_state(api: HfApi, repo: str, tag: str, release: Release) -> State | None:
    """Compare the repository with the folder; None if the repository does not exist or is hidden from the token."""
    try:
        refs = api.list_repo_refs(repo)
    except RepositoryNotFoundError:
        return None
    tagged = next((ref.target_commit for ref in refs.tags if ref.name == tag), None)
    info = api.model_info(repo, revision=tagged, files_metadata=True)
    there = {sibling.rfilename: sibling for sibling in info.siblings}

    def same(name: str, sha256: str) -> bool:
        if name not in there:
            return False
        if there[name].lfs:
            return there[name].lfs.sha256 == sha256
        content = (release.folder / name).read_bytes()
        return there[name].blob_id == hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

    return State(
        commit=info.sha, tagged=tagged is not None, empty=set(there) <= {'.gitattributes'},
        changed=tuple(name for name, sha256 in release.files.items() if not same(name, sha256)),
        stale=tuple(name for name in OPTIONAL if name in there and name not in release.files),
        others=tuple(sorted({*there} - {*release.files, *OPTIONAL, '.gitattributes'})))


def check_parent(state: State | None, recorded: dict | None, settings: PublishSettings) -> None:
    """Raise ConfigError if a push would move an existing tag, or overwrite a commit that no release recorded."""
    if state is None or state.up_to_date:
        return
    if state.tagged:
        raise ConfigError(f'--release {settings.release}: the tag exists in {settings.repo}, at a commit with other '
                          f'files ({", ".join((*state.changed, *state.stale))}), and is never moved; give another.')
    known = recorded['commit'] if recorded and recorded['repo'] == settings.repo else None
    if settings.parent and settings.parent != state.commit:
        raise ConfigError(f'--parent {settings.parent} is not where {settings.repo} is, {state.commit}; look at what '
                          f'was committed there and give that commit.')
    if not state.empty and state.commit not in (known, settings.parent):
        since = f'has moved since it was recorded at {known}' if known else 'holds files that no release recorded'
        raise ConfigError(f'--repo {settings.repo} {since}, and they would be overwritten; look at it, and add '
                          f'--parent {state.commit} to build upon it.')


def upload(api: HfApi, state: State, release: Release, settings: PublishSettings) -> str:
    """Upload the changed files in one commit on top of `state.commit`; returns its sha."""
    operations = [CommitOperationAdd(name, str(release.folder / name)) for name in state.changed]
    operations += [CommitOperationDelete(name) for name in state.stale]
    return api.create_commit(
        settings.repo, operations, commit_message=f'{release.name} {settings.release}', parent_commit=state.commit).oid


def check_download(repo: str, commit: str, release: Release) -> None:
    """Download the commit into an empty cache, compare it with the folder, load it through timm and compare logits.

    Raises ConfigError if a file differs, the model does not load, or logits differ by more than 1e-4 of the largest.
    """
    with tempfile.TemporaryDirectory() as cache:
        for name, sha256 in release.files.items():
            path = call_hub(repo, hf_hub_download, repo_id=repo, filename=name, revision=commit, cache_dir=cache)
            if (found := sha256_of(Path(path))) != sha256:
                raise ConfigError(
                    f'--repo {repo}: {name} came back from commit {commit} with sha256 {found} in place of {sha256}; '
                    f'nothing was recorded; run this again, and if it stays so upload it anew with another --release.')
        try:
            model = timm.create_model(f'hf-hub:{repo}@{commit}', pretrained=True, cache_dir=cache).eval()
            golden = load_file(release.folder / 'golden.safetensors')
            with torch.no_grad():
                error = (model(golden['input']) - golden['logits']).abs().max() / golden['logits'].abs().max()
        except (RuntimeError, ValueError, TypeError, OSError, KeyError) as problem:
            raise ConfigError(f'--repo {repo}: commit {commit} came back the same and does not load through timm: '
                              f'{one_line(problem)}; nothing was recorded.') from problem
    if not error <= 1e-4:
        raise ConfigError(f'--repo {repo}: commit {commit} loads, and its logits differ from the golden ones by '
                          f'{error:.1e} of the largest; nothing was recorded; export it again on this machine.')


def record(release: Release, **where: str) -> bool:
    """Write the release to releases.json; returns False if the same entry is already there."""
    releases = read_releases()
    entry = {**release.entry(releases.get(release.name)), **where}
    if releases.get(release.name) == entry:
        return False
    write_json(WEIGHTS / 'releases.json', {**releases, release.name: entry})
    return True


def package(release: Release) -> None:
    """Copy the weights into the package and record them there."""
    name = f'{release.name}.safetensors'
    if not (WEIGHTS / name).is_file() or sha256_of(WEIGHTS / name) != release.files['model.safetensors']:
        write_file(WEIGHTS / name, partial(shutil.copyfile, release.folder / 'model.safetensors'))
    new = record(release, packaged=name)
    print(f'packaged as {WEIGHTS / name}, {"recorded" if new else "as recorded before"}')


def push(api: HfApi, release: Release, settings: PublishSettings) -> None:
    """Upload, tag, verify by download and record a release; steps done by an earlier call are skipped."""
    repo, recorded = settings.repo, read_releases().get(release.name)
    call_hub(repo, api.create_repo, repo_id=repo, private=settings.private, exist_ok=True)
    state = call_hub(repo, read_state, api=api, repo=repo, tag=settings.release, release=release)
    if state is None:
        raise ConfigError(f'--repo {repo} exists, and your token may not see it; take one that may.')
    check_parent(state, recorded, settings)
    if state.up_to_date:
        commit = state.commit
        print(f'nothing to upload: commit {commit} holds these files')
    else:
        commit = call_hub(repo, upload, api=api, state=state, release=release, settings=settings)
        print(f'uploaded {len(state.changed)} files in commit {commit}')
    if not state.tagged:
        call_hub(repo, api.create_tag, repo_id=repo, tag=settings.release, revision=commit)
        print(f'tagged {settings.release}')
    check_download(repo, commit, release)
    print(f'downloaded again into an empty cache: {len(release.files)} files with the same sha256, golden logits met')
    new = record(release, repo=repo, commit=commit)
    print(f'{"recorded" if new else "recorded before"} in {WEIGHTS / "releases.json"}')


def describe(release: Release) -> str:
    sizes = {name: (release.folder / name).stat().st_size for name in release.files}
    rows = [f'  {name:20} {sizes[name]:>12,} bytes  sha256 {sha256}' for name, sha256 in release.files.items()]
    return '\n'.join([f'{release.name}: {len(sizes)} files, {sum(sizes.values()):,} bytes, verified', *rows])


def describe_state(state: State | None, settings: PublishSettings) -> str:
    repo = f'{settings.repo} on the Hub'
    if state is None:
        return f'{repo}: does not exist, or your token may not see it; --push would make it'
    where = f'at {"tag " + settings.release + ", " if state.tagged else ""}commit {state.commit}'
    others = f'; left alone: {", ".join(state.others)}' if state.others else ''
    if state.up_to_date:
        return f'{repo}: {where}, holds these files{others}; --push would upload nothing'
    stale = f', remove {", ".join(state.stale)}' if state.stale else ''
    return f'{repo}: {where}{others}; --push would upload {", ".join(state.changed) or "nothing"}{stale}'


def run(settings: PublishSettings) -> None:
    """Print the planned actions, and with --push or --package carry them out."""
    api = HfApi()
    if settings.push:
        call_hub(settings.repo, api.whoami)  # reports an invalid token before the long verification
    release = read_release(settings.folder)
    shown, stored = release.config['release'].get('repo'), release
    with tempfile.TemporaryDirectory() as scratch:
        if settings.repo and settings.repo != shown:
            print(f'README.md and config.json name {shown or "no repository"}: '
                  f'{"--push would write " * (not settings.push)}{settings.repo}{" is written" * settings.push}')
            try:
                if not settings.push:  # a copy with the files that --push would upload
                    release = replace(release, folder=Path(shutil.copytree(settings.folder, Path(scratch, 'release'))))
                release = write_address(release, settings.repo)
            except OSError as error:
                raise ConfigError(f'FOLDER {settings.folder}: README.md or config.json cannot be written with --repo '
                                  f'{settings.repo}: {one_line(error)}; make room and run this again.') from error
        publish(api, release, settings, release if settings.push else stored)


def publish(api: HfApi, release: Release, settings: PublishSettings, packaged: Release) -> None:
    """Print, package and push a verified release.

    Args:
        api: Client of the Hub.
        release: Release whose card names the repository of --repo.
        settings: Settings of publish.py.
        packaged: Release for --package; without --push its card is unchanged.
    """
    print(describe(release))
    recorded = read_releases().get(release.name)
    if recorded and recorded['packaged'] and not settings.package and (
            recorded['sha256'] != release.files['model.safetensors']):
        raise ConfigError(f'FOLDER {settings.folder} has other weights than {recorded["packaged"]} of the package; '
                          f'add --package to replace them, or release it under another tag.')
    try:
        if settings.package:
            package(packaged)
        if settings.push:
            push(api, release, settings)
    except OSError as error:
        raise ConfigError(f'a file of this machine cannot be written: {one_line(error)}; make room for it '
                          f'and run this again.') from error
    if settings.repo and not settings.push:
        state = call_hub(settings.repo, read_state, api=api, repo=settings.repo, tag=settings.release, release=release)
        print(describe_state(state, settings))
        check_parent(state, recorded, settings)
        print('nothing on the Hub was changed')
