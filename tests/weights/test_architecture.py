import argparse
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
from model_helpers import SIZES, create

from gmnet_timm.weights.architecture import infer_architecture
from gmnet_timm.weights.description import describe_tensors
from gmnet_timm.weights.files import CheckpointError, read_checkpoint
from gmnet_timm.weights.model import load_model

WRAPPINGS = {
    'bare': lambda sd: sd,
    'state_dict': lambda sd: {'state_dict': sd, 'epoch': 3, 'args': argparse.Namespace(model='gmnet_s1', lr=0.003)},
    'model': lambda sd: {'model': sd},
    'state_dict_ema': lambda sd: {'state_dict_ema': sd, 'state_dict': {k: v + 1 for k, v in sd.items()}},
    'module.': lambda sd: {'state_dict': {f'module.{k}': v for k, v in sd.items()}},
}


@pytest.fixture(scope='module')
def authors():
    return create('gmnet_s1')


@pytest.fixture
def checkpoint(authors, tmp_path, request):
    path = tmp_path / 'renamed.pth.tar'
    torch.save(WRAPPINGS[getattr(request, 'param', 'bare')](authors.state_dict()), path)
    return path


IMAGE = torch.linspace(-1, 1, 3 * 32 * 48).view(1, 3, 32, 48)
every_wrapping = pytest.mark.parametrize('checkpoint', WRAPPINGS, indirect=True)


@every_wrapping
def test_loads_through_every_path(checkpoint, authors):
    expected = authors(IMAGE)
    overlay = dict(file=str(checkpoint))
    for model in (
        timm.create_model('gmnet_s1', checkpoint_path=str(checkpoint)).eval(),
        timm.create_model('gmnet_s1', pretrained=True, pretrained_cfg_overlay=overlay).eval(),
        load_model(str(checkpoint)).model,
    ):
        assert torch.equal(model(IMAGE), expected)


@every_wrapping
def test_loads_with_another_head_and_other_channels(checkpoint, authors):
    overlay = dict(file=str(checkpoint))
    model = timm.create_model('gmnet_s1', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    model.eval()
    assert model(IMAGE[:, :1]).shape == (1, 7)
    # a grey image through summed kernels is the grey image in all three channels
    expected = authors.forward_features(IMAGE[:, :1].expand(1, 3, 32, 48))
    torch.testing.assert_close(model.forward_features(IMAGE[:, :1]), expected, rtol=1e-4, atol=1e-4)


def test_other_weights_instead_of_ema(authors, tmp_path):
    path = tmp_path / 'checkpoint.pth'
    torch.save(WRAPPINGS['state_dict_ema'](authors.state_dict()), path)
    assert (read_checkpoint(path).state_dict['stages.0.1.gamma'] == authors.stages[0][1].gamma).all()
    assert (read_checkpoint(path, use_ema=False).state_dict['stages.0.1.gamma'] == authors.stages[0][1].gamma + 1).all()


def test_safetensors(authors, tmp_path):
    path = tmp_path / 'model.safetensors'
    safetensors.torch.save_file(authors.state_dict(), path)
    assert torch.equal(load_model(str(path)).model(IMAGE), authors(IMAGE))


@pytest.mark.parametrize('name', SIZES)
def test_architecture_of_registered_models(name):
    model = timm.create_model(name, device='meta', num_classes=12, in_chans=4)
    architecture = infer_architecture(model.state_dict())
    assert architecture.nearest_size == name
    assert (architecture.num_classes, architecture.in_chans) == (12, 4)
    assert architecture.differences(name) == {}


@pytest.mark.parametrize('kwargs', [
    dict(base_dim=24),
    dict(depths=(1, 2, 3, 4), mlp_ratios=(2, 3, 4, 5)),
    dict(stem_chs=16, num_classes=0),
    dict(global_pool='catavgmax', depths=(1, 1, 1), mlp_ratios=(2, 2, 2), num_classes=5),
    dict(init_values=0., gate='ln'),
])
def test_architecture_of_other_models(kwargs):
    model = create('gmnet_s2', **kwargs)
    architecture = infer_architecture(model.state_dict())
    for key, value in kwargs.items():
        assert getattr(architecture, key) == value
    args = {key: getattr(architecture, key) for key in ('num_classes', 'global_pool')}
    rebuilt = timm.create_model(
        architecture.nearest_size, **args, **architecture.differences(architecture.nearest_size)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(IMAGE), model(IMAGE))


def test_differences_are_named():
    architecture = infer_architecture(timm.create_model('gmnet_s3', depths=(3, 3, 9, 3), device='meta').state_dict())
    assert architecture.nearest_size == 'gmnet_s3'
    assert architecture.differences('gmnet_s3') == {'depths': (3, 3, 9, 3)}
    assert architecture.differences('gmnet_s4')['base_dim'] == 48


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch pickled_code_ran',)


def write_nothing(path):
    pass


def write_empty(path):
    path.touch()


def write_text(path):
    path.write_text('no checkpoint at all\n' * 100)


def write_code(path):
    torch.save({'state_dict': create('gmnet_s1').state_dict(), 'extra': RunsCode()}, path)


def write_plain_pickle_with_code(path):
    path.write_bytes(pickle.dumps(RunsCode()))


def write_truncated(path):
    torch.save(create('gmnet_s1').state_dict(), path)
    path.write_bytes(path.read_bytes()[:1_000_000])


def write_model_object(path):
    torch.save(create('gmnet_s1'), path)


def write_numbers(path):
    torch.save({'epoch': 3, 'lr': 0.1}, path)


def write_list(path):
    torch.save([1, 2, 3], path)


def write_no_weights(path):
    torch.save({'state_dict': {}}, path)


@pytest.mark.parametrize('write, message', [
    (write_nothing, 'No checkpoint at'),
    (write_empty, 'cannot be read'),
    (write_text, 'cannot be read'),
    (write_code, 'run code'),
    (write_plain_pickle_with_code, 'run code'),
    (write_truncated, 'cannot be read'),
    (write_model_object, 'run code'),
    (write_numbers, 'epoch, lr are not tensors'),
    (write_list, 'cannot be read'),
    (write_no_weights, 'holds no weights'),
])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_unusable_files_get_one_clear_error(write, message, suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f'checkpoint{suffix}'
    write(path)
    if suffix == '.safetensors' and write is not write_nothing:
        message = 'cannot be read'
    with pytest.raises(CheckpointError, match=message) as e:
        load_model(f'gmnet_s1={path}')
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert not (tmp_path / 'pickled_code_ran').exists()


def test_foreign_weights(tmp_path):
    path = tmp_path / 'resnet.pth'
    torch.save(timm.create_model('resnet18').state_dict(), path)
    with pytest.raises(CheckpointError, match=r'resnet\.pth: .*not a GmNet.*conv1\.weight'):
        load_model(str(path))
    with pytest.raises(CheckpointError, match='not a GmNet'):
        infer_architecture(timm.create_model('starnet_s1', device='meta').state_dict())


def test_contradicting_tensors(authors):
    def check(state_dict):
        describe_tensors(state_dict).check_fits(state_dict, 'the file')

    state_dict = authors.state_dict()
    missing = {k: v for k, v in state_dict.items() if k != 'stages.1.2.g.bn.weight'}
    with pytest.raises(CheckpointError, match=r'missing: stages\.1\.2\.g\.bn\.weight\.'):
        check(missing)
    with pytest.raises(CheckpointError, match=r'unexpected: extra\.'):
        check({**state_dict, 'extra': torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r'of another shape: norm\.bias \(3,\) instead of \(320,\)'):
        check({**state_dict, 'norm.bias': torch.zeros(3)})
    for far in ('stages.0.100000.f1.conv.weight', f'stages.0.{"9" * 5000}.f1.conv.weight'):  # never built
        with pytest.raises(CheckpointError, match='missing|unexpected'):
            check({**state_dict, far: torch.zeros(3)})


def test_fused_weights_are_recognised(authors):
    with pytest.raises(CheckpointError, match='fused by reparameterize_model'):
        infer_architecture(timm.utils.reparameterize_model(authors).state_dict())
