"""Follows a forward pass: which module runs, what is multiplied with what, and where in the image a feature lies.

Positions are followed by computation, not guessed from shapes. Beside each tensor runs another one of its shape, whose
entries are the rows and columns of the image that they stand for (row + i column). What moves data, such as a
permutation or a window partition, moves the positions the same way. What maps channels (a linear layer, a 1x1
convolution) hands them on, what shrinks or enlarges maps interpolates them, and what mixes positions without an order
(a matrix over tokens) loses them. Attention hands on those of its queries. Where positions end up tells the layout of a
tensor: maps with channels first or last, tokens with or without prefix, or windows.
"""
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from gmnet_timm.errors import UserError

__all__ = ['Layout', 'Product', 'Trace', 'first_tensor', 'stated_layout', 'trace', 'watch_modules']

_UNKNOWN = complex(math.nan, math.nan)
_MOVES = {
    'view', '_unsafe_view', 'reshape', '_reshape_alias', 'permute', 'transpose', 't', 'expand', 'unsqueeze', 'squeeze',
    'select', 'slice', 'split', 'split_with_sizes', 'chunk', 'unbind', 'roll', 'flip', 'alias', 'detach', 'unfold',
    'repeat', 'narrow', 'index_select', 'index', 'pixel_shuffle', 'pixel_unshuffle', 'channel_shuffle', 'movedim',
    'flatten', 'unflatten', 'rot90', 'diagonal', 'reflection_pad2d', 'replication_pad2d',
}
# by which argument is the first factor
_MATMULS = {'mm': 0, 'bmm': 0, 'matmul': 0, 'linear': 0, 'addmm': 1, 'baddbmm': 1, '_addmm_activation': 1}
_SPATIAL = re.compile(r'conv(olution|\d)|pool\dd|pool$|upsample')
_LOSES_POSITIONS = re.compile(r'fft|sort|topk|gather|scatter|index_put|as_strided|cumsum')
_ACTIVATIONS = re.compile(
    r'^(relu|relu6|gelu|silu|sigmoid|hardsigmoid|hardswish|tanh|hardtanh|clamp|clamp_min|clamp_max|leaky_relu|elu|'
    r'softplus|mish|threshold|log_sigmoid_forward|erf|exp|selu|celu)_?$')
_REDUCTIONS = {'mean', 'sum', 'var', 'var_mean', 'std', 'linalg_vector_norm', 'amax', 'max'}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor is read as maps.

    Attributes:
        name: 'NCHW', 'NHWC', 'NLC' (tokens, channels last), 'NCL', or 'other', such as windows.
        axes: Axes that hold positions, after the first one was split into images and the rest.
        order: Which of the flattened positions stand in the map, row by row; None for all in their order.
        size: (H, W) of the map.
        per_image: Entries of the first axis per image, more than one for windows.
    """

    name: str
    axes: tuple[int, ...]
    order: torch.Tensor | None
    size: tuple[int, int]
    per_image: int = 1

    def maps(self, x: torch.Tensor) -> torch.Tensor:
        """Read a tensor as maps (B, C, H, W)."""
        if self.name == 'NCHW':
            return x
        if self.per_image > 1:
            x = x.unflatten(0, (-1, self.per_image))
        x = x.movedim(self.axes, tuple(range(-len(self.axes), 0)))
        x = x.flatten(x.dim() - len(self.axes))
        x = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        if self.order is not None:
            x = x[..., self.order.to(x.device)]
        return x.unflatten(-1, self.size)


@dataclasses.dataclass(frozen=True)
class Product:
    """One elementwise product of two tensors that both depend on the image, or one activation read as a gate.

    Attributes:
        name: Of the module that multiplies, followed by '#2' for its second product, and so on.
        gate: First operand, or where one of them is what an activation returned, that one.
        value: The other operand.
        product: What comes out.
        pre_gate: What the activation took, None where no operand comes straight from one.
        function: The activation, for tensors like `pre_gate`.
        kind: 'gate', 'activation' (x * (f(x) / x)), or 'attention' where an operand was broadcast, such as the channel
            weights of squeeze-and-excitation.
    """

    name: str
    gate: torch.Tensor
    value: torch.Tensor
    product: torch.Tensor
    pre_gate: torch.Tensor | None
    function: Callable[[torch.Tensor], torch.Tensor] | None
    kind: str


@dataclasses.dataclass
class Trace:
    """What one forward pass did.

    Attributes:
        modules: Layout of what enters and leaves each call of a module, by its name ('#2' for the second call) and
            'input' or 'output'; None where it does not hold maps.
        products: Kind and the layouts of gate, value and product, by the name of the product.
        classes: Class of each called module by its name.
    """

    modules: dict[tuple[str, str], Layout | None]
    products: dict[str, tuple[str, tuple[Layout | None, Layout | None, Layout | None]]]
    classes: dict[str, nn.Module]


def trace(model: nn.Module, images: torch.Tensor, *, activations: bool = False) -> Trace:
    """Run a model once, and note the layouts and products on the way. Nothing of the model is changed.

    Args:
        model: Any model that takes images; not what TorchScript made of one.
        images: Images (B, C, H, W), two are enough.
        activations: Note activations as products too.

    Raises:
        UserError: The model is a TorchScript module, which does not tell what it runs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError('TorchScript does not tell which module runs: look at the model before scripting it.')
    if len(images) == 1:  # two images tell the axis of the batch
        images = images.expand(2, *images.shape[1:]).clone()
    found = Trace({}, {}, {})
    batch = len(images)
    reduced: dict[str, str] = {}

    def on_product(product: Product) -> None:
        operands = (product.gate, product.value, product.product)
        layouts = [recorder.layout(x, batch) for x in operands]
        if product.kind != 'attention':  # nothing is broadcast: what is known of one entry holds for all three
            layouts = [next((layout for layout in layouts if layout is not None), None)] * 3
        found.products[product.name] = product.kind, tuple(layouts)  # type: ignore[assignment]

    def on_module(name: str, side: str, x: torch.Tensor) -> None:
        found.modules[name, side] = recorder.layout(x, batch)
        found.classes[name] = modules[name.partition('#')[0]]

    modules = dict(model.named_modules())
    recorder = Recorder(images, on_product, positions=True, activations=activations, reduced=reduced)
    with torch.no_grad(), watch_modules(model, list(modules), on_module, recorder.running), recorder:
        model(images)
    for name in reduced:  # x * x for a mean square is a statistic
        found.products.pop(name, None)
    return found


@contextlib.contextmanager
def watch_modules(
        model: nn.Module,
        names: Sequence[str],
        on_module: Callable[[str, str, torch.Tensor], None],
        running: list[str] | None = None,
) -> Iterator[None]:
    """Call back with what enters and leaves modules; hooks are removed whatever happens.

    Args:
        model: The model.
        names: Names of modules.
        on_module: Takes the name ('#2' for the second call since the block began), 'input' or 'output', and the tensor.
        running: Stack that takes the names of the modules that run.
    """
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name] = calls.get(name, 0) + 1
        if running is not None:
            running.append(name)
        x = first_tensor((args, kwargs))
        if x is not None:  # looked at before the module runs, which may work in place
            on_module(_numbered(name, calls[name]), 'input', x)

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if running is not None:
            running.pop()
        x = first_tensor(output)
        if x is not None:
            on_module(_numbered(name, calls[name]), 'output', x)

    def restart(*_: Any) -> None:
        calls.clear()

    with contextlib.ExitStack() as stack:
        # each pass of the whole model counts anew
        stack.callback(model.register_forward_pre_hook(restart, prepend=True).remove)
        for name in names:
            module = modules[name]
            handle = module.register_forward_pre_hook(functools.partial(enter, name), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(
                module.register_forward_hook(functools.partial(leave, name), with_kwargs=True).remove)
        yield


def first_tensor(x: Any) -> torch.Tensor | None:
    """The first floating point tensor in nested arguments or outputs."""
    return next((leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()), None)


def stated_layout(name: str, shape: torch.Size, images: torch.Size, prefix: int = 0) -> Layout:
    """The layout that a user states for a tensor.

    Args:
        name: 'NCHW', 'NHWC', 'NLC' or 'NCL'.
        shape: Shape of the tensor.
        images: Shape (B, C, H, W) of the images that it was computed from.
        prefix: Tokens before the patches, such as a class token.

    Raises:
        UserError: The tensor cannot have this layout.
    """
    if len(shape) != len(name) or shape[0] != images[0]:
        raise UserError(f'A tensor of shape {tuple(shape)} does not have the layout {name}.')
    if len(name) == 4:
        axes = (name.index('H'), name.index('W'))
        return Layout(name, axes, None, (shape[axes[0]], shape[axes[1]]))
    axis = name.index('L')
    count = shape[axis] - prefix
    height = max(1, round(math.sqrt(max(count, 1) * images[2] / images[3])))
    if count < 1 or count % height:
        raise UserError(
            f'{count} tokens without {prefix} prefix tokens do not fill the grid of a {images[2]}x{images[3]} image.')
    return Layout(name, (axis,), torch.arange(prefix, shape[axis]), (height, count // height))


@dataclasses.dataclass
class _Note:
    """What is known of a tensor that depends on the image."""

    positions: torch.Tensor | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None  # the activation that returned it
    pre: torch.Tensor | None = None  # what the activation took
    product: str | None = None


class Recorder(TorchDispatchMode):
    """Watches the operations of one forward pass.

    Args:
        images: What the model takes.
        on_product: Called with each product.
        positions: Follow positions.
        activations: Report activations as products.
        reduced: Takes the names of products whose only use is a statistic.
    """

    def __init__(
            self,
            images: torch.Tensor,
            on_product: Callable[[Product], None],
            *,
            positions: bool = False,
            activations: bool = False,
            reduced: dict[str, str] | None = None,
    ):
        super().__init__()
        self.on_product = on_product
        self.activations = activations
        self.reduced = reduced
        self.paused = False  # while the watcher itself computes
        self.running: list[str] = []
        self.calls: dict[str, int] = {}
        self.notes = WeakTensorKeyDictionary()
        self.follow = positions
        self.reach = max(images.shape[-2:]) / 2  # positions this far apart are not summed into one
        self.notes[images] = _Note(_image_positions(images) if positions else None)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not watch what the block computes."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def layout(self, x: torch.Tensor, batch: int) -> Layout | None:
        """Layout of a tensor of the pass, None where it does not hold maps."""
        note = self.notes.get(x)
        return None if note is None or note.positions is None else find_layout(note.positions, batch)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x in self.notes]
        if not inputs or self.paused:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        # an operation in place replaces what was noted of its tensor
        notes = [self.notes[x] for x in inputs]
        before = [x.clone() if name in ('mul_',) else x for x in inputs]
        output = func(*args, **kwargs)
        if name.endswith('_like') or name.startswith('new_'):  # takes the shape alone
            return output
        positions = self._positions(func, name, args, kwargs, output) if self.follow else None
        outputs = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        for i, x in enumerate(outputs):
            self.notes[x] = _Note(positions[i] if positions is not None else None)
        if name == 'copy_' and args[0]._base is not None:
            self._note_written(args[0], args[0]._base)
        if self.reduced is not None:
            self._note_uses(name, notes)
        if len(outputs) == 1:
            self._note_products(func, name, args, kwargs, before, notes, outputs[0])
        return output

    def _note_products(self, func, name, args, kwargs, inputs, notes, output) -> None:
        if name in ('mul', 'mul_') and len(inputs) == 2:
            self._report(inputs, notes, output)
        elif name == 'pow' and len(inputs) == 1 and len(args) == 2 and args[1] == 2 or name == 'square':
            self._report(inputs * 2, notes * 2, output)
        elif name == 'glu':
            value, x = inputs[0].chunk(2, args[1] if len(args) > 1 else -1)
            self._report([x.sigmoid(), value], [_Note(function=torch.sigmoid, pre=x), _Note()], output)
        elif _ACTIVATIONS.match(name) and len(inputs) == 1 and output.shape == inputs[0].shape:
            if name.endswith('_') and not name.startswith('log'):
                return  # its input is gone
            note = self.notes[output]
            note.pre, note.function = inputs[0], functools.partial(_call, func, args[1:], kwargs)
            if self.activations and name not in ('exp', 'erf'):
                self._report_activation(inputs[0], note, output)

    def _report(self, factors, notes, output) -> None:
        gate = 1 if notes[1].function is not None and notes[0].function is None else 0
        note, value = notes[gate], factors[1 - gate]
        broadcast = any(_is_broadcast(factor, output.shape) for factor in factors)
        self._emit(Product(
            self._name(), factors[gate], value, output, note.pre, note.function, 'attention' if broadcast else 'gate'))

    def _report_activation(self, x, note, output) -> None:
        tiny = torch.finfo(x.dtype).eps
        gate = torch.where(x.abs() < tiny, note.function(torch.full_like(x, tiny)) / tiny, output / x)
        self._emit(Product(self._name(), gate, x, output, x, note.function, 'activation'))
        if self.follow and x in self.notes:
            self.notes[gate] = _Note(self.notes[x].positions)

    def _emit(self, product: Product) -> None:
        self.notes[product.product].product = product.name
        self.on_product(product)

    def _note_written(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """A part of a tensor was written to, as by circular padding or `x[:, 1:] = y`."""
        positions = None
        if self.follow and whole.is_contiguous():
            positions = self._filled(whole).clone(memory_format=torch.contiguous_format)
            offset = part.storage_offset() - whole.storage_offset()
            positions.as_strided(part.shape, part.stride(), offset).copy_(self._filled(part))
        self.notes[whole] = _Note(positions)

    def _name(self) -> str:
        name = self.running[-1] if self.running else ''
        self.calls[name] = self.calls.get(name, 0) + 1
        return _numbered(name, self.calls[name])

    def _note_uses(self, name: str, notes: list[_Note]) -> None:
        for note in notes:
            if note.product is not None:
                if name in _REDUCTIONS and self.reduced is not None:
                    self.reduced[note.product] = name
                note.product = None  # only the first use counts

    # --- positions ---------------------------------------------------------------------------------------------------

    def _positions(self, func, name, args, kwargs, output) -> list[torch.Tensor | None]:
        outputs = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        try:
            found = self._moved(func, name, args, kwargs, outputs)
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError):
            found = [None] * len(outputs)
        return [
            p if p is not None and p.shape == x.shape else None
            for p, x in zip([*found, *[None] * len(outputs)], outputs)]

    def _moved(self, func, name, args, kwargs, outputs) -> list[torch.Tensor | None]:
        if _LOSES_POSITIONS.search(name):
            return []
        if name in ('cat', 'stack'):
            return [func([self._filled(x) for x in args[0]], *args[1:], **kwargs)]
        if name == 'constant_pad_nd':
            positions = self._of(args[0])
            return [] if positions is None else [F.pad(positions, args[1], value=math.nan)]
        if name in _MOVES:
            start = self._of(args[0])
            if start is None:
                return []
            if 'view' in name or 'reshape' in name:  # positions have other strides than the tensor
                return [start.reshape(x.shape) for x in outputs]
            rest = tree_map(lambda x: self._of(x) if isinstance(x, torch.Tensor) and x in self.notes else x, args[1:])
            return [x for x in tree_leaves(func(start, *rest, **kwargs)) if isinstance(x, torch.Tensor)]
        if name in _MATMULS:
            a, b = args[_MATMULS[name]:][:2]
            a, b = self._of(a), self._of(b)
            b = b.mT if b is not None and name == 'linear' else b
            return [_matmul(a, b, outputs[0].shape, self.reach)]
        if _SPATIAL.search(name):
            return [_resized(self._of(args[0]), outputs[0].shape, self.reach)]
        if name == 'copy_':
            positions = self._of(args[1])
            return [None if positions is None else positions.expand(outputs[0].shape)]
        known = [p for p in map(self._of, tree_leaves((args, kwargs))) if p is not None]
        return [_same_shape(known, x.shape) for x in outputs]

    def _of(self, x: Any) -> torch.Tensor | None:
        note = self.notes.get(x) if isinstance(x, torch.Tensor) else None
        return None if note is None else note.positions

    def _filled(self, x: torch.Tensor) -> torch.Tensor:
        positions = self._of(x)
        if positions is not None:
            return positions
        return torch.full(x.shape, _UNKNOWN, dtype=torch.complex64, device=x.device)


def find_layout(positions: torch.Tensor, batch: int) -> Layout | None:
    """The layout of a tensor whose entries have these positions in the image, None where they make no grid.

    Args:
        positions: row + i column of each entry, NaN for unknown, of the shape of the tensor.
        batch: Number of images.
    """
    if positions.dim() < 2 or positions.shape[0] % batch:
        return None
    x = torch.nan_to_num(torch.view_as_real(positions), nan=-1e6).unflatten(0, (batch, -1))
    if (x != x[:1]).any():  # images are not the first part of the first axis
        return None
    per_image = x.shape[1]
    x = x[0] if per_image > 1 else x[0, 0]
    axes = [i for i in range(x.dim() - 1) if (x != x.narrow(i, 0, 1)).any()]
    if not axes:
        return None
    moved = x.movedim(axes, list(range(len(axes))))
    flat = moved.flatten(len(axes), -2)[..., 0, :] if moved.dim() > len(axes) + 1 else moved
    flat = flat.reshape(-1, 2)
    valid = (flat > -1e5).all(-1).nonzero()[:, 0]
    (rows, height), (columns, width) = (_ranks(flat[valid, i]) for i in (0, 1))
    key = rows * width + columns
    if len(valid) < 2 or len(valid) != height * width or len(key.unique()) != len(key):
        return None
    order = valid[key.argsort()]
    identity = len(order) == len(flat) and bool((order == torch.arange(len(flat), device=order.device)).all())
    shift = 1 if per_image == 1 else 0  # the axis of the images, or of images and windows, was taken away
    positions_at = tuple(i + 1 if per_image > 1 else i + shift for i in axes)
    name = 'other'
    if per_image == 1 and positions.dim() == 4 and len(axes) == 2 and identity:
        name = {(2, 3): 'NCHW', (1, 2): 'NHWC'}.get((positions_at[0], positions_at[1]), 'other')
    elif per_image == 1 and positions.dim() == 3 and len(axes) == 1:
        name = 'NLC' if positions_at == (1,) else 'NCL'
    return Layout(name, positions_at, None if identity else order.cpu(), (height, width), per_image)


def _ranks(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Rank of each value among the different ones, at least a twentieth of a pixel apart, and how many there are."""
    ordered, index = values.sort()
    steps = torch.zeros_like(ordered, dtype=torch.long)
    steps[1:] = (ordered[1:] - ordered[:-1] > .05).cumsum(0)
    ranks = torch.empty_like(steps)
    ranks[index] = steps
    return ranks, int(steps[-1]) + 1 if len(steps) else 0


def _image_positions(images: torch.Tensor) -> torch.Tensor:
    rows, columns = (torch.arange(n, dtype=torch.float32, device=images.device) for n in images.shape[-2:])
    return torch.complex(*torch.broadcast_tensors(rows[:, None], columns)).expand(images.shape)


def _matmul(
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        shape: torch.Size,
        reach: float,
) -> torch.Tensor | None:
    for positions, axis in ((a, -1), (b, -2)):
        centre = None if positions is None or positions.dim() < 2 else _centre(positions, axis, reach)
        if centre is not None:
            return centre.expand(shape)
    return None


def _resized(positions: torch.Tensor | None, shape: torch.Size, reach: float) -> torch.Tensor | None:
    """Positions of what slides a window over maps, or enlarges them: equally spaced over the same range."""
    if positions is None or positions.dim() != len(shape) or positions.dim() < 3:
        return None
    positions = _centre(positions, 1, reach)
    if positions is None:
        return None
    rows, columns = (_spaced(part, shape[2:]) for part in (positions[:, 0].real, positions[:, 0].imag))
    if rows is None or columns is None:
        return None
    return torch.complex(rows, columns)[:, None].expand(shape)


def _spaced(x: torch.Tensor, size: torch.Size) -> torch.Tensor | None:
    """Rows or columns (B, ...) of a grid at another size, equally spaced: padding repeats or mirrors some of them."""
    varying = [axis for axis in range(1, x.dim()) if (x.amin(axis) != x.amax(axis)).any()]
    if len(varying) > 1:
        return None
    for axis, count in enumerate(size, start=1):
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        half = max(1, x.shape[axis] // 2)
        rising = x.narrow(axis, x.shape[axis] - half, half).mean(axis, keepdim=True) >= \
            x.narrow(axis, 0, half).mean(axis, keepdim=True)
        steps = torch.linspace(0, 1, count, device=x.device) if count > 1 else torch.full((1,), .5, device=x.device)
        steps = steps.view(-1, *[1] * (x.dim() - 1 - axis))
        x = low + (high - low) * torch.where(rising, steps, 1 - steps)
    return x


def _centre(positions: torch.Tensor, axis: int, reach: float) -> torch.Tensor | None:
    """Mean position along an axis that is summed over: of channels with the same one, or of pixels that are merged."""
    first = positions.narrow(axis, 0, 1)
    if ((positions == first) | (positions.isnan() & first.isnan())).all():
        return first
    parts = torch.view_as_real(positions)
    axis = axis - 1 if axis < 0 else axis
    apart = parts.amax(axis) - parts.amin(axis)
    return positions.mean(axis if axis >= 0 else axis + 1, keepdim=True) if (apart <= reach).all() else None


def _same_shape(known: list[torch.Tensor], shape: torch.Size) -> torch.Tensor | None:
    for positions in known:
        if positions.shape == shape:
            return positions
    for positions in known:
        with contextlib.suppress(RuntimeError):
            return positions.expand(shape)
    return None


def _is_broadcast(x: torch.Tensor, shape: torch.Size) -> bool:
    """True if x is repeated along an axis to get this shape, by the operation or by an earlier `expand`."""
    return x.shape != shape or any(stride == 0 and size > 1 for stride, size in zip(x.stride(), shape))


def _call(func, args: tuple, kwargs: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    return func(x, *args, **kwargs)


def _numbered(name: str, call: int) -> str:
    return name if call == 1 else f'{name}#{call}'
