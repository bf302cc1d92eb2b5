"""How images are prepared for a model: resolved once, by timm's rules, and tried on an image."""
import math
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from gmnet_timm.errors import UserError

__all__ = ['RUN_KEYS', 'resolve_preprocessing']

# Arguments of train.py that decide it
RUN_KEYS = ('img_size', 'input_size', 'in_chans', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
_MAX_PIXELS = 2 ** 14  # of a side
_INTERPOLATIONS = ('nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming')


def resolve_preprocessing(
        in_chans: int,
        pretrained_cfg: dict[str, Any],
        recorded: dict[str, Any] | None = None,
        stated: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Preprocessing as timm's validate.py would choose it, checked by preparing an image with it.

    Args:
        in_chans: Input channels of the model.
        pretrained_cfg: The model's own configuration, which counts least.
        recorded: What was recorded in training, under `RUN_KEYS`; empty values count as not recorded.
        stated: What the user states, which counts most; None counts as not stated.

    Returns:
        Arguments of `timm.data.create_transform`: `input_size` (C, H, W), `mean` and `std` with one value per channel,
        `interpolation`, `crop_pct`, `crop_mode`.

    Raises:
        UserError: It does not fit the model, or no image can be prepared with it.
    """
    found = {key: value for key, value in (recorded or {}).items() if key in RUN_KEYS and value not in (None, '', [])}
    wanted = {key: value for key, value in (stated or {}).items() if value is not None}
    if 'img_size' in wanted:
        found.pop('input_size', None)  # it would win over img_size
    args = {**found, **wanted}
    if not args.get('input_size'):
        args['in_chans'] = in_chans
    cfg = {**pretrained_cfg, 'input_size': (in_chans, *tuple(pretrained_cfg.get('input_size') or (3, 224, 224))[1:])}
    try:
        config = resolve_data_config(args, pretrained_cfg=cfg)
        config = {
            **config,
            'input_size': tuple(config['input_size']),
            'mean': _per_channel(config['mean'], in_chans),
            'std': _per_channel(config['std'], in_chans),
        }
        problem = _problem(config, in_chans)
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError) as e:
        problem = str(e) or f'mean and std have one value, or one per channel ({in_chans})'
    if problem:
        given = ', '.join(f'{key} {value}' for key, value in args.items() if key != 'in_chans') or 'none stated'
        raise UserError(f'This preprocessing does not work ({given}): {problem}.')
    return config


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    """One value per channel. From a list of another length timm's loaders take the mean, and so does this."""
    numbers = [float(value) for value in values]
    if len(numbers) == 1:
        return tuple(numbers * channels)
    return tuple(numbers) if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels


def _problem(config: dict[str, Any], in_chans: int) -> str | None:
    channels, *size = config['input_size']
    if channels != in_chans:
        return f'the model takes {in_chans} channels, not {channels}'
    if len(size) != 2 or not all(type(n) is int and 0 < n <= _MAX_PIXELS for n in size):
        return f'height and width are whole numbers from 1 to {_MAX_PIXELS} pixels'
    if not all(map(math.isfinite, (*config['mean'], *config['std']))) or min(config['std']) <= 0:
        return 'mean and std are finite numbers, and std is positive'
    if not 0 < config['crop_pct'] <= 2:
        return 'crop_pct is a number above 0, and usually at most 1'
    if config['interpolation'] not in _INTERPOLATIONS:
        return f'interpolation is one of {", ".join(_INTERPOLATIONS)}'
    if in_chans in (1, 3):  # PIL has no pictures of other numbers of channels
        image = create_transform(**config, is_training=False)(Image.new('L' if in_chans == 1 else 'RGB', (320, 240)))
        if tuple(image.shape) != config['input_size'] or not torch.isfinite(image).all():
            return f'it makes an image of shape {tuple(image.shape)}'
    return None
