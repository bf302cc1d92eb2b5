"""GmNets as other programs store them: NumPy files, linear layers, other names. Each is built here by hand."""
import argparse
import copy
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from model_helpers import create

from gmnet_timm.cli.main import main
from gmnet_timm.weights.files import read_checkpoint
from gmnet_timm.weights.layouts import LayoutError, to_authors
from gmnet_timm.weights.model import load_model

SMALL = dict(num_classes=7, base_dim=8, depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module')
def authors():
    return create('gmnet_s1', **SMALL)


def arrays(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def linear(weights):
    return {name: w[:, :, 0, 0] if re.search(r'\.(f1|g)\.conv\.weight$', name) else w for name, w in weights.items()}


def linear_named_layer(weights):
    return {re.sub(r'\.(f1|g)\.conv\.', r'.\1.layer.', name): w for name, w in linear(weights).items()}


def transposed(weights):
    return {name: w.T if w.ndim == 2 else w for name, w in linear(weights).items()}


def height_width_in_out(weights):
    return {name: w.transpose(2, 3, 1, 0) if w.ndim == 4 else w for name, w in weights.items()}


def without_counters(weights):
    return {name: w for name, w in weights.items() if not name.endswith('num_batches_tracked')}


def names_of_timm(weights):
    return {re.sub(r'^(stages\.\d+\.0)\.0\.', r'\1.', name): w for name, w in weights.items()}


def fused(weights):
    """The norm of `g` folded into its convolution, in float64."""
    found = {name: w for name, w in weights.items() if '.g.bn.' not in name}
    for name in [name for name in weights if name.endswith('.g.conv.weight')]:
        block = name.removesuffix('.conv.weight')
        bn = {part: weights[f'{block}.bn.{part}'].astype(np.float64)
              for part in ('weight', 'bias', 'running_mean', 'running_var')}
        scale = bn['weight'] / np.sqrt(bn['running_var'] + 1e-5)
        bias = (weights[f'{block}.conv.bias'] - bn['running_mean']) * scale + bn['bias']
        found[name] = (weights[name] * scale[:, None, None, None]).astype(np.float32)
        found[f'{block}.conv.bias'] = bias.astype(np.float32)
    return found


LAYOUTS = [linear, linear_named_layer, transposed, height_width_in_out, without_counters, names_of_timm, fused]


def write_npz(path, weights):
    np.savez(path, **weights)


def write_compressed(path, weights):
    np.savez_compressed(path, **weights)


def write_npy(path, weights):
    np.save(path, weights, allow_pickle=True)


def write_torch(path, weights):
    torch.save({name: torch.from_numpy(w.copy()) for name, w in weights.items()}, path)


WRITERS = {'.npz': write_npz, '-compressed.npz': write_compressed, '.npy': write_npy, '.pth': write_torch}


def assert_logits(model, expected, tolerance=0.0):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IMAGES), expected.eval()(IMAGES), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('suffix', WRITERS)
def test_every_layout_in_every_file(layout, suffix, authors, tmp_path):
    path = tmp_path / f'weights{suffix}'
    WRITERS[suffix](path, layout(arrays(authors)))
    tolerance = 1e-4 if layout is fused else 0.0
    assert_logits(load_model(str(path)).model, authors, tolerance)
    if suffix != '.pth':  # timm gives these to the model's load_pretrained
        assert_logits(timm.create_model('gmnet_s1', **SMALL, checkpoint_path=str(path)), authors, tolerance)


@pytest.mark.parametrize('layout', [without_counters, names_of_timm])
def test_what_torch_stores_through_timm(layout, authors, tmp_path):
    write_torch(tmp_path / 'w.pth', layout(arrays(authors)))
    overlay = dict(file=str(tmp_path / 'w.pth'), num_classes=7)
    assert_logits(timm.create_model('gmnet_s1', **SMALL, checkpoint_path=str(tmp_path / 'w.pth')), authors)
    assert_logits(timm.create_model('gmnet_s1', **SMALL, pretrained=True, pretrained_cfg_overlay=overlay), authors)


def test_convert_makes_a_file_for_timm(authors, tmp_path, capsys):
    source, target = tmp_path / 'w.npz', tmp_path / 'w.safetensors'
    write_npz(source, linear_named_layer(fused(arrays(authors))))
    assert main(['info', str(source)]) == 0
    said = ' '.join(capsys.readouterr().err.split())
    assert 'There is no norm g.bn: it was fused into g, and is an identity here.' in said
    assert '1x1 convolutions were stored as linear layers.' in said
    assert main(['convert', str(source), str(target)]) == 0
    overlay = dict(file=str(target), num_classes=7)
    model = timm.create_model('gmnet_s1', **SMALL, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_logits(model, authors, 1e-4)


@pytest.mark.parametrize('layout, down', [('authors', 'stages.0.0.0.conv.weight'), ('timm', 'stages.0.0.conv.weight')])
def test_convert_to_a_layout(layout, down, authors, tmp_path):
    torch.save(authors.state_dict(), tmp_path / 'w.pth')
    target = tmp_path / f'{layout}.safetensors'
    assert main(['convert', str(tmp_path / 'w.pth'), str(target), '--layout', layout]) == 0
    assert down in read_checkpoint(target).state_dict
    assert_logits(load_model(str(target)).model, authors)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.', 'timm_model.', 'backbone.', 'net.',
                                    'module._orig_mod.', 'model.net.module.', 'timm_model._orig_mod.'])
def test_prefixes_of_wrappers(prefix, authors, tmp_path, capsys):
    path = tmp_path / 'w.pth'
    torch.save({f'{prefix}{name}': value for name, value in authors.state_dict().items()}, path)
    assert_logits(load_model(str(path)).model, authors)
    assert main(['info', str(path)]) == 0
    assert f'The prefix {prefix} of all names was removed.' in capsys.readouterr().err


def test_a_prefix_of_some_tensors_is_not_removed(authors, tmp_path, capsys):
    weights = {(f'net.{name}' if i else name): v for i, (name, v) in enumerate(authors.state_dict().items())}
    torch.save(weights, tmp_path / 'w.pth')
    assert main(['info', str(tmp_path / 'w.pth')]) == 1
    assert 'error: ' in capsys.readouterr().err


def test_checkpoint_of_deits_trainer(tmp_path):
    """Its arguments: `nb_classes`, one `input_size`, `eval_crop_ratio`."""
    model = create('gmnet_s1', num_classes=3)
    args = argparse.Namespace(model='gmnet_s1', nb_classes=3, input_size=96, eval_crop_ratio=0.9, lr=5e-4)
    ema = {name: value + 1 for name, value in model.state_dict().items()}
    torch.save({'model': ema, 'model_ema': model.state_dict(), 'epoch': 4, 'args': args}, tmp_path / 'best.pth')
    loaded = load_model(str(tmp_path / 'best.pth'))
    assert_logits(loaded.model, model)
    assert loaded.data_config['input_size'] == (3, 96, 96) and loaded.data_config['crop_pct'] == 0.9


def test_as_many_classes_as_channels(tmp_path):
    """The head is square, and as the convolutions are in torch's layout, it is too."""
    model = create('gmnet_s1', **{**SMALL, 'num_classes': 64})
    torch.save(model.state_dict(), tmp_path / 'square.pth')
    loaded = load_model(str(tmp_path / 'square.pth'))
    assert_logits(loaded.model, model)
    assert any('The head is square' in note for note in loaded.notes)  # if it were transposed, nothing would show it
    swapped = {name: torch.from_numpy(w.copy()) for name, w in height_width_in_out(arrays(model)).items()}
    with pytest.raises(LayoutError, match='head.weight of shape .64, 64. can be read as'):
        to_authors(swapped)


def test_ambiguous_shapes_are_refused():
    """Of a block with as many hidden channels as outer ones, nothing tells rows from columns."""
    model = create('gmnet_s1', base_dim=8, depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1), num_classes=64)
    weights = {name: torch.from_numpy(w.copy()) for name, w in linear(arrays(model)).items()}
    with pytest.raises(LayoutError, match='can be read as'):
        to_authors(weights)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


@pytest.mark.parametrize('value', [Harmful(), np.array([Harmful()], dtype=object)])
def test_a_numpy_file_runs_no_code(value, tmp_path, capsys):
    np.save(tmp_path / 'w.npy', {'head.weight': value}, allow_pickle=True)
    assert main(['info', str(tmp_path / 'w.npy')]) == 1
    assert 'error: ' in capsys.readouterr().err
    np.savez(tmp_path / 'w.npz', head=np.array([value], dtype=object))
    assert main(['info', str(tmp_path / 'w.npz')]) == 1


def test_what_registering_adds_follows_the_model(authors):
    """Copies, pickles, compiled and scripted models load both naming schemes, and resume with their own."""
    weights = {name: torch.from_numpy(w.copy()) for name, w in names_of_timm(arrays(authors)).items()}
    for change in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = change(timm.create_model('gmnet_s1', **SMALL))
        model.load_state_dict(weights)
        assert_logits(model, authors)
        model.load_state_dict(authors.state_dict())
    model = timm.create_model('gmnet_s1', **SMALL)
    compiled = torch.compile(model, backend='eager')
    compiled.load_state_dict({f'_orig_mod.{name}': value for name, value in authors.state_dict().items()})
    assert_logits(compiled, authors)
    holder = torch.nn.ModuleDict({'net': model})
    holder.load_state_dict({f'net.{name}': value for name, value in weights.items()})
    assert_logits(model, authors)


@pytest.mark.filterwarnings('ignore:.*torch.jit.*deprecated')
def test_scripting_is_not_affected(authors):
    model = timm.create_model('gmnet_s1', **SMALL)
    model.load_state_dict({name: torch.from_numpy(w.copy()) for name, w in names_of_timm(arrays(authors)).items()})
    assert_logits(torch.jit.script(model.eval()), authors)
