"""A Hugging Face Hub in miniature on loopback, which speaks the part of the API that huggingface_hub uses here.

It keeps what the real one guarantees: a commit is whole or absent and needs its large files uploaded before, and large
files are accepted only with the hash they were announced with. Faults can be injected into any request.
"""
import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = 'hf_writer'  # of the user 'owner'
READ_TOKEN = 'hf_reader'  # may look at everything and write nothing

CUT = 'cut'  # close the connection after half of the request's body
HANG = 'hang'  # never answer
LOST = 'lost'  # do what was asked, then close the connection without an answer


@dataclasses.dataclass
class Repo:
    private: bool
    commits: Dict[str, Dict[str, bytes]]  # files by commit
    refs: Dict[str, str]  # commits by branch or pull request

    def resolve(self, revision: str) -> Optional[str]:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclasses.dataclass
class Fault:
    method: str
    pattern: str  # searched for in the path
    what: object  # a status, CUT or LOST
    headers: Optional[Dict[str, str]] = None
    hits: int = 0


class HubServer:
    """Use as a context manager; `url` is what HF_ENDPOINT has to be."""

    def __init__(self):
        self.repos: Dict[str, Repo] = {}
        self.large_files: Dict[str, bytes] = {}
        self.faults: List[Fault] = []
        self.requests: List[Tuple[str, str]] = []
        self.lock = threading.Lock()
        self.closed = threading.Event()
        handler = type('Handler', (_Handler,), {'hub': self})
        self._server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self._server.daemon_threads = True
        self.url = f'http://127.0.0.1:{self._server.server_address[1]}'

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc_info):
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()

    @contextlib.contextmanager
    def fault(self, method: str, pattern: str, what: object, headers: Optional[Dict[str, str]] = None):
        """Every request with this method whose path has `pattern` in it fails within the block."""
        fault = Fault(method, pattern, what, headers)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def commit(self, repo_id: str, files: Dict[str, bytes], ref: str = 'main') -> str:
        repo = self.repos.setdefault(repo_id, Repo(False, {}, {}))
        oid = hashlib.sha1(repr((repo_id, ref, len(repo.commits), sorted(files))).encode()).hexdigest()
        repo.commits[oid] = files
        repo.refs[ref] = oid
        return oid


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        self._dispatch([
            (r'/api/whoami-v2', self._whoami),
            (r'/api/models/(?P<repo_id>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?', self._model_info),
            (r'/api/models/(?P<repo_id>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/.*)?', self._tree),
            (r'/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)', self._resolve),
        ])

    do_HEAD = do_GET

    def do_POST(self):
        self._dispatch([
            (r'/api/repos/create', self._create),
            (r'/api/validate-yaml', self._validate_yaml),
            (r'/api/models/(?P<repo_id>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)', self._branch),
            (r'/api/models/(?P<repo_id>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)', self._preupload),
            (r'/api/models/(?P<repo_id>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)', self._commit),
            (r'/(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch', self._batch),
            (r'/large/(?P<oid>\w+)/verify', self._verify),
        ])

    def do_PUT(self):
        self._dispatch([(r'/large/(?P<oid>\w+)', self._upload)])

    def log_message(self, *args):
        pass

    def _dispatch(self, routes):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.requests.append((self.command, url.path))
        fault = next((f for f in self.hub.faults if f.method == self.command and re.search(f.pattern, url.path)), None)
        if fault is not None:
            fault.hits += 1
        self.lost = fault is not None and fault.what == LOST
        length = int(self.headers.get('Content-Length') or 0)
        if fault is not None and fault.what == CUT:
            self.rfile.read(length // 2)
            return self._hang_up()
        chunked = self.headers.get('Transfer-Encoding') == 'chunked'
        self.body = self._read_chunks() if chunked else self.rfile.read(length)
        if fault is not None and fault.what == HANG:
            self.hub.closed.wait()
            return self._hang_up()
        if fault is not None and not self.lost:
            return self._json(fault.what, {'error': f'injected {fault.what}', 'url': f'{self.hub.url}/owner/tiny'},
                              fault.headers)
        for pattern, handle in routes:
            match = re.fullmatch(pattern, url.path)
            if match:
                with self.hub.lock:
                    return self._serve(handle, {k: unquote(v) for k, v in match.groupdict().items() if v is not None})
        self._json(404, {'error': f'no such endpoint: {self.command} {url.path}'})

    def _serve(self, handle, arguments):
        user = {f'Bearer {TOKEN}': 'owner', f'Bearer {READ_TOKEN}': 'reader'}.get(self.headers.get('Authorization'))
        if user is None and self.headers.get('Authorization'):
            return self._json(401, {'error': 'Invalid credentials'}, {'X-Error-Message': 'Invalid credentials'})
        self.user = user
        repo_id = arguments.get('repo_id')
        if repo_id is not None:
            self.repo = self.hub.repos.get(repo_id)
            if self.repo is None or (self.repo.private and user is None):
                return self._json(404, {'error': 'Repository not found'}, {'X-Error-Code': 'RepoNotFound'})
            allowed = user == repo_id.split('/')[0] or (user == 'owner' and self.query.get('create_pr') == ['1'])
            if self.command == 'POST' and not allowed and not self.path.endswith('/batch'):
                return self._json(403, {'error': 'no write permission'}, {'X-Error-Message': 'no write permission'})
        if 'revision' in arguments:
            self.oid = self.repo.resolve(arguments['revision'])
            if self.oid is None:
                return self._json(404, {'error': 'Revision not found'}, {'X-Error-Code': 'RevisionNotFound'})
        handle(**arguments)

    def _read_chunks(self) -> bytes:
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self):
        self.close_connection = True
        self.connection.shutdown(2)

    def _json(self, status, content, headers=None):
        self._send(status, json.dumps(content).encode(), {'Content-Type': 'application/json', **(headers or {})})

    def _send(self, status, content=b'', headers=None):
        if self.lost:
            return self._hang_up()
        self.send_response(status)
        for key, value in {'Content-Length': str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(content)

    def _whoami(self):
        if self.user is None:
            return self._json(401, {'error': 'Invalid username or password.'})
        self._json(200, {'type': 'user', 'name': self.user, 'orgs': [], 'auth': {}})

    def _create(self):
        if self.user is None:
            return self._json(401, {'error': 'Invalid username or password.'})
        wanted = json.loads(self.body)
        repo_id = f'{wanted.get("organization") or self.user}/{wanted["name"]}'
        if self.user != 'owner' or not repo_id.startswith('owner/'):
            return self._json(403, {'error': 'no rights there'}, {'X-Error-Message': 'no rights there'})
        answer = {'url': f'{self.hub.url}/{repo_id}', 'name': repo_id}
        if repo_id in self.hub.repos:
            return self._json(409, {'error': 'You already created this model repo', **answer})
        self.hub.commit(repo_id, {'.gitattributes': b'*.safetensors filter=lfs\n'})
        self.hub.repos[repo_id].private = bool(wanted.get('private')) or wanted.get('visibility') == 'private'
        self._json(200, answer)

    def _validate_yaml(self):
        text = json.loads(self.body)['content']
        metadata = yaml.safe_load(text.split('---')[1]) if text.startswith('---') else None
        errors = [] if isinstance(metadata, dict) and metadata.get('tags') else [{'message': 'no tags'}]
        self._json(400 if errors else 200, {'errors': errors, 'warnings': []})

    def _model_info(self, repo_id, revision='main'):
        oid = self.repo.resolve(revision)
        siblings = [
            dict(rfilename=path, size=len(data), blobId=_blob_id(data), lfs=_lfs(data) if _large(path) else None)
            for path, data in self.repo.commits[oid].items()
        ]
        self._json(200, {
            'id': repo_id, 'modelId': repo_id, 'sha': oid, 'private': self.repo.private, 'tags': [],
            'siblings': siblings, 'pipeline_tag': 'image-classification', 'library_name': 'timm',
        })

    def _tree(self, repo_id, revision):
        self._json(200, [
            {'type': 'file', 'path': path, 'size': len(data), 'oid': _blob_id(data)}
            for path, data in self.repo.commits[self.oid].items()
        ])

    def _branch(self, repo_id, branch):
        start = json.loads(self.body or b'{}').get('startingPoint', 'main')
        if branch in self.repo.refs:
            return self._json(409, {'error': 'branch exists'})
        self.repo.refs[branch] = self.repo.resolve(start)
        self._json(200, {})

    def _preupload(self, repo_id, revision):
        present = self.repo.commits[self.oid]
        self._json(200, {'files': [
            {
                'path': file['path'],
                'uploadMode': 'lfs' if _large(file['path']) else 'regular',
                'shouldIgnore': False,
                'oid': _remote_oid(file['path'], present[file['path']]) if file['path'] in present else None,
            }
            for file in json.loads(self.body)['files']
        ]})

    def _batch(self, repo_id):
        objects = []
        for wanted in json.loads(self.body)['objects']:
            url = f'{self.hub.url}/large/{wanted["oid"]}'
            actions = {'upload': {'href': url}, 'verify': {'href': f'{url}/verify'}}
            known = wanted['oid'] in self.hub.large_files
            objects.append({**wanted, **({} if known else {'actions': actions})})
        self._json(200, {'transfer': 'basic', 'objects': objects})

    def _upload(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._json(400, {'error': 'the content does not have the announced hash'})
        self.hub.large_files[oid] = self.body
        self._send(200)

    def _verify(self, oid):
        size = json.loads(self.body)['size']
        known = self.hub.large_files.get(oid)
        self._json(*((200, {}) if known is not None and len(known) == size else (404, {'error': 'not uploaded'})))

    def _commit(self, repo_id, revision):
        lines = [json.loads(line) for line in self.body.splitlines()]
        parent = lines[0]['value'].get('parentCommit')
        if parent is not None and parent != self.oid:
            return self._json(412, {'error': 'A commit has happened since.'})
        files = dict(self.repo.commits[self.oid])
        for line in lines[1:]:
            value = line['value']
            if line['key'] == 'lfsFile' and value['oid'] not in self.hub.large_files:
                return self._json(400, {'error': 'LFS object is missing'})
            files[value['path']] = (
                self.hub.large_files[value['oid']] if line['key'] == 'lfsFile' else base64.b64decode(value['content']))
        pull_request = self.query.get('create_pr') == ['1']
        number = sum(ref.startswith('refs/pr/') for ref in self.repo.refs) + 1
        oid = self.hub.commit(repo_id, files, f'refs/pr/{number}' if pull_request else revision)
        answer = {'success': True, 'commitOid': oid, 'commitUrl': f'{self.hub.url}/{repo_id}/commit/{oid}'}
        if pull_request:
            answer['pullRequestUrl'] = f'{self.hub.url}/{repo_id}/discussions/{number}'
        self._json(200, answer)

    def _resolve(self, repo_id, revision, path):
        files = self.repo.commits[self.oid]
        headers = {'X-Repo-Commit': self.oid}
        if path not in files:
            return self._json(404, {'error': 'Entry not found'}, {**headers, 'X-Error-Code': 'EntryNotFound'})
        etag = _remote_oid(path, files[path])  # the real one redirects to a storage host for large files
        self._send(200, files[path], {**headers, 'ETag': f'"{etag}"'})


def _large(path: str) -> bool:
    return path.endswith(('.safetensors', '.bin', '.onnx'))


def _lfs(data: bytes):
    return {'sha256': hashlib.sha256(data).hexdigest(), 'size': len(data), 'pointerSize': 134}


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def _remote_oid(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if _large(path) else _blob_id(data)
