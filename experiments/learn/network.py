"""Small networks that differ in their activation or gate alone, many of them trained side by side.

A network is GmNet's block without what an experiment of seconds can do without: a linear stem; residual blocks of a
depthwise 3x3 convolution (where there are maps), normalisation, a linear map to a wider space, the activation or gate,
a linear map back and normalisation; a linear head. Normalisation is batch normalisation without parameters, by the
statistics of the batch at hand in evaluation too. Maps wrap around. So a network without activation is linear, and
prefers no frequency before it has seen data.

Replicas (seeds, learning rates) are the first axis of every tensor: parameters (R, out, in), features (R, C, N) with
N = points, or images times positions.
"""
import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from experiments.variants import Variant

__all__ = ['Network', 'train_step']

Parameters = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Network:
    """Architecture of the replicas.

    Attributes:
        variant: Activation or gate.
        inputs: Number of input channels.
        outputs: Number of outputs.
        width: Channels of the residual stream.
        expansion: Hidden channels per channel of a network with one branch. With two branches the hidden space is
            narrower, such that the number of parameters is the same to a per cent.
        blocks: Number of blocks.
        grid: Side of the maps, 0 for points.
        pooled: Average over positions before the head; otherwise it sees them all.
        scale: Standard deviation of what enters the activation at the start, about.
    """

    variant: Variant
    inputs: int
    outputs: int
    width: int = 32
    expansion: int = 3
    blocks: int = 3
    grid: int = 0
    pooled: bool = True
    scale: float = 1.

    @property
    def hidden(self) -> int:
        one_branch = self.width * self.expansion
        if self.variant.branches == 1:
            return one_branch
        return round(one_branch * (2 * self.width + 1) / (3 * self.width + 2))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of each parameter of one replica, biases as columns."""
        shapes = {'stem': (self.width, self.inputs)}  # normalisation would take a bias away
        for i in range(self.blocks):
            if self.grid:
                shapes[f'{i}.depthwise'] = (self.width, 9)
            shapes[f'{i}.expand.weight'] = (self.hidden * self.variant.branches, self.width)
            shapes[f'{i}.expand.bias'] = (self.hidden * self.variant.branches, 1)
            shapes[f'{i}.project'] = (self.width, self.hidden)
        features = self.width if self.pooled or not self.grid else self.width * self.grid ** 2
        shapes['head.weight'], shapes['head.bias'] = (self.outputs, features), (self.outputs, 1)
        return shapes

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def initial(self, seeds: Sequence[int]) -> Parameters:
        """Normal weights with variance 1 / fan-in, times the scale before the activation; one replica per seed."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        parameters = {}
        for name, shape in self.shapes.items():
            fan_in = self.shapes[name.replace('bias', 'weight')][1]
            std = (self.scale if 'expand' in name else 1.) / math.sqrt(fan_in)
            parameters[name] = torch.stack([std * torch.randn(shape, generator=g) for g in generators])
        return parameters

    def __call__(self, p: Parameters, x: torch.Tensor, pre_gate: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Outputs (R, outputs, points or images) for inputs (R, inputs, N).

        Args:
            p: Parameters of R replicas.
            x: Inputs.
            pre_gate: A list that takes what enters the activation of each block.
        """
        h = torch.bmm(p['stem'], x)
        for i in range(self.blocks):
            z = self._depthwise(h, p[f'{i}.depthwise']) if self.grid else h
            z = torch.baddbmm(p[f'{i}.expand.bias'], p[f'{i}.expand.weight'], _normalize(z))
            if pre_gate is not None:
                pre_gate.append(z[:, :self.hidden])
            h = h + _normalize(torch.bmm(p[f'{i}.project'], self.variant(z)))
        h = _normalize(h)
        if self.grid:
            h = h.unflatten(-1, (-1, self.grid ** 2))
            h = h.mean(-1) if self.pooled else h.transpose(2, 3).flatten(1, 2)
        return torch.baddbmm(p['head.bias'], p['head.weight'], h)

    def _depthwise(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Depthwise 3x3 convolution of maps that wrap around, as a product of matrices: faster on small maps."""
        matrices = (weight @ _shifts(self.grid).flatten(1)).unflatten(-1, (self.grid ** 2,) * 2)
        return (h.unflatten(-1, (-1, self.grid ** 2)) @ matrices).flatten(-2)


def train_step(loss: torch.Tensor, p: Parameters, state: dict[str, Parameters], lr: torch.Tensor, step: int) -> None:
    """One step of Adam (0.9, 0.999, 1e-8 before the bias correction) with a learning rate per replica.

    Args:
        loss: Loss of each replica, (R,).
        p: Parameters, which are changed.
        state: Moments, an empty dictionary at first.
        lr: Learning rates (R,).
        step: Number of this step, from 1.
    """
    gradients = torch.autograd.grad(loss.sum(), list(p.values()))
    mean, square = state.setdefault('mean', {}), state.setdefault('square', {})
    size = (lr * math.sqrt(1 - .999 ** step) / (1 - .9 ** step))[:, None, None]
    with torch.no_grad():
        for (name, value), gradient in zip(p.items(), gradients):
            m = mean.setdefault(name, torch.zeros_like(value)).lerp_(gradient, .1)
            v = square.setdefault(name, torch.zeros_like(value)).mul_(.999).addcmul_(gradient, gradient, value=.001)
            value -= size * m / v.sqrt().add_(1e-8)


def _normalize(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:])  # each channel over points, images and positions


@functools.lru_cache
def _shifts(grid: int) -> torch.Tensor:
    """The nine shifts by up to one position on a grid that wraps around, as permutations (9, grid^2, grid^2)."""
    positions = torch.arange(grid ** 2).view(grid, grid)
    eye = torch.eye(grid ** 2)
    return torch.stack([
        eye[:, positions.roll((-v, -u), (0, 1)).flatten()] for v in (-1, 0, 1) for u in (-1, 0, 1)])
