"""Pickles of checkpoints: nothing that they name is called, and what they may take is bounded."""
import argparse
import builtins
import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import Call, legacy_file, pickled, saved, storage, tensor, weights, zip_file

from gmnet_timm.checkpoint.integrity import DamageError
from gmnet_timm.checkpoint.pickles import ForeignPickleError, Storage, StoredTensor, unpickle
from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint

PROTO = b'\x80\x02'


@pytest.mark.parametrize('value', [
    None, True, 0, -1, 255, 1 << 20, -1 << 31, 1 << 70, -1 << 500, 0.1, float('inf'), 'text', 'größer', '\ud800',
    [], {}, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [1, [2, {'a': (3,)}]], {'a': 1, 2: 'b', None: []}, b'\x00\xff',
    bytearray(b'ab'), bytearray(), {1, 2}, set(), 1 + 2j, collections.OrderedDict(a=1), collections.Counter('aab'),
    argparse.Namespace(a=1, b=[2]), torch.Size([1, 2]), torch.float16, torch.device('cpu'), torch.device('cuda', 1),
], ids=lambda value: repr(value)[:40])
def test_values(value):
    assert unpickle(io.BytesIO(pickle.dumps(value, protocol=2))) == value


def test_shared_and_cyclic_values():
    shared = [1]
    a, b = unpickle(io.BytesIO(pickle.dumps((shared, shared), protocol=2)))
    assert a is b
    shared.append(shared)
    value = unpickle(io.BytesIO(pickle.dumps(shared, protocol=2)))
    assert value[1] is value


def test_ordered_dictionary_of_python_2():
    assert unpickle(io.BytesIO(pickled(Call(collections.OrderedDict, [['a', 1], ['b', 2]])))) == {'a': 1, 'b': 2}


def test_tensors():
    storages: dict[str, Storage] = {}
    tensors = {'a': tensor(6, (2, 3), (3, 1)), 'b': tensor(6, (2,), (2,), offset=3)}
    value = unpickle(io.BytesIO(pickled(tensors)), storages)
    whole = Storage('0', torch.float32, 24, 0, 24)
    assert storages == {'0': whole}
    assert value['a'] == StoredTensor(whole, torch.float32, 0, (2, 3), (3, 1))
    assert value['b'] == StoredTensor(whole, torch.float32, 3, (2,), (2,))


def test_views_of_storages(tmp_path):
    """torch before 0.4 pickled parts of storages."""
    view = tensor(6, (2,), (1,), view=(('view', 3, 2),))
    path = tmp_path / 'x.pth'
    path.write_bytes(legacy_file(pickled({'a': view}), torch.arange(6.).numpy().tobytes(), ('0',)))
    assert torch.equal(read_checkpoint(path).state_dict['a'], torch.tensor([3., 4.]))
    assert torch.equal(torch.load(path, weights_only=True)['a'], torch.tensor([3., 4.]))
    with pytest.raises(DamageError, match='larger than what it looks at'):
        unpickle(io.BytesIO(pickled(tensor(6, (2,), (1,), view=(('view', 5, 2),)))), {})


FITS = {'offset': 0, 'size': (6,), 'stride': (1,)}


@pytest.mark.parametrize('change, word', [
    ({'size': (7,)}, 'larger than its storage'),
    ({'offset': 1}, 'larger than its storage'),
    ({'stride': (2,)}, 'larger than its storage'),
    ({'size': (1 << 62, 1 << 62), 'stride': (1 << 62, 1)}, 'larger than its storage'),
    ({'size': (1 << 2000,)}, 'larger than its storage'),
    ({'offset': -1}, 'not a number'),
    ({'stride': (-1,)}, 'not a number'),
    ({'size': (-1,)}, 'not a number'),
    ({'size': (2.5,)}, 'not a number'),
    ({'size': (True,)}, 'not a number'),
    ({'size': 'abc', 'stride': 'abc'}, 'not a number'),
    ({'size': (6, 1)}, 'impossible shape'),
    ({'size': (1,) * 65, 'stride': (1,) * 65}, 'impossible shape'),
    ({'size': None}, 'arguments that checkpoints do not have'),
    ({'numel': -6}, 'not a number'),
])
def test_tensors_that_do_not_fit(change, word):
    with pytest.raises(DamageError, match=word):
        unpickle(io.BytesIO(pickled(tensor(**{'numel': 6, **FITS, **change}))), {})


def test_one_storage_of_two_sizes():
    with pytest.raises(DamageError, match='contradicts itself'):
        unpickle(io.BytesIO(pickled([storage(6), storage(7)])), {})
    with pytest.raises(DamageError, match='contradicts itself'):
        unpickle(io.BytesIO(pickled([storage(6), storage(6, kind=torch.IntStorage)])), {})


@pytest.mark.parametrize('data', [
    pickle.dumps(os.system, protocol=2),
    pickled(Call(print, 1)),
    pickled(Call(torch.load, 'x')),
    pickled(Call(torch.hub.load, 'x')),
    pickled(torch.nn.ReLU()),
    pickle.dumps({}, protocol=4),
    pickle.dumps({}, protocol=0),
    PROTO + b'N)R.',  # calls None
    PROTO + b'N}b.',  # sets attributes of None
    PROTO + b'NNa.',  # appends to None
    PROTO + b'NNNs.',  # sets an item of None
    PROTO + b'cargparse\nNamespace\n)\x81}K\1K\2sb.',  # an attribute named 1
    PROTO + b'ctorch\nonnx\n.',  # would be imported by looking at it
    PROTO + b'Nq\0Q.',
    PROTO + b'}' + b']' + b'Ns.',  # a list as a key
    PROTO + b'2.',
    PROTO + b'0.',
], ids=range(17))
def test_foreign_pickles(data):
    imported = set(sys.modules)
    with pytest.raises((ForeignPickleError, TypeError)):
        unpickle(io.BytesIO(data), {})
    assert 'torch.onnx' in imported or 'torch.onnx' not in sys.modules


def hostile_objects(ran: Path):
    """Objects that leave a file behind when they are unpickled."""
    code = f'open({str(ran)!r}, "w").close()'
    yield Call(os.system, f'touch {ran}')
    yield Call(builtins.eval, code)
    yield Call(builtins.exec, code)
    yield Call(Path.touch, ran)
    yield Call(builtins.open, str(ran), 'w')
    yield Call(collections.OrderedDict, [('a', Call(os.system, f'touch {ran}'))])


@pytest.mark.parametrize('place', ['bare', 'beside', 'inside', 'args'])
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [2, 4])
def test_hostile_pickles_do_not_run(place, zipped, protocol, tmp_path):
    """That they would run if they were unpickled is checked too."""
    ran = tmp_path / 'ran'
    for hostile in hostile_objects(ran):
        content = {
            'bare': hostile,
            'beside': {'state_dict': weights(), 'optimizer': hostile},
            'inside': {**weights(), 'x': hostile},
            'args': {'args': hostile, **weights()},
        }[place]
        path = tmp_path / 'x.pth'
        torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        with pytest.raises(CheckpointError, match='run code'):
            read_checkpoint(path)
        assert not ran.exists()
        pickle.loads(pickle.dumps(hostile))
        assert ran.exists()
        ran.unlink()


def name(full: str) -> bytes:
    module, _, attribute = full.rpartition('.')
    return b'c' + f'{module}\n{attribute}\n'.encode()


def long1(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, 'little', signed=True)
    return b'\x8a' + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def rebuilt(function: str, *args: bytes) -> bytes:
    return name(f'torch._utils.{function}') + b'(' + b''.join(args) + b'tR'


BIG = long1(3_000_000_000)
STORAGE = b'(' + text('storage') + name('torch.FloatStorage') + text('0') + text('cpu') + b'K\1tQ'  # of one float
SMALL_TENSOR = rebuilt('_rebuild_tensor_v2', STORAGE, b'K\0', b'K\1\x85', b'K\1\x85', b'\x89', b'}')
WIDE_TENSOR = rebuilt('_rebuild_tensor_v2', STORAGE, b'K\0', BIG + BIG + b'\x86', b'K\0K\0\x86', b'\x89', b'}')
MANY = b''.join(text(str(i)) + b'N' for i in range(5000))


def beside(value: bytes) -> bytes:
    """A pickle of {'state_dict': {'a': <a small tensor>}, 'args': value}."""
    state_dict = b'}' + text('a') + SMALL_TENSOR + b's'
    return PROTO + b'}(' + text('state_dict') + state_dict + text('args') + value + b'u.'


def inside(value: bytes) -> bytes:
    """A pickle of {'a': <a small tensor>, 'b': value}."""
    return PROTO + b'}(' + text('a') + SMALL_TENSOR + text('b') + value + b'u.'


VALUES = {
    'bytearray': name('builtins.bytearray') + BIG + b'\x85R',
    'bytearray of Python 2': name('__builtin__.bytearray') + BIG + b'\x85R',
    'many bytearrays': b'](' + (name('builtins.bytearray') + long1(10_000_000) + b'\x85R') * 300 + b'e',
    'bytearrays of bytes': name('_codecs.encode') + text('a' * 50_000) + text('latin1') + b'\x86Rq\0]('
    + (name('builtins.bytearray') + b'h\0\x85R') * 20_000 + b'e',
    'encoding': name('_codecs.encode') + text('a' * 50_000) + text('punycode') + b'\x86R',
    'a storage': name('torch.storage.UntypedStorage') + BIG + b'\x85R',
    'a tensor by its class': name('torch.FloatTensor') + BIG + b'\x85R',
    'a tensor of torch': name('torch.Tensor') + BIG + b'\x85\x81',
    'a large persistent storage': STORAGE.replace(text('0'), text('1')).replace(b'K\1', BIG),
    'a tensor larger than its storage': WIDE_TENSOR.replace(b'K\0K\0\x86', b'K\1K\1\x86'),
    'stride 0': WIDE_TENSOR,
    'a parameter with stride 0': rebuilt('_rebuild_parameter', WIDE_TENSOR, b'\x88', b'}'),
    'quantised': rebuilt(
        '_rebuild_qtensor', STORAGE, b'K\0', BIG + b'\x85', b'K\1\x85',
        name('torch.per_tensor_affine') + b'G?\xf0\0\0\0\0\0\0K\0\x87', b'\x89', b'}'),
    'on another device': rebuilt(
        '_rebuild_device_tensor_from_cpu_tensor', WIDE_TENSOR, name('torch.float64'), text('cpu'), b'\x89'),
    'sparse': rebuilt(
        '_rebuild_sparse_tensor', name('torch.serialization._get_layout') + text('torch.sparse_coo') + b'\x85R',
        b'NN' + BIG + b'\x87'),
    'nested': rebuilt('_rebuild_nested_tensor', b'N', BIG, b'N', b'N'),
    'wrapper': rebuilt('_rebuild_wrapper_subclass', b'N', BIG),
    'pairs of pairs': b')' + b''.join(b'q%ch%c\x86' % (i, i) for i in range(60)),  # t = (t, t), sixty times
    'lists of lists': b'](]q\0' + b''.join(b'](h%ch%ceq%c' % (i, i, i + 1) for i in range(60)) + b'e',
    'a list in itself': b']q\0h\0a',
    'deep lists': b']' * 20_000 + b'a' * 19_999,
    'deep tuples': b')' + b'\x85' * 20_000,
    'a dictionary copied often': b'}q\0(' + MANY + b'u]('
    + (name('collections.OrderedDict') + b'h\0\x85R') * 3000 + b'e',
    'attributes set often': name('argparse.Namespace') + b')\x81}q\0(' + MANY + b'ub' + b'h\0b' * 100_000,
    'keys that collide': b'}(' + b''.join(long1(i * ((1 << 61) - 1)) + b'N' for i in range(1, 20_000)) + b'u',
    'floats that collide': b'}(' + b''.join(
        b'G' + struct.pack('>d', 2. ** 61 * i) + b'N' for i in range(20_000)) + b'u',
    'a set that collides': name('builtins.set') + b'](' + b''.join(
        long1(i * ((1 << 61) - 1)) for i in range(1, 20_000)) + b'e\x85R',
    'a long key hashed often': b'(' + b'N' * 100_000 + b'tq\0}(' + b'h\0N' * 100_000 + b'u',
    'dictionaries': b'](' + b'}' * 2_000_000 + b'e',
    'sets': b'](' + b'\x8f' * 2_000_000 + b'e',
    'marks': b'(' * 2_000_000,
    'nothing': b'](' + b'N' * 3_000_000 + b'e',
    'memo': b'N' + b''.join(b'r' + struct.pack('<I', i) for i in range(1_000_000)),
    'colliding memo': b'N' + b''.join(
        b'r' + struct.pack('<I', i << 12 & 0xFFFFFFFF | i >> 20) for i in range(1_000_000)),
    'wide characters': b'](' + text('a' * 1_000_000 + '\U0001F600') * 30 + b'e',
    'one wide text': text('a' * 30_000_000 + '\U0001F600'),
    'a longer one': text('a' * 60_000_000 + '\U0001F600'),
    'long names': b'c' + b'a' * 20_000_000 + b'\nb\n',
    'a long number': b'\x8b' + struct.pack('<i', 20_000_000) + b'\x7f' * 20_000_000,
    'a number of many digits': b'L' + b'9' * 20_000_000 + b'L\n',
    'a long string': b"S'" + b'\\x61' * 5_000_000 + b"'\n",
}
for opcode, length in {
    'BINBYTES8': b'\x8e' + struct.pack('<Q', 1 << 40), 'BINUNICODE8': b'\x8d' + struct.pack('<Q', 1 << 40),
    'LONG1': b'\x8a\xff', 'LONG4': b'\x8b' + struct.pack('<i', 1 << 30), 'negative LONG4': b'\x8b\xff\xff\xff\xff',
    'BINBYTES': b'B\xff\xff\xff\x7f', 'BINUNICODE': b'X\xff\xff\xff\xff', 'BINSTRING': b'T\xff\xff\xff\x7f',
    'BYTEARRAY8': b'\x96' + struct.pack('<Q', 1 << 40), 'FRAME': b'\x95' + struct.pack('<Q', 1 << 60),
    'GET': b'j\xff\xff\xff\x7f', 'PUT': b'Nr\xff\xff\xff\xff',
}.items():
    VALUES[f'length of {opcode}'] = length

SMALL_TENSORS = text('a') + SMALL_TENSOR + b'q\0'
BOMBS = {
    **{key: beside(value) for key, value in VALUES.items()},
    **{f'{key} as weights': inside(value) for key, value in VALUES.items() if len(value) < 1000},
    'pairs of pairs as a key': PROTO + b'}' + VALUES['pairs of pairs'] + b'Ns.',
    'pairs of pairs in an argument': beside(
        name('argparse.Namespace') + b')\x81}' + text('x') + VALUES['pairs of pairs'] + b'sb'),
    'many names of one tensor': PROTO + b'}(' + SMALL_TENSORS + b''.join(
        text(str(i)) + b'h\0' for i in range(200_000)) + b'u.',
    'as many tensors as are read': PROTO + b'}(' + SMALL_TENSORS + b''.join(
        text(str(i)) + SMALL_TENSOR.replace(b'K\1\x85', b'K\0\x85', 1) for i in range(20_000)) + b'u.',
}

READ = """
import faulthandler, json, re, resource, sys, time
from pathlib import Path
from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint, read_metadata

def memory(what):
    return int(re.search(what + r':\\s+(\\d+) kB', Path('/proc/self/status').read_text()).group(1)) * 1024

faulthandler.dump_traceback_later(120, exit=True)
read_checkpoint(sys.argv[1])
results = {}
for path in sorted(Path(sys.argv[2]).iterdir()):
    for read in (read_checkpoint, read_metadata):
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak, VmHWM
        before, start = memory('VmRSS'), time.process_time()
        virtual = memory('VmSize') + 2 * path.stat().st_size + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (virtual, resource.RLIM_INFINITY))
        try:
            read(path)
            answer = 'read'
        except CheckpointError as e:
            answer = str(e)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results[f'{path.name} {read.__name__}'] = (answer, memory('VmHWM') - before, time.process_time() - start)
print(json.dumps(results))
"""


@pytest.mark.parametrize('smallest, size', [(0, 100_000), pytest.param(100_000, 1 << 40, marks=pytest.mark.slow)])
def test_allocation_bombs(smallest, size, tmp_path):
    """Reading takes at most twice the file and 256 MB, real and virtual, and a few seconds."""
    folder = tmp_path / 'bombs'
    folder.mkdir()
    data = struct.pack('<f', 1.)
    for key, bomb in BOMBS.items():
        if smallest <= len(bomb) < size:
            (folder / f'{key}.pth').write_bytes(zip_file(bomb, data))
            (folder / f'{key}, legacy.pth').write_bytes(legacy_file(bomb, data, ('0',)))
    (tmp_path / 'x.pth').write_bytes(saved(weights()))
    done = subprocess.run(
        [sys.executable, '-c', READ, tmp_path / 'x.pth', folder], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) > 40
    for key, (answer, peak, seconds) in results.items():
        length = (folder / key.rpartition(' ')[0]).stat().st_size
        assert peak < 2 * length + (256 << 20), (key, peak)
        assert seconds < 10, (key, seconds)
        assert answer == 'read' or 'cannot be read' in answer or ' holds ' in answer, (key, answer)
        assert 'memory' not in answer.lower(), (key, answer)
