"""Damaged and hostile files: an error that says so, and never a crash, a hang, executed code or exhausted memory."""
import builtins
import collections
import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from gmnet_timm import GmNet
from gmnet_timm.checkpoint.architecture import infer_architecture
from gmnet_timm.checkpoint.description import describe_tensors
from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint
from gmnet_timm.checkpoint.writing import save_weights
from gmnet_timm.source import read_source

SUFFIXES = {'hashed': '.safetensors', 'plain': '.safetensors', 'zip': '.pth', 'legacy': '.pth'}
CASES_PER_FORMAT = 600
MAX_SECONDS_PER_CASE = 5
MAX_EXTRA_MEMORY = 300 << 20  # bytes


def tiny_state_dict():
    torch.manual_seed(0)
    return GmNet(base_dim=2, depths=(1, 1), mlp_ratios=(2, 1), stem_chs=2, num_classes=3).state_dict()


def memory(what: str) -> int:
    """Bytes that Linux counts for this process: VmRSS now, VmHWM at most since the last reset."""
    return int(re.search(rf'{what}:\s+(\d+) kB', Path('/proc/self/status').read_text()).group(1)) * 1024


@pytest.fixture(autouse=True)
def bounded_memory():
    try:
        Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    except OSError:
        yield  # no Linux
        return
    before = memory('VmRSS')
    yield
    assert memory('VmHWM') - before < MAX_EXTRA_MEMORY


def read(path):
    """The weights in a file, None if it was refused. Anything but a refusal or usable weights fails the test."""
    start = time.monotonic()
    try:
        state_dict = read_checkpoint(path).state_dict
        infer_architecture(state_dict)
    except CheckpointError as e:
        assert str(e)
        return None
    finally:
        assert time.monotonic() - start < MAX_SECONDS_PER_CASE
    assert all(torch.isfinite(value).all() for value in state_dict.values())
    return state_dict


def refuse(path, *words):
    with pytest.raises(CheckpointError) as info:
        read_source(path)
    for word in words:
        assert word in str(info.value)


def original_file(kind: str, path: Path) -> bytes:
    state_dict = tiny_state_dict()
    if kind == 'hashed':
        save_weights(state_dict, path, describe_tensors(state_dict))
    elif kind == 'plain':
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=kind == 'zip')
    return path.read_bytes()


def damage(raw: bytes, rng: random.Random) -> bytes:
    """One random injury."""
    data = bytearray(raw)
    at = rng.randrange(len(data))
    structure = rng.randrange(min(len(data), 4096)) * rng.choice((1, -1))  # headers and directories are at the ends
    how = rng.choice(['flip'] * 2 + ['flip structure'] * 2 + ['cut', 'overwrite', 'insert', 'remove', 'zero'])
    if how == 'flip':
        data[at] ^= 1 << rng.randrange(8)
    elif how == 'flip structure':
        data[structure] ^= 1 << rng.randrange(8)
    elif how == 'cut':
        del data[at:]
    elif how == 'overwrite':
        data[at:at + 8] = rng.choice((rng.randbytes(8), b'\xff' * 8, struct.pack('<Q', 1 << 62)))
    elif how == 'insert':
        data[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif how == 'remove':
        del data[at:at + rng.randrange(1, 9)]
    else:
        data[at:at + 64] = bytes(len(data[at:at + 64]))
    return bytes(data)


def same(state_dict, other) -> bool:
    return state_dict.keys() == other.keys() and all(
        value.dtype == other[key].dtype and torch.equal(value, other[key]) for key, value in state_dict.items())


@pytest.mark.slow
@pytest.mark.parametrize('kind', SUFFIXES)
def test_random_damage(kind, tmp_path):
    """Where a format has checksums or a recorded hash, whatever still loads is what was written."""
    path = tmp_path / f'checkpoint{SUFFIXES[kind]}'
    raw = original_file(kind, path)
    expected = tiny_state_dict()
    assert same(read(path), expected)
    rng = random.Random(kind)
    refused = 0
    for case in range(CASES_PER_FORMAT):
        path.write_bytes(damage(raw, rng))
        state_dict = read(path)
        if state_dict is None:
            refused += 1
        elif kind in ('hashed', 'zip'):
            assert same(state_dict, expected), f'case {case}'
        else:
            shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (state_dict, expected)]
            assert shapes[0] == shapes[1], f'case {case}'
    assert refused > CASES_PER_FORMAT // 4


@pytest.mark.parametrize('length', [0, 1, 7, 1 << 20, 100_000_001, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_safetensors_header_length(length, tmp_path):
    raw = save(tiny_state_dict())
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', length) + raw[8:])
    refuse(tmp_path / 'x.safetensors')


@pytest.mark.parametrize('change', [
    {'shape': [1 << 40]}, {'shape': [1 << 62, 1 << 62]}, {'shape': [-1]}, {'shape': []}, {'shape': [3, 1]},
    {'dtype': 'F64'}, {'dtype': 'I32'}, {'dtype': 'F8_E4M3'}, {'dtype': 'X'}, {'data_offsets': [0, 1 << 50]},
    {'data_offsets': [8, 0]}, {'data_offsets': [-4, 8]}, {'data_offsets': 'x'},
])
def test_safetensors_entry(change, tmp_path):
    raw = save(tiny_state_dict())
    start = 8 + struct.unpack('<Q', raw[:8])[0]
    header = json.loads(raw[8:start])
    header['head.bias'].update(change)
    text = json.dumps(header).encode()
    (tmp_path / 'x.safetensors').write_bytes(struct.pack('<Q', len(text)) + text + raw[start:])
    refuse(tmp_path / 'x.safetensors')


def legacy_file(obj, storage_elements: int, protocol: int = 2) -> bytes:
    """torch's format before zip files, with one storage that claims a size of its own."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ('storage', torch.FloatStorage, '0', 'cpu', storage_elements, None) if obj == 'STORAGE' else None

    file = io.BytesIO()
    for value in (0x1950a86a20f9469cfc6c, 1001, {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}}):
        pickle.dump(value, file, protocol)
    Pickler(file, protocol).dump(obj)
    pickle.dump(['0'], file, protocol)
    return file.getvalue() + struct.pack('<q', storage_elements) + bytes(64)


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize('elements', [1 << 20, 1 << 33, 10 ** 15, 1 << 62, -1])
def test_huge_storage_in_legacy_pickle(elements, tmp_path):
    size = (max(elements, 1),)
    tensor = Call(torch._utils._rebuild_tensor_v2, 'STORAGE', 0, size, (1,), False, collections.OrderedDict())
    (tmp_path / 'x.pth').write_bytes(legacy_file({'head.bias': tensor}, elements))
    refuse(tmp_path / 'x.pth')


@pytest.mark.parametrize('tail', [
    b'\x8d' + struct.pack('<Q', 1 << 40), b'\x8a\xff', b'\x8b' + struct.pack('<i', 1 << 30), b'B\xff\xff\xff\x7f',
    b'(' * 100_000, b'}' * 100_000 + b'.', b'j\xff\xff\xff\x7f.', b'r\xff\xff\xff\x7f.',
], ids=['unicode', 'long1', 'long4', 'bytes', 'marks', 'dicts', 'get', 'put'])
def test_pickle_that_claims_much(tail, tmp_path):
    (tmp_path / 'x.pth').write_bytes(legacy_file({}, 1)[:40] + b'\x80\x02' + tail)
    refuse(tmp_path / 'x.pth')
    (tmp_path / 'y.pth').write_bytes(b'\x80\x02' + tail)
    refuse(tmp_path / 'y.pth')


def rewrite_zip(path: Path, change, compression=zipfile.ZIP_STORED) -> None:
    """Copy a checkpoint of torch, with what `change(name, data)` makes of its records, and right checksums."""
    torch.save(tiny_state_dict(), path)
    with zipfile.ZipFile(path) as file:
        records = [(info.filename, file.read(info)) for info in file.infolist()]
    with zipfile.ZipFile(path, 'w', compression) as file:
        for name, data in records:
            file.writestr(name, change(name, data))


def test_zip_records(tmp_path):
    """Checksums that are right prove nothing by themselves."""
    path = tmp_path / 'x.pth'
    rewrite_zip(path, lambda name, data: data)
    assert same(read(path), tiny_state_dict())
    rewrite_zip(path, lambda name, data: data[:8] if name.endswith('data/0') else data)
    refuse(path)
    rewrite_zip(path, lambda name, data: bytes(64 << 20) if name.endswith('data/0') else data, zipfile.ZIP_DEFLATED)
    refuse(path, 'compressed')
    rewrite_zip(path, lambda name, data: b'\x80\x02' if name.endswith('data.pkl') else data)
    refuse(path)


def test_overlapping_zip_entries(tmp_path):
    """A hundred entries that share their bytes would read as a hundred times the file."""
    path = tmp_path / 'x.pth'
    with zipfile.ZipFile(path, 'w') as file:
        file.writestr('x/data/0', bytes(1 << 16))
        for i in range(1, 100):
            info = zipfile.ZipInfo(f'x/data/{i}')
            info.header_offset, info.file_size, info.compress_size = 0, 1 << 16, 1 << 16
            info.CRC = file.filelist[0].CRC
            file.filelist.append(info)
    refuse(path, 'does not start where the one before it ends')


@pytest.mark.parametrize('name, value, word', [
    ('norm.weight', torch.zeros(1).expand(1 << 20, 1 << 20), 'claim'),
    ('norm.weight', torch.zeros(4, device='meta'), 'plain'),
    ('norm.weight', torch.zeros(4).to_sparse(), ''),
    ('norm.weight', torch.zeros(4, dtype=torch.int32), 'dtype'),
    ('norm.weight', torch.zeros(4, dtype=torch.complex64), 'dtype'),
    ('norm.weight', torch.zeros(4, dtype=torch.bool), 'dtype'),
    ('norm.weight', torch.zeros(4, dtype=torch.float8_e4m3fn), 'dtype'),
    ('norm.num_batches_tracked', torch.tensor(1.), 'dtype'),
    ('norm.weight', torch.tensor([1, 1, 1, float('nan')]), 'NaN'),
    ('norm.running_var', torch.tensor([1, 1, 1, float('inf')]), 'infinite'),
    ('norm.running_var', torch.tensor([1, 1, 1, -1e-3]), 'Negative'),
    ('head.weight', torch.zeros(()), 'head.weight'),
    ('head.weight', torch.zeros(3), 'head.weight'),
    ('head.weight', torch.zeros(0, 4), 'head.weight'),
    ('stem.0.conv.weight', torch.zeros(0, 3, 3, 3), 'stem.0.conv.weight'),
    ('stages.0.1.f1.conv.weight', torch.zeros(1, 2, 1, 1), ''),
    (f'stages.{"9" * 5000}.1.f1.conv.weight', torch.zeros(1), 'unexpected'),
    ('stages.0.999999.f1.conv.weight', torch.zeros(1), ''),
    ('stages.999999.0.0.conv.weight', torch.zeros(1), ''),
    ('norm.weight', 'a string', 'not tensors'),
    ('norm.weight', None, 'not tensors'),
    (7, torch.zeros(1), ''),
    ((1, 2), torch.zeros(1), ''),
])
def test_unusable_entry(name, value, word, tmp_path):
    state_dict = dict(tiny_state_dict())
    state_dict[name] = value
    torch.save(state_dict, tmp_path / 'x.pth')
    refuse(tmp_path / 'x.pth', word)


@pytest.mark.parametrize('content', [
    [], {}, 3, None, 'x', torch.zeros(3), {'state_dict': None}, {'state_dict': []}, {'model': 3}])
def test_no_state_dict(content, tmp_path):
    torch.save(content, tmp_path / 'x.pth')
    refuse(tmp_path / 'x.pth')


def test_every_wrong_shape(tmp_path):
    """A tensor of another size is never taken, whichever it is."""
    path = tmp_path / 'x.pth'
    for key, value in tiny_state_dict().items():
        wrong = value.new_zeros(2) if value.ndim == 0 else torch.cat([value, value[:1]])
        torch.save({**tiny_state_dict(), key: wrong}, path)
        assert read(path) is None, key


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
            'beside': {'state_dict': tiny_state_dict(), 'optimizer': hostile},
            'inside': {**tiny_state_dict(), 'x': hostile},
            'args': {'args': hostile, **tiny_state_dict()},
        }[place]
        path = tmp_path / 'x.pth'
        torch.save(content, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        refuse(path)
        assert not ran.exists()
        pickle.loads(pickle.dumps(hostile))
        assert ran.exists()
        ran.unlink()


def test_hostile_tar_does_not_run(tmp_path):
    """torch 2.5 unpacks this format with weights_only=True, later ones refuse it; here it is always refused."""
    ran = tmp_path / 'ran'
    none, empty = pickle.dumps(0, protocol=2), pickle.dumps([], protocol=2)
    hostile = pickle.dumps(Call(os.system, f'touch {ran}'), protocol=2)
    with tarfile.open(tmp_path / 'x.pth', 'w') as file:
        for name, data in (('storages', none + empty), ('tensors', none), ('pickle', hostile)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    refuse(tmp_path / 'x.pth', 'tar file')
    assert not ran.exists()


def test_not_a_checkpoint(tmp_path):
    for name in ('x.pth', 'x.safetensors'):
        refuse(tmp_path / name, 'No checkpoint')
        for data in (b'', b'\0', b'PK\x03\x04', b'{}', b'\x80\x02}.', b'<html></html>', bytes(1000)):
            (tmp_path / name).write_bytes(data)
            refuse(tmp_path / name)
