"""Proof that a written folder is the model that its source defines.

Nothing here uses the description of the model that the folder was written from, nor the code that resolved it: the
original is built from the source's own words, by the calls that train.py and timm make, and the folder by timm alone.
"""
import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import load_checkpoint
from torch import nn

from gmnet_timm.checkpoint.architecture import infer_architecture
from gmnet_timm.errors import UserError
from gmnet_timm.publishing.onnx_file import ONNX_NAME, find_difference
from gmnet_timm.source import Source

__all__ = ['prove_folder', 'same_logits']

_SCALES = (1., 8., 64.)  # of normal noise: bright images drive activations into their bounds, such as ReLU6's 6


def prove_folder(source: Source, folder: Path, stated: bool) -> str:
    """Check that timm loads a folder to the model that the source defines, and prepares images as it does.

    Args:
        source: What the folder was written from.
        folder: What was written.
        stated: Whether the user stated preprocessing, so that the folder's is not the source's own.

    Returns:
        What the folder was compared with, in words for the user.

    Raises:
        UserError: The two differ.
    """
    try:
        original, what = _original(source)
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        alike = stated or _same_preprocessing(source, original, loaded)
    except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, ValueError) as e:
        raise UserError(f'timm cannot load the model and its preprocessing: {" ".join(str(e).split())[:300]}') from e
    if not same_logits(original, loaded):
        raise UserError(
            f'What timm loads back from the files does not compute the logits of {what}. Nothing was published.')
    if not alike:
        raise UserError(
            f'What timm loads back from the files prepares images differently from {what}. Nothing was published.')
    if (folder / ONNX_NAME).exists():
        difference = find_difference(folder, original, resolve_model_data_config(loaded))
        if difference is not None:
            raise UserError(f'{difference} Nothing was published.')
    return what


@torch.no_grad()
def same_logits(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models in evaluation mode compute the same logits, bit for bit, from noise of three brightnesses.

    Where both overflow, an image proves nothing and is left out; the first must not overflow.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, int(one.in_chans), 96, 64, generator=generator)  # type: ignore[arg-type]
    for scale in _SCALES:
        mine, theirs = one(scale * images), other(scale * images)
        overflows = [not torch.isfinite(logits).all() for logits in (mine, theirs)]
        if all(overflows) and scale != _SCALES[0]:
            continue
        if any(overflows) or not torch.equal(mine, theirs):
            return False
    return True


def _original(source: Source) -> tuple[nn.Module, str]:
    """The model as its source defines it, and what that is."""
    weights = source.checkpoint
    if source.run_args.get('model'):
        return _as_trained(source), "the network of the run's arguments"
    if source.config is not None:
        folder = source.config.path.parent
        return timm.create_model(f'local-dir:{folder}', pretrained=True, **source.stated).eval(), f'local-dir:{folder}'
    recorded = _recorded(weights.path)
    if recorded is not None:
        name, args, what = recorded['model'], json.loads(recorded['model_args']), f'what {weights.path.name} records'
    else:
        name, args = _from_shapes(weights.state_dict)
        what = 'the network assumed from the tensors' if source.description.assumed else 'the stated network'
    model = timm.create_model(name, **{**args, **source.stated})
    load_checkpoint(model, str(weights.path), use_ema=weights.ema, strict=True)
    return model.eval(), what


def _from_shapes(state_dict: dict[str, torch.Tensor]) -> tuple[str, dict[str, Any]]:
    architecture = infer_architecture(state_dict)
    name = architecture.nearest_size
    args = {key: getattr(architecture, key) for key in ('in_chans', 'num_classes', 'global_pool')}
    return name, {**args, **architecture.differences(name)}


def _as_trained(source: Source) -> nn.Module:
    """What train.py's call of `timm.create_model` builds, with the weights by timm's own loader."""
    args: dict[str, Any] = source.run_args
    chans = args.get('in_chans')
    if chans is None:
        chans = 3 if args.get('input_size') is None else args['input_size'][0]
    model = timm.create_model(
        args['model'],
        in_chans=chans,
        num_classes=args.get('num_classes'),
        global_pool=args.get('gp'),
        bn_eps=args.get('bn_eps'),
        **(args.get('model_kwargs') or {}),
    )
    load_checkpoint(model, str(source.checkpoint.path), use_ema=source.checkpoint.ema, strict=True)
    return model.eval()


def _recorded(path: Path) -> dict[str, str] | None:
    if path.suffix != '.safetensors':
        return None
    with safe_open(str(path), framework='pt') as file:
        metadata = file.metadata() or {}
    return metadata if 'model' in metadata else None


def _same_preprocessing(source: Source, original: nn.Module, loaded: nn.Module) -> bool:
    """Whether a picture becomes the same tensor, where the source says how it is prepared."""
    theirs = resolve_model_data_config(loaded)
    mine = resolve_data_config(source.run_args, model=original)
    chans = theirs['input_size'][0]
    if chans not in (1, 3) or len(mine['mean']) not in (1, chans):  # no picture, or ImageNet's three values
        return tuple(mine['input_size'][1:]) == tuple(theirs['input_size'][1:])
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert('L' if chans == 1 else 'RGB')
    prepared = [create_transform(**config, is_training=False)(image) for config in (mine, theirs)]
    return prepared[0].shape == prepared[1].shape and torch.allclose(prepared[0], prepared[1], atol=1e-6)
