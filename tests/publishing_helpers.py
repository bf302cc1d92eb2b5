"""What the tests of publishing share."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml

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


def make_run(folder: Path, ema: bool = False, **args) -> Path:
    """The output folder of a run of train.py, as that writes it."""
    folder.mkdir()
    args = {'model': 'gmnet_s1', 'epochs': 3, 'opt': 'adamw', 'lr': 0.003, 'img_size': 96, 'crop_pct': 0.9,
            'mean': None, 'std': None, 'interpolation': '', 'data_dir': '/secret/place', 'model_ema': ema,
            'num_classes': 3, 'model_kwargs': TINY, 'amp': False, 'amp_dtype': 'float16', 'lr_base': 0.1,
            'aa': 'rand-m1', 'color_jitter': 0.0, **args}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    with (folder / 'summary.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'])
        writer.writeheader()
        for epoch, top1 in enumerate((10.5, 40.25, 30.125)):
            writer.writerow(dict(epoch=epoch, train_loss=1, eval_loss=1, eval_top1=top1, eval_top5=99, lr=0.1))
    for name, epoch in (('model_best.pth.tar', 1), ('last.pth.tar', 2)):
        state = {'epoch': epoch, 'arch': 'gmnet_s1', 'state_dict': tiny_model().state_dict(), 'optimizer': {}}
        if ema:
            state['state_dict_ema'] = {
                k: v * 0.5 if v.is_floating_point() else v for k, v in tiny_model().state_dict().items()}
        torch.save(state, folder / name)
    return folder


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
