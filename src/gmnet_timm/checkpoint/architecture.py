"""Reading GmNet checkpoints: from the authors, from timm's train.py, or as safetensors.

What a checkpoint holds is worked out from the shapes of its tensors, never from its name: three of the four published
sizes are reconstructions, and files get renamed.
"""
import argparse
import dataclasses
import functools
import re
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.models import load_state_dict

from gmnet_timm import gmnet
from gmnet_timm.checkpoint.integrity import (
    DamageError,
    _listed,
    check_container,
    check_values,
    recorded_sha256,
    weights_sha256,
)
from gmnet_timm.errors import UserError

__all__ = [
    'Architecture', 'CheckpointError', 'infer_architecture', 'load_model', 'read_checkpoint_entries', 'read_state_dict',
    'require_ema',
]

REGISTERED_SIZES = ('gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4')

_TENSORS_PER_BLOCK = 19  # four convolutions, two BatchNorms and the layer scale


class CheckpointError(UserError, ValueError):
    """A file that is not a usable GmNet checkpoint."""


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


def read_state_dict(path: Union[str, Path], use_ema: bool = True) -> Dict[str, torch.Tensor]:
    """Read the weights of a checkpoint file, without running any code that it may carry.

    Takes what timm takes: a state dict, bare or under `state_dict_ema`, `model_ema`, `state_dict` or `model`, with or
    without the `module.` prefix of DistributedDataParallel, in torch's or in safetensors format.

    Args:
        path: Checkpoint file.
        use_ema: Prefer averaged weights where the file has them.

    Returns:
        Tensors by parameter name, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged as far as that can be known (checksums, a recorded hash, values
            that are not finite), holds something else, or is a pickle that needs code to run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f'No checkpoint at {path}: give the path of a file.')
    try:
        check_container(path)
        state_dict = load_state_dict(str(path), use_ema=use_ema, device='cpu', weights_only=True)
    except Exception as e:  # a damaged file can make the unpickler and the zip reader raise almost anything
        raise CheckpointError(f'{path} cannot be read as a checkpoint. {_reason(e)}') from e
    if not state_dict:
        raise CheckpointError(f'{path} holds no weights.')
    strangers = [key for key, value in state_dict.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise CheckpointError(f'{path} holds no state dict: {_listed(strangers)} are no tensors.')
    try:
        check_values(state_dict, path.stat().st_size)
    except DamageError as e:
        raise CheckpointError(f'{path} holds no usable weights. {e}.') from e
    recorded = recorded_sha256(path)
    if recorded is not None and recorded != weights_sha256(state_dict):
        raise CheckpointError(f'{path} is damaged: its weights do not have the SHA-256 that it records.')
    return state_dict


def read_checkpoint_entries(path: Union[str, Path]) -> Dict[str, Any]:
    """What train.py saved beside the weights (`epoch`, `args`, `state_dict_ema`, …), without running any code.

    Args:
        path: Checkpoint file, one that `read_state_dict` accepts.

    Returns:
        Entries by name, their tensors left on disk where the format allows. None for safetensors and bare state dicts.
    """
    if str(path).endswith('.safetensors'):
        return {}
    with torch.serialization.safe_globals([argparse.Namespace]):
        entries = torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    if not isinstance(entries, dict):
        return {}
    return {key: value for key, value in entries.items() if not isinstance(value, torch.Tensor)}


def require_ema(path: Union[str, Path]) -> None:
    """Check that a file has averaged weights, where `use_ema` alone would fall back to the others.

    Raises:
        CheckpointError: It has none.
    """
    if not any(key in read_checkpoint_entries(path) for key in ('state_dict_ema', 'model_ema')):
        raise CheckpointError(f'{path} has no averaged (EMA) weights.')


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
        CheckpointError: As by `read_state_dict` and `infer_architecture`.
    """
    state_dict = read_state_dict(path, use_ema=use_ema)
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
        raise CheckpointError(f'This is not a GmNet: it has no {key} (it starts with {_listed(list(shapes))}).')
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
    found = [f'{what}: {_listed(keys)}' for what, keys in problems.items() if keys]
    if found:
        raise CheckpointError(f'The tensors do not make a GmNet. {"; ".join(found)}.')


def _reason(error: Exception) -> str:
    text = ' '.join(str(error).split())
    if 'weights_only' in text or 'Weights only' in text:
        blocked = re.search(r'Unsupported globals: (.*?)\. No automatic', text)  # timm's message, where it knows them
        names = f' It asks for {blocked.group(1)[:200]}.' if blocked else ''
        return f'It is in another format, or a pickle that would run code, which is refused.{names}'
    if isinstance(error, DamageError):
        return f'{error}.'
    return f'It is damaged or in another format ({type(error).__name__}: {text.split(". ")[0][:200]}).'
