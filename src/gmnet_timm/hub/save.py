"""A folder that timm and transformers load: weights, configuration and card, compared with its source."""
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import load_checkpoint
from timm.models._hub import save_config_for_hf
from torch import nn

from gmnet_timm.errors import TargetExistsError, UserError
from gmnet_timm.files import replacing_folder
from gmnet_timm.hub.card import model_card
from gmnet_timm.hub.loading import load_as_from_hub, same_logits
from gmnet_timm.hub.onnx import ONNX_NAME, find_difference, require_onnx, write_onnx
from gmnet_timm.hub.publication import Publication
from gmnet_timm.weights.config import CARD_NAME, CONFIG_NAME, LOCATION_KEYS, WEIGHTS_NAME
from gmnet_timm.weights.convert import save_weights
from gmnet_timm.weights.layouts import named_as
from gmnet_timm.weights.model import Source

__all__ = ['SavedFolder', 'other_weights', 'save_folder']

_WEIGHTS_SUFFIXES = ('.safetensors', '.bin', '.pth', '.pth.tar', '.pt', '.ckpt', '.npz', '.npy', '.onnx', '.onnx_data',
                     '.data', '.h5', '.msgpack', '.tflite', '.torchscript')


@dataclasses.dataclass(frozen=True)
class SavedFolder:
    """A folder that was written, and what was compared with it.

    Attributes:
        path: The folder.
        compared_with: What computes the same logits, None where the source does not say which model it holds.
        files: Names of what was written.
        others: Names of weights that the folder had before, and still has.
    """

    path: Path
    compared_with: str | None
    files: tuple[str, ...]
    others: tuple[str, ...]


def save_folder(
        publication: Publication,
        folder: str | Path,
        repo_id: str | None = None,
        license: str | None = None,
        train_datasets: Sequence[str] = (),
        force: bool = False,
        overwrite_card: bool = False,
        stated_preprocessing: bool = False,
        onnx: bool = False,
) -> SavedFolder:
    """Write model.safetensors, config.json and README.md, and compare what timm loads from them with the source.

    Args:
        publication: What to write.
        folder: Folder to create.
        repo_id: `owner/name` that the card's examples load, the folder itself if None.
        license: Licence of the weights, an identifier of the Hub. By default that of the source.
        train_datasets: Identifiers on the Hub of the training data.
        force: Replace these files in a folder that exists.
        overwrite_card: Write a new card even if the source or the folder has one.
        stated_preprocessing: The user stated preprocessing, so the source's own is not to be compared.
        onnx: Write an ONNX file and its preprocessing too. A card that is kept and names the file has the same effect.

    Raises:
        TargetExistsError: The folder exists and `force` is not set.
        UserError: What was written does not load to the same model, or cannot be written.
    """
    folder, license = Path(folder), license or publication.license
    if folder.exists() and not force:
        raise TargetExistsError(folder)
    model_id = f'hf-hub:{repo_id}' if repo_id else f'local-dir:{folder}'
    card = None if overwrite_card else publication.card
    onnx = onnx or card is not None and ONNX_NAME in card
    if onnx:
        require_onnx()
    elif (folder / ONNX_NAME).exists():
        raise UserError(f'{folder} holds an {ONNX_NAME} of earlier weights: give --onnx to replace it, or remove it.')
    model = publication.source.build()
    if card is None:
        name = (repo_id or folder.resolve().name).split('/')[-1]
        card = str(model_card(publication, model, name, model_id, license, train_datasets, onnx=onnx))
    with replacing_folder(folder, force=force) as temporary:
        keep_card = not overwrite_card and (folder / CARD_NAME).exists()
        _write_files(publication, model, temporary, None if keep_card else card, license, onnx)
        compared_with = _compare(publication.source, model, temporary, stated_preprocessing)
        files = tuple(str(path.relative_to(temporary)) for path in sorted(temporary.rglob('*')) if path.is_file())
    there = [path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file()]
    return SavedFolder(folder, compared_with, files, other_weights(there, files))


def other_weights(names: Iterable[str], written: Sequence[str]) -> tuple[str, ...]:
    """Of the files of a folder or repository, the weights that are not among those just written."""
    return tuple(name for name in sorted({*names} - {*written}) if name.endswith(_WEIGHTS_SUFFIXES))


def _write_files(
        publication: Publication,
        model: Any,
        folder: Path,
        card: str | None,
        license: str | None,
        onnx: bool,
) -> None:
    source, description = publication.source, publication.source.description
    kept = {key: value for key, value in (source.config.pretrained_cfg if source.config else {}).items()
            if key not in LOCATION_KEYS}
    cfg: dict[str, Any] = {**vars(model)['pretrained_cfg'], **kept, **source.data_config, 'pool_size': None}
    cfg.pop('tag', None)  # it names the training data of the published models
    cfg.pop('license', None)
    if license is not None:
        cfg['license'] = license
    model.pretrained_cfg = cfg
    sha256 = save_weights(model.state_dict(), folder / WEIGHTS_NAME, description, force=True)
    save_config_for_hf(
        model,
        folder / CONFIG_NAME,  # type: ignore[arg-type]  # timm before 1.0.30 says str and needs a Path
        model_config={'label_names': publication.class_names, 'global_pool': description.full_args['global_pool']},
    )
    config = json.loads((folder / CONFIG_NAME).read_text(encoding='utf-8'))
    if source.config is not None:  # what is not understood here is kept
        for written, before in ((config, source.config.others), (config['pretrained_cfg'], kept)):
            written.update({key: value for key, value in before.items() if key not in written})
    config.update(architecture=description.size, weights_sha256=sha256)
    config.pop('model_args', None)
    # num_classes has an entry of its own, and transformers passes both to `create_model`
    if description.distinct_args:
        config['model_args'] = description.distinct_args
    if description.full_args['in_chans'] not in (1, 3):  # timm before 1.0.30 would adapt it from three channels
        config['pretrained_cfg']['first_conv'] = None
    text = json.dumps(config, indent=2, allow_nan=False) + '\n'
    (folder / CONFIG_NAME).write_text(text, encoding='utf-8')
    if card is not None:
        (folder / CARD_NAME).write_text(card, encoding='utf-8')
    if onnx:
        write_onnx(model, source.data_config, folder)


def _compare(source: Source, model: nn.Module, folder: Path, stated: bool) -> str | None:
    """Check that timm loads a folder, as it loads repositories, to the model that its source defines.

    Nothing here uses the description of the model that the folder was written from: the original is built from the
    source's own words, by the calls that train.py and timm make.

    Args:
        source: What the folder was written from.
        model: The model that was written, compared where the source defines none.
        folder: What was written.
        stated: Whether the user stated preprocessing, so that the folder's is not the source's own.

    Returns:
        What the folder was compared with, in words for the user; None where there is nothing to compare with.

    Raises:
        UserError: The two differ.
    """
    try:
        original, what = _original(source)
        loaded = load_as_from_hub(folder)
        alike = stated or original is None or _same_preprocessing(source, original, loaded)
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'timm cannot load the model and its preprocessing: {" ".join(str(e).split())[:300]}') from e
    if not same_logits(original if original is not None else model, loaded):
        raise UserError(
            f'What timm loads back from the files does not compute the logits of {what or source.checkpoint.path}. '
            'Nothing was published.')
    if not alike:
        raise UserError(
            f'What timm loads back from the files prepares images differently from {what}. Nothing was published.')
    if (folder / ONNX_NAME).exists():
        difference = find_difference(folder, model, resolve_model_data_config(loaded))
        if difference is not None:
            raise UserError(f'{difference} Nothing was published.')
    return what


def _original(source: Source) -> tuple[nn.Module | None, str | None]:
    """The model as its source defines it, and what that is; None where the source only holds tensors."""
    if source.run_args.get('model'):
        return _with_weights(source, _as_train_py(source)), "the network of the run's arguments"
    if source.config is not None:
        args = {**source.config.model_args, 'num_classes': source.config.num_classes, **source.stated}
        return _with_weights(source, timm.create_model(source.config.name, **args)), str(source.config.path)
    metadata = source.checkpoint.metadata
    if 'model' in metadata and 'model_args' in metadata:
        args = {**json.loads(metadata['model_args']), **source.stated}
        return _with_weights(source, timm.create_model(metadata['model'], **args)), \
            f'what {source.checkpoint.path.name} records'
    return None, None


def _as_train_py(source: Source) -> nn.Module:
    """What train.py's call of `timm.create_model` builds."""
    args: dict[str, Any] = source.run_args
    chans = args.get('in_chans')
    if chans is None:
        chans = 3 if args.get('input_size') is None else args['input_size'][0]
    return timm.create_model(
        args['model'],
        in_chans=chans,
        num_classes=args.get('num_classes'),
        global_pool=args.get('gp'),
        bn_eps=args.get('bn_eps'),
        **(args.get('model_kwargs') or {}),
    )


def _with_weights(source: Source, model: nn.Module) -> nn.Module:
    """A model with the weights of the source, by timm's own loader where that reads them."""
    weights = source.checkpoint
    if model.state_dict().keys() == weights.state_dict.keys() and weights.prefix in ('', 'module.', '_orig_mod.'):
        load_checkpoint(model, str(weights.path), use_ema=weights.ema, strict=True)
    else:
        model.load_state_dict(named_as(source.state_dict, model))
    return model.eval()


def _same_preprocessing(source: Source, original: nn.Module, loaded: nn.Module) -> bool:
    """Whether a picture becomes the same tensor, where the source says how it is prepared."""
    theirs = resolve_model_data_config(loaded)
    recorded = {**(source.config.pretrained_cfg if source.config else {}), **source.run_args}
    mine = resolve_data_config(
        source.run_args, model=original, pretrained_cfg=recorded if source.config and not source.run_args else {})
    chans = theirs['input_size'][0]
    if chans not in (1, 3) or len(mine['mean']) not in (1, chans):  # no picture, or ImageNet's three values
        return tuple(mine['input_size'][1:]) == tuple(theirs['input_size'][1:])
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert('L' if chans == 1 else 'RGB')
    prepared = [create_transform(**config, is_training=False)(image) for config in (mine, theirs)]
    return prepared[0].shape == prepared[1].shape and torch.allclose(prepared[0], prepared[1], atol=1e-6)
