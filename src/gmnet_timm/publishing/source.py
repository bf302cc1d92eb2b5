"""What there is to publish: weights, preprocessing, class names, metrics and recipe, and where each came from."""
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import yaml
from timm.data import ImageNetInfo, create_dataset, resolve_data_config

from gmnet_timm import gmnet
from gmnet_timm.checkpoint.architecture import Architecture, infer_architecture
from gmnet_timm.checkpoint.reading import CheckpointError, read_checkpoint
from gmnet_timm.errors import UserError

__all__ = ['Metric', 'Source', 'read_source']

WEIGHTS_NAME = 'model.safetensors'
CONFIG_NAME = 'config.json'
CARD_NAME = 'README.md'

_RUN_CHECKPOINTS = ('model_best.pth.tar', 'last.pth.tar')
_METRIC_NAMES = ('top1', 'top5')
_PREPROCESSING = ('img_size', 'input_size', 'in_chans', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')


@dataclasses.dataclass(frozen=True)
class Metric:
    """An accuracy that somebody measured."""

    name: str  # 'top1' or 'top5'
    value: float  # percent
    source: str  # what says so: a file, or 'given on the command line'


@dataclasses.dataclass(frozen=True)
class Source:
    """Everything that goes into a published repository."""

    state_dict: Dict[str, torch.Tensor]
    architecture: Architecture
    data_config: Dict[str, Any]  # preprocessing, in the terms of `timm.data.create_transform`
    label_names: Optional[List[str]]
    metrics: List[Metric]
    recipe: Dict[str, Any]  # arguments of timm's train.py, empty if unknown
    use_ema: bool
    notes: List[str]  # what was assumed or left out, for the user and for the card
    license: Optional[str] = None  # of weights that came with a config.json
    card: Optional[str] = None  # the README.md that came with the weights

    def build(self) -> gmnet.GmNet:
        """The model with its weights, in evaluation mode."""
        model = self.architecture.build()
        model.load_state_dict(self.state_dict)
        return model.eval()


def read_source(
        path: Union[str, Path],
        checkpoint: Optional[str] = None,
        use_ema: bool = False,
        classes: Optional[str] = None,
        preprocessing: Optional[Dict[str, Any]] = None,
        metrics: Optional[Dict[str, float]] = None,
        results_file: Optional[str] = None,
) -> Source:
    """Collect what is to be published.

    Args:
        path: A checkpoint file, an output folder of timm's train.py, or a folder that timm loads as `local-dir:`.
        checkpoint: Name of the file to take from an output folder, by default its best checkpoint, else its last.
        use_ema: Take averaged weights.
        classes: Class names: an image folder, a text file with a name a line, or `imagenet-1k`.
        preprocessing: Arguments of `timm.data.resolve_data_config` that replace those found.
        metrics: Accuracies in percent, `top1` and `top5`, that replace those found.
        results_file: CSV file of timm's validate.py with the accuracies of these weights.

    Raises:
        UserError: Something is missing, contradicts the tensors or must not be published; the message says what.
    """
    path = Path(str(path)[len('local-dir:'):] if str(path).startswith('local-dir:') else path)
    weights_path = _find_weights(path, checkpoint)
    read = read_checkpoint(weights_path, use_ema=use_ema)
    state_dict = read.state_dict
    if use_ema and not read.ema:
        raise CheckpointError(f'{weights_path} has no averaged (EMA) weights.')
    architecture = infer_architecture(state_dict)
    if not architecture.num_classes:
        raise CheckpointError(f'{weights_path} has no classifier: there is nothing to classify images with.')

    notes: List[str] = []
    config = _read_config(path, architecture)
    recipe = _read_recipe(path, read.args)
    found = {**config.get('pretrained_cfg', {}), **{key: recipe[key] for key in _PREPROCESSING if recipe.get(key)}}
    if not config and not recipe and not preprocessing:
        notes.append("The preprocessing is the published models', it was not recorded with these weights.")
    label_names = config.get('label_names') if classes is None else _read_classes(classes, architecture)
    if label_names is None and architecture.num_classes == 1000:
        notes.append('The class names are those of ImageNet-1k, assumed from the 1000 classes.')
        label_names = _read_classes('imagenet-1k', architecture)
    elif label_names is None:
        notes.append('The class names are unknown.')
    return Source(
        state_dict=state_dict,
        architecture=architecture,
        data_config=_resolve_preprocessing({**found, **(preprocessing or {})}, architecture),
        label_names=_check_labels(label_names, architecture),
        metrics=_collect_metrics(path, read.metadata, recipe, use_ema, metrics or {}, results_file, notes),
        recipe=recipe,
        use_ema=use_ema,
        notes=notes,
        license=config.get('pretrained_cfg', {}).get('license'),
        card=_read_text(path / CARD_NAME) if (path / CARD_NAME).is_file() else None,
    )


def _find_weights(path: Path, checkpoint: Optional[str]) -> Path:
    if not path.is_dir():
        if checkpoint is not None:
            raise UserError(f'{path} is no folder: --checkpoint names a file of an output folder of train.py.')
        return path
    names = [checkpoint] if checkpoint is not None else [WEIGHTS_NAME, *_RUN_CHECKPOINTS]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f'{path} has no {" or ".join(names)}.')


def _read_config(path: Path, architecture: Architecture) -> Dict[str, Any]:
    """The config.json of a `local-dir:` folder, {} if there is none, checked against the tensors."""
    file = path / CONFIG_NAME
    if not file.is_file():
        return {}
    try:
        config = json.loads(_read_text(file))
        args = {**config.get('model_args', {}), 'num_classes': config['num_classes']}
        described = Architecture.from_config(config['architecture'], args)
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f'{file} describes no GmNet. {type(e).__name__}: {e}') from e
    if described != architecture:
        raise UserError(
            f'{file} does not describe the tensors beside it. They are {architecture.describe()}; '
            f'it says {described.describe()}.')
    return config


def _read_recipe(path: Path, own_args: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of train.py: from args.yaml of the output folder, else from the checkpoint itself."""
    file = path / 'args.yaml'
    if not file.is_file():
        return own_args
    try:
        recipe = yaml.safe_load(_read_text(file))
    except yaml.YAMLError as e:
        raise UserError(f'{file} cannot be read: {e}') from e
    if not isinstance(recipe, dict):
        raise UserError(f'{file} holds no arguments of train.py.')
    return recipe


def _resolve_preprocessing(args: Dict[str, Any], architecture: Architecture) -> Dict[str, Any]:
    if args.get('img_size'):
        args = {**args, 'input_size': None, 'in_chans': architecture.in_chans}  # it replaces what else was found
    defaults = gmnet.default_cfgs['gmnet_s3'].default.to_dict()
    defaults['input_size'] = (architecture.in_chans, *defaults['input_size'][1:])
    try:
        config = resolve_data_config(args, pretrained_cfg=defaults)
        mean, std = (tuple(float(value) for value in config[key]) for key in ('mean', 'std'))
    except (AssertionError, TypeError, ValueError) as e:
        raise UserError(f'Wrong preprocessing: {args}') from e
    chans = architecture.in_chans
    mean, std = (values if len(values) in (1, chans) else (sum(values) / len(values),) for values in (mean, std))
    if config['input_size'][0] != chans or min(std) <= 0:
        raise UserError(f'The model takes {chans} channels, this preprocessing does not fit: {config}')
    return {**config, 'mean': mean, 'std': std}


def _read_classes(classes: str, architecture: Architecture) -> List[str]:
    if classes == 'imagenet-1k':
        return _imagenet_labels()
    path = Path(classes)
    if path.is_dir():
        try:
            indices = create_dataset('', root=str(path), split='train').reader.class_to_idx
        except RuntimeError as e:
            raise UserError(f'No class names in {classes}: {e}') from e
        return sorted(indices, key=indices.get)
    if path.is_file():
        return [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    raise UserError(f'No class names in {classes}: give a folder of images, a text file or imagenet-1k.')


def _imagenet_labels() -> List[str]:
    """timm's descriptions of the ImageNet-1k classes; the two pairs that share one also get their synset."""
    info = ImageNetInfo('imagenet-1k')
    names = info.label_names()
    texts = [info.label_name_to_description(name) for name in names]
    return [text if texts.count(text) == 1 else f'{text} ({names[i]})' for i, text in enumerate(texts)]


def _check_labels(label_names: Optional[List[str]], architecture: Architecture) -> Optional[List[str]]:
    if label_names is None:
        return None
    if not isinstance(label_names, list) or not all(isinstance(name, str) for name in label_names):
        raise UserError('Class names have to be a list of strings.')
    if len(label_names) != architecture.num_classes:
        raise UserError(f'{len(label_names)} class names do not fit a model of {architecture.num_classes} classes.')
    doubles = sorted({name for name in label_names if label_names.count(name) > 1})
    if doubles:
        raise UserError(f'Class names have to differ, these occur twice: {", ".join(doubles[:5])}')
    return label_names


def _collect_metrics(
        path: Path,
        entries: Dict[str, Any],
        recipe: Dict[str, Any],
        use_ema: bool,
        given: Dict[str, float],
        results_file: Optional[str],
        notes: List[str],
) -> List[Metric]:
    """Accuracies by precedence: flags, validate.py's CSV, the run's summary.csv."""
    summary = path / 'summary.csv'
    if given:
        return _metrics(given, 'given on the command line')
    if results_file is not None:
        rows = _read_csv(Path(results_file))
        if len(rows) != 1:
            raise UserError(f'{results_file} has {len(rows)} results, it has to have the one of these weights.')
        return _metrics(rows[0], f'validate.py ({Path(results_file).name})')
    if not summary.is_file():
        return []
    if bool(recipe.get('model_ema')) != use_ema:  # train.py evaluates the average as soon as there is one
        notes.append('The accuracies in summary.csv are of the averaged (EMA) weights, not of these.')
        return []
    rows = [row for row in _read_csv(summary) if row.get('epoch') == str(entries.get('epoch'))]
    if not rows:
        notes.append("summary.csv has no row for the checkpoint's epoch.")
        return []
    # a resumed run repeats epochs, the last one counts
    row = {key: rows[-1].get(f'eval_{key}') for key in _METRIC_NAMES}
    return _metrics(row, f'train.py (summary.csv, epoch {rows[-1]["epoch"]})')


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, ValueError) as e:
        raise UserError(f'{path} cannot be read as text: {e}') from e


def _read_csv(path: Path) -> List[Dict[str, str]]:
    try:
        return list(csv.DictReader(_read_text(path).splitlines()))
    except csv.Error as e:
        raise UserError(f'{path} cannot be read as CSV: {e}') from e


def _metrics(values: Dict[str, Any], source: str) -> List[Metric]:
    given = [name for name in _METRIC_NAMES if values.get(name) not in (None, '')]
    return [Metric(*_accuracy(name, values[name]), source) for name in given]


def _accuracy(name: str, text: Any) -> Tuple[str, float]:
    try:
        value = float(text)
    except ValueError as e:
        raise UserError(f'{name} {text} is no number.') from e
    if not 0 <= value <= 100:
        raise UserError(f'{name} {value} is no percentage.')
    return name, value
