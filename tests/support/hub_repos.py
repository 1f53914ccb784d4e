"""Storage of the loopback Hub: repositories of immutable commits."""
import hashlib
import json
import re
from dataclasses import dataclass, field

import yaml

__all__ = ['GITATTRIBUTES', 'Blob', 'Refusal', 'Repo', 'read_card']

LARGE = ('safetensors', 'bin', 'onnx', 'pt', 'pt2', 'pth')
GITATTRIBUTES = ''.join(f'*.{ending} filter=lfs diff=lfs merge=lfs -text\n' for ending in LARGE)


class Refusal(Exception):
    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        self.status, self.message = status, message
        self.headers = {'X-Error-Message': message, **({'X-Error-Code': code} if code else {}), **headers}


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def git_oid(self) -> str:
        """Git object id of the blob; for an LFS file, that of its pointer."""
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b'blob %d\0' % len(content) + content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (f'version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n'
                f'size {len(self.content)}\n').encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Repo:
    """A repository of immutable commits, each with a full tree; branches and tags point to commits."""

    private: bool = False
    commits: dict[str, tuple[str, dict[str, Blob]]] = field(default_factory=dict)  # sha: (message, path: blob)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, Blob], branch: str = 'main') -> str:
        told = json.dumps([len(self.commits), message, {path: blob.etag for path, blob in sorted(files.items())}])
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha] = (message, dict(files))
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = 'main') -> dict[str, Blob]:
        return self.commits[self.resolve(revision)][1]

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        return sha


def read_card(text: str) -> dict:
    """The YAML at the head of a README."""
    match = re.match(r'---\n(.*?)\n---\s*(\n|$)', text, re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}
