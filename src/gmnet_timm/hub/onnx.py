"""A model as an ONNX file, for ONNX Runtime and for browsers, and how its images are prepared.

The two files have the names and the form that transformers.js expects.
"""
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import str_to_pil_interp
from timm.utils import reparameterize_model
from torch import nn

from gmnet_timm.errors import UserError, require

__all__ = [
    'ONNX_NAME', 'PREPROCESSOR_NAME', 'find_difference', 'prepare', 'preprocessor_config', 'require_onnx', 'write_onnx',
]

ONNX_NAME = 'onnx/model.onnx'
PREPROCESSOR_NAME = 'preprocessor_config.json'
IMAGES, LOGITS = 'pixel_values', 'logits'  # names of input and output

# Relative to the norm of the logits. The order of sums alone made up to 8e-7 (docs/ecosystem.md).
_TOLERANCE = 1e-5
_SCALES = (1., 8., 64.)  # of normal noise, see loading.py
# The steps that `prepare` takes. transformers.js leaves out those that are not switched on.
_STEPS = {'do_convert_rgb', 'do_resize', 'do_center_crop', 'do_rescale', 'do_normalize'}


def require_onnx(*modules: str) -> None:
    """Fail before the work that needs packages of the extra `onnx`.

    Raises:
        MissingExtraError: One of them is not installed.
    """
    for module in modules or ('onnx', 'onnxscript', 'onnxruntime'):
        require(module, 'onnx')


def write_onnx(model: nn.Module, data_config: dict[str, Any], folder: Path) -> None:
    """Write a fused copy of a model, for batches of any size, and its preprocessing.

    Args:
        model: A classifier in evaluation mode.
        data_config: Preprocessing, as arguments of `timm.data.create_transform`.
        folder: Where to write `ONNX_NAME` and `PREPROCESSOR_NAME`.

    Raises:
        MissingExtraError: The extra `onnx` is not installed.
        UserError: There is no way to write this preprocessing.
    """
    require_onnx()
    text = json.dumps(preprocessor_config(data_config), indent=2) + '\n'
    (folder / PREPROCESSOR_NAME).write_text(text, encoding='utf-8')
    path = folder / ONNX_NAME
    path.parent.mkdir()
    torch.onnx.export(
        reparameterize_model(model),
        (torch.zeros(2, *data_config['input_size']),),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=[IMAGES],
        output_names=[LOGITS],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
    )


def preprocessor_config(data_config: dict[str, Any]) -> dict[str, Any]:
    """Preprocessing in the words of transformers.

    Without an `image_processor_type`, with which transformers itself would no longer read timm's config.json.

    Raises:
        UserError: They have none for it.
    """
    channels, height, width = data_config['input_size']
    squash = data_config['crop_mode'] == 'squash'
    if channels != 3:
        raise UserError(f'--onnx is for models of RGB images: this one takes {channels} channels.')
    plain = data_config['crop_mode'] == 'center' and height == width
    if not (squash or plain) or data_config['crop_pct'] > 1:
        raise UserError(
            f'--onnx: {PREPROCESSOR_NAME} has no words for {height} x {width} pixels with crop mode '
            f'{data_config["crop_mode"]} and crop_pct {data_config["crop_pct"]:g}. It has some for square center crops '
            'and for squash, with crop_pct up to 1.')
    resized = [math.floor(side / data_config['crop_pct']) for side in (height, width)]  # as timm rounds
    return {
        **dict.fromkeys(sorted(_STEPS), True),
        'size': dict(height=resized[0], width=resized[1]) if squash else dict(shortest_edge=resized[0]),
        'resample': int(str_to_pil_interp(data_config['interpolation'])),
        'crop_size': dict(height=height, width=width),
        'rescale_factor': 1 / 255,
        'image_mean': list(data_config['mean']),
        'image_std': list(data_config['std']),
    }


# Printed in the model cards as it is, for readers without torch and timm.
def prepare(image, config):
    """Turn an RGB image of PIL into pixels (1, 3, height, width), as preprocessor_config.json says."""
    size, crop = config['size'], config['crop_size']
    shortest = size.get('shortest_edge')
    width, height = [shortest * side // min(image.size) for side in image.size] if shortest else (
        size['width'], size['height'])
    left, top = round((width - crop['width']) / 2), round((height - crop['height']) / 2)
    image = image.resize((width, height), config['resample'])
    image = image.crop((left, top, left + crop['width'], top + crop['height']))
    pixels = np.asarray(image, np.float32) * np.float32(config['rescale_factor'])
    pixels = (pixels - np.float32(config['image_mean'])) / np.float32(config['image_std'])
    return pixels.transpose(2, 0, 1)[None]


@torch.no_grad()
def find_difference(folder: Path, model: nn.Module, data_config: dict[str, Any]) -> str | None:
    """How the ONNX file and its preprocessing differ from a model and timm.

    Args:
        folder: Where the two files are.
        model: The model in evaluation mode.
        data_config: Preprocessing, as arguments of `timm.data.create_transform`.

    Returns:
        A sentence, None if images and logits are the same but for the rounding of sums.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    require_onnx('onnxruntime')
    from onnxruntime import InferenceSession

    for name in (ONNX_NAME, PREPROCESSOR_NAME):
        if not (folder / name).is_file():
            return f'There is no {name}.'
    try:
        config = json.loads((folder / PREPROCESSOR_NAME).read_text(encoding='utf-8'))
        steps = {name for name, value in config.items() if name.startswith('do_') and value}
    except (AttributeError, ValueError) as e:
        return f'{PREPROCESSOR_NAME} cannot be followed: {e!r}.'
    if steps != _STEPS:
        return f'{PREPROCESSOR_NAME} prepares images differently from timm: {", ".join(sorted(steps ^ _STEPS))}.'
    noise = np.random.default_rng(0).integers(0, 256, (240, 333, 3), dtype=np.uint8)
    for image in (Image.fromarray(noise), Image.fromarray(noise).rotate(90, expand=True)):
        expected = create_transform(**data_config, is_training=False)(image)[None].numpy()
        try:
            pixels = prepare(image, config)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            return f'{PREPROCESSOR_NAME} cannot be followed: {e!r}.'
        if pixels.shape != expected.shape or not np.allclose(pixels, expected, atol=1e-5):
            return f'{PREPROCESSOR_NAME} prepares images differently from timm.'
    session = InferenceSession(folder / ONNX_NAME, providers=['CPUExecutionProvider'])
    images = torch.randn(3, *data_config['input_size'], generator=torch.Generator().manual_seed(0))
    for scale in _SCALES:
        for batch in (scale * images[:1], scale * images):
            theirs = torch.from_numpy(session.run([LOGITS], {IMAGES: batch.numpy()})[0])
            mine = model(batch)
            if theirs.shape != mine.shape:
                return f'{ONNX_NAME} gives logits of shape {tuple(theirs.shape)}, not {tuple(mine.shape)}.'
            finite = torch.isfinite(mine).all(1)
            if scale == 1 and not finite.all():
                return f'The model overflows, so that {ONNX_NAME} cannot be compared with it.'
            if not torch.equal(finite, torch.isfinite(theirs).all(1)):
                return f'{ONNX_NAME} overflows where the model does not, or the reverse.'
            errors = (theirs - mine).norm(dim=1) / mine.norm(dim=1)
            if (errors[finite] > _TOLERANCE).any():
                return f'{ONNX_NAME} computes other logits than the model (off by {errors[finite].max():.1e}).'
    return None
