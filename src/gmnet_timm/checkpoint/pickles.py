"""What does the pickle in a checkpoint say? It is read as data: nothing that it names is imported or called.

`torch.load(weights_only=True)` calls the functions on its list with whatever arguments a pickle has, so a small file
can ask for any amount of memory (`bytearray(3_000_000_000)`, a tensor larger than its storage). Here the same opcodes
and names are understood, tensors are descriptions of where their bytes lie, and what a pickle may take is bounded.
"""
import argparse
import dataclasses
import pickletools
import sys
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch

from gmnet_timm.checkpoint.integrity import DamageError

__all__ = ['ForeignPickleError', 'Storage', 'StoredTensor', 'Unread', 'unpickle']

MAX_OBJECT_BYTES = 96 << 20  # those of the largest models of timm with optimizer and EMA weights take about a third

_OPCODE_BYTES = 48  # what each opcode is charged: a place on the stack or in a list, and its time
_ITEM_BYTES = 112  # an entry of a dictionary
_SLOW_KEY_BYTES = 10_000  # a key with a hash that collisions can be made for; few of them take no time
_MAX_INT = 1 << 31
_MAX_DIMS = 64  # as in torch

_STORAGE_DTYPES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128,
    'UntypedStorage': torch.uint8,
}


class ForeignPickleError(DamageError):
    """A pickle that is not that of a checkpoint and may run code when it is loaded."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bytes of one or several tensors, `nbytes` from `start` on in the stored ones named `key`."""

    key: str
    dtype: torch.dtype
    stored_nbytes: int
    start: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor by where its bytes lie; offset and strides count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Unread:
    """An object that torch would load and that weights have no use for, such as a sparse tensor or a layout."""

    what: str


@dataclasses.dataclass(frozen=True)
class _Name:
    """A global that the pickle names."""

    name: str


def unpickle(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """Read one pickle, up to its end.

    Args:
        stream: Where it is read from, at its position.
        storages: Takes the storages that the pickle refers to, whole, by key. There can be none if it is None.

    Returns:
        Numbers, strings, lists, dictionaries, `argparse.Namespace` and so on, `StoredTensor` for tensors.

    Raises:
        DamageError: It asks for too much, or contradicts itself.
        ForeignPickleError: It needs what checkpoints do not need.
        Exception: Almost any other, for a damaged pickle.
    """
    return _Unpickler(storages).load(stream)


class _Unpickler:
    """The stack machine of pickle, with one method per opcode that torch reads: protocol 2, and nothing else."""

    def __init__(self, storages: dict[str, Storage] | None):
        self.storages = storages
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.left = MAX_OBJECT_BYTES

    def load(self, stream: BinaryIO) -> Any:
        for opcode, arg, _ in pickletools.genops(stream):
            if opcode.name == 'STOP':
                return self.stack.pop()
            run = _OPCODES.get(opcode.name)
            if run is None:
                raise ForeignPickleError(f'It uses {opcode.name}, which checkpoints do not')
            self.charge(_OPCODE_BYTES)
            run(self, arg)
        raise DamageError('It is cut off')

    def charge(self, nbytes: int) -> None:
        self.left -= nbytes
        if self.left < 0:
            raise DamageError(f'Its pickle asks for more than {MAX_OBJECT_BYTES >> 20} MB besides the tensors')

    def push(self, value: Any) -> None:
        self.charge(sys.getsizeof(value))
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _: None) -> None:
        self.charge(sys.getsizeof([]))
        self.marked.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.charge(_ITEM_BYTES)
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def make_tuple(self, _: None) -> None:
        self.push(tuple(self.pop_to_mark()))

    def tuple_of(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.push(tuple(reversed(items)))

    def append(self, _: None) -> None:
        item = self.stack.pop()
        self.extend([item])

    def appends(self, _: None) -> None:
        self.extend(self.pop_to_mark())

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ForeignPickleError('It appends to something other than a list')
        self.stack[-1].extend(items)

    def setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.update([(key, value)])

    def setitems(self, _: None) -> None:
        items = self.pop_to_mark()
        self.update(zip(items[::2], items[1::2], strict=True))

    def update(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise ForeignPickleError('It sets items of something other than a dictionary')
        self.stack[-1].update(self.checked_items(pairs))

    def checked_items(self, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
        items = {}
        for key, value in pairs:
            self.charge(_ITEM_BYTES)
            self.check_key(key)
            items[key] = value
        return items

    def check_key(self, key: Any) -> None:
        """Refuse keys that take long to hash, or many of which can be made to collide."""
        if isinstance(key, (str, bytes, type(None))) or (isinstance(key, int) and abs(key) < _MAX_INT):
            return
        parts = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, (str, bytes, int, float, type(None))) for part in parts):
            raise ForeignPickleError('It has unusual keys in a dictionary')
        self.charge(_SLOW_KEY_BYTES * (1 + len(parts)))

    def name(self, arg: str) -> None:
        module, _, name = arg.partition(' ')
        full = f'{_RENAMED.get(module, module)}.{name}'
        dtype = vars(torch).get(name) if module == 'torch' else None
        if isinstance(dtype, torch.dtype):
            self.stack.append(dtype)
        elif full in _CALLS or full in _UNREAD or (full.startswith('torch.') and name.endswith(('Storage', 'Tensor'))):
            self.push(_Name(full))
        else:
            raise ForeignPickleError(f'It asks for {full[:200]!r}')

    def reduce(self, _: None) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.call(function, args))

    def call(self, function: Any, args: Any) -> Any:
        """What a call of the pickle stands for."""
        if not isinstance(function, _Name) or not isinstance(args, tuple):
            raise ForeignPickleError('It calls something that is not a function')
        if function.name not in _CALLS:
            return Unread(function.name)
        try:
            return _CALLS[function.name](self, *args)
        except (TypeError, ValueError) as e:
            if isinstance(e, DamageError):
                raise
            raise DamageError(f'It calls {function.name} with arguments that checkpoints do not have') from e

    def build(self, _: None) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, argparse.Namespace) and isinstance(state, dict):
            if not all(isinstance(key, str) for key in state):
                raise ForeignPickleError('It sets attributes without names')
            vars(instance).update(self.checked_items(state.items()))
        elif not isinstance(instance, (dict, StoredTensor, Unread)):  # attributes of these are left out
            raise ForeignPickleError('It sets attributes of something that has none')

    def storage(self, _: None) -> None:
        what, kind, key, _, numel, *view = self.stack.pop()
        if what != 'storage' or self.storages is None or not isinstance(kind, _Name):
            raise ForeignPickleError('It refers to something other than tensors')
        dtype = _STORAGE_DTYPES.get(kind.name.rpartition('.')[2])
        if dtype is None:
            self.push(Unread(kind.name))
            return
        nbytes = _count(numel) * dtype.itemsize
        whole = Storage(key, dtype, nbytes, 0, nbytes)
        if not isinstance(key, str) or self.storages.setdefault(key, whole) != whole:
            raise DamageError('It contradicts itself on the size of a tensor')
        self.charge(_ITEM_BYTES)
        self.push(_view(whole, *view[0]) if view and view[0] is not None else whole)


def _view(storage: Storage, key: str, offset: int, numel: int) -> Storage:
    """Part of a storage, in files of torch before 0.4."""
    start, nbytes = _count(offset) * storage.dtype.itemsize, _count(numel) * storage.dtype.itemsize
    if start + nbytes > storage.nbytes:
        raise DamageError('It has a view that is larger than what it looks at')
    return Storage(storage.key, storage.dtype, storage.stored_nbytes, start, nbytes)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise DamageError('It has a size that is not a number')
    return value


def _tensor(
        machine: _Unpickler,
        storage: Storage | Unread,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        hooks: Any = None,
        metadata: Any = None,
        dtype: torch.dtype | None = None,
) -> StoredTensor | Unread:
    if isinstance(storage, Unread) or metadata:  # metadata: values that are negated or conjugate when they are read
        return Unread('a tensor that is not plain')
    if not isinstance(storage, Storage):
        raise TypeError
    dtype = dtype or storage.dtype
    counts = [_count(value) for value in (offset, *size, *stride)]
    machine.charge(sys.getsizeof(counts))
    if len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise DamageError('It has a tensor with an impossible shape')
    end = offset + sum((n - 1) * step for n, step in zip(size, stride)) + 1 if 0 not in size else 0
    if end * dtype.itemsize > storage.nbytes:
        raise DamageError('It has a tensor that is larger than its storage')
    return StoredTensor(storage, dtype, offset, tuple(size), tuple(stride))


def _tensor_v3(machine, storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> Any:
    if not isinstance(dtype, torch.dtype):
        raise TypeError
    return _tensor(machine, storage, offset, size, stride, metadata=metadata, dtype=dtype)


def _first(machine: _Unpickler, tensor: Any, *_: Any) -> Any:
    """Parameters and subclasses: the tensor in them."""
    return tensor


def _from_cpu_tensor(machine: _Unpickler, tensor: Any, dtype: Any, *_: Any) -> Any:
    return tensor if getattr(tensor, 'dtype', None) == dtype else Unread('a tensor of another device')


def _mapping(machine: _Unpickler, items: Any = ()) -> dict[Any, Any]:
    return machine.checked_items(items.items() if isinstance(items, dict) else items)


def _set(machine: _Unpickler, items: Any = ()) -> set[Any]:
    return set(machine.checked_items((item, None) for item in items))


def _bytes(machine: _Unpickler, text: str, encoding: str) -> Any:
    if not isinstance(text, str) or encoding not in ('latin1', 'latin-1'):
        raise TypeError
    machine.charge(len(text))
    return text.encode('latin1')


def _bytearray(machine: _Unpickler, data: bytes = b'') -> bytearray:
    if not isinstance(data, bytes):
        raise TypeError
    machine.charge(len(data))
    return bytearray(data)


def _size(machine: _Unpickler, sizes: tuple[int, ...] = ()) -> tuple[int, ...]:
    if not isinstance(sizes, tuple):
        raise TypeError
    return sizes


def _device(machine: _Unpickler, kind: str, index: int | None = None) -> torch.device:
    if not isinstance(kind, str):
        raise TypeError
    try:
        return torch.device(kind) if index is None else torch.device(kind, index)
    except RuntimeError as e:
        raise ValueError from e


def _complex(machine: _Unpickler, real: float, imaginary: float) -> complex:
    return complex(real, imaginary)


def _from_type(machine: _Unpickler, function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A subclass of tensors, or a tensor with attributes."""
    return machine.call(function, args)


_OPCODES: dict[str, Callable[[_Unpickler, Any], None]] = {
    'PROTO': lambda machine, arg: None,
    'MARK': _Unpickler.mark,
    **dict.fromkeys(('BINPUT', 'LONG_BINPUT'), _Unpickler.put),
    **dict.fromkeys(('BINGET', 'LONG_BINGET'), _Unpickler.get),
    **dict.fromkeys(
        ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINSTRING'), _Unpickler.push),
    'NONE': lambda machine, arg: machine.stack.append(None),
    'NEWTRUE': lambda machine, arg: machine.stack.append(True),
    'NEWFALSE': lambda machine, arg: machine.stack.append(False),
    'EMPTY_TUPLE': lambda machine, arg: machine.stack.append(()),
    'EMPTY_LIST': lambda machine, arg: machine.push([]),
    'EMPTY_DICT': lambda machine, arg: machine.push({}),
    'EMPTY_SET': lambda machine, arg: machine.push(set()),
    'TUPLE': _Unpickler.make_tuple,
    'TUPLE1': lambda machine, arg: machine.tuple_of(1),
    'TUPLE2': lambda machine, arg: machine.tuple_of(2),
    'TUPLE3': lambda machine, arg: machine.tuple_of(3),
    'APPEND': _Unpickler.append,
    'APPENDS': _Unpickler.appends,
    'SETITEM': _Unpickler.setitem,
    'SETITEMS': _Unpickler.setitems,
    'GLOBAL': _Unpickler.name,
    'REDUCE': _Unpickler.reduce,
    'NEWOBJ': _Unpickler.reduce,
    'BUILD': _Unpickler.build,
    'BINPERSID': _Unpickler.storage,
}

_CALLS: dict[str, Callable[..., Any]] = {
    'argparse.Namespace': lambda machine: argparse.Namespace(),
    'collections.OrderedDict': _mapping,
    'collections.Counter': _mapping,
    'builtins.set': _set,
    'builtins.complex': _complex,
    'builtins.bytearray': _bytearray,
    '_codecs.encode': _bytes,
    'torch.Size': _size,
    'torch.device': _device,
    'torch.nn.parameter.Parameter': _first,
    'torch._utils._rebuild_parameter': _first,
    'torch._utils._rebuild_parameter_with_state': _first,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3,
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': _from_cpu_tensor,
    'torch._tensor._rebuild_from_type_v2': _from_type,
}

_UNREAD = {
    *(f'torch._utils._rebuild_{what}' for what in (
        'qtensor', 'sparse_tensor', 'meta_tensor_no_storage', 'nested_tensor', 'wrapper_subclass',
        'device_tensor_from_numpy')),
    *(f'torch.per_{what}' for what in (
        'tensor_affine', 'tensor_symmetric', 'channel_affine', 'channel_symmetric', 'channel_affine_float_qparams')),
    'torch.serialization._get_layout',
}

_RENAMED = {'__builtin__': 'builtins'}  # Python 2's names, which protocol 2 uses
