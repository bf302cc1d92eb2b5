"""The roofline: the least time that a model can take on a machine, from its work and the machine's measured peaks."""
import dataclasses

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .machine import set_arithmetic
from .runtimes import DTYPES, RUNTIMES, Forward, Unsupported

__all__ = ['Peak', 'Work', 'matmul_forwards', 'measure_work']


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that one forward pass must do, for one image of a batch.

    Counted are convolutions, linear layers and matmuls, nothing else: every activation, norm, sum and gate could be
    fused into the kernel before it. Each reads its inputs once and writes its output once.
    """

    macs: int  # multiply-adds
    weights: int  # elements that are read once for a batch, whatever its size
    activations: int  # elements that are read and written for every image


@dataclasses.dataclass(frozen=True)
class Peak:
    """The fastest the machine was seen to work, in the run that is judged by it."""

    compute_macs_per_s: dict[str, float]  # multiply-adds of the fastest large matmul, by dtype
    bandwidth_bytes_per_s: float  # memory bandwidth of a large copy, reads and writes

    def roofline_ms(self, work: Work, batch_size: int, dtype: str) -> float:
        """The least time of a forward pass: compute or memory, whichever takes longer."""
        compute = batch_size * work.macs / self.compute_macs_per_s[dtype]
        elements = work.weights + batch_size * work.activations
        return 1e3 * max(compute, elements * DTYPES[dtype].itemsize / self.bandwidth_bytes_per_s)


class _Traffic(TorchDispatchMode):
    """Counts the elements that convolutions and matmuls read and write."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.elements += sum(t.numel() for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor))
        return out


def measure_work(net: nn.Module, x: torch.Tensor) -> Work:
    """Count the work of a (fused) model; `x` is one image, (1, C, H, W)."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        net(x)
    elements = []
    for batch in (x, torch.cat([x, x])):
        with torch.no_grad(), _Traffic() as traffic:
            net(batch)
        elements.append(traffic.elements)
    activations = elements[1] - elements[0]
    return Work(flops.get_total_flops() // 2, elements[0] - activations, activations)


def matmul_forwards(size: int, device: str, dtype: str, threads: int) -> dict[str, Forward]:
    """The same matmul in each runtime's library: which is fastest differs between machines, by a factor of two."""
    forwards = {}
    set_arithmetic(dtype)
    matmul, x = nn.Linear(size, size, bias=False, device=device).eval(), torch.randn(size, size, device=device)
    for name in ('eager', 'onnxruntime', 'openvino'):  # compiled, it is that of eager
        try:
            with torch.no_grad():
                forwards[name] = RUNTIMES[name](matmul, x, dtype, threads)
        except (Unsupported, ImportError):
            continue
    return forwards
