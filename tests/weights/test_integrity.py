"""The hash of weights, and which values can be weights."""
import hashlib
import struct

import pytest
import torch
from checkpoint_files import weights

from gmnet_timm.weights.files import CheckpointError, read_checkpoint, weights_sha256


def test_hash_by_hand():
    """As docs/publishing.md describes it, with nothing of this package."""
    state_dict = {'b': torch.tensor([[1., 2.], [3., 4.]]).t(), 'a.num_batches_tracked': torch.tensor(7)}
    a = b'a.num_batches_tracked int64 []\n' + struct.pack('<q', 7)
    b = b'b float32 [2, 2]\n' + struct.pack('<4f', 1, 3, 2, 4)
    assert weights_sha256(state_dict) == hashlib.sha256(a + b).hexdigest()


@pytest.mark.parametrize('change', [
    lambda sd: sd.update(a=sd['a'] + 1), lambda sd: sd.update(a=sd['a'].reshape(3, 8)),
    lambda sd: sd.update(a=sd['a'].double()), lambda sd: sd.update(x=sd.pop('a')), lambda sd: sd.pop('e')])
def test_hash_covers_names_dtypes_shapes_and_values(change):
    state_dict = weights()
    change(state_dict)
    assert weights_sha256(state_dict) != weights_sha256(weights())
    assert weights_sha256(dict(reversed(weights().items()))) == weights_sha256(weights())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('position', [0, 500, 999])
def test_one_value_that_is_not_finite(dtype, value, position, tmp_path):
    tensor = torch.zeros(1000, dtype=dtype)
    tensor[position] = value
    for key, changed in (('a', tensor), ('b', tensor.reshape(10, 100).t()), ('c', tensor[position])):
        torch.save({'fine': torch.ones(3), key: changed}, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=f'NaN or infinite values in {key}'):
            read_checkpoint(tmp_path / 'x.pth')


def test_other_values_that_weights_do_not_have(tmp_path):
    path = tmp_path / 'x.pth'
    for key, value, word in (
            ('x.running_var', torch.tensor([1., -1e-3]), 'Negative variances in x.running_var'),
            ('x', torch.zeros(1).expand(1 << 20, 1 << 20), 'claim 4,398,046,511,104 bytes'),
            ('x', torch.zeros(1, dtype=torch.int64), r'Not dtypes of weights: x torch\.int64'),
            ('num_batches_tracked', torch.zeros(1), r'torch\.float32'),
            *(('x', torch.zeros(2, dtype=dtype), 'Not dtypes of weights')
              for dtype in (torch.int32, torch.bool, torch.float8_e4m3fn))):
        torch.save({key: value}, path)
        with pytest.raises(CheckpointError, match=word):
            read_checkpoint(path)
    torch.save({'x.running_mean': torch.tensor([-1.]), 'x.running_var': torch.tensor([0.])}, path)
    assert len(read_checkpoint(path).state_dict) == 2
