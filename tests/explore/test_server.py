"""Requests that the page itself would not send: they get an error, and nothing on this machine changes.

The server runs in a process and a temporary folder of its own, which holds a canary and the uploads of other visitors.
"""
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from gmnet_timm.explore.pictures import Exploration, Picture, ShownModel
from gmnet_timm.weights.model import load_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec('gradio') is None, reason='needs Gradio (the extra explore)')]


class Client:
    """Speaks to the page as Gradio's browser code does."""

    def __init__(self, url: str):
        self.url = url.rstrip('/')
        self.config = json.loads(self.get('/config'))
        self.prefix = self.config.get('api_prefix', '')
        self.by_id = {c['id']: c for c in self.config['components']}
        self.session = uuid.uuid4().hex

    def get(self, path: str) -> str:
        return urllib.request.urlopen(self.url + path, timeout=60).read().decode()

    def post(self, path: str, data: bytes, **headers: str) -> str:
        headers = {name.replace('_', '-'): value for name, value in headers.items()}
        request = urllib.request.Request(self.url + self.prefix + path, data, headers)
        return urllib.request.urlopen(request, timeout=60).read().decode()

    def upload(self, content: bytes, name: str = 'photo.png', **headers: str) -> Path:
        mark = uuid.uuid4().hex
        body = (f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
                + content + f'\r\n--{mark}--\r\n'.encode())
        return Path(json.loads(self.post(
            '/upload', body, Content_Type=f'multipart/form-data; boundary={mark}', **headers))[0])

    def component(self, elem_id: str) -> int:
        return next(i for i, c in self.by_id.items() if c['props'].get('elem_id') == elem_id)

    def call(self, elem_id: str, event: str, event_data=None, nth: int = 0, **values) -> dict:
        """What the page answers to an event of a component, with these values in place of those it started with."""
        target = self.component(elem_id)
        found = [d for d in self.config['dependencies']
                 if [target, event] in d['targets'] and d['backend_fn']]
        inputs = {self.component(name): value for name, value in values.items()}
        data = [inputs.get(i, self.by_id[i]['props'].get('value')) for i in found[nth]['inputs']]
        body = dict(data=data, fn_index=found[nth]['id'], session_hash=self.session, event_data=event_data)
        if found[nth]['queue'] is False:
            try:
                return json.loads(self.post('/run/predict', json.dumps(body).encode(), Content_Type='application/json'))
            except urllib.error.HTTPError as e:
                return json.loads(e.read())
        self.post('/queue/join', json.dumps(body).encode(), Content_Type='application/json')
        stream = urllib.request.urlopen(f'{self.url}{self.prefix}/queue/data?session_hash={self.session}', timeout=60)
        return next(json.loads(line[6:])['output'] for line in stream if b'process_completed' in line)


def _text(answer: dict) -> str:
    return re.sub(r'<[^>]+>|\s+', ' ', json.dumps(answer, ensure_ascii=False))


def _png(size=(80, 60)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert('RGB').save(file, 'PNG')
    return file.getvalue()


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file() and not p.is_symlink()}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('hostile')
    (root / 'tmp' / 'of-others').mkdir(parents=True)
    (root / 'tmp' / 'of-others' / 'canary.png').write_bytes(_png())
    torch.save({'state_dict': timm.create_model('gmnet_s1', num_classes=3).state_dict()}, root / 'm.pth')
    for name in ('ape', 'bee', 'cat'):
        (root / 'data' / 'validation' / name).mkdir(parents=True)
        Image.new('RGB', (64, 64), (90, 120, 30)).save(root / 'data' / 'validation' / name / 'x.png')
    return root


@pytest.fixture(scope='module')
def server(root):
    process = subprocess.Popen(
        [sys.executable, '-m', 'gmnet_timm', 'freq', 'explore', 'm.pth', '--data-dir', 'data', '--img-size', '32'],
        cwd=root, env={**os.environ, 'TMPDIR': str(root / 'tmp')}, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().split()[0]
    process.terminate()
    assert process.wait(30) == 0
    assert [p.name for p in (root / 'tmp').iterdir() if p.name.startswith('gmnet-timm-')] == []


@pytest.fixture
def client(server):
    return Client(server)


def _file(path) -> dict:
    return {'path': str(path), 'orig_name': 'photo.png', 'meta': {'_type': 'gradio.FileData'}}


def test_two_visitors_with_the_same_picture(client, server):
    other, picture = Client(server), _png()
    paths = [visitor.upload(picture) for visitor in (client, other)]
    assert paths[0] == paths[1]
    for visitor, path in zip((client, other), paths):
        assert 'photo.png, 80×60 pixels' in _text(visitor.call('file', 'upload', file=_file(path)))
    assert 'ape' in _text(client.call('radius', 'input', radius=3))  # the data name the classes


def test_no_path_of_a_request_is_read_deleted_or_told(client, server, root):
    theirs = Client(server).upload(_png((50, 40)), 'private.png')
    uploads = theirs.parent.parent
    assert uploads.parent == root / 'tmp'
    (uploads / 'hash').mkdir()
    (uploads / 'hash' / 'link.png').symlink_to(root / 'tmp' / 'of-others' / 'canary.png')
    (uploads / 'linked').symlink_to(root / 'tmp' / 'of-others')
    before = _snapshot(root)
    hostile = [
        uploads, theirs.parent, theirs.parent / 'none.png', root / 'tmp', root / 'tmp' / 'of-others' / 'canary.png',
        uploads / 'hash' / 'link.png', uploads / 'linked' / 'canary.png', root / 'data', root / 'm.pth', '/etc/passwd',
        uploads / '..' / 'of-others' / 'canary.png', '', '.', 'a\0b', f'{server}config', 'http://127.0.0.1:1/x.png']
    for path in hostile:
        for changed in ({}, {'is_stream': True}, {'url': str(path)}):
            answer = client.call('file', 'upload', file={**_file(path), **changed})
            assert 'pixels' not in _text(answer), path
            said = _text(answer).replace(json.dumps(str(path))[1:-1], '')
            assert str(root) not in said and 'Traceback' not in said, path
            assert _snapshot(root) == before, path
    assert 'private.png, 50×40' in _text(client.call('file', 'upload', file=_file(theirs)))
    for other in ('a list', [_file(theirs)], {'path': None}, 7):
        assert 'pixels' not in _text(client.call('file', 'upload', file=other))
    assert _snapshot(root) == before


@pytest.mark.parametrize('content, name', [
    (b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'a.png'), (b'no picture', 'a.png'), (b'', 'a.png')])
def test_what_is_not_a_picture_is_refused(client, content, name):
    answer = client.call('file', 'upload', file=_file(client.upload(content, name)))
    assert 'a.png cannot be read as an image' in _text(answer)


def test_thin_pictures_take_no_memory(client):
    for size in ((1, 60_000), (49_000_000, 1)):
        path = client.upload(_thin(size), 'thin.png')
        assert 'too narrow' in _text(client.call('file', 'upload', file=_file(path)))


def _thin(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new('L', size).save(file, 'PNG')
    return file.getvalue()


@pytest.mark.parametrize('values', [
    dict(radius=1e9), dict(radius=-5), dict(radius=float('nan')), dict(other=float('inf')), dict(radius='7'),
    dict(radius=None), dict(radius=[3])])
def test_radii_that_the_page_does_not_send(client, values):
    client.call('file', 'upload', file=_file(client.upload(_png())))
    before = client.call('radius', 'input', radius=3)['data']
    answer = _text(client.call('radius', 'input', **values))
    assert '≤' not in answer and 'Traceback' not in answer
    assert client.call('radius', 'input', radius=3)['data'] == before


def test_options_and_events_that_the_page_does_not_send(client):
    client.call('file', 'upload', file=_file(client.upload(_png())))
    before = _text(client.call('radius', 'input', radius=3))
    for values in ({'space': 'nowhere'}, {'keep-dc': 'x'}, {'contrast': 3}):
        assert '≤' not in _text(client.call('radius', 'input', **values))
    for data in (None, {}, {'index': '99'}, {'index': '-1'}, {'index': '../x'}, {'index': None}, ['index']):
        assert 'pixels' not in _text(client.call('thumbnails', 'select', data)), data
    assert 'x.png, 64×64 pixels' in _text(client.call('thumbnails', 'select', {'index': '1'}))
    assert '≤ 3' in before


@pytest.mark.parametrize('origin', ['http://evil.example', 'null', 'http://127.0.0.1:1'])
def test_other_pages_cannot_send_anything(client, origin):
    with pytest.raises(urllib.error.HTTPError) as refused:
        client.upload(_png(), Origin=origin)
    assert refused.value.code == 403
    client.upload(_png(), Origin=client.url)  # the page itself


def test_a_picture_is_forgotten(tmp_path, monkeypatch):
    """Gradio deletes a state once its time to live is over, but only one that was an output of an event."""
    import gradio

    from gmnet_timm.explore.page import Page
    monkeypatch.setenv('GRADIO_TEMP_DIR', str(tmp_path))
    torch.save({'state_dict': timm.create_model('gmnet_s1', num_classes=3).state_dict()}, tmp_path / 'm.pth')
    model = load_model(str(tmp_path / 'm.pth'), preprocessing={'img_size': 32})
    page = Page(Exploration((ShownModel('m', 'm.pth', model),))).blocks
    (state,) = (block for block in page.blocks.values() if isinstance(block, gradio.State))
    assert state.time_to_live == 3600
    state.time_to_live = 0
    app, url, _ = page.launch(server_name='127.0.0.1', prevent_thread_lock=True, quiet=True, inline=False)

    def held():
        states = [value for found in app.state_holder.session_data.values() for value in found.state_data.values()]
        return [value.name for value in states if isinstance(value, Picture)]

    try:
        client = Client(url)
        client.call('file', 'upload', file=_file(client.upload(_png())))
        assert held() == ['photo.png']
        app.state_holder.delete_all_expired_state()
        assert held() == []
    finally:
        page.close(verbose=False)
