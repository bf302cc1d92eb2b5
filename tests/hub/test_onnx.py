"""The ONNX file of a published model: what it computes, what is found wrong in it, and what the card shows of it."""
import json
import re
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from publishing_helpers import LABELS, refused, succeed, tiny_model
from timm.data import create_transform, resolve_model_data_config

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.hub import save as save_module
from gmnet_timm.hub.onnx import (
    ONNX_NAME,
    PREPROCESSOR_NAME,
    find_difference,
    prepare,
    preprocessor_config,
)

CONFIG = dict(input_size=(3, 64, 64), crop_pct=.875, crop_mode='center', interpolation='bicubic', mean=(.5, .4, .3),
              std=(.2, .3, .25))


@pytest.mark.parametrize('changes', [
    {}, dict(interpolation='bilinear'), dict(interpolation='nearest'), dict(interpolation='lanczos'),
    dict(crop_pct=1.), dict(crop_pct=.9), dict(input_size=(3, 65, 65)), dict(crop_mode='squash'),
    dict(crop_mode='squash', crop_pct=.95, input_size=(3, 48, 80)),
], ids=str)
@pytest.mark.parametrize('size', [(320, 240), (240, 321), (64, 64), (50, 33), (501, 97)])
def test_images_are_prepared_as_by_timm(changes, size):
    config = {**CONFIG, **changes}
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = create_transform(**config, is_training=False)(image)[None].numpy()
    actual = prepare(image, json.loads(json.dumps(preprocessor_config(config))))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize('changes', [dict(crop_mode='border'), dict(input_size=(3, 64, 48)), dict(crop_pct=1.5)])
def test_what_cannot_be_written_is_refused(changes):
    with pytest.raises(UserError, match='has no words for'):
        preprocessor_config({**CONFIG, **changes})


def test_a_missing_package_is_named(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    status, _, err = run('save', checkpoint, tmp_path / 'out', '--onnx')
    assert status == 3 and "pip install 'gmnet-timm[onnx]'" in err and not (tmp_path / 'out').exists()


# Exports take seconds: the tests share one.


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A saved folder with an ONNX file, in a folder with a photograph. Not to be written to."""
    for module in ('onnx', 'onnxruntime', 'onnxscript'):
        pytest.importorskip(module, reason='needs the extra onnx')
    work = tmp_path_factory.mktemp('onnx')
    torch.save(tiny_model().state_dict(), work / 'checkpoint.pth')
    (work / 'names.txt').write_text('\n'.join(LABELS))
    Image.fromarray(pytest.importorskip('skimage.data').astronaut()).save(work / 'photo.jpg')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        options = ['--class-names', 'names.txt', '--img-size', '64', '--onnx']
        assert main(['save', 'checkpoint.pth', 'model', *options]) == 0
    return work / 'model'


@pytest.fixture
def copy(saved, tmp_path):
    shutil.copytree(saved, tmp_path / 'model')
    return tmp_path / 'model'


@pytest.mark.slow
@pytest.mark.parametrize('batch', [1, 2, 5])
def test_it_computes_the_models_logits(saved, batch):
    import onnx
    import onnxruntime

    onnx.checker.check_model(saved / ONNX_NAME, full_check=True)
    operations = [node.op_type for node in onnx.load(saved / ONNX_NAME).graph.node]
    assert operations.count('BatchNormalization') == 1  # the last, which follows an addition
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    photo = Image.open(saved.parent / 'photo.jpg')
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(photo.crop((10 * i, 0, 400, 500))) for i in range(batch)])
    with torch.no_grad():
        expected = model(images).numpy()
    (actual,) = onnxruntime.InferenceSession(saved / ONNX_NAME).run(['logits'], {'pixel_values': images.numpy()})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_card_shows_the_same_probabilities_with_timm_and_onnx_runtime(saved, monkeypatch, capsys):
    monkeypatch.chdir(saved.parent)
    card = (saved / 'README.md').read_text()
    printed = []
    for title in ('Image classification', 'ONNX Runtime'):
        exec(re.search(rf'### {title}\n.*?```python\n(.*?)```', card, re.DOTALL)[1], {})
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count(' %  ') == 3
    assert "from_pretrained('model'" in card.split('```js')[1]


def change_weights(folder, name, change):
    import onnx
    path = folder / ONNX_NAME
    proto = onnx.load(path)
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))
    onnx.save(proto, path)


def relu6_to_relu(folder):
    import onnx
    path = folder / ONNX_NAME
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == 'Clip':
            del node.input[2:]
    onnx.save(proto, path)


def fix_batch(folder):
    import onnx
    proto = onnx.load(folder / ONNX_NAME)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, folder / ONNX_NAME)


def change_preprocessing(folder, **changes):
    path = folder / PREPROCESSOR_NAME
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


DAMAGE = {
    'other weights': (
        lambda folder: change_weights(folder, 'head.weight', lambda w: w[::-1].copy()), 'computes other logits'),
    'one bias': (lambda folder: change_weights(folder, 'head.bias', lambda b: b + 1e-3), 'computes other logits'),
    'no clip': (relu6_to_relu, 'computes other logits'),
    'one image only': (fix_batch, 'InvalidArgument'),
    'cut off': (lambda folder: (folder / ONNX_NAME).write_bytes((folder / ONNX_NAME).read_bytes()[:9000]), ''),
    'no file': (lambda folder: (folder / ONNX_NAME).unlink(), f'There is no {ONNX_NAME}'),
    'no preprocessing': (lambda folder: (folder / PREPROCESSOR_NAME).unlink(), f'There is no {PREPROCESSOR_NAME}'),
    'mean': (lambda folder: change_preprocessing(folder, image_mean=[.485, .456, .41]), 'prepares images differently'),
    'resampling': (lambda folder: change_preprocessing(folder, resample=2), 'prepares images differently'),
    'size': (lambda folder: change_preprocessing(folder, size={'shortest_edge': 64}), 'prepares images differently'),
    'not normalized': (
        lambda folder: change_preprocessing(folder, do_normalize=False), 'prepares images differently'),
    'padded': (lambda folder: change_preprocessing(folder, do_pad=True), 'prepares images differently'),
    'no JSON': (lambda folder: (folder / PREPROCESSOR_NAME).write_text('{'), 'cannot be followed'),
    'no crop': (lambda folder: change_preprocessing(folder, crop_size=None), 'cannot be followed'),
}


@pytest.mark.slow
@pytest.mark.parametrize('damage', DAMAGE)
def test_verify_finds(damage, copy, run):
    change, finding = DAMAGE[damage]
    change(copy)
    status, out, _ = run('verify', copy)
    (line,) = [line for line in out.splitlines() if ' onnx: ' in line]
    assert status == 1 and line.startswith('FAILED') and finding in line
    assert out.count('FAILED') == 1


class Overflowing(torch.nn.Module):
    """A model whose logits are infinite for images with values beyond a limit."""

    def __init__(self, model, limit):
        super().__init__()
        self.model, self.limit = model, limit

    def forward(self, x):
        beyond = x.abs().amax((1, 2, 3)) > self.limit
        return self.model(x).masked_fill(beyond[:, None], float('inf'))


@pytest.mark.slow
@pytest.mark.parametrize('limit, finding', [(0, 'The model overflows'), (100, 'overflows where the model does not')])
def test_overflow_is_a_finding(saved, limit, finding):
    model = timm.create_model(f'local-dir:{saved}', pretrained=True).eval()
    config = resolve_model_data_config(model)
    with torch.no_grad():
        assert find_difference(saved, model, config) is None
        assert finding in find_difference(saved, Overflowing(model, limit), config)


@pytest.mark.slow
def test_verify_confirms_or_says_what_it_needs(copy, run, monkeypatch):
    assert 'ok      onnx:' in succeed(run('verify', copy))
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    (line,) = [line for line in succeed(run('verify', copy)).splitlines() if ' onnx: ' in line]
    assert line.startswith('note') and "onnxruntime is not installed" in line and "'gmnet-timm[onnx]'" in line


@pytest.mark.slow
def test_nothing_is_written_that_computes_something_else(copy, run, tmp_path, checkpoint, monkeypatch):
    """A broken exporter, in place of which a file of other weights is written."""
    change_weights(copy, 'head.bias', lambda b: b + 1e-3)

    def write_onnx(model, data_config, folder):
        for name in (ONNX_NAME, PREPROCESSOR_NAME):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(copy / name, folder / name)

    monkeypatch.setattr(save_module, 'write_onnx', write_onnx)
    refused(run('save', checkpoint, tmp_path / 'out', '--onnx', '--img-size', 64), 'computes other logits', 'Nothing')
    assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_push_replaces_what_is_there_or_nothing(copy, run, hub, checkpoint, tmp_path):
    """The card of a saved folder names the file, so that it comes along; a file of earlier weights never stays."""
    succeed(run('push', copy, 'owner/tiny'))
    files = hub.files('owner/tiny')
    assert files[ONNX_NAME] and files[PREPROCESSOR_NAME] == (copy / PREPROCESSOR_NAME).read_bytes()
    assert 'ok      onnx:' in succeed(run('verify', 'owner/tiny'))
    torch.save(tiny_model(act_layer='gelu').state_dict(), checkpoint)
    refused(run('push', checkpoint, 'owner/tiny', '--img-size', 64), 'of earlier weights', '--onnx')
    assert hub.files('owner/tiny') == files
    refused(run('save', checkpoint, copy, '--force', '--img-size', 64), 'of earlier weights', '--onnx')
