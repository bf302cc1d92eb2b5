"""Where does a zip checkpoint keep its records, and is every byte of it accounted for?

Readers of zip files disagree about files that are not what they seem: two files in one, names that occur twice,
entries that are marked as directories. So this reads only what `torch.save` and Python's zipfile write: entries that
lie side by side from the first byte to the directory, in its order, and a directory that reaches to the end.
"""
import dataclasses
import struct
import zlib
from collections.abc import Callable

from gmnet_timm.checkpoint.integrity import DamageError

__all__ = ['MAGIC', 'Read', 'Record', 'check_crc', 'zip_records']

MAGIC = b'PK\x03\x04'

Read = Callable[[int, int], memoryview]  # the bytes of a file from a position on; raises DamageError beyond its end

_LOCAL = struct.Struct('<4s5H3I2H')
_CENTRAL = struct.Struct('<4s6H3I5H2I')
_END = struct.Struct('<4s4H2IH')
_END64 = struct.Struct('<4sQ2H2I4Q')
_LOCATOR64 = struct.Struct('<4sIQI')
_NARROW = 0xFFFFFFFF  # the value of a field that is too small for its number, which a zip64 field has then

_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11  # the flags that `torch.save` and zipfile set
_DIRECTORY = 1 << 4  # of the external attributes; torch reads nothing from an entry that has it
_TWO_FILES = 'Its end does not fit its beginning, as if parts of two files were in it: copy or download it again'
_MAX_ENTRIES = 100_000  # there is one per tensor; this bounds the memory that a directory takes


@dataclasses.dataclass(frozen=True)
class Record:
    """The bytes of one entry."""

    start: int
    size: int
    crc: int


@dataclasses.dataclass(frozen=True)
class _Entry:
    name: bytes
    flags: int
    crc: int
    size: int
    offset: int


def zip_records(read: Read, size: int) -> dict[str, Record]:
    """The records of a zip file, by name.

    Args:
        read: Gives the bytes of the file.
        size: Size of the file in bytes.

    Raises:
        DamageError: The file is not laid out as `torch.save` and zipfile do it, or headers contradict each other.
    """
    count, start, end = _find_directory(read, size)
    directory = read(start, end - start)
    records: dict[str, Record] = {}
    position = at = 0  # in the file, and in its directory
    for _ in range(count):
        entry, at = _central_entry(directory, at)
        name = _checked_name(entry, records)
        if entry.offset != position:
            raise DamageError(f'Its zip entry {name!r} does not start where the one before it ends')
        data = _data_start(read, entry)
        records[name] = Record(data, entry.size, entry.crc)
        position = data + entry.size + _descriptor_size(read, entry, data + entry.size)
    if at != len(directory) or position != start:
        raise DamageError('Its zip directory does not cover the file')
    if len({name.lower() for name in records}) != count:  # torch does not tell lower from upper case
        raise DamageError('Its zip directory has a name twice')
    return records


def check_crc(read: Read, name: str, record: Record) -> None:
    """Compare the bytes of a record with its checksum.

    Raises:
        DamageError: They differ.
    """
    if zlib.crc32(read(record.start, record.size)) != record.crc:
        raise DamageError(f'The checksum of {name!r} in it is wrong')


def _find_directory(read: Read, size: int) -> tuple[int, int, int]:
    """Number of entries, start and end of the central directory."""
    end = size - _END.size
    signature, *narrow, comment = _END.unpack(read(end, _END.size))
    if signature != b'PK\x05\x06' or comment:
        raise DamageError('It starts like a zip file and does not end like one: copy or download it again')
    fields = narrow
    if end >= _LOCATOR64.size and read(end - _LOCATOR64.size, 4) == b'PK\x06\x07':
        end -= _LOCATOR64.size
        locator = _LOCATOR64.unpack(read(end, _LOCATOR64.size))
        end -= _END64.size
        signature, length, _, _, *fields = _END64.unpack(read(end, _END64.size))
        agree = all(n in (wide, 0xFFFF, _NARROW) for n, wide in zip(narrow, fields, strict=True))
        if locator[1:] != (0, end, 1) or signature != b'PK\x06\x06' or length != _END64.size - 12 or not agree:
            raise DamageError(_TWO_FILES)
    *disks, here, count, length, start = fields
    if any(disks) or here != count or start + length != end:
        raise DamageError(_TWO_FILES)
    if count > _MAX_ENTRIES:
        raise DamageError(f'Its zip directory has {count:,} entries, more than the {_MAX_ENTRIES:,} that are read')
    return count, start, end


def _central_entry(directory: memoryview, at: int) -> tuple[_Entry, int]:
    """The entry of the central directory at a position, and the position after it."""
    if at + _CENTRAL.size > len(directory):
        raise DamageError('Its zip directory is cut off')
    (signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, disk, _,
     attributes, offset) = _CENTRAL.unpack_from(directory, at)
    if signature != b'PK\x01\x02' or disk:
        raise DamageError('Its zip directory is damaged')
    name_start = at + _CENTRAL.size
    extra_start = name_start + name_length
    name = bytes(directory[name_start:extra_start])
    extra = directory[extra_start:extra_start + extra_length]
    if method or flags & ~(_DESCRIPTOR | _UTF8):
        raise DamageError('Its zip entries are compressed or encrypted, which torch.save never does')
    if attributes & _DIRECTORY:
        raise DamageError(f'Its zip entry {name!r} is marked as a directory')
    size, packed, offset = _widen((size, packed, offset), extra)
    if size != packed:
        raise DamageError(f'Its zip entry {name!r} has two sizes')
    return _Entry(name, flags, crc, size, offset), extra_start + extra_length + comment_length


def _checked_name(entry: _Entry, seen: dict[str, Record]) -> str:
    try:
        name = entry.name.decode()
    except UnicodeDecodeError:
        raise DamageError(f'Its zip entry {entry.name!r} has a damaged name') from None
    if not name or '\0' in name or name.endswith(('/', '\\')):
        raise DamageError(f'Its zip entry {name!r} is not a file')
    if name in seen:
        raise DamageError(f'Its zip directory has {name!r} twice')
    return name


def _data_start(read: Read, entry: _Entry) -> int:
    """Where the data of an entry starts, if the header before it says the same as the directory."""
    (signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length) = _LOCAL.unpack(
        read(entry.offset, _LOCAL.size))
    name_start = entry.offset + _LOCAL.size
    start = name_start + name_length + extra_length
    extra = read(name_start + name_length, extra_length)
    expected = {(entry.crc, entry.size, entry.size)}
    if flags & _DESCRIPTOR:  # then they follow the data
        expected |= {(0, 0, 0), (0, _NARROW, _NARROW)}
    else:
        size, packed = _widen((size, packed), extra)
    same = (signature, flags, method, bytes(read(name_start, name_length))) == (MAGIC, entry.flags, 0, entry.name)
    if not same or (crc, packed, size) not in expected:
        raise DamageError(f'The header of its zip entry {entry.name!r} is not what the directory says')
    return start


def _descriptor_size(read: Read, entry: _Entry, at: int) -> int:
    """Bytes that follow the data of an entry, if they say the same as the directory."""
    if not entry.flags & _DESCRIPTOR:
        return 0
    expected = (b'PK\x07\x08', entry.crc, entry.size, entry.size)
    for layout in (struct.Struct('<4s3I'), struct.Struct('<4sI2Q')):
        if layout.unpack(read(at, layout.size)) == expected:
            return layout.size
    raise DamageError(f'What follows its zip entry {entry.name!r} is not what the directory says')


def _widen(values: tuple[int, ...], extra: memoryview) -> list[int]:
    """Sizes and offsets, those that do not fit into 32 bits taken from the zip64 field."""
    wide: list[int] = []
    at = 0
    while _NARROW in values and at + 4 <= len(extra):
        tag, length = struct.unpack_from('<2H', extra, at)
        if tag == 1:
            wide = list(struct.unpack(f'<{length // 8}Q', extra[at + 4:at + 4 + length // 8 * 8]))
        at += 4 + length
    if len(wide) < values.count(_NARROW):
        raise DamageError('Its zip directory lacks sizes')
    return [wide.pop(0) if value == _NARROW else value for value in values]
