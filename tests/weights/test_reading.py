"""What is read from checkpoint files of all sorts: the same as by timm, and what train.py wrote beside the weights."""
import argparse
import collections
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import run_content, same, save_hashed, saved, weights
from timm.models import load_state_dict

from gmnet_timm.weights.files import SHA256_KEY, CheckpointError, read_checkpoint, read_outline

GOLDEN = Path(__file__).parents[1] / 'golden' / 'checkpoints'
FORMATS = ('zip', 'legacy')


def read_metadata(path):
    return read_outline(path)[0]


def parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def with_attributes():
    tensor = torch.arange(3.)
    tensor.note = 'a tensor with an attribute is pickled as a subclass is'
    return {'a': tensor}


CONTENTS = {
    'bare': weights,
    'train.py': run_content,
    'module.': lambda: {'state_dict': {f'module.{key}': value for key, value in weights().items()}},
    'compiled': lambda: {'state_dict': {f'_orig_mod.module.{key}': value for key, value in weights().items()}},
    'model': lambda: {'model': weights(), 'epoch': 1},
    'model_ema': lambda: {'model': weights(), 'model_ema': weights(1.)},
    'all': lambda: {'state_dict_ema': weights(1.), 'model_ema': weights(2.), 'state_dict': weights(), 'model': {}},
    'ema is None': lambda: {'state_dict_ema': None, 'state_dict': weights()},
    'ema alone': lambda: {'state_dict_ema': weights(1.)},
    'state_dict of a module': lambda: torch.nn.BatchNorm2d(3).state_dict(),
    'parameters': parameters,
    'attributes': with_attributes,
    'one storage': lambda: dict(zip('abc', torch.arange(12.).split(4))),
}


def write(path: Path, content, kind: str = 'zip') -> Path:
    path.write_bytes(saved(content, zipped=kind == 'zip'))
    return path


@pytest.mark.parametrize('use_ema', [True, False])
@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('name', CONTENTS)
def test_as_by_timm(name, kind, use_ema, tmp_path):
    path = write(tmp_path / 'renamed.pth.tar', CONTENTS[name](), kind)
    try:
        expected = load_state_dict(str(path), use_ema=use_ema)
        assert all(isinstance(value, torch.Tensor) for value in expected.values())
        if name == 'compiled':  # timm 1.0.27 takes off the outer prefix only
            expected = type(expected)((key.removeprefix('module.'), value) for key, value in expected.items())
    except AssertionError:
        with pytest.raises(CheckpointError, match='not tensors'):
            read_checkpoint(path, use_ema=use_ema)
        return
    checkpoint = read_checkpoint(path, use_ema=use_ema)
    assert same(checkpoint.state_dict, expected)
    assert list(checkpoint.state_dict) == list(expected)
    assert all(value.stride() == expected[key].stride() for key, value in checkpoint.state_dict.items())
    assert not any(value.requires_grad for value in checkpoint.state_dict.values())
    assert checkpoint.protection == {'zip': 'zip checksums', 'legacy': None}[kind]


@pytest.mark.parametrize('name, has_ema', [
    ('bare', False), ('train.py', True), ('model_ema', True), ('all', True), ('ema is None', False)])
def test_ema(name, has_ema, tmp_path):
    path = write(tmp_path / 'x.pth', CONTENTS[name]())
    for use_ema in (True, False):
        checkpoint = read_checkpoint(path, use_ema=use_ema)
        assert (checkpoint.ema, checkpoint.has_ema) == (has_ema and use_ema, has_ema)
        offset = 1. if has_ema and use_ema else 0.
        assert checkpoint.state_dict['a'].flatten()[0] == offset
    assert read_outline(path)[1] is has_ema


def test_tensors_that_share_memory_still_do(tmp_path):
    path = write(tmp_path / 'x.pth', weights())
    state_dict = read_checkpoint(path).state_dict
    state_dict['tied'].fill_(-9.)
    assert (state_dict['a'][1] == -9).all() and (state_dict['a'][0] >= 0).all()


@pytest.mark.parametrize('version', ['2.5'])
@pytest.mark.parametrize('kind', FORMATS)
def test_files_of_older_versions(version, kind):
    """Written once by that version of torch; the same content is made here."""
    path = GOLDEN / f'torch-{version}-{kind}.pth'
    content = run_content()
    assert same(read_checkpoint(path).state_dict, content['state_dict_ema'])
    assert same(read_checkpoint(path, use_ema=False).state_dict, content['state_dict'])
    assert read_checkpoint(path).args == vars(content['args'])


@pytest.mark.parametrize('kind', FORMATS)
@pytest.mark.parametrize('read', [read_metadata, lambda path: read_checkpoint(path).metadata])
def test_metadata_of_train_py(read, kind, tmp_path):
    content = run_content()
    metadata = read(write(tmp_path / 'x.pth', content, kind))
    assert metadata == {key: content[key] for key in (
        'epoch', 'arch', 'args', 'metric', 'amp_scaler', 'saver', 'version')}
    assert isinstance(metadata['args'], argparse.Namespace)
    assert read_checkpoint(tmp_path / 'x.pth').args == vars(content['args'])


def test_metadata_of_other_files(tmp_path):
    assert read_metadata(write(tmp_path / 'bare.pth', weights())) == {}
    assert read_checkpoint(tmp_path / 'bare.pth').args == {}
    strings = {'format': 'pt', 'note': 'größer'}
    safetensors.torch.save_file({'a': torch.arange(3.)}, tmp_path / 'x.safetensors', metadata=strings)
    assert read_metadata(tmp_path / 'x.safetensors') == strings
    checkpoint = read_checkpoint(tmp_path / 'x.safetensors')
    assert (checkpoint.metadata, checkpoint.args, checkpoint.protection) == (strings, {}, None)
    save_hashed({'a': torch.arange(3.)}, tmp_path / 'hashed.safetensors')
    checkpoint = read_checkpoint(tmp_path / 'hashed.safetensors')
    assert SHA256_KEY in checkpoint.metadata and checkpoint.protection == 'recorded SHA-256'


@pytest.mark.filterwarnings('ignore')
def test_unusual_metadata(tmp_path):
    """What weights_only lets through beside the weights. Values that only torch can rebuild are left out."""
    args = argparse.Namespace(a=torch.Size([2]), b={1, 2}, c=b'\xff', d=1j, e=torch.device('cpu'), f=torch.float16)
    args.weights = torch.ones(3)  # one argument that is left out
    content = {
        'state_dict': weights(), 'args': args, 'counter': collections.Counter('aab'), 'array': bytearray(b'abc'),
        'keys': {0.5: 1, (1, 'x'): 2, None: 3, True: 4, b'k': 5}, 'set': set(), 'nan': float('inf'), 'deep': [[[[]]]],
        'sparse': torch.ones(2).to_sparse(), 'quantised': torch.quantize_per_tensor(torch.ones(2), .1, 0, torch.qint8),
        'meta': torch.ones(2, device='meta'), 'layout': torch.strided, 'storage': torch.ones(2).untyped_storage(),
        'conjugate': torch.ones(2, dtype=torch.complex64).conj(), 'long': 1 << 999,
    }
    path = write(tmp_path / 'x.pth', content)
    if 'builtins.set' in torch._weights_only_unpickler._get_allowed_globals():  # torch 2.5 allows less
        load_state_dict(str(path))
    metadata = read_metadata(path)
    assert vars(metadata.pop('args')) == {key: value for key, value in vars(args).items() if key != 'weights'}
    kept = ('counter', 'array', 'keys', 'set', 'nan', 'deep', 'long', 'layout')
    assert metadata == {key: content[key] for key in kept}


class RunsCode:
    def __reduce__(self):
        return os.system, ('touch pickled_code_ran',)


ERRORS = {
    'nothing': (b'', 'damaged or in another format'),
    'text': (b'no checkpoint at all\n' * 100, 'damaged or in another format'),
    'code': (saved({'state_dict': weights(), 'extra': RunsCode()}), r"run code, .* It asks for posix\.system"),
    'code in a legacy file': (saved({'state_dict': weights(), 'extra': RunsCode()}, zipped=False), 'run code'),
    'a model': (saved(torch.nn.Linear(1, 1)), r"It asks for torch\.nn\.modules\.linear\.Linear"),
    'a list': (saved([1, 2]), 'holds a list instead of tensors by name'),
    'a tensor': (saved(torch.ones(3)), 'holds a Tensor instead of tensors by name'),
    'numbers': (saved({'epoch': 3, 'lr': 0.1}), 'holds no state dict: epoch, lr are not tensors'),
    'numbers for names': (saved({1: torch.ones(1), (1, 2): torch.ones(1)}), r': 1, \(1, 2\) are not'),
    'a name of two lines': (saved({'a\n\x1b[31mb': 3}), r"holds no state dict: 'a\\n\\x1b\[31mb' are not"),
    'no tensors': (saved({'state_dict': {}}), 'holds no weights'),
    'None': (saved({'state_dict': None}), 'holds a NoneType instead'),
    'sparse': (saved({'a': torch.ones(2).to_sparse()}), 'not plain tensors: a'),
    'integers': (saved({'a': torch.ones(2, dtype=torch.int32)}), r'Not dtypes of weights: a torch\.int32'),
    'NaN': (saved({'a': torch.tensor([1., float('nan'), 1.])}), 'NaN or infinite values in a'),
    'infinite': (saved({'a': torch.tensor([1., -float('inf'), 1.]).half()}), 'NaN or infinite values in a'),
    'negative': (saved({'running_var': torch.tensor([1., -1.]).bfloat16()}), 'Negative variances in running_var'),
    'two legacy files': (2 * saved(weights(), zipped=False), 'two files in one'),
    'a legacy file and a zip': (saved(weights(), zipped=False) + saved(weights()), 'two files in one'),
    'half a legacy file': (saved(weights(), zipped=False)[:-7], 'unexpected EOF'),
    'a plain pickle': (b'\x80\x02}.', 'magic number'),
    'a pickle of today': (b'\x80\x04\x95\x02\0\0\0\0\0\0\0}.', 'run code'),
    'safetensors': (safetensors.torch.save({'a': torch.ones(1)}), r'has to end in \.safetensors'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_errors(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw, word = ERRORS[name]
    path = tmp_path / 'x.pth'
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=word) as info:
        read_checkpoint(path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)
    assert os.listdir(tmp_path) == ['x.pth']


def with_header(raw: bytes, text: bytes) -> bytes:
    return struct.pack('<Q', len(text)) + text + raw[8 + struct.unpack('<Q', raw[:8])[0]:]


SAFE = safetensors.torch.save({'a': torch.ones(2)})
SAFETENSORS_ERRORS = {
    'a zip': (saved(weights()), r'let its name end in \.pth'),
    'nothing': (b'', 'damaged'),
    'cut off': (SAFE[:-1], 'damaged'),
    'numbers in metadata': (with_header(SAFE, b'{"__metadata__": {"a": 1}}'), 'damaged'),
    'a list': (with_header(SAFE, b'[]'), 'damaged'),
    'a huge header': (struct.pack('<Q', 1 << 40) + SAFE[8:], 'damaged'),
    'a deep header': (with_header(SAFE, b'[' * 100_000), 'damaged'),
    'many tensors': (with_header(SAFE, json.dumps({str(i): 1 for i in range(60_000)}).encode()), 'damaged'),
    'NaN': (safetensors.torch.save({'a': torch.tensor(float('nan'))}), 'NaN'),
    'no tensors': (safetensors.torch.save({}), 'holds no weights'),
}


@pytest.mark.parametrize('name', SAFETENSORS_ERRORS)
def test_errors_of_safetensors(name, tmp_path):
    raw, word = SAFETENSORS_ERRORS[name]
    path = tmp_path / 'x.safetensors'
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=word) as info:
        read_checkpoint(path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)


@pytest.mark.parametrize('read', [read_checkpoint, read_metadata])
def test_paths(read, tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path, word in (
            (tmp_path / 'missing', 'No checkpoint at'),
            (tmp_path, 'is not a file'),
            (tmp_path / 'pipe', 'is not a file'),
            ('/dev/zero', 'is not a file'),
            (tmp_path / ('x' * 300), 'too long'),
            ('a\0b', 'null byte')):
        with pytest.raises(CheckpointError, match=word):
            read(path)


def test_recorded_hash(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_hashed({'a': torch.arange(3.)}, path)
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match='SHA-256 that it records'):
        read_checkpoint(path)
