"""Resumable downloads, and checksums of files."""
import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants
from huggingface_hub.utils import tqdm

__all__ = ['digest_of', 'download', 'sha256_of']

TIMEOUT = 60  # seconds without data


def digest_of(path: Path, algorithm: str) -> str:
    """Hexadecimal digest of a file by an algorithm of hashlib."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    return digest_of(path, 'sha256')


def download(url: str, path: Path, md5: str) -> None:
    """Download a file with a progress bar, and move it to `path` once its size and MD5 are verified.

    An interrupted download is kept as PATH.part, and the next call requests only the rest. The caller must ensure that
    only one process downloads a file at a time.

    Args:
        url: Address, by http or https.
        path: File to write; its folder is created.
        md5: Hexadecimal MD5 that the publisher states.

    Raises:
        RuntimeError: The download fails, or the MD5 is another; the message says what to do.
    """
    partial = path.with_name(f'{path.name}.part')
    if constants.HF_HUB_OFFLINE:
        raise RuntimeError(f'{url} is not in the cache and HF_HUB_OFFLINE is set; go online once to download it.')
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _download_rest(url, partial)
    except HTTPError as error:
        raise RuntimeError(
            f'{url} could not be downloaded: the server answered {error.code} ({error.reason}).') from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise RuntimeError(
            f'{url} could not be downloaded ({type(error).__name__}: {reason}); try again, and it goes on where it was '
            f'cut.') from error
    if (found := digest_of(partial, 'md5')) != md5:
        size = partial.stat().st_size
        partial.unlink()
        raise RuntimeError(
            f'{url} gave a file of {size} bytes whose MD5 is {found}, but its publisher states {md5}; it was deleted. '
            f'Try again, and if it stays so, the file has been replaced or something on the way changes it.')
    os.replace(partial, path)


def _download_rest(url: str, partial: Path) -> None:
    """Append the missing bytes to `partial`, or download all again if the server does not support ranges.

    Raises ConnectionError if the response is cut short.
    """
    begin = partial.stat().st_size if partial.exists() else 0
    headers = {'User-Agent': 'coatnet_zoo', 'Accept-Encoding': 'identity'}
    if begin:
        headers['Range'] = f'bytes={begin}-'
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and begin:  # no bytes are missing; the MD5 decides
            return
        raise
    with response:
        resumed = response.status == 206
        begin = begin if resumed else 0
        length = response.headers.get('Content-Length')
        total = None if length is None else begin + int(length)
        with partial.open('ab' if resumed else 'wb') as file, tqdm(
                total=total, initial=begin, unit='B', unit_scale=True, desc=partial.stem) as bar:
            while block := response.read(1 << 18):
                file.write(block)
                bar.update(len(block))
    if total is not None and (size := partial.stat().st_size) < total:
        raise ConnectionError(f'{size} of {total} bytes came')
