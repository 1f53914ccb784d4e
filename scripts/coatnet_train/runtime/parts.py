"""Files packed into parts of a limited size, with checksums, and joined again, where no large file can be sent."""
import hashlib
import json
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError
from coatnet_train.runtime.files import write_json

__all__ = ['join_parts', 'write_parts']

MANIFEST = 'parts.json'


def write_parts(files: Mapping[str, Path], folder: Path, part_bytes: int) -> list[Path]:
    """Pack files into folder/part-000, part-001, ... and a manifest; returns the parts.

    Args:
        files: Where each file goes, relative to what `join_parts` is given, and where it is.
        folder: New or empty folder, or one with earlier parts, which are replaced.
        part_bytes: Largest size of a part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob('part-*'):
        path.unlink()
    digests = {}
    with tempfile.TemporaryFile(dir=folder) as packed:
        with tarfile.open(fileobj=packed, mode='w') as archive:
            for name, path in files.items():
                archive.add(path, name)
        packed.seek(0)
        while chunk := packed.read(part_bytes):
            path = folder / f'part-{len(digests):03}'
            path.write_bytes(chunk)
            digests[path.name] = hashlib.sha256(chunk).hexdigest()
    write_json(folder / MANIFEST, {'parts': digests, 'files': list(files)})
    return [folder / name for name in digests]


def join_parts(folder: Path, destination: Path) -> list[str]:
    """Unpack what `write_parts` packed, once every part is there as it was written; returns the names of the files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ConfigError(f'{folder} must hold {MANIFEST} and its parts; fetch all of them.') from error
    with tempfile.TemporaryFile() as packed:
        for name, digest in manifest['parts'].items():
            path = folder / name
            content = path.read_bytes() if path.is_file() else b''
            if hashlib.sha256(content).hexdigest() != digest:
                raise ConfigError(f'{path} is missing or not as it was written (SHA-256); fetch it again.')
            packed.write(content)
        packed.seek(0)
        with tarfile.open(fileobj=packed) as archive:
            safe = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
            archive.extractall(destination, **safe)
    return manifest['files']
