"""Where in the image a feature lies: found by computation, not guessed from shapes.

Beside each tensor of a pass runs another one of its shape, whose entries are the rows and columns of the image that
they stand for (row + i column). What moves data, such as a permutation or a window partition, moves the positions the
same way. What maps channels (a linear layer, a 1x1 convolution) hands them on, what shrinks or enlarges maps
interpolates them, and what mixes positions without an order (a matrix over tokens) loses them. Attention hands on those
of its queries. Where positions end up tells the layout of a tensor: maps with channels first or last, tokens with or
without prefix, or windows.
"""
import contextlib
import dataclasses
import math
import re
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from gmnet_timm.errors import UserError

__all__ = ['MOVES', 'Layout', 'Positions', 'find_layout', 'stated_layout']

_UNKNOWN = complex(math.nan, math.nan)
MOVES = {
    'view', '_unsafe_view', 'reshape', '_reshape_alias', 'permute', 'transpose', 't', 'expand', 'unsqueeze', 'squeeze',
    'select', 'slice', 'split', 'split_with_sizes', 'chunk', 'unbind', 'roll', 'flip', 'alias', 'detach', 'unfold',
    'repeat', 'narrow', 'index_select', 'index', 'pixel_shuffle', 'pixel_unshuffle', 'channel_shuffle', 'movedim',
    'flatten', 'unflatten', 'rot90', 'diagonal', 'reflection_pad2d', 'replication_pad2d',
}
# by which argument is the first factor
_MATMULS = {'mm': 0, 'bmm': 0, 'matmul': 0, 'linear': 0, 'addmm': 1, 'baddbmm': 1, '_addmm_activation': 1}
_REDUCTIONS = {'mean', 'sum', 'amax', 'amin', 'max', 'min'}
_SPATIAL = re.compile(r'conv(olution|\d)|pool\dd|pool$|upsample')
_LOSES_POSITIONS = re.compile(r'fft|sort|topk|gather|scatter|index_put|as_strided|cumsum')


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

    def maps(self, x: torch.Tensor, channels: int | None = None) -> torch.Tensor:
        """Read a tensor as maps (B, C, H, W), with all channels or this many of them, evenly spaced."""
        if self.name == 'NCHW':
            return _some(x, channels)
        if self.per_image > 1:
            x = x.unflatten(0, (-1, self.per_image))
        x = x.movedim(self.axes, tuple(range(-len(self.axes), 0)))
        x = x.flatten(x.dim() - len(self.axes))
        x = _some(x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1), channels)
        if self.order is not None:
            x = x[..., self.order.to(x.device)]
        return x.unflatten(-1, self.size)


def _some(maps: torch.Tensor, channels: int | None) -> torch.Tensor:
    """Evenly spaced entries of the second axis, (B, C, ...)."""
    if channels is None or channels >= maps.shape[1]:
        return maps
    return maps.index_select(1, torch.arange(channels, device=maps.device) * maps.shape[1] // channels)


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


class Positions:
    """Positions of the tensors of one pass.

    Args:
        images: What the model takes, (B, C, H, W), at least two images, which tell the axis of the batch.
    """

    def __init__(self, images: torch.Tensor):
        self.batch = len(images)
        self.reach = max(images.shape[-2:]) / 2  # positions this far apart or more are not summed into one
        self.known = WeakTensorKeyDictionary()
        self.known[images] = _image_positions(images)
        self.layouts = WeakTensorKeyDictionary()  # by positions, which many tensors share

    def of(self, x: Any) -> torch.Tensor | None:
        """Positions of the entries of a tensor, row + i column, None where they are not known."""
        return self.known.get(x) if isinstance(x, torch.Tensor) else None

    def layout(self, x: torch.Tensor) -> Layout | None:
        """Layout of a tensor, None where it does not hold maps."""
        positions = self.of(x)
        if positions is not None and positions not in self.layouts:
            self.layouts[positions] = find_layout(positions, self.batch)
        return None if positions is None else self.layouts[positions]

    def follow(self, func, name: str, args, kwargs, outputs: list[torch.Tensor]) -> None:
        """Note the positions of what an operation returned."""
        try:
            found = self._moved(func, name, args, kwargs, outputs)
        except (RuntimeError, NotImplementedError, TypeError, IndexError, ValueError):
            found = []
        for x, positions in zip(outputs, [*found, *[None] * len(outputs)]):
            if positions is not None and positions.shape == x.shape:
                self.known[x] = positions
            else:  # an operation in place replaces what was known
                self.known.pop(x, None)

    def written(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """A part of a tensor was written to, as by circular padding or `x[:, 1:] = y`."""
        if not whole.is_contiguous():
            self.known.pop(whole, None)
            return
        positions = self._filled(whole).clone(memory_format=torch.contiguous_format)
        offset = part.storage_offset() - whole.storage_offset()
        positions.as_strided(part.shape, part.stride(), offset).copy_(self._filled(part))
        self.known[whole] = positions

    def _moved(self, func, name, args, kwargs, outputs) -> list[torch.Tensor | None]:
        if _LOSES_POSITIONS.search(name):
            return []
        if name in ('cat', 'stack'):
            return [func([self._filled(x) for x in args[0]], *args[1:], **kwargs)]
        if name == 'constant_pad_nd':
            positions = self.of(args[0])
            return [] if positions is None else [torch.constant_pad_nd(positions, args[1], _UNKNOWN)]
        if name in MOVES:
            start = self.of(args[0])
            if start is None:
                return []
            if 'view' in name or 'reshape' in name:  # positions have other strides than the tensor
                return [start.reshape(x.shape) for x in outputs]
            rest = tree_map(lambda x: self.known.get(x, x) if isinstance(x, torch.Tensor) else x, args[1:])
            return [x for x in tree_leaves(func(start, *rest, **kwargs)) if isinstance(x, torch.Tensor)]
        if name in _MATMULS:
            a, b = args[_MATMULS[name]:][:2]
            a, b = self.of(a), self.of(b)
            b = b.mT if b is not None and name == 'linear' else b
            return [_matmul(a, b, outputs[0].shape, self.reach)]
        if name in _REDUCTIONS and len(args) > 1:
            return [_reduced(self.of(args[0]), args[1], outputs[0].shape, self.reach)]
        if _SPATIAL.search(name):
            return [_resized(self.of(args[0]), outputs[0].shape, self.reach)]
        if name == 'glu':
            positions = self.of(args[0])
            return [] if positions is None else [positions.chunk(2, args[1] if len(args) > 1 else -1)[0]]
        if name == 'copy_':
            positions = self.of(args[1])
            return [None if positions is None else positions.expand(outputs[0].shape)]
        known = [p for p in map(self.of, tree_leaves((args, kwargs))) if p is not None]
        return [_same_shape(known, x.shape) for x in outputs]

    def _filled(self, x: torch.Tensor) -> torch.Tensor:
        positions = self.of(x)
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
    per_image = positions.shape[0] // batch
    # one entry stands for all along an axis where they are one in memory
    repeated = [stride == 0 and (axis > 0 or per_image == 1) for axis, stride in enumerate(positions.stride())]
    x = positions[tuple(slice(0, 1) if same else slice(None) for same in repeated)]
    x = torch.nan_to_num(torch.view_as_real(x), nan=-1e6)
    x = x[None] if repeated[0] else x.unflatten(0, (batch, -1))
    if (x != x[:1]).any():  # images are not the first part of the first axis
        return None
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


def _reduced(positions: torch.Tensor | None, axes: Any, shape: torch.Size, reach: float) -> torch.Tensor | None:
    """Positions of what a reduction along some axes leaves, such as the largest of four neighbouring tokens."""
    for axis in [axes] if isinstance(axes, int) else axes:
        positions = None if positions is None else _centre(positions, axis % positions.dim(), reach)
    return None if positions is None else positions.reshape(shape)


def _resized(positions: torch.Tensor | None, shape: torch.Size, reach: float) -> torch.Tensor | None:
    """Positions of what slides a window over maps, or enlarges them: equally spaced over the same range."""
    if positions is None or positions.dim() != len(shape) or positions.dim() < 3:
        return None
    if positions.stride(0) == 0:  # all images alike
        positions = positions[:1]
    positions = _centre(positions, 1, reach)
    if positions is None:
        return None
    rows, columns = (_spaced(part, shape[2:]) for part in (positions[:, 0].real, positions[:, 0].imag))
    if rows is None or columns is None:
        return None
    return torch.complex(rows, columns)[:, None].expand(shape)


def _spaced(x: torch.Tensor, size: torch.Size) -> torch.Tensor | None:
    """Rows or columns (B, ...) of a grid at another size, equally spaced: padding repeats, mirrors or hides some."""
    def low(axis: int, keepdim: bool = False) -> torch.Tensor:
        return x.nan_to_num(math.inf).amin(axis, keepdim=keepdim)

    def high(axis: int, keepdim: bool = False) -> torch.Tensor:
        return x.nan_to_num(-math.inf).amax(axis, keepdim=keepdim)

    # lines that are all padding have an infinite lowest and highest position
    varying = [axis for axis in range(1, x.dim()) if ((low(axis) < high(axis)) & low(axis).isfinite()).any()]
    if len(varying) > 1:
        return None
    for axis, count in enumerate(size, start=1):
        places = torch.arange(float(x.shape[axis]), device=x.device).view(-1, *[1] * (x.dim() - 1 - axis))
        places = torch.where(x.isnan(), math.nan, places)
        rising = ((places - places.nanmean(axis, keepdim=True)) * x).nansum(axis, keepdim=True) >= 0
        first, last = low(axis, True), high(axis, True)
        steps = torch.linspace(0, 1, count, device=x.device) if count > 1 else torch.full((1,), .5, device=x.device)
        steps = steps.view(-1, *[1] * (x.dim() - 1 - axis))
        x = torch.where(first <= last, first + (last - first) * torch.where(rising, steps, 1 - steps), math.nan)
    return x if x.isfinite().all() else None


def _centre(positions: torch.Tensor, axis: int, reach: float) -> torch.Tensor | None:
    """Mean position along an axis that is summed over: of channels with the same one, or of pixels that are merged."""
    first = positions.narrow(axis, 0, 1)
    if positions.stride(axis) == 0 or ((positions == first) | (positions.isnan() & first.isnan())).all():
        return first
    parts = torch.view_as_real(positions)
    axis = axis - 1 if axis < 0 else axis
    apart = parts.amax(axis) - parts.amin(axis)
    return positions.mean(axis if axis >= 0 else axis + 1, keepdim=True) if (apart < reach).all() else None


def _same_shape(known: list[torch.Tensor], shape: torch.Size) -> torch.Tensor | None:
    for positions in known:
        if positions.shape == shape:
            return positions
    for positions in known:
        with contextlib.suppress(RuntimeError):
            return positions.expand(shape)
    return None
