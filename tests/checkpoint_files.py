"""Checkpoint files as torch does not write them: parts of its formats put together by hand, right or wrong."""
import argparse
import collections
import io
import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass, field

import torch

from gmnet_timm.weights.convert import save_weights
from gmnet_timm.weights.description import ModelDescription

LEGACY_HEAD = (0x1950A86A20F9469CFC6C, 1001, {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}})


def weights(offset: float = 0.) -> collections.OrderedDict:
    """Tensors of all sorts that a state dict can have: dtypes, views, strides, shared memory, none or one element."""
    t = torch.arange(24.).reshape(2, 3, 4) + offset
    return collections.OrderedDict(
        a=t,
        b=t.half()[:, 1:],
        c=t.bfloat16().transpose(0, 2),
        d=t.double()[0, :, ::2],
        num_batches_tracked=torch.tensor(7),
        tied=t[1],
        e=torch.empty(0, 3),
    )


def plain_weights(offset: float = 0.) -> dict:
    """Those that every version of safetensors takes: contiguous, with elements, and with memory of their own."""
    return {key: value.clone(memory_format=torch.contiguous_format)
            for key, value in weights(offset).items() if value.numel()}


def run_content() -> dict:
    """What train.py of timm saves, in small."""
    exp_avg = torch.full((3,), 0.5)
    return {
        'epoch': 3,
        'arch': 'gmnet_s1',
        'state_dict': weights(),
        'state_dict_ema': weights(1.),
        'args': argparse.Namespace(
            model='gmnet_s1', lr=1e-3, mean=(0.5, 0.5), bce=None, amp=True, i=-5, seed=1 << 40, name='größer', opt=[]),
        'metric': 71.25,
        'optimizer': {'state': {0: {'step': torch.tensor(3.), 'exp_avg': exp_avg}}, 'param_groups': [{'lr': 0.1}]},
        'amp_scaler': {'scale': 65536., 'growth_factor': 2.0},
        'saver': {'checkpoint_files': [('checkpoint-3.pth.tar', 71.25)], 'pending': (3, 71.25)},
        'version': 2,
    }


def saved(content, zipped: bool = True) -> bytes:
    """A file of `torch.save`."""
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def same(state_dict: dict, other: dict) -> bool:
    """Whether tensors are the same bit for bit."""
    return state_dict.keys() == other.keys() and all(
        value.dtype == other[key].dtype and torch.equal(value, other[key]) for key, value in state_dict.items())


class Call:
    """Pickles to the call of a function."""

    def __init__(self, function, *args):
        self.reduced = (function, args)

    def __reduce__(self):
        return self.reduced


class Persistent:
    """Pickles to a persistent id, which is how torch refers to storages."""

    def __init__(self, *pid):
        self.pid = pid


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Persistent) else None


def pickled(obj, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    _Pickler(file, protocol).dump(obj)
    return file.getvalue()


def storage(numel: int, key: str = '0', kind=torch.FloatStorage, *, view: tuple = ()) -> Persistent:
    return Persistent('storage', kind, key, 'cpu', numel, *view)


def tensor(numel: int, size: tuple, stride: tuple, offset: int = 0, **kwargs) -> Call:
    """A tensor as torch pickles it, with a storage of `numel` elements."""
    hooks = collections.OrderedDict()
    return Call(torch._utils._rebuild_tensor_v2, storage(numel, **kwargs), offset, size, stride, False, hooks)


def legacy_file(pickle_bytes: bytes, data: bytes = b'', keys: tuple = (), itemsize: int = 4) -> bytes:
    """torch's format before zip files, around any pickle; `data` is one storage, if there are keys."""
    head = b''.join(pickled(value) for value in LEGACY_HEAD)
    storages = struct.pack('<q', len(data) // itemsize) + data if keys else b''
    return head + pickle_bytes + pickled(list(keys)) + storages


def zip_file(pickle_bytes: bytes, *data: bytes) -> bytes:
    """torch's zip format around any pickle, with right checksums; `data` are the storages 0, 1 and so on."""
    return zip_of([('x/data.pkl', pickle_bytes), *((f'x/data/{i}', record) for i, record in enumerate(data))])


def zip_of(records) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as archive:
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(name), data)
    return file.getvalue()


def records_of(raw: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


@dataclass
class Entry:
    """An entry of a zip file, with headers that may lie: `central` and `local` replace fields of what is true."""

    name: str
    data: bytes
    central: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)
    descriptor: bool = False
    zip64: bool = False


def craft_zip(entries: list[Entry], zip64: bool = False, **end) -> bytes:
    """A zip file from its parts; `end` replaces fields of the record at its end."""
    body, directory = b'', b''
    for entry in entries:
        true = dict(
            name=entry.name.encode(), flags=8 if entry.descriptor else 0, method=0, crc=zlib.crc32(entry.data),
            packed=len(entry.data), size=len(entry.data), disk=0, attributes=0, offset=len(body), extra=b'')
        central, local = {**true, **entry.central}, {**true, **entry.local}
        directory += _central(central, entry.zip64)
        body += _local(local, entry.descriptor, entry.zip64) + entry.data
        if entry.descriptor:
            sizes = (local['crc'], local['packed'], local['size'])
            body += struct.pack('<4sI2Q' if entry.zip64 else '<4s3I', b'PK\7\x08', *sizes)
    fields = {**dict(
        count=len(entries), here=len(entries), size=len(directory), offset=len(body), disk=0, start_disk=0), **end}
    return body + directory + _end(fields, len(body) + len(directory), zip64)


def _central(f: dict, zip64: bool) -> bytes:
    sizes = [f['packed'], f['size'], f['offset']]
    extra = f['extra']
    if zip64:
        extra += struct.pack('<2H3Q', 1, 24, f['size'], f['packed'], f['offset'])
        sizes = [0xFFFFFFFF] * 3
    return struct.pack(
        '<4s6H3I5H2I', b'PK\1\2', 0, 0, f['flags'], f['method'], 0, 0, f['crc'], sizes[0], sizes[1], len(f['name']),
        len(extra), 0, f['disk'], 0, f['attributes'], sizes[2]) + f['name'] + extra


def _local(f: dict, descriptor: bool, zip64: bool) -> bytes:
    values, extra = (f['crc'], f['packed'], f['size']), f['extra']
    if descriptor:
        values = (0, 0, 0)
    elif zip64:
        extra += struct.pack('<2H2Q', 1, 16, f['size'], f['packed'])
        values = (f['crc'], 0xFFFFFFFF, 0xFFFFFFFF)
    return struct.pack(
        '<4s5H3I2H', b'PK\3\4', 0, f['flags'], f['method'], 0, 0, *values, len(f['name']), len(extra),
    ) + f['name'] + extra


def _end(f: dict, position: int, zip64: bool) -> bytes:
    values = [f[key] for key in ('disk', 'start_disk', 'here', 'count', 'size', 'offset')]
    head = b''
    if zip64:
        head = struct.pack('<4sQ2H2I4Q', b'PK\6\6', 44, 45, 45, *values)
        head += struct.pack('<4sIQI', b'PK\6\7', 0, position, 1)
        values = [0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF]
    return head + struct.pack('<4s4H2IH', b'PK\5\6', *values, f.get('comment', 0))


def save_hashed(state_dict, path, force: bool = False) -> None:
    """A safetensors file with a recorded hash, as this package writes it."""
    save_weights(state_dict, path, ModelDescription('gmnet_s1', {}), force=force)
