"""The layout of zip files: what torch and zipfile write is read, everything else is refused."""
import contextlib
import io
import struct
import zipfile
import zlib

import pytest
import torch
from checkpoint_files import Entry, craft_zip, records_of, run_content, same, saved, weights, zip_of
from timm.models import load_state_dict

from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint

RAW = saved(weights())
OTHER = saved(weights(5.))


def entries() -> list[Entry]:
    return [Entry(name, data) for name, data in records_of(RAW)]


def changed(name: str, **changes) -> bytes:
    """The checkpoint with one entry that differs: `central`, `local` fields or attributes of `Entry`."""
    parts = entries()
    (entry,) = [entry for entry in parts if entry.name.endswith(name)]
    for key, value in changes.items():
        setattr(entry, key, value)
    return craft_zip(parts)


def flipped(raw: bytes, byte: int, bit: int = 0) -> bytes:
    data = bytearray(raw)
    data[byte] ^= 1 << bit
    return bytes(data)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'x.pth'


def test_layouts_that_are_read(path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, data in records_of(RAW):
            with archive.open(name, 'w', force_zip64=True) as file:
                file.write(data)
    layouts = {
        'torch': RAW,
        'zipfile': zip_of(records_of(RAW)),
        'zipfile with zip64': buffer.getvalue(),
        'crafted': craft_zip(entries()),
        'zip64 at the end': craft_zip(entries(), zip64=True),
        'zip64 all over': craft_zip([Entry(e.name, e.data, zip64=True) for e in entries()], zip64=True),
        'descriptors': craft_zip([Entry(e.name, e.data, descriptor=True) for e in entries()]),
        'both': craft_zip([Entry(e.name, e.data, descriptor=bool(e.data), zip64=True) for e in entries()], zip64=True),
        'padding': craft_zip([Entry(e.name, e.data, local={'extra': b'FB\x03\0ZZZ'}) for e in entries()]),
    }
    for name, raw in layouts.items():
        path.write_bytes(raw)
        checkpoint = read_checkpoint(path)
        assert same(checkpoint.state_dict, weights()), name
        assert checkpoint.protection == 'zip checksums'


@pytest.mark.parametrize('alignment', [1, 64, 4096, 1 << 16])
def test_alignment(alignment, path):
    config = pytest.importorskip('torch.utils.serialization.config')
    if not hasattr(config.save, 'storage_alignment'):
        pytest.skip('this torch has one alignment')
    with config.patch({'save.storage_alignment': alignment}):
        path.write_bytes(saved(weights()))
    assert same(read_checkpoint(path).state_dict, weights())


DATA = 'data/1'
PLAIN = craft_zip(entries())
DIRECTORY = PLAIN.index(b'PK\1\2')

HOSTILE = {
    'marked as a directory': (changed(DATA, central={'attributes': 1 << 4}), 'directory'),
    'named as a directory': (zip_of([*records_of(RAW), ('archive/', b'')]), 'not a file'),
    'compressed': (changed(DATA, central={'method': 8}, local={'method': 8}), 'compressed'),
    'compressed in the directory': (changed(DATA, central={'method': 8}), 'compressed'),
    'encrypted': (changed(DATA, central={'flags': 1}, local={'flags': 1}), 'encrypted'),
    'patched': (changed(DATA, central={'flags': 1 << 5}, local={'flags': 1 << 5}), 'encrypted'),
    'wrong checksum': (changed(DATA, central={'crc': 1}, local={'crc': 1}), 'checksum'),
    'two checksums': (changed(DATA, local={'crc': 1}), 'not what the directory says'),
    'two sizes': (changed(DATA, central={'size': 4}), 'two sizes'),
    'shorter in the directory': (changed(DATA, central={'size': 4, 'packed': 4}), 'not what the directory says'),
    'two names': (changed(DATA, local={'name': b'archive/data/9'}), 'not what the directory says'),
    'another disk': (changed(DATA, central={'disk': 1}), 'damaged'),
    'elsewhere': (changed(DATA, central={'offset': 0}), 'does not start where the one before it ends'),
    'wrong descriptor': (changed(DATA, descriptor=True, local={'crc': 1, 'flags': 8}), 'not what the directory says'),
    'a name twice': (craft_zip([*entries(), Entry('archive/data/0', b'')]), 'twice'),
    'a name twice but for its case': (craft_zip([*entries(), Entry('archive/DATA/0', b'')]), 'twice'),
    'two folders': (craft_zip([*entries(), Entry('other/data/0', b'')]), 'one folder'),
    'bytes before': (b'#!/bin/sh\n' + RAW, 'no file of torch'),
    'a zip before': (zip_of([('a', b'')]) + RAW, 'parts of two files'),
    'bytes after': (RAW + b'\0', 'does not end like one'),
    'a comment': (craft_zip(entries(), comment=1) + b' ', 'does not end like one'),
    'two files': (RAW + OTHER, 'parts of two files'),
    'a damaged one and a good one': (flipped(RAW, RAW.index(b'\0\0\x80?')) + OTHER, 'parts of two files'),
    'part of one and a good one': (RAW[:len(RAW) // 2] + OTHER, 'parts of two files'),
    'a gap': (PLAIN[:DIRECTORY] + b'gap' + PLAIN[DIRECTORY:], 'parts of two files'),
    'several disks': (craft_zip(entries(), disk=1), 'parts of two files'),
    'too few entries': (craft_zip(entries(), count=3, here=3), 'does not cover the file'),
    'too many entries': (craft_zip(entries(), count=99, here=99), 'cut off'),
    'directory elsewhere': (craft_zip(entries(), offset=0), 'parts of two files'),
    'half of it': (RAW[:len(RAW) // 2], 'does not end like one'),
    'without its end': (RAW[:-1], 'does not end like one'),
    'no records': (craft_zip([]), 'no file of torch'),
    'no data.pkl': (craft_zip(entries()[1:]), 'data.pkl'),
    'TorchScript': (craft_zip([*entries(), Entry('archive/constants.pkl', b'')]), 'TorchScript'),
    'no record of a tensor': (craft_zip([e for e in entries() if e.name != 'archive/data/1']), 'data/1'),
    'a tensor that is cut off': (craft_zip([
        Entry(e.name, e.data[:8] if e.name.endswith(DATA) else e.data) for e in entries()]), 'data/1'),
    'a tensor that goes on': (craft_zip([
        Entry(e.name, e.data + bytes(8) if e.name.endswith(DATA) else e.data) for e in entries()]), 'data/1'),
    'a byte order that is none': (craft_zip([
        Entry(e.name, b'middle' if e.name.endswith('byteorder') else e.data) for e in entries()]), 'byte order'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_layouts_that_are_refused(name, path):
    raw, word = HOSTILE[name]
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=word) as info:
        read_checkpoint(path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)


def test_swapped_records(path):
    """Two entries that point at each other's data, with each other's checksums."""
    parts = entries()
    a, b = (next(e for e in parts if e.name.endswith(name)) for name in ('data/0', 'data/3'))
    a.name, b.name = b.name, a.name
    path.write_bytes(craft_zip(parts))
    with pytest.raises(CheckpointError, match='size of its record'):
        read_checkpoint(path)


SMALL = saved({'norm.weight': torch.arange(1., 4.)})
EVERY_BIT = {
    'torch': SMALL,
    'zip64': craft_zip([Entry(name, data, zip64=True) for name, data in records_of(SMALL)], zip64=True),
    'train.py': saved(run_content()),
}


@pytest.mark.parametrize('name', [
    'torch', pytest.param('zip64', marks=pytest.mark.slow), pytest.param('train.py', marks=pytest.mark.slow)])
def test_every_bit_of_the_headers(name, path):
    """Each bit of the directory, of the end and of the headers in between: an error, or the original tensors.

    Of what passes, timm reads no other tensors either: weights that were checked here may be loaded there.
    """
    raw = EVERY_BIT[name]
    path.write_bytes(raw)
    expected = read_checkpoint(path).state_dict
    headers = set(range(len(raw)))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        for info in archive.infolist():
            start = info.header_offset + 30 + sum(struct.unpack_from('<2H', raw, info.header_offset + 26))
            headers -= set(range(start, start + info.file_size))
    assert len(headers) > len(raw) // 4
    refused = 0
    for at in sorted(headers):
        for bit in range(8):
            path.unlink()  # some file systems take long to write over a file
            path.write_bytes(flipped(raw, at, bit))
            try:
                state_dict = read_checkpoint(path).state_dict
            except CheckpointError:
                refused += 1
            else:
                assert same(state_dict, expected), (at, bit)
                with contextlib.suppress(RuntimeError):
                    assert same(load_state_dict(str(path)), expected), (at, bit)
    assert refused > len(headers)


def test_every_bit_of_the_data(path):
    for name, data in records_of(RAW):
        for at in range(0, len(data), 3):
            raw = flipped(RAW, RAW.index(data) + at, at % 8)
            path.write_bytes(raw)
            with pytest.raises(CheckpointError, match='checksum'):
                read_checkpoint(path)
            assert zlib.crc32(raw) != zlib.crc32(RAW), name


def test_big_endian(path):
    """torch writes the byte order of its machine."""
    def swapped(name: str, data: bytes) -> bytes:
        if name.endswith('byteorder'):
            return b'big'
        if '/data/' not in name:
            return data
        width = dict(zip('01234', [4, 2, 2, 8, 8])).get(name[-1], 4)
        return b''.join(data[i:i + width][::-1] for i in range(0, len(data), width))

    path.write_bytes(zip_of([(name, swapped(name, data)) for name, data in records_of(RAW)]))
    assert same(torch.load(path, weights_only=True), weights())
    assert same(read_checkpoint(path).state_dict, weights())


def test_train_py_in_a_zip(path):
    path.write_bytes(saved(run_content()))
    assert same(read_checkpoint(path).state_dict, weights(1.))
