"""Where does a model multiply features by features? Its gates, found by running it once."""
import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Iterator
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from gmnet_timm.errors import UserError

__all__ = ['Product', 'Tap', 'find_gates', 'find_products']


@dataclasses.dataclass(frozen=True)
class Tap:
    """A tensor that a hook can read: the first argument of a module's forward pass, or what it returns."""

    name: str  # of the module, as in model.named_modules()
    module: nn.Module
    is_output: bool


@dataclasses.dataclass(frozen=True)
class Product:
    """An elementwise multiplication of two tensors that both depend on the model's input.

    Attributes:
        before: The last tensor that both factors were computed from: a gate's input.
        after: The product, None if no module takes or returns it.
        shape: Shape of the product for the input that the model was run on.
        is_gate: Both factors have an entry per position and channel. Otherwise one was broadcast, such as the channel
            weights of squeeze-and-excitation, a spatial attention map, or the reciprocal standard deviation of a norm.
    """

    before: Tap
    after: Tap | None
    shape: tuple[int, ...]
    is_gate: bool


def find_gates(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, Product]:
    """The gates of any model: products of two factors that both have an entry per position and channel.

    They are found by what the model computes, not by class: in GmNet, the gated ResNet18 and MobileNetV2, StarNet,
    SwiGLU and gMLP, whoever wrote them, and in feature extractors and torch.fx graphs of these. See `find_products` for
    the arguments and the names.
    """
    return {name: product for name, product in find_products(model, x).items() if product.is_gate}


def find_products(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, Product]:
    """Every product of two tensors that depend on the model's input, in the order of one forward pass.

    The pass runs in evaluation mode, and leaves the model as it was. On the meta device it costs next to nothing.

    Args:
        model: Any module that takes one tensor, compiled or not; not what TorchScript or torch.export made of one.
        x: An input. By default an image of zeros, of the size in the model's pretrained_cfg. If it is so small that
            feature maps shrink to one pixel, channel weights there count as gates.

    Returns:
        Products by the name of the module that multiplies, followed by '#2' for its second one, and so on. A torch.fx
        graph multiplies for all its modules: its products are named by what the names of the modules around them share.

    Raises:
        UserError: TorchScript does not tell which module multiplies.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError('TorchScript does not tell which module multiplies: find gates before scripting or tracing.')
    if x is None:
        x = _example_input(model)
    recorder = _Recorder(model, x)
    with torch.no_grad(), _evaluation_mode(model), recorder.hooked(), recorder:
        model(x)
    return recorder.products()


def _example_input(model: nn.Module) -> torch.Tensor:
    p = next(model.parameters(), torch.empty(0))
    channels, height, width = resolve_model_data_config(model)['input_size']
    return torch.zeros(1, getattr(model, 'in_chans', channels), height, width, device=p.device, dtype=p.dtype)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


class _Recorder(TorchDispatchMode):
    """Watches the operations of one forward pass, and the modules that run meanwhile.

    Each tensor that depends on the input has a set of bits: bit i says that it is `taps[i]`, or was computed from it.
    So the highest bit that two factors have in common is the last tensor that both come from.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor):
        super().__init__()
        self.model = model
        self.taps: list[Tap] = []
        self.bits = WeakTensorKeyDictionary()
        self.bits[x] = 0
        self.running: list[tuple[str, nn.Module]] = []
        self.found: list[dict[str, Any]] = []
        self.unread = WeakTensorKeyDictionary()  # products that no module has taken or returned, and their entries

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, module in self.model.named_modules():
                enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
            yield

    def _enter(self, name: str, module: nn.Module, args: tuple) -> None:
        self.running.append((name, module))
        if args:
            self._tap(Tap(name, module, is_output=False), args[0])

    def _leave(self, name: str, module: nn.Module, args: tuple, output: Any) -> None:
        self.running.pop()
        self._tap(Tap(name, module, is_output=True), output)

    def _tap(self, tap: Tap, x: Any) -> None:
        if isinstance(x, torch.Tensor) and x in self.bits:
            self.bits[x] |= 1 << len(self.taps)
            self.taps.append(tap)
            if x in self.unread:
                self.unread.pop(x)['after'] = tap

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x in self.bits]
        bits = [self.bits[x] for x in inputs]
        output = func(*args, **(kwargs or {}))
        if inputs and not _ignores_values(func):
            for x in tree_leaves(output):
                if isinstance(x, torch.Tensor):
                    self.bits[x] = functools.reduce(operator.or_, bits)
                    self.unread.pop(x, None)  # written in place
            if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_) and len(inputs) == 2:
                self._found(inputs, bits[0] & bits[1], output)
        return output

    def _found(self, factors: list[torch.Tensor], common: int, product: torch.Tensor) -> None:
        self.found.append(dict(
            running=self.running[-1],
            before=self.taps[common.bit_length() - 1],
            after=None,
            shape=tuple(product.shape),
            is_gate=not any(_is_broadcast(factor, product.shape) for factor in factors),
        ))
        self.unread[product] = self.found[-1]

    def products(self) -> dict[str, Product]:
        products: dict[str, Product] = {}
        calls: dict[str, int] = {}
        for entry in self.found:
            name, module = entry.pop('running')
            product = Product(**entry)
            if isinstance(module, torch.fx.GraphModule) and product.after is not None:
                around = [tap.name.split('.') for tap in (product.before, product.after)]
                name = '.'.join(os.path.commonprefix(around))
            calls[name] = calls.get(name, 0) + 1
            products[name if calls[name] == 1 else f'{name}#{calls[name]}'] = product
        return products


def _ignores_values(func: Any) -> bool:
    """True for operations like `zeros_like`, which take from a tensor only its shape."""
    name = func.overloadpacket.__name__
    return name.endswith('_like') or name.startswith('new_')


def _is_broadcast(x: torch.Tensor, shape: torch.Size) -> bool:
    """True if x is repeated along an axis to get this shape, by the operation or by an earlier `expand`."""
    return x.shape != shape or any(stride == 0 and size > 1 for stride, size in zip(x.stride(), shape))
