"""A loopback server with the Hub's HTTP routes, for the real clients: huggingface_hub, timm, transformers.

It implements what huggingface_hub's source requires: ndjson commits, preupload, LFS batch with PUT and verify, HEAD and
Range on resolve, X-Repo-Commit and ETag, error codes in X-Error-Code. As on the Hub, LFS files are served by a redirect
to another host, which must not get the token, and a new repository starts with one commit of .gitattributes.

    with HubServer() as hub:
        hub.fail('GET', r'/cdn/', 'half')    # the next download is cut in the middle

Limits: models only, all in memory; plain LFS in single parts, so neither Xet (the default of the real Hub, switched off
by HF_HUB_DISABLE_XET=1) nor multipart uploads; no gating, pull requests or pagination. A file is LFS by .gitattributes
or above 10 MB, a rule of this server. Names and sha256 sums are checked; the validity of card fields is not.
"""
import base64
import fnmatch
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from support.hub_repos import GITATTRIBUTES, Blob, Refusal, Repo, read_card

__all__ = ['OWNER_TOKEN', 'READER_TOKEN', 'HubServer', 'Repo', 'Request']

OWNER_TOKEN, READER_TOKEN = 'hf_loopback_owner', 'hf_loopback_reader'
WHEN = '2026-01-01T00:00:00.000Z'


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: bool  # whether the request had a token; tokens themselves are not kept
    range: str | None
    host: str
    status: int


@dataclass
class Fault:
    method: str
    path: str
    kind: str
    times: int


class Cut(Exception):
    """Raised to end the connection."""


class HubServer(ThreadingHTTPServer):
    """Server on a free port of 127.0.0.1, to be used in a `with` statement; tests read and change its attributes.

    Attributes:
        users: Token: (user, 'read' or 'write').
        repos: 'owner/name': `Repo`.
        objects: LFS content that was uploaded, by sha256.
        corrupted: sha256 of LFS content that is served with one bit changed, at the same size.
        requests: Recorded requests, oldest first.
        before: Called with (method, path) before every request, for example to push as somebody else.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.cdn = f'http://localhost:{self.server_port}'  # another host by name
        self.users = {OWNER_TOKEN: ('owner', 'write'), READER_TOKEN: ('reader', 'read')}
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.corrupted: set[str] = set()
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.RLock()

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': .02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that closed their connection."""

    def fail(self, method: str, path: str, kind: str, times: int = 1) -> None:
        """Cut the next `times` requests whose path matches the pattern `path`.

        kind: 'before' (before anything is done), 'half' (after half of the body is sent or received), or 'answer' (the
        request is carried out, but the response is lost).
        """
        self.faults.append(Fault(method, path, kind, times))

    def create(self, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit('initial commit', {'.gitattributes': Blob(GITATTRIBUTES.encode(), lfs=False)})
        return repo


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # a body waits 40 ms behind its headers otherwise
    ROUTES = (  # method, pattern and handler; groups for repository, revision and the rest are passed to the handler
        ('GET', r'/api/whoami-v2', 'whoami'),
        ('POST', r'/api/validate-yaml', 'validate_yaml'),
        ('POST', r'/api/repos/create', 'create'),
        ('GET', r'/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?', 'info'),
        ('GET', r'/api/models/([^/]+/[^/]+)/tree/([^/]+)', 'tree'),
        ('GET', r'/api/models/([^/]+/[^/]+)/refs', 'refs'),
        ('GET', r'/api/models/([^/]+/[^/]+)/commits/([^/]+)', 'history'),
        ('POST', r'/api/models/([^/]+/[^/]+)/preupload/([^/]+)', 'preupload'),
        ('POST', r'/api/models/([^/]+/[^/]+)/commit/([^/]+)', 'commit'),
        ('POST', r'/api/models/([^/]+/[^/]+)/tag/([^/]+)', 'tag'),
        ('POST', r'/api/models/([^/]+/[^/]+)/branch/([^/]+)', 'branch'),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/objects/batch', 'lfs_batch'),
        ('POST', r'/([^/]+/[^/]+)\.git/info/lfs/verify', 'lfs_verify'),
        ('PUT', r'/lfs/([0-9a-f]{64})', 'lfs_put'),
        ('GET', r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', 'resolve'),
        ('GET', r'/cdn/([0-9a-f]{64})', 'cdn'),
    )

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args: object) -> None:
        pass

    def answer(self) -> None:
        """Handle the request under the lock and send the response, or cut the connection for a fault."""
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.server.before(self.command, url.path)
        with self.server.lock:
            fault = next((fault for fault in self.server.faults if fault.times and fault.method == self.command
                          and re.search(fault.path, url.path)), None)
            self.fault = fault.kind if fault else ''
            if fault:
                fault.times -= 1
            try:
                if self.fault == 'before':
                    raise Cut
                self.body = self.read_body()
                status, headers, content = self.route(url.path)
            except Refusal as refusal:
                status, headers = refusal.status, refusal.headers
                content = json.dumps({'error': refusal.message}).encode()
            except Cut:
                status, headers, content = 0, {}, b''
            self.server.requests.append(Request(
                self.command, url.path, 'Authorization' in self.headers, self.headers.get('Range'),
                self.headers['Host'], status))
        if not status or self.fault == 'answer':
            self.cut()
        else:
            self.send(status, headers, content)

    def route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        method = 'GET' if self.command == 'HEAD' else self.command
        for known, pattern, name in self.ROUTES:
            if known == method and (match := re.fullmatch(pattern, path)):
                found = getattr(self, name)(*(group and unquote(group) for group in match.groups()))
                return found if isinstance(found, tuple) else (
                    200, {'Content-Type': 'application/json'}, json.dumps(found).encode())
        raise Refusal(404, None, f'No route {self.command} {path}')

    def read_body(self) -> bytes:
        if 'chunked' in self.headers.get('Transfer-Encoding', ''):
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b''.join(chunks)
        length = int(self.headers.get('Content-Length', 0))
        if self.fault == 'half' and length:
            self.rfile.read(length // 2)
            raise Cut
        return self.rfile.read(length)

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {'Content-Length': str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            half = self.fault == 'half' and content
            self.wfile.write(content[:len(content) // 2] if half else content)
            if half:
                self.wfile.flush()
                self.close_connection = True

    def cut(self) -> None:
        """Reset the connection, so that the client gets an error and not the end of the response."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.connection.close()
        self.close_connection = True

    # permissions

    def user(self) -> tuple[str, str] | None:
        if 'Authorization' not in self.headers:
            return None
        token = self.headers['Authorization'].removeprefix('Bearer ')
        if token not in self.server.users:
            # the client distinguishes an invalid token from a hidden repository by this message
            raise Refusal(401, None, 'Invalid credentials in Authorization header')
        return self.server.users[token]

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        user, repo = self.user(), self.server.repos.get(repo_id)
        owner = repo_id.split('/')[0]
        if repo is None or (repo.private and (user is None or user[0] != owner)):
            raise Refusal(404 if user else 401, 'RepoNotFound', 'Repository not found')
        if write and user is None:
            raise Refusal(401, None, 'Invalid username or password.')
        if write and user != (owner, 'write'):
            raise Refusal(403, None, f'You don\'t have the rights to write to {repo_id}')
        return repo

    # the routes

    def whoami(self) -> dict:
        if (user := self.user()) is None:
            raise Refusal(401, None, 'Invalid username or password.')
        return {'type': 'user', 'name': user[0], 'orgs': [], 'auth': {'accessToken': {'role': user[1]}}}

    def validate_yaml(self) -> dict | tuple[int, dict[str, str], bytes]:
        try:
            card = read_card(json.loads(self.body)['content'])
            errors = [] if isinstance(card, dict) else [{'message': 'the metadata must be a mapping'}]
        except yaml.YAMLError as error:
            card, errors = {}, [{'message': f'the metadata is not YAML: {error}'}]
        warnings = [] if card else [{'message': 'empty or missing yaml metadata in repo card'}]
        found = {'errors': errors, 'warnings': warnings}
        return (400, {'Content-Type': 'application/json'}, json.dumps(found).encode()) if errors else found

    def create(self) -> dict | tuple[int, dict[str, str], bytes]:
        asked, user = json.loads(self.body), self.user()
        if user is None:
            raise Refusal(401, None, 'Invalid username or password.')
        owner = asked.get('organization') or user[0]
        repo_id = f'{owner}/{asked["name"]}'
        found = {'url': f'{self.server.endpoint}/{repo_id}', 'name': repo_id}
        if user != (owner, 'write'):
            raise Refusal(403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        if repo_id in self.server.repos:
            found['error'] = 'You already created this model repo'
            return 409, {'Content-Type': 'application/json'}, json.dumps(found).encode()
        # huggingface_hub 0.30 sends private, 2.x sends visibility
        self.server.create(repo_id, asked.get('private') or asked.get('visibility') == 'private')
        return found

    def info(self, repo_id: str, revision: str | None) -> dict:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision or 'main')
        files = repo.files(sha)
        card = read_card(files['README.md'].content.decode()) if 'README.md' in files else {}
        siblings = [{'rfilename': path} for path in sorted(files)]
        if 'blobs' in self.query:
            for sibling in siblings:
                blob = files[sibling['rfilename']]
                sibling |= {'size': len(blob.content), 'blobId': blob.git_oid}
                if blob.lfs:
                    sibling['lfs'] = {
                        'sha256': blob.sha256, 'size': len(blob.content), 'pointerSize': len(blob.pointer)}
        return {
            '_id': sha[:24], 'id': repo_id, 'modelId': repo_id, 'author': repo_id.split('/')[0], 'sha': sha,
            'private': repo.private, 'gated': False, 'disabled': False, 'downloads': 0, 'likes': 0,
            'createdAt': WHEN, 'lastModified': WHEN, 'tags': card.get('tags', []), 'siblings': siblings,
            'cardData': card or None, 'library_name': card.get('library_name'),
            'pipeline_tag': card.get('pipeline_tag')}

    def tree(self, repo_id: str, revision: str) -> list[dict]:
        files, entries = self.repo(repo_id).files(revision), {}
        deep = self.query.get('recursive', ['false'])[0].lower() in ('1', 'true')
        for path, blob in sorted(files.items()):
            folder = path.partition('/')[0]
            if '/' in path and not deep:
                entries[folder] = {'type': 'directory', 'path': folder, 'oid': '0' * 40, 'size': 0}
                continue
            entries[path] = {'type': 'file', 'path': path, 'size': len(blob.content), 'oid': blob.git_oid}
            if blob.lfs:
                entries[path]['lfs'] = {
                    'oid': blob.sha256, 'size': len(blob.content), 'pointerSize': len(blob.pointer)}
        return list(entries.values())

    def refs(self, repo_id: str) -> dict:
        repo = self.repo(repo_id)
        return {'converts': [], 'pullRequests': []} | {
            kind: [{'name': name, 'ref': f'refs/{git}/{name}', 'targetCommit': sha} for name, sha in found.items()]
            for kind, git, found in (('branches', 'heads', repo.branches), ('tags', 'tags', repo.tags))}

    def history(self, repo_id: str, revision: str) -> list[dict]:
        repo = self.repo(repo_id)
        made = list(repo.commits)
        return [{'id': sha, 'title': repo.commits[sha][0], 'message': '', 'date': WHEN, 'authors': []}
                for sha in reversed(made[:made.index(repo.resolve(revision)) + 1])]

    def preupload(self, repo_id: str, revision: str) -> dict:
        files = self.repo(repo_id, write=True).files(revision)
        rules = [line.split()[0] for line in files['.gitattributes'].content.decode().splitlines() if 'lfs' in line]
        answer = []
        for file in json.loads(self.body)['files']:
            path, old = file['path'], files.get(file['path'])
            lfs = file['size'] > 10_000_000 or any(fnmatch.fnmatch(path.rpartition('/')[2], rule) for rule in rules)
            answer.append({'path': path, 'uploadMode': 'lfs' if lfs else 'regular', 'shouldIgnore': False,
                           'oid': old.etag if old and old.lfs == lfs else None})
        return {'files': answer}

    def commit(self, repo_id: str, revision: str) -> dict:
        repo = self.repo(repo_id, write=True)
        if revision not in repo.branches:
            raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        if not lines or lines[0]['key'] != 'header':
            raise Refusal(400, None, 'The first line of a commit must be its header')
        header, head = lines[0]['value'], repo.branches[revision]
        if header.get('parentCommit', head) != head:
            raise Refusal(412, None, 'A commit has happened since. Please refresh and try again.')
        files = dict(repo.files(head))
        for line in lines[1:]:
            value = line['value']
            path = value['path']
            if line['key'] == 'file' and value['encoding'] == 'base64':
                files[path] = Blob(base64.b64decode(value['content'], validate=True), lfs=False)
            elif line['key'] == 'lfsFile' and value['algo'] == 'sha256':
                content = self.server.objects.get(value['oid'])
                if content is None or len(content) != value['size']:
                    raise Refusal(400, None, f'LFS object of {path} has not been uploaded')
                files[path] = Blob(content, lfs=True)
            elif line['key'] in ('deletedFile', 'deletedFolder'):
                gone = [file for file in files if file == path or file.startswith(path.rstrip('/') + '/')]
                if not gone:
                    raise Refusal(404, 'EntryNotFound', f'A file with this name doesn\'t exist: {path}')
                for file in gone:
                    del files[file]
            else:
                raise Refusal(400, None, f'Unknown operation {line["key"]}')
        sha = repo.commit(header['summary'], files, revision)
        return {'success': True, 'commitOid': sha, 'commitUrl': f'{self.server.endpoint}/{repo_id}/commit/{sha}',
                'hookOutput': ''}

    def tag(self, repo_id: str, revision: str) -> dict:
        repo, name = self.repo(repo_id, write=True), json.loads(self.body)['tag']
        sha = repo.resolve(revision)
        if name in repo.tags:
            raise Refusal(409, None, f'Tag reference exists already: {name}')
        repo.tags[name] = sha
        return {}

    def branch(self, repo_id: str, name: str) -> dict:
        repo = self.repo(repo_id, write=True)
        if name in repo.branches:
            raise Refusal(409, None, f'Reference already exists: {name}')
        repo.branches[name] = repo.resolve(json.loads(self.body or b'{}').get('startingPoint', 'main'))
        return {}

    def lfs_batch(self, repo_id: str) -> tuple[int, dict[str, str], bytes]:
        self.repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.body)['objects']:
            entry = {'oid': asked['oid'], 'size': asked['size']}
            if asked['oid'] not in self.server.objects:
                entry |= {'authenticated': True, 'actions': {
                    'upload': {'href': f'{self.server.cdn}/lfs/{asked["oid"]}'},
                    'verify': {'href': f'{self.server.endpoint}/{repo_id}.git/info/lfs/verify'}}}
            objects.append(entry)
        return 200, {'Content-Type': 'application/vnd.git-lfs+json'}, json.dumps(
            {'transfer': 'basic', 'objects': objects}).encode()

    def lfs_put(self, oid: str) -> tuple[int, dict[str, str], bytes]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, None, 'The content does not have the sha256 of its name')
        self.server.objects[oid] = self.body
        return 200, {}, b''

    def lfs_verify(self, repo_id: str) -> dict:
        self.repo(repo_id, write=True)
        asked = json.loads(self.body)
        if len(self.server.objects.get(asked['oid'], b'')) != asked['size']:
            raise Refusal(404, None, 'The object is not there or has another size')
        return {}

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        blob = repo.files(sha).get(path)
        if blob is None:
            raise Refusal(404, 'EntryNotFound', 'Entry not found', **{'X-Repo-Commit': sha})
        headers = {'X-Repo-Commit': sha, 'Accept-Ranges': 'bytes'}
        if blob.lfs:  # redirect to the host of large files, with the metadata that the client needs
            return 302, headers | {
                'Location': f'{self.server.cdn}/cdn/{blob.sha256}', 'ETag': f'"{blob.git_oid}"',
                'X-Linked-Etag': f'"{blob.sha256}"', 'X-Linked-Size': str(len(blob.content))}, b''
        return self.part(blob.content, headers | {'ETag': f'"{blob.etag}"'})

    def cdn(self, oid: str) -> tuple[int, dict[str, str], bytes]:
        content = self.server.objects.get(oid)
        if content is None:
            raise Refusal(404, None, 'No such object')
        if oid in self.server.corrupted:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return self.part(content, {'ETag': f'"{oid}"', 'Accept-Ranges': 'bytes'})

    def part(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        headers = {'Content-Type': 'application/octet-stream', **headers}
        if (match := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', ''))) is None:
            return 200, headers, content
        start, end = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if start >= len(content):
            raise Refusal(416, None, 'Range not satisfiable', **{'Content-Range': f'bytes */{len(content)}'})
        return 206, headers | {'Content-Range': f'bytes {start}-{end}/{len(content)}'}, content[start:end + 1]
