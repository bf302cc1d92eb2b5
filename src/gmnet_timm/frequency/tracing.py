"""Follows a forward pass: which module runs, what is multiplied with what, and how each tensor is read as maps."""
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.positions import MOVES, Layout, Positions

__all__ = ['FoundProduct', 'Product', 'Recorder', 'Trace', 'evaluation_mode', 'trace', 'uncompiled', 'watch_modules']

_ACTIVATIONS = {
    'relu', 'relu6', 'gelu', 'silu', 'sigmoid', 'hardsigmoid', 'hardswish', 'tanh', 'hardtanh', 'clamp', 'clamp_min',
    'clamp_max', 'leaky_relu', 'elu', 'softplus', 'mish', 'threshold', 'log_sigmoid_forward', 'erf', 'exp', 'selu',
    'celu',
}
_ENTRY_BY_ENTRY = {
    'clone', '_to_copy', 'alias', 'detach', 'permute', 'transpose', 'add', 'sub', 'rsub', 'mul', 'div', 'neg'}
_FILLS = {'fill', 'zero', 'normal', 'uniform', 'bernoulli', 'random', 'exponential'}
_REDUCTIONS = {'mean', 'sum'}
_ROOTS = {'sqrt', 'rsqrt', 'pow'}
_NUMBERS = (int, float, type(None))


@dataclasses.dataclass(frozen=True)
class Product:
    """One elementwise product of two tensors that both depend on the image, or one activation read as a gate.

    Attributes:
        name: Of the module that multiplies, followed by ':relu' or the like for an activation, and by '#2' for its
            second product, and so on.
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


@dataclasses.dataclass(frozen=True)
class FoundProduct:
    """Where a model multiplies two tensors that both depend on its input.

    Attributes:
        kind: 'gate' where both operands have an entry per position and channel. 'attention' where one was broadcast,
            such as the channel weights of squeeze-and-excitation, a map of attention, or the reciprocal standard
            deviation of a norm. 'activation' for one that was read as a gate, on request.
        layout: Of a gate or an activation; None where it does not hold maps, or layouts were not looked for.
    """

    kind: str
    layout: Layout | None = None


@dataclasses.dataclass
class Trace:
    """What one forward pass did.

    Attributes:
        modules: Layout of what enters and leaves each call of a module, by its name ('#2' for the second call) and
            'input' or 'output'; None where it does not hold maps.
        shapes: Shapes of the same.
        same: By the same keys, the first key of the same tensor: what a block returns is what the next one takes.
        products: Products by name.
        classes: Each called module by its name.
        images: Shape of the images of the pass.
    """

    images: torch.Size
    modules: dict[tuple[str, str], Layout | None] = dataclasses.field(default_factory=dict)
    shapes: dict[tuple[str, str], torch.Size] = dataclasses.field(default_factory=dict)
    same: dict[tuple[str, str], tuple[str, str]] = dataclasses.field(default_factory=dict)
    products: dict[str, FoundProduct] = dataclasses.field(default_factory=dict)
    classes: dict[str, nn.Module] = dataclasses.field(default_factory=dict)


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` was given: what it compiled tells neither modules nor products."""
    return getattr(model, '_orig_mod', model)


def trace(model: nn.Module, images: torch.Tensor, *, activations: bool = False, layouts: bool = True) -> Trace:
    """Run a model once, and note the layouts and products on the way. Nothing of the model is changed.

    Args:
        model: Any model that takes images; not what TorchScript made of one.
        images: Images (B, C, H, W), two are enough.
        activations: Note activations as products too.
        layouts: Look for layouts. Without them, any input will do, also on the meta device.

    Raises:
        UserError: The model is a TorchScript module, which does not tell what it runs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError('TorchScript does not tell which module runs: look at the model before scripting it.')
    if layouts and len(images) == 1:  # two images tell the axis of the batch
        images = images.expand(2, *images.shape[1:]).clone()
    positions = Positions(images) if layouts else None
    found = Trace(images.shape)
    first_key = WeakTensorKeyDictionary()

    def layout(x: torch.Tensor) -> Layout | None:
        return positions.layout(x) if positions is not None else None

    def on_product(product: Product) -> None:
        known = None
        if product.kind != 'attention':  # nothing is broadcast: what is known of one entry holds for all three
            known = layout(product.gate) or layout(product.value) or layout(product.product)
        found.products[product.name] = FoundProduct(product.kind, known)

    def on_module(name: str, side: str, x: torch.Tensor) -> None:
        found.modules[name, side], found.shapes[name, side] = layout(x), x.shape
        key, version = first_key.setdefault(x, ((name, side), _version(x)))
        found.same[name, side] = key if version == _version(x) else (name, side)
        found.classes[name] = recorder.modules[name.partition('#')[0]]

    recorder = Recorder(model, on_product, activations=activations)
    with torch.no_grad(), recorder.hooked(on_module, list(recorder.modules)), recorder.watch(images, positions):
        model(images)
    for name in recorder.statistics():
        del found.products[name]
    return found


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own: training would change statistics."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextlib.contextmanager
def watch_modules(
        model: nn.Module,
        names: Sequence[str],
        on_module: Callable[[str, str, torch.Tensor], None],
) -> Iterator[None]:
    """Call back with what enters and leaves modules; hooks are removed whatever happens.

    Args:
        model: The model.
        names: Names of modules.
        on_module: Takes the name ('#2' for the second call in a pass), 'input' or 'output', and the tensor.
    """
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        calls[name] = calls.get(name, 0) + 1
        x = _first_floats((args, kwargs))
        if x is not None:  # looked at before the module runs, which may work in place
            on_module(_numbered(name, calls[name]), 'input', x)

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        x = _first_floats(output)
        if x is not None:
            on_module(_numbered(name, calls[name]), 'output', x)

    with contextlib.ExitStack() as stack:
        # each pass of the whole model counts anew
        stack.callback(model.register_forward_pre_hook(lambda *_: calls.clear(), prepend=True).remove)
        for name in names:
            module = modules[name]
            handle = module.register_forward_pre_hook(functools.partial(enter, name), with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(
                module.register_forward_hook(functools.partial(leave, name), with_kwargs=True).remove)
        yield


def _tensors(x: Any) -> list[torch.Tensor]:
    """Tensors in nested arguments or outputs, in their order."""
    if isinstance(x, torch.Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (tuple, list)):
        return []
    return [tensor for part in x if not isinstance(part, _NUMBERS) for tensor in _tensors(part)]


def _first_floats(x: Any) -> torch.Tensor | None:
    return next((tensor for tensor in _tensors(x) if tensor.is_floating_point()), None)


@dataclasses.dataclass
class _Note:
    """What is known of a tensor that depends on the image.

    Attributes:
        function: The activation that returned it.
        pre: What that activation took.
        version: Of `pre`, which may be overwritten later.
        repeated: It was broadcast along an axis, and may have been copied since.
        square: Name of the product of something with itself that it is.
        mean_of: Name of such a product that it is a mean of.
    """

    function: Callable[[torch.Tensor], torch.Tensor] | None = None
    pre: torch.Tensor | None = None
    version: int = 0
    repeated: bool = False
    square: str | None = None
    mean_of: str | None = None


class Recorder(TorchDispatchMode):
    """Watches the operations of forward passes, and calls back with each product.

    Found are `mul`, `square`, `pow` by 2, `glu`, the products within `addcmul` and `lerp`, in place or not, and what
    torch writes as one of them, such as an einsum without a sum. Not found are a quotient, the logarithm of a product,
    and what is computed within one kernel: matrix products, attention, an activation like SiLU.

    Args:
        model: Any model that takes images.
        on_product: Called with each product.
        activations: Report activations as products.
    """

    def __init__(self, model: nn.Module, on_product: Callable[[Product], None], *, activations: bool = False):
        super().__init__()
        self.model = model
        self.modules = dict(model.named_modules())
        self.on_product = on_product
        self.activations = activations
        self.positions: Positions | None = None
        self.running: list[str] = []
        self.finished: list[str] = []
        self.calls: dict[str, int] = {}
        self.notes = WeakTensorKeyDictionary()
        self.roots: set[str] = set()  # squares whose mean a root was taken of
        self.used: set[str] = set()  # squares with another use than a mean

    @contextlib.contextmanager
    def hooked(self, on_module: Callable[[str, str, torch.Tensor], None], names: Sequence[str]) -> Iterator[None]:
        """Hooks on all modules, which tell which one runs.

        Args:
            on_module: As for `watch_modules`.
            names: As for `watch_modules`.
        """
        def outside(*args: Any) -> None:
            with _disable_current_modes():  # what the watcher itself computes
                on_module(*args)

        def enter(name: str, *_: Any) -> None:
            self.running.append(name)

        def leave(name: str, *_: Any) -> None:
            self.running.pop()
            self.finished = [*self.finished[-1:], name]

        with contextlib.ExitStack() as stack:
            for name, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(functools.partial(enter, name)).remove)
                stack.callback(module.register_forward_hook(functools.partial(leave, name)).remove)
            stack.enter_context(watch_modules(self.model, names, outside))
            yield

    @contextlib.contextmanager
    def watch(self, images: torch.Tensor, positions: Positions | None = None) -> Iterator[None]:
        """Watch one pass of these images, and follow positions."""
        self.positions = positions
        for seen in (self.running, self.finished, self.calls, self.roots, self.used):
            seen.clear()
        self.notes = WeakTensorKeyDictionary()
        self.notes[images] = _Note()
        with self:
            yield

    def statistics(self) -> set[str]:
        """Names of squares that only go into a mean and then into a root, as in RMSNorm: no gates."""
        return self.roots - self.used

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        noted = [(x, note) for x in _tensors((args, kwargs)) if (note := self.notes.get(x)) is not None]
        inputs, notes = [x for x, _ in noted], [note for _, note in noted]
        name = func.overloadpacket.__name__
        if not inputs or name.endswith('_like') or name.startswith('new_'):  # takes the shape alone
            return func(*args, **kwargs)
        in_place, name = name.endswith('_'), name.rstrip('_')
        if in_place and (name in _FILLS or name == 'copy' and args[1] not in self.notes) and len(inputs) == 1:
            self.notes.pop(args[0])  # constant from now on
            if self.positions is not None:
                self.positions.known.pop(args[0], None)
            return func(*args, **kwargs)
        factors = self._factors(name, args, in_place)
        taken = inputs[0].clone() if in_place and self.activations and name in _ACTIVATIONS else inputs[0]
        output = func(*args, **kwargs)
        outputs = _tensors(output)
        if self.positions is not None:
            self.positions.follow(func, name + '_' * in_place, args, kwargs, outputs)
        new = self._note(name, args, inputs, notes, outputs)
        if name in MOVES and len(inputs) == len(outputs) == 1 and _is_current(notes[0]):
            new.function, new.pre = notes[0].function, func(notes[0].pre, *args[1:], **kwargs)
            new.version = _version(new.pre)
        for x in outputs:
            self.notes[x] = new if len(outputs) == 1 else dataclasses.replace(new)
        if in_place and args[0]._base is not None:
            self._written(args[0], args[0]._base)
        if len(outputs) == 1 and outputs[0].is_floating_point():
            if factors is not None:
                self._report(*factors, outputs[0], is_output=name not in ('addcmul', 'lerp'))
            elif len(inputs) == 1 and name in _ACTIVATIONS and outputs[0].shape == inputs[0].shape:
                self._note_activation(name, args, kwargs, taken, in_place, outputs[0])
        return output

    def _note(self, name: str, args: tuple, inputs: list[torch.Tensor], notes: list[_Note], outputs: list) -> _Note:
        """What an operation hands on."""
        new = _Note()
        if name in ('expand', 'repeat', 'repeat_interleave') or 'upsample' in name:
            new.repeated = _was_one(inputs[0].shape, outputs[0].shape)
        elif name in _ENTRY_BY_ENTRY or name in _ACTIVATIONS:
            new.repeated = all(note.repeated for note in notes)
        for note in notes:
            if note.square is not None and name in MOVES:
                new.square = note.square
            elif note.square is not None and name in _REDUCTIONS:
                new.mean_of = note.square
            elif note.square is not None:
                self.used.add(note.square)
            elif note.mean_of is not None and name in _ROOTS and (name != 'pow' or args[1] in (.5, -.5)):
                self.roots.add(note.mean_of)
            elif note.mean_of is not None and len(notes) == 1:
                new.mean_of = note.mean_of
        return new

    def _factors(self, name: str, args: tuple, in_place: bool) -> list[tuple[torch.Tensor, _Note]] | None:
        """The two tensors that an operation multiplies entry by entry, None where it does not."""
        if name == 'mul':
            factors = args[:2]
        elif name == 'square' or (name == 'pow' and args[1] == 2):
            factors = (args[0], args[0])
        elif name == 'addcmul':
            factors = args[1:3]
        elif name == 'lerp':
            factors = (args[2], args[1] if args[1] in self.notes else args[0])
        elif name == 'glu':
            value, x = args[0].chunk(2, args[1] if len(args) > 1 else -1)
            return [(x.sigmoid(), _Note(torch.sigmoid, x, _version(x))), (value, _Note())]
        else:
            return None
        if not all(isinstance(x, torch.Tensor) and x in self.notes for x in factors):
            return None
        notes = [self.notes[x] for x in factors]
        if name == 'lerp':
            return [(args[2], notes[0]), (args[1] - args[0], _Note())]
        if not in_place:
            return list(zip(factors, notes))
        kept = args[0].clone()  # of what is overwritten
        notes = [
            dataclasses.replace(note, pre=kept, version=_version(kept)) if note.pre is args[0] else note
            for note in notes]
        return [(kept if x is args[0] else x, note) for x, note in zip(factors, notes)]

    def _report(self, first: tuple, second: tuple, output: torch.Tensor, is_output: bool) -> None:
        if second[1].function is not None and first[1].function is None:
            first, second = second, first
        (gate, note), (value, other) = first, second
        product = output if is_output else gate * value
        broadcast = any(
            n.repeated or _is_broadcast(x, product.shape) for x, n in ((gate, note), (value, other)))
        pre = note.pre if _is_current(note) else None
        found = Product(
            self._name(), gate, value, product, pre, note.function, 'attention' if broadcast else 'gate')
        if gate is value and is_output:
            self.notes[output].square = found.name
        self.on_product(found)

    def _note_activation(self, name: str, args, kwargs, x: torch.Tensor, in_place: bool, output: torch.Tensor) -> None:
        note = self.notes[output]
        note.function = functools.partial(_call, getattr(torch.ops.aten, name), args[1:], kwargs)
        if x is output:
            return  # what it took is gone
        note.pre, note.version = x, _version(x)
        if not self.activations or name in ('exp', 'erf'):
            return
        tiny = torch.finfo(x.dtype).eps
        gate = torch.where(x.abs() < tiny, note.function(torch.full_like(x, tiny)) / tiny, output / x)
        self.on_product(Product(self._name(f':{name}'), gate, x, output, x, note.function, 'activation'))

    def _written(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """A part of a tensor was written to."""
        if whole not in self.notes:
            self.notes[whole] = _Note()
        if self.positions is not None:
            self.positions.written(part, whole)

    def _name(self, what: str = '') -> str:
        name = self.running[-1] if self.running else ''
        if isinstance(self.modules[name], torch.fx.GraphModule):  # multiplies for all modules within
            name = '.'.join(os.path.commonprefix([module.split('.') for module in self.finished])) or name
        name += what
        self.calls[name] = self.calls.get(name, 0) + 1
        return _numbered(name, self.calls[name])


def _was_one(before: torch.Size, after: torch.Size) -> bool:
    """True if an axis of one entry became longer."""
    padded = (*(1,) * (len(after) - len(before)), *before)
    return any(a == 1 < b for a, b in zip(padded, after))


def _is_broadcast(x: torch.Tensor, shape: torch.Size) -> bool:
    """True if x is repeated along an axis to get this shape, by the operation or by an earlier `expand`."""
    return x.shape != shape or any(stride == 0 and size > 1 for stride, size in zip(x.stride(), shape))


def _is_current(note: _Note) -> bool:
    """True if what the activation took is known and was not overwritten."""
    return note.pre is not None and _version(note.pre) == note.version


def _version(x: torch.Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _call(func, args: tuple, kwargs: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    return func(x, *args, **kwargs)


def _numbered(name: str, call: int) -> str:
    return name if call == 1 else f'{name}#{call}'
