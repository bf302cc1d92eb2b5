"""Which GmNet a set of tensors belongs to, worked out from their shapes.

Three of the four published sizes are reconstructions and files get renamed, so a name alone is not trusted.
"""
import dataclasses
import functools
import re
from typing import Any

import timm
import torch

from gmnet_timm.errors import listed
from gmnet_timm.weights.files import CheckpointError
from gmnet_timm.weights.layouts import to_authors

__all__ = ['SIZES', 'Architecture', 'infer_architecture', 'shape_problems', 'size_architecture']

SIZES = ('gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4')


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the shapes of tensors tell about a GmNet, as arguments of `GmNet`.

    They tell neither the activation nor the output stride, nor average from maximum pooling.
    """

    base_dim: int
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    stem_chs: int
    in_chans: int
    num_classes: int
    global_pool: str  # 'catavgmax' doubles the head's input, everything else is called 'avg'
    gate: str = 'identity'
    init_values: float = 1e-6  # 0 where there is no layer scale; its initial value leaves no trace

    @property
    def nearest_size(self) -> str:
        """The registered model that differs in the fewest of the arguments that define a size."""
        return min(SIZES, key=lambda name: len(self.differences(name)))

    def differences(self, name: str) -> dict[str, Any]:
        """Arguments that turn the registered model `name` into this one, without classes, channels and pooling."""
        theirs = size_architecture(name)
        fields = ('base_dim', 'depths', 'mlp_ratios', 'stem_chs', 'gate', 'init_values')
        return {field: getattr(self, field) for field in fields if getattr(self, field) != getattr(theirs, field)}


def infer_architecture(state_dict: dict[str, torch.Tensor]) -> Architecture:
    """Work out from tensor shapes which GmNet a state dict belongs to.

    Args:
        state_dict: Tensors by parameter name (meta tensors will do). Whether all of them fit, and no other is there, is
            not compared: `ModelDescription.check_fits` does that.

    Raises:
        CheckpointError: It is not a GmNet.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    if 'stem.0.weight' in shapes and 'stages.0.0.0.weight' in shapes:
        raise CheckpointError(
            'These weights were fused by reparameterize_model, which cannot be undone. Use the checkpoint before.')
    stem = _conv_shape(shapes, 'stem.0.conv.weight')
    num_stages = max(1, _count(shapes, r'stages\.(\d+)\.'))
    dims = [_conv_shape(shapes, f'stages.{i}.0.0.conv.weight')[0] for i in range(num_stages)]
    depths = tuple(_count(shapes, rf'stages\.{i}\.(\d+)\.f1\.conv\.weight$') - 1 for i in range(num_stages))
    if min(depths) < 1:
        raise CheckpointError(f'This is not a GmNet: its stages have {depths} blocks.')
    hidden = [_conv_shape(shapes, f'stages.{i}.1.f1.conv.weight')[0] for i in range(len(dims))]
    head = shapes.get('head.weight') or (0, dims[-1])  # () is not the shape of a head either
    return Architecture(
        base_dim=dims[0],
        depths=depths,
        mlp_ratios=tuple(h // dim for h, dim in zip(hidden, dims)),
        stem_chs=stem[0],
        in_chans=stem[1],
        num_classes=head[0],
        global_pool='catavgmax' if len(head) == 2 and head[1] == 2 * dims[-1] else 'avg',
        gate=_gate(shapes),
        init_values=1e-6 if 'stages.0.1.gamma' in shapes else 0.,
    )


@functools.lru_cache(maxsize=None)
def size_architecture(name: str) -> Architecture:
    """The architecture of a registered model, ours or timm's own, read from the model itself."""
    state_dict, _ = to_authors(timm.create_model(name, device='meta').state_dict())
    return infer_architecture(state_dict)


def _conv_shape(shapes: dict[str, tuple[int, ...]], key: str) -> tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f'This is not a GmNet: it has no {key} (it starts with {listed(list(shapes))}).')
    shape = shapes[key]
    if len(shape) != 4 or min(shape) < 1:
        raise CheckpointError(f'This is not a GmNet: {key} has shape {shape}, a convolution has four dimensions.')
    return shape


def _gate(shapes: dict[str, tuple[int, ...]]) -> str:
    """The gate of the first block, named by its tensors: a norm, a depthwise or a full convolution, or none."""
    if 'stages.0.1.gate.weight' in shapes:
        return 'ln'
    if 'stages.0.1.gate.conv.weight' not in shapes:
        return 'identity'
    return 'dw' if _conv_shape(shapes, 'stages.0.1.gate.conv.weight')[1] == 1 else 'fc'


def _count(shapes: dict[str, tuple[int, ...]], pattern: str) -> int:
    """One more than the largest number that `pattern` captures at the start of a key, 0 if there is none."""
    matches = (re.match(pattern, key) for key in shapes)
    numbers = (match.group(1) for match in matches if match)
    return max((int(number) + 1 for number in numbers if len(number) < 7), default=0)  # longer ones are not indices


def shape_problems(expected: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> str:
    """How names and shapes differ from those of a model's state dict, '' if they agree."""
    wanted = {key: tuple(value.shape) for key, value in expected.items()}
    problems = {
        'missing': [key for key in wanted if key not in shapes],
        'unexpected': [key for key in shapes if key not in wanted],
        'of another shape': [
            f'{key} {shapes[key]} instead of {shape}'
            for key, shape in wanted.items() if key in shapes and shapes[key] != shape
        ],
    }
    return '; '.join(f'{what}: {listed(keys)}' for what, keys in problems.items() if keys)
