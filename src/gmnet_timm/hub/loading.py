"""A folder as timm loads it from the Hub, and whether two models compute the same."""
import shutil
import tempfile
from pathlib import Path

import timm
import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.weights.config import read_config

__all__ = ['load_as_from_hub', 'same_logits']

_COMMIT = '0' * 40  # huggingface_hub takes a file of a known commit from its cache without asking the Hub
_SCALES = (1., 8., 64.)  # of normal noise: bright images drive activations into their bounds, such as ReLU6's 6


def load_as_from_hub(folder: Path) -> nn.Module:
    """What timm makes of a folder once it is a repository on the Hub, in evaluation mode.

    This is not what `local-dir:` loads: entries of config.json such as `hf_hub_filename` count on the Hub alone.

    Raises:
        UserError: config.json names a file that is not there.
        Exception: Whatever timm raises for a folder that it cannot load.
    """
    filename = read_config(folder).pretrained_cfg.get('hf_hub_filename')
    if filename and not (folder / str(filename)).is_file():
        raise UserError(f'config.json names the weights {str(filename)[:100]!r}, which are not there.')
    with tempfile.TemporaryDirectory() as cache:
        shutil.copytree(folder, Path(cache, 'models--a--b', 'snapshots', _COMMIT))
        return timm.create_model(f'hf-hub:a/b@{_COMMIT}', pretrained=True, cache_dir=cache).eval()


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
