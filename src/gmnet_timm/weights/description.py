"""The description of a model: what `timm.create_model` needs to build one that computes the same.

The shapes of tensors do not tell an activation, a pooling or an output stride, so a description is put together from
what a source states: the arguments of a training run, a config.json, the metadata of a safetensors file. Where only
tensors are known, the rest is assumed, and the description says so.
"""
import dataclasses
import difflib
import inspect
import json
import math
from typing import Any

import timm
import torch
from timm.models import split_model_name_tag
from torch import nn

from gmnet_timm import gmnet
from gmnet_timm.errors import UserError, listed, shown
from gmnet_timm.weights.architecture import SIZES, infer_architecture, shape_problems, size_architecture
from gmnet_timm.weights.config import Config
from gmnet_timm.weights.files import CheckpointError
from gmnet_timm.weights.layouts import to_authors

__all__ = [
    'ModelDescription', 'describe_config', 'describe_metadata', 'describe_tensors', 'describe_training',
    'is_model_name', 'near_names',
]

MODEL_KEY, ARGS_KEY, ASSUMED_KEY = 'model', 'model_args', 'assumed'  # in the metadata of a safetensors file

# Arguments of `timm.create_model` that change training only, or nothing.
_WITHOUT_EFFECT = {
    'drop_rate', 'drop_path_rate', 'drop_block_rate', 'recompute_gate', 'bn_momentum', 'scriptable', 'exportable',
    'no_jit', 'device', 'dtype',
}
# Values that only tensors being known leaves open, and what is then assumed: the published models' values.
_ASSUMED = {'act_layer': 'relu6', 'global_pool': 'avg', 'output_stride': 32}
ALL_ARGS = 'model_kwargs'  # what a model of timm's, known by its name alone, leaves open


@dataclasses.dataclass(frozen=True)
class ModelDescription:
    """A model by name and arguments.

    Attributes:
        name: Name of a model in timm's registry.
        model_args: Arguments of `timm.create_model` that change what the model computes or the shapes of its tensors.
            What is not among them has the default of `name`. Values are those of JSON.
        assumed: Names of arguments that no source states, so that the defaults of `name` had to be assumed.
    """

    name: str
    model_args: dict[str, Any]
    assumed: tuple[str, ...] = ()

    @property
    def is_gmnet(self) -> bool:
        return self.size in SIZES

    @property
    def size(self) -> str:
        """The name without the tag of its weights."""
        return split_model_name_tag(self.name)[0]

    @property
    def full_args(self) -> dict[str, Any]:
        """Of a GmNet, every argument that changes what it computes, defaults included; else `model_args`."""
        if not self.is_gmnet:
            return self.model_args
        known = {**_gmnet_defaults(), **dataclasses.asdict(size_architecture(self.size)), **self.model_args}
        known['init_values'] = 1e-6 if known['init_values'] else 0.  # its value is in the tensors, if there are any
        return {key: _as_json(value) for key, value in known.items()}

    @property
    def distinct_args(self) -> dict[str, Any]:
        """The arguments whose values are not the defaults of `name`, classes and three channels left out."""
        defaults = ModelDescription(self.name, {}).full_args
        args = {key: value for key, value in self.full_args.items() if value != defaults.get(key)}
        args.pop('num_classes', None)
        return args

    def create(self, **kwargs: Any) -> nn.Module:
        """Build the model with random weights, in evaluation mode; keyword arguments as for `timm.create_model`.

        Raises:
            UserError: timm cannot build it.
        """
        try:
            return timm.create_model(self.name, **{**self.model_args, **kwargs}).eval()
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as e:
            raise UserError(f'timm cannot build {self}: {" ".join(str(e).split())[:300]}') from e

    def check_fits(self, state_dict: dict[str, torch.Tensor], where: str) -> None:
        """Check that tensors are those of this GmNet, by name and shape.

        Args:
            state_dict: The tensors, under the authors' names.
            where: What describes them so, for the error.

        Raises:
            CheckpointError: They are not.
        """
        problem = self._implausible(len(state_dict))
        if problem is None:
            shapes = {key: tuple(value.shape) for key, value in state_dict.items()}
            expected, _ = to_authors(self.create(device='meta').state_dict())
            problem = shape_problems(expected, shapes)
        if problem:
            raise CheckpointError(f'The tensors are not those of {self}, as {where} would have it. {problem}.')

    def stated(self, args: dict[str, Any]) -> 'ModelDescription':
        """This description with arguments that the user states.

        Raises:
            UserError: An argument contradicts the source, or the model does not have it.
        """
        if not args:
            return self
        stated = _checked(self.name, args, 'The command line')
        known, new = self.full_args, dataclasses.replace(self, model_args={**self.model_args, **stated.model_args})
        open_args = {*self.assumed, 'norm_layer'} if self.assumed else set()
        for key in stated.model_args:
            if key not in open_args and ALL_ARGS not in open_args and new.full_args[key] != known.get(key):
                raise UserError(
                    f'The source says {key} {known.get(key)!r}, the command line says {stated.model_args[key]!r}. '
                    'State only what the source leaves open.')
        left_open = tuple(key for key in self.assumed if key not in stated.model_args and key != ALL_ARGS)
        return dataclasses.replace(new, assumed=left_open)

    def __str__(self) -> str:
        """The call that builds it."""
        args = {**self.model_args}
        if self.is_gmnet:
            args = {'in_chans': self.full_args['in_chans'], 'num_classes': self.full_args['num_classes'],
                    **self.distinct_args}
        return f"timm.create_model({self.name!r}{''.join(f', {key}={value!r}' for key, value in args.items())})"

    def as_metadata(self) -> dict[str, str]:
        """What a safetensors file records of a description, see `describe_metadata`."""
        metadata = {MODEL_KEY: self.size, ARGS_KEY: json.dumps(self.full_args, sort_keys=True, allow_nan=False)}
        if self.assumed:
            metadata[ASSUMED_KEY] = json.dumps(list(self.assumed))
        return metadata

    def _implausible(self, tensors: int) -> str | None:
        """Why the model must not be built to compare it with tensors: a description may ask for a huge network."""
        args = self.full_args
        depths, ratios = args['depths'], args['mlp_ratios']
        whole = [args['base_dim'], args['stem_chs'], args['in_chans'], *_items(depths), *_items(ratios)]
        if not all(type(n) is int and 0 < n < 2 ** 20 for n in whole) or type(args['num_classes']) is not int:
            return 'These are not sizes of a network'
        if len(depths) > 16 or sum(depths) * 16 > tensors:
            return f'Tensors of its {sum(depths)} blocks are missing'
        return None


def describe_training(args: dict[str, Any], where: str, base: Config | None = None) -> ModelDescription:
    """The model that timm's train.py builds from its arguments.

    Args:
        args: Arguments of train.py by their names in its namespace.
        where: What says so, for errors.
        base: The configuration behind a model name with a scheme, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.

    Raises:
        UserError: They name no model, or one that cannot be carried over; the message names the argument.
    """
    name = args.get('model')
    if not isinstance(name, str) or not name:
        raise UserError(f'{where} names no model.')
    if args.get('split_bn'):
        raise UserError(f'{where} says split_bn: its BatchNorms are split into parts, which no model of timm can load.')
    model_kwargs = args.get('model_kwargs') or {}
    if not isinstance(model_kwargs, dict):
        raise UserError(f'{where}: model_kwargs {shown(model_kwargs)} is not a mapping.')
    model_args: dict[str, Any] = {}
    if base is not None:
        name, model_args = base.name, {**base.model_args, 'num_classes': base.num_classes}
    elif is_model_name(name) and (cfg := timm.get_pretrained_cfg(name)) is not None:
        model_args = {'num_classes': cfg.num_classes}
    input_size = args.get('input_size')
    chans = args.get('in_chans') or (input_size[0] if isinstance(input_size, (list, tuple)) and input_size else 3)
    model_args['in_chans'] = chans
    for key, arg in (('num_classes', 'num_classes'), ('global_pool', 'gp'), ('bn_eps', 'bn_eps')):
        if args.get(arg) is not None:
            model_args[key] = args[arg]
    return _checked(name, {**model_args, **model_kwargs}, where)


def describe_config(config: Config) -> ModelDescription:
    """The model that a config.json describes."""
    return _checked(config.name, {**config.model_args, 'num_classes': config.num_classes}, str(config.path))


def describe_metadata(metadata: dict[str, Any], where: str) -> ModelDescription | None:
    """The model that the metadata of a safetensors file describes, None if they describe none.

    Raises:
        UserError: They are not what this package writes.
    """
    if MODEL_KEY not in metadata or ARGS_KEY not in metadata:
        return None
    try:
        args, assumed = json.loads(metadata[ARGS_KEY]), json.loads(metadata.get(ASSUMED_KEY, '[]'))
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f'{where}: its metadata cannot be read. {e}') from e
    if not isinstance(args, dict) or not isinstance(assumed, list) or not set(map(str, assumed)) <= set(_ASSUMED):
        raise UserError(f'{where}: its metadata does not describe a model.')
    return dataclasses.replace(_checked(metadata[MODEL_KEY], args, where), assumed=tuple(map(str, assumed)))


def describe_tensors(state_dict: dict[str, torch.Tensor], name: str | None = None) -> ModelDescription:
    """The model that tensors alone suggest: a GmNet, or the model `name` with their classes and channels.

    Raises:
        CheckpointError: They are not a GmNet's, and no name was given.
        UserError: timm knows no model of that name.
    """
    if name is not None and split_model_name_tag(name)[0] not in SIZES:
        return ModelDescription(name, _head_and_stem(name, state_dict), (ALL_ARGS,))
    architecture = infer_architecture(state_dict)
    size = name or architecture.nearest_size
    args: dict[str, Any] = dict(in_chans=architecture.in_chans, num_classes=architecture.num_classes)
    if architecture.global_pool != 'avg':
        args['global_pool'] = architecture.global_pool
    assumed = tuple(key for key in _ASSUMED if key not in args)
    return _checked(size, {**args, **architecture.differences(split_model_name_tag(size)[0])}, 'The file', assumed)


def is_model_name(name: str) -> bool:
    """Whether timm knows a model, with the tag of its weights if one is given: gmnet_s1.pth.tar is not one."""
    if not timm.is_model(split_model_name_tag(name)[0]):
        return False
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # no such tag
        return False
    return True


def near_names(name: str) -> str:
    """A sentence with the models whose names are most like a mistyped one."""
    models = timm.list_models()
    # the names themselves, and as long a piece of each, so that vit_tinny is near vit_tiny_patch16_224
    pieces = {known[:len(name)]: known for known in reversed(models)} | {known: known for known in models}
    near = dict.fromkeys(pieces[piece] for piece in difflib.get_close_matches(name, pieces, n=4, cutoff=.75))
    if near:
        return f'Did you mean {" or ".join(near)}?'
    return f'Models of this package: {", ".join(timm.list_models("gmnet*"))}.'


def _checked(name: str, args: dict[str, Any], where: str, assumed: tuple[str, ...] = ()) -> ModelDescription:
    """A description, after refusing what cannot be carried over."""
    if not isinstance(name, str) or not is_model_name(name):
        raise UserError(f'{where} names {shown(name)!r}, which is not a model that timm knows.')
    args = {key: value for key, value in args.items() if value is not None and key not in _WITHOUT_EFFECT}
    if split_model_name_tag(name)[0] in SIZES:
        strangers = [key for key in args if key not in _gmnet_defaults()]
        if strangers:
            raise UserError(f'{where}: {listed(strangers)} cannot be carried over: GmNet has no such argument.')
    for key, value in args.items():
        if not _is_json(value):
            raise UserError(f'{where}: {key} {shown(value)} cannot be carried over: config.json cannot hold it.')
    return ModelDescription(name, {key: _as_json(value) for key, value in args.items()}, assumed)


def _is_json(value: Any, depth: int = 4) -> bool:
    """Whether JSON can hold a value. Arguments of models are neither deep nor long: aliases can make them so."""
    if isinstance(value, (list, tuple, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and len(value) <= 100 and all(_is_json(item, depth - 1) for item in items)
    return isinstance(value, (str, bool, int)) or value is None or isinstance(value, float) and math.isfinite(value)


def _as_json(value: Any) -> Any:
    """A value as JSON and YAML give it back, with lists for tuples, however deep."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) and value else [None]


def _gmnet_defaults() -> dict[str, Any]:
    """Arguments of GmNet that change what it computes, with their defaults."""
    parameters = inspect.signature(gmnet.GmNet).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _WITHOUT_EFFECT}


def _head_and_stem(name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Classes and input channels of a state dict, from the shapes of the layers that timm's configuration names."""
    if not is_model_name(name):
        raise UserError(f'timm knows no model {name}. {near_names(name)}')
    cfg = timm.get_pretrained_cfg(name)

    def size(layer: Any, dim: int) -> int | None:
        weight = state_dict.get(f'{layer}.weight')
        return None if weight is None or weight.dim() <= dim else weight.shape[dim]

    found = dict(num_classes=size(cfg and cfg.classifier, 0), in_chans=size(cfg and cfg.first_conv, 1))
    return {key: value for key, value in found.items() if value is not None}
