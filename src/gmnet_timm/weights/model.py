"""Where a model comes from: a run folder, a checkpoint, a folder with config.json, a repository, or timm's own weights.

Every command reads models here. What several places state about one model (a checkpoint's own `args`, the args.yaml or
config.json beside it, the metadata of a safetensors file) must agree. What none of them states is assumed, and the
description says so.
"""
import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models._hub import hf_split
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.weights.class_names import check_class_names, read_class_names
from gmnet_timm.weights.config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    WEIGHTS_NAMES,
    Config,
    download_repository,
    offline_without_address,
    read_config,
    read_hub_config,
)
from gmnet_timm.weights.description import (
    ModelDescription,
    describe_config,
    describe_metadata,
    describe_tensors,
    describe_training,
    is_model_name,
    near_names,
)
from gmnet_timm.weights.files import (
    SHA256_KEY,
    Checkpoint,
    CheckpointError,
    read_checkpoint,
    read_outline,
    weights_sha256,
)
from gmnet_timm.weights.layouts import LayoutError, named_as, to_authors
from gmnet_timm.weights.preprocessing import RUN_KEYS, resolve_preprocessing
from gmnet_timm.weights.runs import ARGS_NAME, read_args, train_args

__all__ = ['LoadedModel', 'Source', 'load_model', 'read_source', 'split_spec']

_RUN_CHECKPOINTS = ('model_best.pth.tar', 'last.pth.tar')


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights, and everything that is stated about their model.

    Attributes:
        folder: Folder that was named, None where a file was.
        checkpoint: The weights as their file holds them.
        state_dict: The weights; of a GmNet, under the authors' names and in torch's layouts.
        description: The model.
        data_config: Preprocessing, as arguments of `timm.data.create_transform`.
        recorded_config: The same without what the user states.
        class_names: Names of the classes in their order, None if unknown.
        run_args: Arguments of train.py, {} if unknown.
        config: The config.json beside the weights, None if there is none.
        stated_by: What describes the model: files, or nothing but the tensors.
        stated: Arguments of the model that the user states.
        notes: What was chosen or assumed, in whole sentences.
    """

    folder: Path | None
    checkpoint: Checkpoint
    state_dict: dict[str, torch.Tensor]
    description: ModelDescription
    data_config: dict[str, Any]
    recorded_config: dict[str, Any]
    class_names: list[str] | None
    run_args: dict[str, Any]
    config: Config | None
    stated_by: tuple[str, ...]
    stated: dict[str, Any]
    notes: tuple[str, ...]

    def build(self) -> nn.Module:
        """The model with its weights, in evaluation mode.

        Raises:
            CheckpointError: The tensors do not fit it.
        """
        model = self.description.create()
        try:
            model.load_state_dict(named_as(self.state_dict, model))
        except RuntimeError as e:
            raise CheckpointError(
                f'{self.checkpoint.path} does not fit {self.description}: {" ".join(str(e).split())[:300]} …') from e
        return model


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained classifier in evaluation mode, and how it takes its images.

    Attributes:
        name: For tables and figures.
        model: The classifier.
        data_config: Preprocessing, as arguments of `timm.data.create_transform`.
        class_names: Names of the classes in their order, None if unknown.
        provenance: What is needed to load it again, for reports.
        notes: What was chosen or assumed, in whole sentences.
    """

    name: str
    model: nn.Module
    data_config: dict[str, Any]
    class_names: list[str] | None
    provenance: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_source(
        spec: str | Path,
        *,
        checkpoint: str | None = None,
        use_ema: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        class_names: str | None = None,
) -> Source:
    """Read a model from files.

    Args:
        spec: A checkpoint file, an output folder of timm's train.py, a folder or repository that timm loads as
            `local-dir:` or `hf-hub:`, or `NAME=FILE` for a checkpoint of the registered model NAME.
        checkpoint: Name of the file to take from an output folder, by default its best checkpoint, else its last.
        use_ema: Take EMA weights where there are any.
        model_kwargs: Arguments of `timm.create_model` that the source leaves open.
        preprocessing: Arguments of train.py that replace the recorded ones: `img_size`, `crop_pct`, `mean`, ….
        class_names: Where to read class names, as for `read_class_names`.

    Raises:
        UserError: Something is missing, contradicts the tensors, or cannot be carried over; the message says what.
    """
    is_remote = str(spec).startswith(('hf-hub:', 'hf_hub:'))
    name, path = (None, download_repository(str(spec))) if is_remote else split_spec(spec)
    folder = path if path.is_dir() else None
    if folder is None and str(spec).startswith('local-dir:'):
        raise UserError(f'{spec} names no folder.')
    weights = read_checkpoint(_find_weights(path, checkpoint), use_ema=use_ema)
    try:
        state_dict, notes = to_authors(weights.state_dict)
    except LayoutError as e:
        raise CheckpointError(f'{weights.path}: {e}.') from e
    config = read_config(weights.path.parent) if _has_config(weights.path, folder) else None
    run_args = _run_args(weights)
    base = _base_of(run_args, weights.path)
    statements = _statements(weights, config, run_args, base)
    if name is not None and statements and name not in {n for d in statements.values() for n in (d.name, d.size)}:
        where, other = next(iter(statements.items()))
        raise UserError(f'{where} says that this is a {other.name}, not a {name}.')
    description = _agreed(statements) if statements else _assumed(weights.path, state_dict, name)
    description = description.stated(model_kwargs or {})
    if description.is_gmnet:
        description.check_fits(state_dict, ' and '.join(statements) or str(weights.path))
    else:
        state_dict, notes = weights.state_dict, []

    if weights.prefix:
        notes.append(f'The prefix {weights.prefix} of all names was removed.')
    if weights.has_ema:
        notes.append('The EMA weights of the checkpoint are taken.' if weights.ema
                     else 'The checkpoint has EMA weights too, which are not taken.')
    if description.assumed:
        notes.append(_assumption(description))
    described_by = config or base
    known = {**(described_by.pretrained_cfg if described_by else {}), **run_args}
    if not any(known.get(key) for key in RUN_KEYS) and not any((preprocessing or {}).values()):
        notes.append('The preprocessing was not recorded with these weights. That of the published models is taken.')
    recorded = int(description.full_args.get('in_chans') or 3), _base_cfg(description, described_by), run_args
    num_classes = int(description.full_args.get('num_classes') or 0)
    names = config.label_names if config is not None else None
    if class_names is not None:
        names = read_class_names(class_names, num_classes, run_args)
    elif names is not None:
        check_class_names(names, num_classes)
    return Source(
        folder=folder,
        checkpoint=weights,
        state_dict=state_dict,
        description=description,
        data_config=resolve_preprocessing(*recorded, preprocessing),
        recorded_config=resolve_preprocessing(*recorded) if not preprocessing else _recorded_or_empty(recorded),
        class_names=names,
        run_args=run_args,
        config=config,
        stated_by=tuple(statements),
        stated=dict(model_kwargs or {}),
        notes=tuple(notes),
    )


def load_model(
        spec: str,
        *,
        checkpoint: str | None = None,
        use_ema: bool = True,
        model_kwargs: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
) -> LoadedModel:
    """Load a classifier with its weights, from files as by `read_source`, or by one of timm's names.

    Args:
        spec: As for `read_source`, or what `timm.create_model` takes: `hf-hub:OWNER/NAME`, or the name of a model with
            pretrained weights.
        checkpoint: As for `read_source`.
        use_ema: As for `read_source`.
        model_kwargs: As for `read_source`; for a name of timm's, arguments of `timm.create_model`.
        preprocessing: As for `read_source`.

    Raises:
        UserError: There is no such model, no weights for it, or they do not fit.
    """
    timm_name = _timm_name(spec)
    if timm_name is None:
        return _from_files(read_source(
            spec, checkpoint=checkpoint, use_ema=use_ema, model_kwargs=model_kwargs, preprocessing=preprocessing))
    try:
        args = {**_input_args(timm_name, preprocessing), **(model_kwargs or {})}
        with offline_without_address():
            model = timm.create_model(timm_name, pretrained=True, **args).eval()
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError) as e:
        if ':' not in spec and not is_model_name(spec):
            raise UserError(f'{spec} is neither a file or folder nor a model of timm. {near_names(spec)}') from e
        known = timm.get_pretrained_cfg(spec) if ':' not in spec else None
        if known is not None and not known.has_weights:
            raise UserError(f'{spec} has no published weights. Give a checkpoint file, a folder of a training, or '
                            'hf-hub:OWNER/NAME.') from e
        raise UserError(f'{spec} cannot be loaded: {" ".join(str(e).split())[:400]}') from e
    _check_recorded(timm_name, model)
    cfg: dict[str, Any] = vars(model).get('pretrained_cfg') or {}
    labels = cfg.get('label_names')
    return LoadedModel(
        name=spec,
        model=model,
        data_config=resolve_preprocessing(_model_chans(model, cfg), cfg, stated=preprocessing),
        class_names=list(labels) if labels else None,
        provenance=dict(model=spec, model_args=model_kwargs or {}, weights_sha256=weights_sha256(model.state_dict())),
    )


def _timm_name(spec: str) -> str | None:
    """What `timm.create_model` takes, None for files that are read here.

    timm itself loads folders of other models: it resizes position embeddings, renames tensors, and takes other formats.
    """
    _, path = split_spec(spec)
    if path.is_dir() and (path / CONFIG_NAME).is_file():
        ours = any((path / name).is_file() for name in WEIGHTS_NAMES) and describe_config(read_config(path)).is_gmnet
        return None if ours else f'local-dir:{path}'
    return None if '=' in spec or spec.startswith('local-dir:') or path.exists() else spec


def _from_files(source: Source) -> LoadedModel:
    path = source.checkpoint.path
    cfg = timm.get_pretrained_cfg(source.description.name)
    fixed = source.description.model_args.get('img_size') or (cfg.input_size[-1] if cfg else None)
    if cfg is not None and cfg.fixed_input_size and source.data_config['input_size'][-1] != fixed:
        raise UserError(
            f'{source.description.name} in {path} takes images of {fixed} pixels, not '
            f'{source.data_config["input_size"][-1]}. Leave out --img-size, or state --model-kwargs img_size=….')
    return LoadedModel(
        name=f'{source.description.name} {path}',
        model=source.build(),
        data_config=source.data_config,
        class_names=source.class_names,
        provenance=dict(
            model=source.description.name,
            model_args=source.description.model_args,
            assumed=list(source.description.assumed),
            checkpoint=str(path),
            ema=source.checkpoint.ema,
            weights_sha256=weights_sha256(source.state_dict),
        ),
        notes=source.notes,
    )


def _input_args(name: str, preprocessing: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for another image size, for a model that takes images of one size only, such as a ViT."""
    size = (preprocessing or {}).get('img_size')
    cfg = timm.get_pretrained_cfg(name) if is_model_name(name) else None
    return {'img_size': size} if size and cfg is not None and cfg.fixed_input_size else {}


def split_spec(spec: str | Path) -> tuple[str | None, Path]:
    """The name and the path of `NAME=FILE`, `local-dir:FOLDER` or a path, whose own name may have a `=` in it."""
    text = str(spec)
    if text.startswith('local-dir:'):
        return None, Path(text.removeprefix('local-dir:') or 'local-dir:')
    name, equals, path = text.partition('=')
    if equals and not Path(text).exists():
        return name, Path(path)
    return None, Path(text)


def _find_weights(path: Path, checkpoint: str | None) -> Path:
    if not path.is_dir():
        if checkpoint is not None:
            raise UserError(f'{path} is not a folder: --checkpoint names a file of an output folder of train.py.')
        return path
    names = [checkpoint] if checkpoint is not None else [*WEIGHTS_NAMES, *_RUN_CHECKPOINTS]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(f'The folder {path} is neither a model nor a run of train.py: it has no {" or ".join(names)}.')


def _has_config(weights: Path, folder: Path | None) -> bool:
    """Whether a config.json beside the weights describes them. In a folder that the user named it always does."""
    return (folder is not None or weights.name in WEIGHTS_NAMES) and (weights.parent / CONFIG_NAME).is_file()


def _run_args(weights: Checkpoint) -> dict[str, Any]:
    """Arguments of train.py: of the checkpoint itself, else of the run folder that it lies in."""
    if weights.args:
        return train_args(weights.args)
    beside = weights.path.parent / ARGS_NAME
    return train_args(read_args(beside)) if beside.is_file() and weights.path.name.endswith('.pth.tar') else {}


def _base_of(run_args: dict[str, Any], path: Path) -> Config | None:
    """The configuration of the folder or repository that a training started from, None where it named a model."""
    name = run_args.get('model')
    return read_hub_config(name, str(path)) if isinstance(name, str) and ':' in name else None


def _statements(
        weights: Checkpoint,
        config: Config | None,
        run_args: dict[str, Any],
        base: Config | None,
) -> dict[str, ModelDescription]:
    """The descriptions of the model, by where they are written."""
    found = {}
    if run_args.get('model'):
        where = f'args of {weights.path}' if weights.args else str(weights.path.parent / ARGS_NAME)
        found[where] = describe_training(run_args, where, base)
        beside = weights.path.parent / ARGS_NAME
        if weights.args and beside.is_file() and weights.path.name.endswith('.pth.tar'):
            args = train_args(read_args(beside))
            found[str(beside)] = describe_training(args, str(beside), _base_of(args, beside))
    recorded = describe_metadata(weights.metadata, str(weights.path)) if weights.path.suffix == '.safetensors' else None
    if recorded is not None:
        found[f'metadata of {weights.path}'] = recorded
    if config is not None:
        found[str(config.path)] = describe_config(config)
    return found


def _agreed(statements: dict[str, ModelDescription]) -> ModelDescription:
    """The description that all agree on, with what the first assumed."""
    (first, description), *others = statements.items()
    for where, other in others:
        mine, theirs = description.full_args, other.full_args
        different = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        if different or description.is_gmnet != other.is_gmnet:
            key = different[0] if different else 'model'
            raise UserError(
                f'{first} and {where} describe different models: {key} {mine.get(key, description.name)!r} against '
                f'{theirs.get(key, other.name)!r}. Remove or correct the one that is wrong.')
    assumed = next((d.assumed for d in statements.values() if d.assumed), ())
    return dataclasses.replace(description, assumed=assumed)


def _assumed(path: Path, state_dict: dict[str, torch.Tensor], name: str | None) -> ModelDescription:
    """The model that the tensors alone suggest."""
    try:
        return describe_tensors(state_dict, name)
    except CheckpointError as e:
        foreign = name is None and 'not a GmNet' in str(e)
        hint = ' For a checkpoint of another model, give NAME=FILE.' if foreign else ''
        raise CheckpointError(f'{path}: {e}{hint}') from e


def _assumption(description: ModelDescription) -> str:
    if description.is_gmnet:
        values = ', '.join(f'{key} {description.full_args[key]}' for key in description.assumed)
        return f'Tensors alone do not tell {", ".join(description.assumed)}; assumed: {values}.'
    return f'The file does not say with which arguments {description.name} was built; none were assumed.'


def _recorded_or_empty(recorded: tuple[int, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Recorded preprocessing, {} where it does not work, so that the user had to state another."""
    try:
        return resolve_preprocessing(*recorded)
    except UserError:
        return {}


def _base_cfg(description: ModelDescription, config: Config | None) -> dict[str, Any]:
    if config is not None:
        return config.pretrained_cfg
    cfg = timm.get_pretrained_cfg(description.name)
    return cfg.to_dict() if cfg is not None else {}


def _model_chans(model: nn.Module, cfg: dict[str, Any]) -> int:
    chans = getattr(model, 'in_chans', None)
    return chans if isinstance(chans, int) else (cfg.get('input_size') or (3,))[0]


def _check_recorded(name: str, model: nn.Module) -> None:
    """Compare the weights that timm loaded with the SHA-256 that their file records, where it records one."""
    scheme, _, where = name.partition(':')
    path: str | Path | None = None
    if scheme == 'local-dir':
        path = Path(where, WEIGHTS_NAME)
    elif scheme in ('hf-hub', 'hf_hub'):
        with contextlib.suppress(OSError, ValueError):  # the repository has no such file
            repo_id, revision = hf_split(where)
            path = hf_hub_download(repo_id, WEIGHTS_NAME, revision=revision)
    recorded = read_outline(path)[0].get(SHA256_KEY) if path is not None and Path(path).is_file() else None
    if recorded is not None and recorded != weights_sha256(model.state_dict()):
        raise CheckpointError(
            f'{name} is damaged: the weights that timm loaded do not have the SHA-256 that they record.')
