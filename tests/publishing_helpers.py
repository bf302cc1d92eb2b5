"""What the tests of publishing share."""
import os
import subprocess
import sys
from pathlib import Path

import torch

from gmnet_timm import GmNet

TINY = dict(base_dim=4, depths=[1, 1, 1, 1], mlp_ratios=[2, 2, 2, 2], stem_chs=4)
FILES = {'model.safetensors', 'config.json', 'README.md'}
LABELS = ['cat', 'dog', 'owl']


def tiny_model(**kwargs) -> GmNet:
    """A model whose every tensor differs from its initial value, so that a tensor left out would show."""
    torch.manual_seed(0)
    model = GmNet(**{**TINY, 'num_classes': 3, **kwargs}).eval()
    for name, value in model.state_dict().items():
        if name.endswith(('gamma', 'running_var')):
            value.uniform_(0.5, 1.5)
        elif value.is_floating_point():
            value.normal_(0, 0.3)
        else:
            value.fill_(7)
    return model


def succeed(result):
    status, out, err = result
    assert status == 0, err
    return out


def refused(result, *words):
    status, out, err = result
    assert status == 1
    assert 'published' not in out and 'written' not in out
    for word in words:
        assert word in err
    return err


def python(code: str, hub_url: str, tmp_path: Path, **environment) -> str:
    """Run code in a process of its own, whose Hub is the server."""
    env = {
        **{key: value for key, value in os.environ.items() if key != 'HF_TOKEN'},
        'HF_ENDPOINT': hub_url, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1',
        'HF_HUB_DISABLE_TELEMETRY': '1', 'OMP_WAIT_POLICY': 'PASSIVE', **environment,
    }
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return done.stdout
