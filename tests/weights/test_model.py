"""What a source says of its model is what is built, or the source is refused."""
import argparse
import json
import runpy
import socket
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from huggingface_hub import constants
from model_helpers import create

from gmnet_timm.cli.main import main
from gmnet_timm.errors import UserError
from gmnet_timm.hub.loading import same_logits
from gmnet_timm.weights.config import _is_known_host
from gmnet_timm.weights.convert import save_weights
from gmnet_timm.weights.model import load_model, read_source

TINY = dict(base_dim=4, depths=[1, 1, 1, 1], mlp_ratios=[2, 2, 2, 2], stem_chs=4)
# What tensors do not tell, or tell only in part; each changes the logits
VARIANTS = {
    'gelu': dict(act_layer='gelu'),
    'max': dict(global_pool='max'),
    'dilated': dict(output_stride=8),
    'dw': dict(gate='dw', act_layer='silu'),
    'no scale': dict(init_values=0, output_stride=16, global_pool='catavgmax'),
}
every_variant = pytest.mark.parametrize('variant', VARIANTS)
IMAGES = 4 * torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))


def train_args(variant='gelu', **args):
    kwargs = {**TINY, **VARIANTS[variant]}
    pool = kwargs.pop('global_pool', None)
    return {'model': 'gmnet_s1', 'num_classes': 3, 'in_chans': None, 'gp': pool, 'model_kwargs': kwargs,
            'img_size': None, 'mean': None, 'std': None, 'interpolation': '', 'crop_pct': None, **args}


def original(variant='gelu'):
    return create('gmnet_s1', num_classes=3, **TINY, **VARIANTS[variant])


def write_checkpoint(path, model, **entries):
    torch.save({'state_dict': model.state_dict(), 'epoch': 0, **entries}, path)
    return path


def write_run(folder, variant='gelu', **args):
    folder.mkdir()
    args = train_args(variant, **args)
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    model = original(variant)
    write_checkpoint(folder / 'model_best.pth.tar', model, args=argparse.Namespace(**args))
    return model


def assert_same(actual, expected):
    with torch.no_grad():
        assert torch.equal(actual.eval()(IMAGES), expected.eval()(IMAGES))


def assert_matters(variant):
    """The test could fail: without the variant's arguments the network computes something else."""
    model, plain = original(variant), dict(TINY, gate=VARIANTS[variant].get('gate', 'identity'))
    plain.update(init_values=VARIANTS[variant].get('init_values', 1e-6))
    if VARIANTS[variant].get('global_pool') == 'catavgmax':
        plain.update(global_pool='catavgmax')
    other = timm.create_model('gmnet_s1', num_classes=3, **plain).eval()
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(other(IMAGES), model(IMAGES), rtol=1e-2)


@pytest.fixture(params=['run', 'checkpoint', 'folder', 'safetensors'])
def source(request, tmp_path):
    """The same model from each kind of source."""
    def write(variant):
        model = write_run(tmp_path / 'run', variant)
        checkpoint = tmp_path / 'run' / 'model_best.pth.tar'
        if request.param == 'run':
            return str(tmp_path / 'run'), model
        if request.param == 'checkpoint':
            return str(checkpoint.rename(tmp_path / 'renamed.pth')), model
        if request.param == 'safetensors':
            found = read_source(tmp_path / 'run')
            save_weights(found.state_dict, tmp_path / 'weights.safetensors', found.description)
            return str(tmp_path / 'weights.safetensors'), model
        folder = tmp_path / 'folder'
        folder.mkdir()
        safetensors.torch.save_file(model.state_dict(), folder / 'model.safetensors')
        config = {'architecture': 'gmnet_s1', 'num_classes': 3, 'model_args': {**TINY, **VARIANTS[variant]},
                  'pretrained_cfg': {**timm.get_pretrained_cfg('gmnet_s1').to_dict(), 'num_classes': 3}}
        (folder / 'config.json').write_text(json.dumps(config))
        return str(folder), model
    return write


@every_variant
def test_every_source_gives_the_network_that_it_describes(variant, source):
    path, model = source(variant)
    assert_matters(variant)
    assert_same(load_model(path).model, model)
    found = read_source(path)
    assert not found.description.assumed and not any('assumed' in note for note in found.notes[:-1])


@pytest.mark.slow
@every_variant
def test_save_save_load(variant, source, tmp_path, monkeypatch, capsys):
    """Published twice, from each kind of source, timm loads the network that the first source defines."""
    monkeypatch.chdir(tmp_path)
    path, model = source(variant)
    assert main(['save', path, 'first']) == 0
    assert main(['save', 'first', 'second']) == 0
    assert_same(timm.create_model('local-dir:second', pretrained=True), model)
    capsys.readouterr()
    assert main(['verify', 'second']) == 0
    assert 'FAILED' not in capsys.readouterr().out
    first, second = ((tmp_path / name / 'model.safetensors').read_bytes() for name in ('first', 'second'))
    assert first == second


@every_variant
def test_bare_tensors_with_the_rest_stated(variant, tmp_path, capsys):
    model = original(variant)
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    args = dict(VARIANTS[variant])
    flags = ['--gp', args.pop('global_pool')] if 'global_pool' in args else []
    flags += ['--model-kwargs', *(f'{key}={value}' for key, value in args.items())] if args else []
    assert main(['save', str(tmp_path / 'bare.pth'), str(tmp_path / 'out'), *flags]) == 0
    assert_same(timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True), model)


def test_what_is_assumed_is_said_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = original()
    torch.save(model.state_dict(), 'bare.pth')
    assumed = 'act_layer relu6, global_pool avg, output_stride 32'
    assert main(['save', 'bare.pth', 'out']) == 0
    out, err = capsys.readouterr()
    assert assumed in err and 'compared                 not possible' in out  # nothing states the model
    assert assumed in (tmp_path / 'out' / 'README.md').read_text()
    assert main(['verify', 'out']) == 0
    assert assumed in capsys.readouterr().out
    assert main(['save', 'out', 'again']) == 0
    assert assumed in capsys.readouterr().err
    assert main(['info', 'bare.pth']) == 0
    out, err = capsys.readouterr()
    assert 'nothing but the tensors' in out and assumed in err
    flags = ['--model-kwargs', 'act_layer=gelu', 'output_stride=32', '--gp', 'avg']
    assert main(['save', 'bare.pth', 'stated', *flags]) == 0
    assert 'assumed' not in (tmp_path / 'stated' / 'README.md').read_text()
    # an assumption can be corrected later, a statement cannot
    assert main(['save', 'out', 'corrected', '--model-kwargs', 'act_layer=gelu']) == 0
    assert_same(timm.create_model('local-dir:corrected', pretrained=True), model)
    assert main(['save', 'corrected', 'wrong', '--model-kwargs', 'act_layer=relu']) == 1
    assert 'The source says act_layer' in capsys.readouterr().err


@pytest.mark.parametrize('flags', [
    ['--model-kwargs', 'act_layer=relu6'], ['--model-kwargs', 'base_dim=8'], ['--gp', 'max'],
    ['--model-kwargs', 'output_stride=16'], ['--model-kwargs', 'widths=3'], ['--model-kwargs', 'act_layer'],
])
def test_flags_that_contradict_the_source(flags, tmp_path, capsys):
    write_run(tmp_path / 'run')
    assert main(['info', str(tmp_path / 'run'), *flags]) == 1
    assert flags[-1].split('=')[0] in capsys.readouterr().err or flags[0] == '--gp'


@pytest.mark.parametrize('args, named', [
    (dict(split_bn=True), 'split_bn'),
    (dict(model_kwargs={**TINY, 'features_only': True}), 'features_only'),
    (dict(model_kwargs={**TINY, 'patch_size': 4}), 'patch_size'),
    (dict(model_kwargs={**TINY, 'act_layer': 'no_such_activation'}), 'no_such_activation'),
    (dict(model_kwargs={**TINY, 'depths': [10 ** 9] * 4}), 'depths'),
    (dict(model_kwargs={**TINY, 'act_layer': float('nan')}), 'act_layer'),
    (dict(model_kwargs=['act_layer=gelu']), 'model_kwargs'),
    (dict(num_classes={}), 'num_classes'),
    (dict(gp=7), 'global_pool|gmnet_s1'),
    (dict(model='gmnet_s9'), 'gmnet_s9'),
    (dict(model_kwargs={}), 'missing|shape'),
    (dict(model='local-dir:nowhere'), 'nowhere'),
])
def test_arguments_that_cannot_be_carried_over(args, named, tmp_path):
    write_run(tmp_path / 'run', **args)
    with pytest.raises(UserError, match=named) as e:
        read_source(tmp_path / 'run')
    assert '\n' not in str(e.value)


def test_sources_that_contradict_each_other(tmp_path):
    write_run(tmp_path / 'run')
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump(train_args('dilated')))
    with pytest.raises(UserError, match=r'args\.yaml.* describe different models: (act_layer|output_stride)'):
        read_source(tmp_path / 'run')
    with pytest.raises(UserError, match='this is a gmnet_s1, not a gmnet_s3'):
        read_source(f'gmnet_s3={tmp_path / "run" / "model_best.pth.tar"}')


def test_config_that_contradicts_the_weights_file(tmp_path, capsys):
    write_run(tmp_path / 'run')
    assert main(['save', str(tmp_path / 'run'), str(tmp_path / 'out')]) == 0
    path = tmp_path / 'out' / 'config.json'
    config = json.loads(path.read_text())
    assert config['model_args']['act_layer'] == 'gelu'
    config['model_args']['act_layer'] = 'relu6'
    path.write_text(json.dumps(config))
    assert main(['verify', str(tmp_path / 'out')]) == 1
    assert 'act_layer relu6 against gelu' in capsys.readouterr().out
    with pytest.raises(UserError, match='describe different models: act_layer'):
        load_model(str(tmp_path / 'out'))


@pytest.mark.parametrize('key, value', [('act_layer', 'relu'), ('global_pool', 'max'), ('output_stride', 16)])
def test_a_writer_that_loses_an_argument_is_found_out(key, value, tmp_path, monkeypatch, capsys):
    """The proof does not use the description that the folder is written from."""
    from gmnet_timm.weights import description
    kwargs = {**TINY, key: value}
    pool = kwargs.pop('global_pool', None)
    write_run(tmp_path / 'run', model_kwargs=kwargs, gp=pool)
    real = description._checked

    def lose(name, args, *rest):
        return real(name, {k: v for k, v in args.items() if k != key}, *rest)

    monkeypatch.setattr(description, '_checked', lose)
    assert main(['save', str(tmp_path / 'run'), str(tmp_path / 'out')]) == 1
    assert "does not compute the logits of the network of the run's arguments" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_ema_is_taken_everywhere_unless_told_not_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = write_run(tmp_path / 'run')
    ema = {k: v / 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    write_checkpoint(tmp_path / 'run' / 'model_best.pth.tar', model, state_dict_ema=ema)
    for flags, expected in (([], ema), (['--no-ema'], model.state_dict())):
        found = read_source('run', use_ema=not flags)
        assert torch.equal(found.checkpoint.state_dict['head.weight'], expected['head.weight'])
        assert torch.equal(load_model('run', use_ema=not flags).model.head.weight, expected['head.weight'])
        assert main(['save', 'run', f'out{len(flags)}', *flags]) == 0
        assert main(['convert', 'run', f'out{len(flags)}.safetensors', *flags]) == 0
        for path in (f'out{len(flags)}/model.safetensors', f'out{len(flags)}.safetensors'):
            assert torch.equal(safetensors.torch.load_file(path)['head.weight'], expected['head.weight'])
        err = capsys.readouterr().err
        assert ('which are not taken' if flags else 'EMA weights of the checkpoint are taken') in err


def test_converted_files_describe_themselves(tmp_path):
    model = write_run(tmp_path / 'run')
    found = read_source(tmp_path / 'run')
    for suffix in ('.safetensors', '.pth.tar'):
        target = tmp_path / f'converted{suffix}'
        save_weights(found.state_dict, target, found.description)
        again = read_source(target)
        assert again.description.full_args == found.description.full_args and not again.description.assumed
        assert_same(again.build(), model)
    save_weights(found.state_dict, tmp_path / 'bare.pth', found.description)
    assert read_source(tmp_path / 'bare.pth').description.assumed


def test_other_models_of_timm(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    args = dict(model='test_resnet', num_classes=3, gp='max', model_kwargs=dict(act_layer='gelu'), in_chans=1)
    model = timm.create_model('test_resnet', num_classes=3, global_pool='max', act_layer='gelu', in_chans=1).eval()
    write_checkpoint(folder / 'last.pth.tar', model, args=argparse.Namespace(**args))
    image = IMAGES[:, :1]
    with torch.no_grad():
        assert torch.equal(load_model(str(folder)).model(image), model(image))
        torch.save(model.state_dict(), tmp_path / 'bare.pth')
        loaded = load_model(
            f'test_resnet={tmp_path / "bare.pth"}', model_kwargs=dict(act_layer='gelu', global_pool='max'))
        assert torch.equal(loaded.model(image), model(image))
        assumed = load_model(f'test_resnet={tmp_path / "bare.pth"}')
    assert any('does not say with which arguments' in note for note in assumed.notes)
    with pytest.raises(UserError, match='vit_tiny'):
        load_model(f'vit_tinny={tmp_path / "bare.pth"}')


def test_files_called_like_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(['info', 'gmnet_s1.pth.tar']) == 1
    assert 'neither a model nor a file' in capsys.readouterr().err
    torch.save(original().state_dict(), 'gmnet_s1.pth.tar')
    assert main(['info', 'gmnet_s1.pth.tar']) == 0
    assert main(['info', 'gmnet_s1.in1k']) == 0
    assert main(['info', 'gmnet_s5']) == 1
    assert 'gmnet_s1' in capsys.readouterr().err


def test_models_of_one_input_size(tmp_path):
    """A ViT takes another size by name, since timm adapts it; from a file it would have to be guessed how."""
    vit = timm.create_model('test_vit', num_classes=3).eval()
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    assert vit.pretrained_cfg['fixed_input_size']
    load_model(f'test_vit={tmp_path / "vit.pth"}')
    with pytest.raises(UserError, match='takes images of 160 pixels, not 96'):
        load_model(f'test_vit={tmp_path / "vit.pth"}', preprocessing=dict(img_size=96))


def test_tuples_of_a_checkpoint_are_the_lists_of_its_args_yaml(tmp_path):
    """train.py writes `depths=(1,1)` as a tuple into the checkpoint and as a list into args.yaml, for any model."""
    kwargs = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    model = timm.create_model('test_resnet', num_classes=3, **kwargs).eval()
    args = dict(model='test_resnet', num_classes=3, in_chans=None, gp=None, model_kwargs=kwargs)
    lists = {key: list(value) for key, value in kwargs.items()}
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**args, 'model_kwargs': lists}))
    write_checkpoint(tmp_path / 'last.pth.tar', model, args=argparse.Namespace(**args))
    assert_same(load_model(str(tmp_path)).model, model)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump({**args, 'model_kwargs': dict(layers=[1, 1, 1, 2])}))
    with pytest.raises(UserError, match='describe different models'):
        load_model(str(tmp_path))


def test_folders_of_other_models_are_loaded_by_timm(tmp_path):
    """timm knows what belongs to them: here, a ViT of another image size than its name's."""
    vit = timm.create_model('test_vit', num_classes=3, img_size=96).eval()
    timm.models.save_for_hf(vit, str(tmp_path / 'vit'), model_args=dict(img_size=96), safe_serialization=True)
    loaded = load_model(f'local-dir:{tmp_path / "vit"}')
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(loaded.model(image), vit(image))


def test_same_logits_of_models_that_overflow():
    """Different where only one overflows or only bright images tell; an image that overflows in both tells nothing."""
    class Net(torch.nn.Module):
        in_chans = 3

        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x).flatten(1)

    relu, relu6, square = Net(torch.relu), Net(lambda x: x.clamp(0, 20)), Net(lambda x: x * 1e37)
    clipped = Net(lambda x: (x * 1e37).clamp(-3e38, 3e38))
    assert same_logits(relu, relu) and same_logits(square, square)
    assert not same_logits(relu, relu6) and not same_logits(square, clipped) and not same_logits(clipped, square)
    infinite = Net(lambda x: x / 0)
    assert not same_logits(infinite, infinite)


def test_without_a_network_nothing_is_tried_for_half_a_minute(monkeypatch, capsys, tmp_path):
    def no_address(*args, **kwargs):
        raise socket.gaierror(-2, 'Name or service not known')

    monkeypatch.setattr(socket, 'getaddrinfo', no_address)
    for name in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy'):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    start = time.perf_counter()
    assert main(['info', 'hf-hub:you/absent']) == 1
    assert 'has no address here' in capsys.readouterr().err
    with pytest.raises(UserError, match='cannot be loaded'):
        load_model('hf-hub:you/absent')
    assert time.perf_counter() - start < 10 and not constants.HF_HUB_OFFLINE
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')  # a proxy would know the name
    assert _is_known_host('https://huggingface.co')


def test_the_example_names_what_is_missing(monkeypatch):
    examples = Path(__file__).parents[2] / 'examples'
    monkeypatch.setitem(sys.modules, 'nncf', None)
    with pytest.raises(SystemExit, match="nncf is not installed. Install it with: pip install 'gmnet-timm"):
        runpy.run_path(str(examples / 'quantize.py'))
