"""Which GmNet do tensors belong to?

What a checkpoint holds is worked out from the shapes of its tensors, never from its name: three of the four published
sizes are reconstructions, and files get renamed.
"""
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch

from gmnet_timm import gmnet
from gmnet_timm.checkpoint.integrity import listed
from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint

__all__ = ['Architecture', 'infer_architecture', 'load_model']

REGISTERED_SIZES = ('gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4')

_TENSORS_PER_BLOCK = 19  # four convolutions, two BatchNorms and the layer scale


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What defines a GmNet, in the terms of `GmNet`'s arguments.

    Except for `act_layer`, which leaves no trace in the tensors: pass it to `build` where it is not ReLU6.
    """

    base_dim: int
    depths: Tuple[int, ...]
    mlp_ratios: Tuple[int, ...]
    stem_chs: int
    in_chans: int
    num_classes: int
    global_pool: str
    gate: str = 'identity'

    @classmethod
    def from_config(cls, name: str, args: Dict[str, Any]) -> 'Architecture':
        """What `timm.create_model(name, **args)` would build, without building it, as a config may ask for much.

        Raises:
            CheckpointError: `name` is no model of this package.
        """
        size = name.split('.')[0]
        if size not in REGISTERED_SIZES:
            raise CheckpointError(f'{name} is no GmNet. Models: {", ".join(REGISTERED_SIZES)}.')
        names = {field.name for field in dataclasses.fields(cls)}
        values: Dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in args.items()}
        return dataclasses.replace(_registered(size), **{key: values[key] for key in values if key in names})

    @property
    def model_name(self) -> Optional[str]:
        """The registered model with this base_dim, depths, mlp_ratios and gate, None if there is none."""
        name = self.nearest_model_name
        return None if self.differences(name) else name

    @property
    def nearest_model_name(self) -> str:
        """The registered model that differs in the fewest of them."""
        return min(REGISTERED_SIZES, key=lambda name: len(self.differences(name)))

    @property
    def model_args(self) -> Dict[str, Any]:
        """Arguments that make `timm.create_model(self.nearest_model_name, **args)` build this architecture."""
        args: Dict[str, Any] = dict(in_chans=self.in_chans, num_classes=self.num_classes)
        if self.global_pool != 'avg':
            args['global_pool'] = self.global_pool
        args.update({field: mine for field, mine, _ in self._compare(self.nearest_model_name)})
        return args

    def differences(self, name: str) -> List[str]:
        """What differs from the registered model `name`, one entry each; classes and channels do not count."""
        return [f'{field} {mine} instead of {theirs}' for field, mine, theirs in self._compare(name)]

    def describe(self) -> str:
        """One line: which registered model this is, or how it differs from the nearest, and how to build it."""
        name = self.nearest_model_name
        differences = self.differences(name)
        what = f'no registered model, nearest to {name} ({"; ".join(differences)})' if differences else name
        args = ''.join(f', {key}={value!r}' for key, value in self.model_args.items())
        return f"{what}: timm.create_model('{name}'{args})"

    def build(self, **kwargs: Any) -> gmnet.GmNet:
        """A model of this architecture with random weights; keyword arguments as for `timm.create_model`."""
        return getattr(gmnet, self.nearest_model_name)(**{**self.model_args, **kwargs})

    def _compare(self, name: str) -> List[Tuple[str, Any, Any]]:
        theirs = _registered(name)
        return [
            (field, getattr(self, field), getattr(theirs, field))
            for field in ('base_dim', 'depths', 'mlp_ratios', 'stem_chs', 'gate')
            if getattr(self, field) != getattr(theirs, field)
        ]


def infer_architecture(state_dict: Dict[str, torch.Tensor], verify: bool = True) -> Architecture:
    """Work out from tensor shapes which GmNet a state dict belongs to.

    Args:
        state_dict: Tensors by parameter name (meta tensors will do).
        verify: Also compare every name and shape with a model of that architecture.

    Raises:
        CheckpointError: It is not a GmNet, or its tensors contradict each other.
    """
    shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
    if 'stem.0.weight' in shapes and 'stages.0.0.0.weight' in shapes:
        raise CheckpointError(
            'These weights were folded by reparameterize_model, which cannot be undone. Use the checkpoint before.')
    stem = _conv_shape(shapes, 'stem.0.conv.weight')
    num_stages = max(1, _count(shapes, r'stages\.(\d+)\.'))
    dims = [_conv_shape(shapes, f'stages.{i}.0.0.conv.weight')[0] for i in range(num_stages)]
    depths = tuple(_count(shapes, rf'stages\.{i}\.(\d+)\.f1\.conv\.weight$') - 1 for i in range(num_stages))
    if min(depths) < 1:
        raise CheckpointError(f'This is not a GmNet: its stages have {depths} blocks.')
    hidden = [_conv_shape(shapes, f'stages.{i}.1.f1.conv.weight')[0] for i in range(len(dims))]
    head = shapes.get('head.weight') or (0, dims[-1])  # () is no shape of a head either
    architecture = Architecture(
        base_dim=dims[0],
        depths=depths,
        mlp_ratios=tuple(h // dim for h, dim in zip(hidden, dims)),
        stem_chs=stem[0],
        in_chans=stem[1],
        num_classes=head[0],
        global_pool='catavgmax' if len(head) == 2 and head[1] == 2 * dims[-1] else 'avg',
        gate=_gate(shapes),
    )
    if verify:
        _verify_shapes(shapes, architecture)
    return architecture


def load_model(path: Union[str, Path], use_ema: bool = True, **kwargs: Any) -> gmnet.GmNet:
    """Build the model that a checkpoint file holds and load its weights into it, in evaluation mode.

    Args:
        path: Checkpoint file.
        use_ema: Prefer averaged weights where the file has them.
        **kwargs: Further arguments of `timm.create_model`, such as `drop_path_rate`.

    Raises:
        CheckpointError: As by `read_checkpoint` and `infer_architecture`.
    """
    state_dict = read_checkpoint(path, use_ema=use_ema).state_dict
    try:
        model = infer_architecture(state_dict).build(**kwargs)
    except CheckpointError as e:
        raise CheckpointError(f'{path}: {e}') from e
    model.load_state_dict(state_dict)
    return model.eval()


@functools.lru_cache(maxsize=None)
def _registered(name: str) -> Architecture:
    """The architecture of a registered model, read from the model itself."""
    return infer_architecture(getattr(gmnet, name)(device='meta').state_dict(), verify=False)


def _conv_shape(shapes: Dict[str, Tuple[int, ...]], key: str) -> Tuple[int, ...]:
    if key not in shapes:
        raise CheckpointError(f'This is not a GmNet: it has no {key} (it starts with {listed(list(shapes))}).')
    shape = shapes[key]
    if len(shape) != 4 or min(shape) < 1:
        raise CheckpointError(f'This is not a GmNet: {key} has shape {shape}, a convolution has four dimensions.')
    return shape


def _gate(shapes: Dict[str, Tuple[int, ...]]) -> str:
    """The gate of the first block, named by its tensors: a norm, a depthwise or a full convolution, or none."""
    if 'stages.0.1.gate.weight' in shapes:
        return 'ln'
    if 'stages.0.1.gate.conv.weight' not in shapes:
        return 'identity'
    return 'dw' if _conv_shape(shapes, 'stages.0.1.gate.conv.weight')[1] == 1 else 'fc'


def _count(shapes: Dict[str, Tuple[int, ...]], pattern: str) -> int:
    """One more than the largest number that `pattern` captures at the start of a key, 0 without any."""
    matches = (re.match(pattern, key) for key in shapes)
    numbers = (match.group(1) for match in matches if match)
    return max((int(number) + 1 for number in numbers if len(number) < 7), default=0)  # longer ones are no indices


def _verify_shapes(shapes: Dict[str, Tuple[int, ...]], architecture: Architecture) -> None:
    if sum(architecture.depths) * _TENSORS_PER_BLOCK > len(shapes):  # or this would build whatever a name pretends
        raise CheckpointError(f'This is not a GmNet: tensors of its {architecture.depths} blocks are missing.')
    model = architecture.build(device='meta')
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    problems = {
        'missing': [key for key in expected if key not in shapes],
        'unexpected': [key for key in shapes if key not in expected],
        'of another shape': [
            f'{key} {shapes[key]} instead of {shape}'
            for key, shape in expected.items() if key in shapes and shapes[key] != shape
        ],
    }
    found = [f'{what}: {listed(keys)}' for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f'The tensors do not make a GmNet. {"; ".join(found)}.')
