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

from gmnet_timm.weights.files import CheckpointError, read_checkpoint

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
    'marked as a directory': changed(DATA, central={'attributes': 1 << 4}),
    'named as a directory': zip_of([*records_of(RAW), ('archive/', b'')]),
    'compressed': changed(DATA, central={'method': 8}, local={'method': 8}),
    'compressed in the directory': changed(DATA, central={'method': 8}),
    'encrypted': changed(DATA, central={'flags': 1}, local={'flags': 1}),
    'patched': changed(DATA, central={'flags': 1 << 5}, local={'flags': 1 << 5}),
    'wrong checksum': changed(DATA, central={'crc': 1}, local={'crc': 1}),
    'two checksums': changed(DATA, local={'crc': 1}),
    'two sizes': changed(DATA, central={'size': 4}),
    'shorter in the directory': changed(DATA, central={'size': 4, 'packed': 4}),
    'two names': changed(DATA, local={'name': b'archive/data/9'}),
    'another disk': changed(DATA, central={'disk': 1}),
    'elsewhere': changed(DATA, central={'offset': 0}),
    'wrong descriptor': changed(DATA, descriptor=True, local={'crc': 1, 'flags': 8}),
    'a name twice': craft_zip([*entries(), Entry('archive/data/0', b'')]),
    'a name twice but for its case': craft_zip([*entries(), Entry('archive/DATA/0', b'')]),
    'two folders': craft_zip([*entries(), Entry('other/data/0', b'')]),
    'bytes before': b'#!/bin/sh\n' + RAW,
    'a zip before': zip_of([('a', b'')]) + RAW,
    'bytes after': RAW + b'\0',
    'a comment': craft_zip(entries(), comment=1) + b' ',
    'two files': RAW + OTHER,
    'a damaged one and a good one': flipped(RAW, RAW.index(b'\0\0\x80?')) + OTHER,
    'part of one and a good one': RAW[:len(RAW) // 2] + OTHER,
    'a gap': PLAIN[:DIRECTORY] + b'gap' + PLAIN[DIRECTORY:],
    'several disks': craft_zip(entries(), disk=1),
    'too few entries': craft_zip(entries(), count=3, here=3),
    'too many entries': craft_zip(entries(), count=99, here=99),
    'directory elsewhere': craft_zip(entries(), offset=0),
    'half of it': RAW[:len(RAW) // 2],
    'without its end': RAW[:-1],
    'no records': craft_zip([]),
    'no data.pkl': craft_zip(entries()[1:]),
    'TorchScript': craft_zip([*entries(), Entry('archive/constants.pkl', b'')]),
    'no record of a tensor': craft_zip([e for e in entries() if e.name != 'archive/data/1']),
    'a tensor that is cut off': craft_zip([
        Entry(e.name, e.data[:8] if e.name.endswith(DATA) else e.data) for e in entries()]),
    'a tensor that goes on': craft_zip([
        Entry(e.name, e.data + bytes(8) if e.name.endswith(DATA) else e.data) for e in entries()]),
    'a byte order that is none': craft_zip([
        Entry(e.name, b'middle' if e.name.endswith('byteorder') else e.data) for e in entries()]),
}


# What zipfile reads past, because nothing depends on it: the directory counts, and every checksum is compared.
HARMLESS = {
    'two checksums', 'another disk', 'wrong descriptor', 'bytes after', 'several disks', 'too few entries',
    'too many entries'}


@pytest.mark.parametrize('name', HOSTILE)
def test_damaged_layouts(name, path):
    path.write_bytes(HOSTILE[name])
    if name in HARMLESS:
        assert same(read_checkpoint(path).state_dict, weights())
        return
    with pytest.raises(CheckpointError) as info:
        read_checkpoint(path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)


@pytest.mark.parametrize('name, word', [
    ('marked as a directory', 'marked as a folder'), ('compressed', 'compressed'), ('a name twice', 'twice'),
    ('a name twice but for its case', 'twice'), ('two folders', 'one folder'), ('bytes before', 'no file of torch'),
    ('two files', 'two files in one'), ('no data.pkl', 'data.pkl'), ('TorchScript', 'TorchScript')])
def test_reasons(name, word, path):
    path.write_bytes(HOSTILE[name])
    with pytest.raises(CheckpointError, match=word):
        read_checkpoint(path)


def test_swapped_records(path):
    """Two entries that point at each other's data, with each other's checksums."""
    parts = entries()
    a, b = (next(e for e in parts if e.name.endswith(name)) for name in ('data/0', 'data/3'))
    a.name, b.name = b.name, a.name
    path.write_bytes(craft_zip(parts))
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


SMALL = saved({'norm.weight': torch.arange(1., 4.)})
EVERY_BIT = {
    'torch': SMALL,
    'zip64': craft_zip([Entry(name, data, zip64=True) for name, data in records_of(SMALL)], zip64=True),
    'train.py': saved(run_content()),
}


@pytest.mark.parametrize('name, step', [('torch', 1), ('zip64', 2), ('train.py', 16)])
@pytest.mark.slow
def test_bits_of_the_headers(name, step, path):
    """Each bit of every `step`-th byte of the directory, of the end and of the headers in between.

    An error, or the original tensors.

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
    refused, chosen = 0, sorted(headers)[::step]
    for at in chosen:
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
    assert refused > len(chosen)


def test_every_bit_of_the_data(path):
    for name, data in records_of(RAW):
        for at in range(0, len(data), 3):
            raw = flipped(RAW, RAW.index(data) + at, at % 8)
            path.write_bytes(raw)
            with pytest.raises(CheckpointError, match='CRC'):
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
