"""Released weights: names, location of the files, and verification of a file against the released SHA-256.

`weights/releases.json` has an entry for each NAME.TAG: `repo`, `commit` and `file` on the Hub (null if it is not
there), `packaged` (a file of `weights/`, or null), `sha256`, `size`, `pretrained_cfg`, and where the numbers come from.
huggingface_hub does not detect a corrupted download of the right size, so the SHA-256 is verified before loading.
"""
import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_token, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from . import kecam
from .download import sha256_of

__all__ = [
    'add_released_tags', 'check_release', 'fetch', 'find_release', 'read_releases', 'sha256_of', 'verify_weights']

WEIGHTS = Path(__file__).with_name('weights')


def read_releases(path: Path) -> dict[str, dict[str, Any]]:
    """Read and validate a releases.json; the module docstring lists the fields of an entry.

    Raises:
        ValueError: The file cannot be read, is no JSON, or has an invalid entry.
    """
    try:
        releases = json.loads(path.read_text(encoding='utf-8'))
        for name, entry in releases.items():
            where, packaged = (entry['repo'], entry['commit']), entry['packaged']
            rules = {
                'sha256 of 64 hexadecimal digits': re.fullmatch('[0-9a-f]{64}', entry['sha256']),
                'repo and commit of 40 digits, or null for both': where == (None, None) or (all(where) and (
                    re.fullmatch('[^/]+/[^/]+', where[0]) and re.fullmatch('[0-9a-f]{40}', where[1]))),
                'repo or packaged': entry['repo'] or packaged,
                'packaged without folders': not packaged or Path(packaged).name == packaged,
                'size and file': entry['size'] >= 0 and entry['file'],
                'pretrained_cfg with input_size and num_classes': all(
                    key in entry['pretrained_cfg'] for key in ('input_size', 'num_classes'))}
            if broken := [rule for rule, kept in rules.items() if not kept]:
                raise ValueError(f'{name} must have {broken[0]}')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is damaged ({type(error).__name__}: {error}); reinstall coatnet_zoo, or take back '
                         f'what was changed in it.') from error
    return releases


RELEASES = read_releases(WEIGHTS / 'releases.json')

# pretrained_cfg fields that a tag may set; input size and layer names belong to the architecture
_TAG_FIELDS = (
    'num_classes', 'label_names', 'label_descriptions', 'interpolation', 'crop_pct', 'crop_mode', 'mean', 'std',
    'test_input_size', 'test_crop_pct', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


def add_released_tags(cfgs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Add the released tags of these architectures, for `generate_default_cfgs`.

    Args:
        cfgs: 'NAME.untrained' and its pretrained cfg, for each architecture.
    """
    released: dict[str, Any] = {}
    for name, entry in RELEASES.items():
        untrained = cfgs.get(f'{name.partition(".")[0]}.untrained')
        if untrained is None:
            continue  # an architecture of another family
        fields = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in entry['pretrained_cfg'].items() if key in _TAG_FIELDS}
        source = {'file': str(WEIGHTS / entry['packaged'])} if entry['packaged'] else {
            'hf_hub_id': _hub_id(entry), 'hf_hub_filename': entry['file']}
        released[name] = {**untrained, **fields, **source}
    return {**cfgs, **released}


def check_release(name: str, cfg: dict[str, Any], default_cfg: dict[str, Any]) -> None:
    """Raise ValueError for weights that would change the default input size or number of classes of their architecture.

    timm takes both defaults of an architecture from its first tag with weights, even for `pretrained=False`.

    Args:
        name: NAME.TAG.
        cfg: Its pretrained cfg.
        default_cfg: The pretrained cfg of NAME.untrained.

    Raises:
        ValueError: Another input size, or, unless NAME ends in _64, another number of classes.
    """
    if tuple(cfg['input_size']) != tuple(default_cfg['input_size']):
        raise ValueError(
            f'{name}: weights of input size {tuple(cfg["input_size"])} would change the input size of '
            f'{name.partition(".")[0]}, {tuple(default_cfg["input_size"])}; train at that size or release under '
            f'another name.')
    if not name.partition('.')[0].endswith('_64') and cfg['num_classes'] != default_cfg['num_classes']:
        raise ValueError(
            f'{name}: weights of {cfg["num_classes"]} classes would change the number of classes of '
            f'{name.partition(".")[0]}, {default_cfg["num_classes"]}; only names that end in _64 may do so.')


def find_release(cfg: dict[str, Any]) -> str | None:
    """NAME.TAG of the release that timm reads for this pretrained cfg, None if it is not a release."""
    from_hub = cfg.get('source') == 'hf-hub' or not cfg.get('file')
    for name, entry in RELEASES.items():
        if from_hub and entry['repo'] and cfg.get('hf_hub_id') == _hub_id(entry):
            return name
        if not from_hub and entry['packaged'] and cfg['file'] == str(WEIGHTS / entry['packaged']):
            return name
    return None


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """Path of the verified file of a release, in the package or in the Hub's cache; downloads it if need be.

    Args:
        name: NAME.TAG of `weights/releases.json`.
        cache_dir: Cache folder of the Hub's files; None for the Hub's default.

    Raises:
        FileNotFoundError: A packaged file is missing.
        RuntimeError: The download fails, or the file is not the released one by its sha256.
    """
    entry = RELEASES[name]
    if entry['packaged']:
        path = _packaged(name, entry)
    else:
        try:
            path = Path(hf_hub_download(
                entry['repo'], entry['file'], revision=entry['commit'], cache_dir=cache_dir))
        except Exception as error:  # the HTTP library below huggingface_hub, and so its errors, differs by version
            raise RuntimeError(f'{name}: {_hub_error_message(entry, error)}') from error
    _check_sha256(name, entry, path)
    return path


def verify_weights(name: str, cache_dir: str | Path | None = None) -> Path:
    """Verify the weights on this machine against the sha256 they were released with; nothing is downloaded.

    Args:
        name: 'NAME.TAG', or NAME for its first release.
        cache_dir: Cache folder of the files; None for the default, of the Hub or (kecam's weights) of torch.hub.

    Returns:
        Path of the file.

    Raises:
        ValueError: Nothing of that name is released.
        FileNotFoundError: The file is neither in the package nor in the cache.
        RuntimeError: The file is not the released one.
    """
    names = (*RELEASES, *kecam.WEIGHTS)
    known = next((known for known in names if name in (known, known.partition('.')[0])), None)
    if known is None:
        raise ValueError(f'{name!r} has no released weights. Names that have some: {", ".join(names)}.')
    if known not in RELEASES:
        return kecam.cached_weights(known, cache_dir)
    entry = RELEASES[known]
    if entry['packaged']:
        path = _packaged(known, entry)
    else:
        cached = try_to_load_from_cache(entry['repo'], entry['file'], cache_dir, revision=entry['commit'])
        if not isinstance(cached, str):
            raise FileNotFoundError(
                f'{known}: {entry["repo"]} at {entry["commit"][:12]} is not in the cache; '
                f'timm.create_model({known!r}, pretrained=True) downloads it.')
        path = Path(cached)
    _check_sha256(known, entry, path)
    return path


def _hub_id(entry: dict[str, Any]) -> str:
    return f'{entry["repo"]}@{entry["commit"]}'


def _packaged(name: str, entry: dict[str, Any]) -> Path:
    path = WEIGHTS / entry['packaged']
    if not path.is_file():
        raise FileNotFoundError(f'{name}: {path} is missing from the package; reinstall coatnet_zoo.')
    return path


def _check_sha256(name: str, entry: dict[str, Any], path: Path) -> None:
    if (found := sha256_of(path)) != entry['sha256']:
        way_out = 'reinstall coatnet_zoo' if entry['packaged'] else (
            f'delete {path.resolve()} and load {name} again')  # resolved: the path is a link in the cache
        raise RuntimeError(
            f'{name}: {path} is damaged and was not loaded: its sha256 is {found}, released was {entry["sha256"]}; '
            f'{way_out}.')


def _hub_error_message(entry: dict[str, Any], error: Exception) -> str:
    """Error message for a failed download: cause and remedy."""
    repo, status = entry['repo'], getattr(getattr(error, 'response', None), 'status_code', None)
    local_file = 'pretrained_cfg_overlay=dict(file=...) loads a file of your own'
    if isinstance(error, LocalEntryNotFoundError):
        reason = ' (HF_HUB_OFFLINE is set)' if os.environ.get('HF_HUB_OFFLINE') else ''
        return (f'the weights are not in the cache and the Hub cannot be reached{reason}; go online once to download '
                f'{repo}, or copy the cache from a machine that has them; {local_file}.')
    if isinstance(error, RepositoryNotFoundError):
        login = ('your token may not see it; ask its owner for access' if get_token() else
                 'log in with `hf auth login` or set HF_TOKEN if you have access')
        return f'the Hub shows no repository {repo}: it is private or gone; {login}; {local_file}.'
    if isinstance(error, (RevisionNotFoundError, EntryNotFoundError)):
        return (f'{repo} no longer has {entry["file"]} at commit {entry["commit"]}; update coatnet_zoo, or '
                f'{local_file}.')
    if isinstance(error, HfHubHTTPError) and status == 401:
        return 'the Hub refuses the token of HF_TOKEN or of your login; renew it, or unset it for public weights.'
    return (f'{repo} could not be downloaded ({type(error).__name__}: {" ".join(str(error).split())}); try again, or '
            f'{local_file}.')
