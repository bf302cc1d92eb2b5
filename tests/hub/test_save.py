"""What `save` and `convert` read and write."""
import hashlib
import json
import struct
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from publishing_helpers import FILES, LABELS, TINY, make_run, refused, succeed, tiny_model
from safetensors.torch import load_file, save_file
from timm.utils import reparameterize_model


def logits(model, size=64, seed=1):
    image = torch.randn(2, model.in_chans, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.eval()(image)


# What is read


def test_run_folder(run, tmp_path, names):
    """Best checkpoint, preprocessing of args.yaml, accuracy of that epoch, recipe without private paths."""
    folder = make_run(tmp_path / 'run')
    succeed(run('save', folder, tmp_path / 'out', '--class-names', names, '--train-dataset', 'owner/pets'))
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['pretrained_cfg']['input_size'] == [3, 96, 96]
    assert config['pretrained_cfg']['crop_pct'] == 0.9
    assert config['label_names'] == LABELS
    card = ModelCard.load(tmp_path / 'out' / 'README.md')
    (result,) = [r for r in card.data.eval_results if 'Top-1' in r.metric_name]
    assert (result.metric_value, result.dataset_name) == (40.25, 'owner/pets')
    assert 'summary.csv, epoch 1' in result.metric_args['source']
    assert 'adamw' in card.text and '| color_jitter | 0.0 |' in card.text and 'secret' not in str(card)
    assert 'amp_dtype' not in card.text and 'lr_base' not in card.text  # they had no effect
    succeed(run('save', folder, tmp_path / 'last', '--checkpoint', 'last.pth.tar', '--class-names', names))
    assert '30.125' in (tmp_path / 'last' / 'README.md').read_text()


def test_ema_weights(run, tmp_path):
    """They are taken unless told not to, and accuracies that train.py measured on them never describe the others."""
    folder = make_run(tmp_path / 'run', ema=True)
    _, _, err = run('save', folder, tmp_path / 'plain', '--no-ema')
    assert 'of the EMA weights, not of these' in err
    assert 'accuracy' not in (tmp_path / 'plain' / 'README.md').read_text().split('---')[1]
    succeed(run('save', folder, tmp_path / 'ema'))
    assert '40.25' in (tmp_path / 'ema' / 'README.md').read_text()
    plain, ema = (load_file(tmp_path / name / 'model.safetensors') for name in ('plain', 'ema'))
    assert torch.equal(plain['head.weight'] * 0.5, ema['head.weight'])
    # train.py does not evaluate EMA weights that it keeps on the CPU
    on_cpu = make_run(tmp_path / 'cpu', ema=True, model_ema_force_cpu=True)
    assert 'of the weights without EMA' in run('save', on_cpu, tmp_path / 'x')[2]
    plain_run = make_run(tmp_path / 'run2')
    for damage in ('- 1\n', 'a: [', '\x00'):
        (plain_run / 'args.yaml').write_text(damage)
        refused(run('save', plain_run, tmp_path / 'y'), 'args.yaml')


def test_metrics_of_validate_and_flags(run, tmp_path, checkpoint):
    results = tmp_path / 'results.csv'
    results.write_text('model,top1,top1_err,top5,top5_err\ngmnet_s1,61.5,38.5,88.25,11.75\n')
    succeed(run('save', checkpoint, tmp_path / 'a', '--results', results))
    text = (tmp_path / 'a' / 'README.md').read_text()
    assert '61.5 | validate.py (results.csv)' in text
    assert '88.25' not in text  # of three classes, the five likeliest are always right
    succeed(run('save', checkpoint, tmp_path / 'b', '--top1', 55))
    assert '55 | given on the command line' in (tmp_path / 'b' / 'README.md').read_text()
    refused(run('save', checkpoint, tmp_path / 'c', '--top1', 155), 'percentage')


def test_class_names(run, tmp_path, checkpoint, names):
    for name in ('b10', 'b9', 'a'):  # timm sorts numbers as numbers
        (tmp_path / 'images' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'images' / 'train' / name / 'x.jpg').touch()
    succeed(run('save', checkpoint, tmp_path / 'a', '--class-names', tmp_path / 'images'))
    assert json.loads((tmp_path / 'a' / 'config.json').read_text())['label_names'] == ['a', 'b9', 'b10']
    refused(run('save', checkpoint, tmp_path / 'b', '--class-names', 'imagenet-1k'), '1000 class names')
    names.write_text('cat\ncat\nowl\n')
    refused(run('save', checkpoint, tmp_path / 'b', '--class-names', names), 'twice: cat')
    refused(run('save', checkpoint, tmp_path / 'b', '--class-names', tmp_path / 'nowhere'), 'nowhere')
    refused(run('save', checkpoint, tmp_path / 'b', '--class-names', checkpoint), 'as text')
    (tmp_path / 'empty').mkdir()
    refused(run('save', checkpoint, tmp_path / 'b', '--class-names', tmp_path / 'empty'), 'No class names')
    torch.save(tiny_model(num_classes=1000).state_dict(), checkpoint)
    _, _, err = run('save', checkpoint, tmp_path / 'c')
    labels = json.loads((tmp_path / 'c' / 'config.json').read_text())['label_names']
    assert 'assumed' in err and len(set(labels)) == 1000 and labels[0].startswith('tench')


def test_local_dir_folder_keeps_its_card(run, tmp_path, checkpoint, names):
    """Saving what was saved loses nothing, and refuses a configuration of other tensors."""
    succeed(run(
        'save', checkpoint, tmp_path / 'a', '--class-names', names, '--top1', 50, '--img-size', 96, '--license', 'mit'))
    succeed(run('save', f'local-dir:{tmp_path / "a"}', tmp_path / 'b'))
    for name in FILES:
        assert (tmp_path / 'a' / name).read_bytes() == (tmp_path / 'b' / name).read_bytes()
    config = json.loads((tmp_path / 'b' / 'config.json').read_text())
    config['model_args']['depths'] = [1, 1, 2, 1]
    (tmp_path / 'b' / 'config.json').write_text(json.dumps(config))
    refused(run('save', tmp_path / 'b', tmp_path / 'c'), 'describe different models: depths')
    status, out, _ = run('verify', tmp_path / 'b')
    assert status == 1 and 'FAILED  config' in out
    for args in ({'depths': [10 ** 9] * 4}, {'width': 10 ** 9}, {'width': 'x'}, 'x', None, []):  # none of them is built
        (tmp_path / 'b' / 'config.json').write_text(json.dumps({**config, 'model_args': args}))
        status, out, _ = run('verify', tmp_path / 'b')
        assert status == 1 and 'FAILED  config' in out
        refused(run('save', tmp_path / 'b', tmp_path / 'c'), 'config.json')


class Visible:
    """Its unpickling leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize('what', ['fused', 'nan', 'unknown', 'missing', 'code', 'headless'])
def test_refused_before_anything_is_sent(run, hub, tmp_path, what):
    state_dict = tiny_model(num_classes=0 if what == 'headless' else 3).state_dict()
    if what == 'fused':
        state_dict = reparameterize_model(tiny_model()).state_dict()
    elif what == 'nan':
        state_dict['norm.bias'][1] = float('inf')
    elif what == 'unknown':
        state_dict['extra.weight'] = torch.zeros(3)
    elif what == 'missing':
        del state_dict['stages.1.1.gamma']
    elif what == 'code':
        state_dict['x'] = Visible(tmp_path / 'ran')
    torch.save(state_dict, tmp_path / 'bad.pth')
    reason = dict(fused='fused', nan='norm.bias', unknown='extra.weight', missing='stages.1.1.gamma', code='run code',
                  headless='classifier')[what]
    refused(run('push', tmp_path / 'bad.pth', 'owner/bad'), reason)
    assert not hub.requests and not (tmp_path / 'ran').exists()


# What is written


def test_saved_folder(run, tmp_path, checkpoint, names):
    """No pickle, no num_classes in model_args, loads to the logits of the original, never overwritten unasked."""
    out = tmp_path / 'out'
    succeed(run('save', checkpoint, out, '--class-names', names))
    assert {path.name for path in out.iterdir()} == FILES
    config = json.loads((out / 'config.json').read_text())
    assert config['model_args'] == {k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items()}
    assert torch.equal(logits(timm.create_model(f'local-dir:{out}', pretrained=True)), logits(tiny_model()))
    refused(run('save', checkpoint, out), '--force')
    (out / 'README.md').write_text('mine')
    succeed(run('save', checkpoint, out, '--force', '--class-names', names))
    assert (out / 'README.md').read_text() == 'mine'
    succeed(run('save', checkpoint, out, '--force', '--class-names', names, '--overwrite-card'))
    assert (out / 'README.md').read_text().startswith('---')
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith('.')] == []


@pytest.mark.parametrize('kwargs, dtype', [
    (dict(in_chans=1), torch.float16),
    (dict(in_chans=4, num_classes=2), torch.float64),
    (dict(global_pool='catavgmax'), torch.float32),
    (dict(base_dim=40, depths=(2, 2, 10, 2), mlp_ratios=(3, 3, 3, 2), stem_chs=32), torch.float32),
], ids=['grey, half precision', 'four channels, double precision', 'pooling', 'gmnet_s1'])
def test_saved_variants(run, tmp_path, kwargs, dtype):
    """Whatever the model, config.json builds it again, by itself and without num_classes, which transformers adds."""
    model = tiny_model(**kwargs).to(dtype)
    torch.save(model.state_dict(), tmp_path / 'x.pth')
    succeed(run('save', tmp_path / 'x.pth', tmp_path / 'out'))
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert torch.equal(logits(loaded), logits(model.float()))
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['architecture'] == 'gmnet_s1'
    args = config.get('model_args', {})
    assert 'num_classes' not in args and ('base_dim' in args) == ('base_dim' not in kwargs)
    built = timm.create_model(config['architecture'], num_classes=config['num_classes'], **args)
    built.load_state_dict(load_file(tmp_path / 'out' / 'model.safetensors'))
    assert torch.equal(logits(built), logits(model.float()))
    assert len(config['pretrained_cfg']['mean']) in (1, model.in_chans)
    assert 'FAILED' not in succeed(run('verify', tmp_path / 'out'))


def test_verify_finds_the_entry_that_transformers_cannot_load(run, tmp_path, checkpoint):
    """timm 1.0.31 writes it by itself."""
    succeed(run('save', checkpoint, tmp_path / 'out'))
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    config['model_args']['num_classes'] = 3
    (tmp_path / 'out' / 'config.json').write_text(json.dumps(config))
    status, out, _ = run('verify', tmp_path / 'out')
    assert status == 1 and 'num_classes under model_args' in out


def test_recorded_hash(run, tmp_path, checkpoint):
    """The SHA-256 is the one that its documentation describes, computed here from the bytes of the file."""
    succeed(run('convert', checkpoint, tmp_path / 'a.safetensors'))
    raw = (tmp_path / 'a.safetensors').read_bytes()
    (length,) = struct.unpack('<Q', raw[:8])
    header = json.loads(raw[8:8 + length])
    metadata = header.pop('__metadata__')
    digest = hashlib.sha256()
    for name, entry in sorted(header.items()):
        start, end = (8 + length + offset for offset in entry['data_offsets'])
        dtype = {'F32': 'float32', 'I64': 'int64'}[entry['dtype']]
        digest.update(f'{name} {dtype} {entry["shape"]}\n'.encode() + raw[start:end])
    assert metadata['weights_sha256'] == digest.hexdigest()


def test_flipped_bit(run, tmp_path, checkpoint):
    """It is noticed where a hash is recorded, and said to be unnoticeable where there is none."""
    out = tmp_path / 'out'
    succeed(run('save', checkpoint, out))
    raw = bytearray((out / 'model.safetensors').read_bytes())
    raw[-2000] ^= 1
    (out / 'model.safetensors').write_bytes(raw)
    status, text, _ = run('verify', out)
    assert status == 1 and 'SHA-256' in text
    refused(run('save', out, tmp_path / 'b'), 'SHA-256')
    save_file(tiny_model().state_dict(), out / 'model.safetensors')
    status, text, _ = run('verify', out)
    assert status == 0 and 'no SHA-256' in text


def test_convert(run, tmp_path, checkpoint):
    original = tiny_model().state_dict()
    succeed(run('convert', checkpoint, tmp_path / 'a.safetensors'))
    succeed(run('convert', tmp_path / 'a.safetensors', tmp_path / 'b.pth.tar'))
    succeed(run('convert', tmp_path / 'b.pth.tar', tmp_path / 'c.pth'))
    for loaded in (load_file(tmp_path / 'a.safetensors'),
                   torch.load(tmp_path / 'b.pth.tar', weights_only=True)['state_dict'],
                   torch.load(tmp_path / 'c.pth', weights_only=True)):
        assert set(loaded) == set(original) and all(torch.equal(loaded[key], original[key]) for key in original)
    before = (tmp_path / 'c.pth').read_bytes()
    refused(run('convert', checkpoint, tmp_path / 'c.pth', '--dtype', 'float16'), '--force')
    assert (tmp_path / 'c.pth').read_bytes() == before
    succeed(run('convert', checkpoint, tmp_path / 'c.pth', '--dtype', 'float16', '--force'))
    half = torch.load(tmp_path / 'c.pth', weights_only=True)
    assert all(torch.equal(half[key], value.half() if value.is_floating_point() else value)
               for key, value in original.items())
    refused(run('convert', checkpoint, tmp_path / 'c.onnx'), '.safetensors')
    original['head.bias'][0] = 1e6
    torch.save(original, checkpoint)
    refused(run('convert', checkpoint, tmp_path / 'd.pth', '--dtype', 'float16'), 'head.bias', 'bfloat16')
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        'a.safetensors', 'b.pth.tar', 'c.pth', 'checkpoint.pth']
