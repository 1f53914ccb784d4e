"""Pack files into parts of a limited size with checksums, and join them again, where large files cannot be sent."""
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from coatnet_train.runtime.cli import ConfigError, one_line
from coatnet_train.runtime.files import write_json

__all__ = ['join_parts', 'write_parts']

MANIFEST = 'parts.json'


def read_manifest(folder: Path) -> dict:
    """Digests of the parts and names of the files; raises ConfigError unless `write_parts` wrote the manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise ConfigError(f'--unpack {folder} must hold {MANIFEST} and its parts, as --pack writes them, but '
                          f'{MANIFEST} cannot be read: {one_line(error)}; fetch all of them.') from error
    parts, files = (manifest.get(key) for key in ('parts', 'files')) if isinstance(manifest, dict) else (None, None)
    if not (isinstance(parts, dict) and parts and all(Path(name).name == name for name in parts)
            and isinstance(files, list)):
        raise ConfigError(f'{folder / MANIFEST} must name parts and files, as --pack writes it, but does not; fetch it '
                          f'again.')
    return manifest


def earlier_parts(folder: Path) -> set[str]:
    """Names of the parts in a folder, after temporary files are removed; raises ConfigError if it holds other files."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f'--pack {folder} must be a folder, but is a file; name another.')
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob('.part-*.tmp'), *folder.glob(f'.{MANIFEST}.tmp')]:
        path.unlink()
    parts = set(read_manifest(folder)['parts']) if (folder / MANIFEST).exists() else set()
    if others := sorted({path.name for path in folder.iterdir()} - parts - {MANIFEST}):
        raise ConfigError(f'--pack {folder} must be new, empty, or hold earlier parts alone, but has '
                          f'{", ".join(others[:4])}; name another folder.')
    return parts


def write_parts(files: Mapping[str, Path], folder: Path, part_bytes: int) -> list[Path]:
    """Pack files into folder/part-000, part-001, ... and a manifest; returns the parts.

    Args:
        files: Path of each file by its name in the archive, relative to the destination of `join_parts`.
        folder: New or empty folder, or one with earlier parts, which are replaced once the new ones are complete.
        part_bytes: Maximum size of a part.

    Raises ConfigError if the folder holds other files or cannot be written.
    """
    digests: dict[str, str] = {}
    try:
        earlier = earlier_parts(folder)
        with tempfile.TemporaryFile(dir=folder) as packed:
            with tarfile.open(fileobj=packed, mode='w') as archive:
                for name, path in files.items():
                    archive.add(path, name)
            packed.seek(0)
            while chunk := packed.read(part_bytes):
                name = f'part-{len(digests):03}'
                (folder / f'.{name}.tmp').write_bytes(chunk)
                digests[name] = hashlib.sha256(chunk).hexdigest()
        for name in digests:
            os.replace(folder / f'.{name}.tmp', folder / name)
        write_json(folder / MANIFEST, {'parts': digests, 'files': list(files)})
        for name in earlier - digests.keys():
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        for name in digests:
            (folder / f'.{name}.tmp').unlink(missing_ok=True)  # partial files should not fill up the disk
        raise ConfigError(f'--pack {folder} cannot be written: {one_line(error)}; name another.') from error
    return [folder / name for name in digests]


def join_parts(folder: Path, destination: Path) -> list[str]:
    """Verify every part, unpack the files and return their names; raises ConfigError for a missing or changed part."""
    manifest = read_manifest(folder)
    with tempfile.TemporaryFile() as packed:
        for name, digest in manifest['parts'].items():
            path = folder / name
            content = path.read_bytes() if path.is_file() else b''
            if hashlib.sha256(content).hexdigest() != digest:
                raise ConfigError(f'{path} is missing or not as it was written (SHA-256); fetch it again.')
            packed.write(content)
        packed.seek(0)
        try:
            with tarfile.open(fileobj=packed) as archive:
                safe = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
                archive.extractall(destination, **safe)
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(f'{folder} cannot be unpacked into {destination}: {one_line(error)}.') from error
    return manifest['files']
