"""The models to look at: by timm's names, from folders, from the Hub, or from checkpoints of training runs."""
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional

import timm
import yaml
from timm.data import resolve_data_config
from torch import nn

from gmnet_timm.checkpoint.architecture import infer_architecture
from gmnet_timm.checkpoint.reading import read_checkpoint
from gmnet_timm.errors import UserError

__all__ = ['Subject', 'load_subject', 'read_run_args', 'run_checkpoints']


@dataclass
class Subject:
    """A trained model in evaluation mode and how it wants its images."""

    name: str
    model: nn.Module
    data_config: Dict[str, Any]
    origin: Dict[str, Any] = field(default_factory=dict)  # what is needed to load it again

def load_subject(spec: str, use_ema: bool = True, **data_args: Any) -> Subject:
    """Load a model with its weights.

    Args:
        spec: What timm.create_model takes (a name, `local-dir:FOLDER`, `hf-hub:OWNER/NAME`), a checkpoint file in a run
            folder of train.py or of the demo, a checkpoint file of a GmNet, or `NAME=FILE` for one of another model.
        use_ema: Prefer averaged weights where a checkpoint has them.
        **data_args: Take precedence over the model's own, under the names of train.py: `img_size`, `crop_pct`, ….

    Raises:
        UserError: There is no such model, no weights for it, or they do not fit.
    """
    data_args = {name: value for name, value in data_args.items() if value is not None}
    name, equals, path = spec.partition('=')
    if equals:
        return _from_checkpoint(Path(path), dict(model=name), use_ema, data_args)
    if Path(spec).is_file():
        run = Path(spec).parent
        args = read_run_args(run) if (run / 'args.yaml').is_file() else {}
        return _from_checkpoint(Path(spec), args, use_ema, data_args)
    try:
        model = timm.create_model(spec, pretrained=True)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f'{spec} is no file, and timm cannot create a model with weights from it: {e}') from e
    return Subject(spec, model.eval(), _data_config(model, {}, data_args), dict(model=spec))


def read_run_args(run: Path) -> Dict[str, Any]:
    """Read the arguments of a training run from its args.yaml.

    Raises:
        UserError: There is none, or it names no model.
    """
    try:
        args = yaml.safe_load((run / 'args.yaml').read_text())
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f'{run} is no run folder of train.py: its args.yaml cannot be read ({e}).') from e
    if not isinstance(args, dict) or not args.get('model'):
        raise UserError(f'{run} is no run folder of train.py: its args.yaml names no model.')
    return args


def run_checkpoints(run: Path) -> Dict[int, Path]:
    """Checkpoints of a training run by epoch, in order. train.py keeps the best `--checkpoint-hist` of them.

    Raises:
        UserError: There are none.
    """
    found = {}
    for path in run.glob('checkpoint-*.pth.tar'):
        match = re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', path.name)
        if match:
            found[int(match.group(1))] = path
    if not found:
        raise UserError(f'{run} holds no checkpoint-EPOCH.pth.tar.')
    return dict(sorted(found.items()))


def _from_checkpoint(path: Path, args: Dict[str, Any], use_ema: bool, data_args: Dict[str, Any]) -> Subject:
    state_dict = read_checkpoint(path, use_ema=use_ema).state_dict
    if args:
        model_args = _head_and_stem(args['model'], state_dict)
        model_args.update(args.get('model_kwargs') or {})
        if args.get('gp'):
            model_args['global_pool'] = args['gp']
        try:
            model = timm.create_model(args['model'], **model_args)
        except (RuntimeError, TypeError, ValueError) as e:
            raise UserError(f'timm cannot create {args["model"]} for {path}: {e}') from e
    else:
        architecture = infer_architecture(state_dict)
        args = dict(model=architecture.nearest_model_name)
        model_args = architecture.model_args
        model = architecture.build()
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as e:
        raise UserError(f'{path} does not fit {args["model"]}: {" ".join(str(e).split())[:300]} …') from e
    args.setdefault('in_chans', model_args.get('in_chans'))
    return Subject(
        f'{args["model"]} {path}',
        model.eval(),
        _data_config(model, args, data_args),
        dict(model=args['model'], model_args=model_args, checkpoint=str(path), use_ema=use_ema),
    )


def _data_config(model: nn.Module, run_args: Dict[str, Any], data_args: Dict[str, Any]) -> Dict[str, Any]:
    """How images are prepared: as asked for, else as in the run, else as the model's configuration says."""
    known = ('input_size', 'img_size', 'in_chans', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    args = {key: run_args[key] for key in known if run_args.get(key) is not None}
    if 'img_size' in data_args:
        size = args.pop('input_size', None)  # it would win over img_size
        args.setdefault('in_chans', size[0] if size else getattr(model, 'in_chans', 3))
    try:
        config = resolve_data_config({**args, **data_args}, model=model)
    except AssertionError as e:
        raise UserError('Mean or standard deviation of the images have not one value, nor one a channel.') from e
    channels = config['input_size'][0]
    for name in ('mean', 'std'):
        if len(config[name]) != channels:
            raise UserError(
                f'The {name} of the images has {len(config[name])} values, the model takes {channels} channels: '
                f'give one value or {channels} by --{name}.')
    return config


def _head_and_stem(name: str, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """Classes and input channels of a state dict, from the shapes of the layers that timm's configuration names."""
    if not timm.is_model(name):
        raise UserError(f'timm knows no model {name}.')
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)

    def size(layer: Optional[Any], dim: int) -> Optional[int]:
        weight = state_dict.get(f'{layer}.weight')
        return None if weight is None or weight.dim() <= dim else weight.shape[dim]

    found = dict(num_classes=size(cfg and cfg.classifier, 0), in_chans=size(cfg and cfg.first_conv, 1))
    return {key: value for key, value in found.items() if value is not None}
