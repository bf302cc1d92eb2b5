"""How the tensors of a GmNet are named and laid out: the authors' names, which are ours, and others.

Every function takes and gives tensors by name, and changes no value.
"""
import re
from collections.abc import Mapping

import torch

__all__ = ['LayoutError', 'is_timm', 'named_as', 'strip_wrappers', 'to_authors', 'to_timm']

# of DistributedDataParallel, torch.compile, Lightning and others, transformers, detectors
_WRAPPERS = ('module.', '_orig_mod.', 'model.', 'timm_model.', 'backbone.', 'net.')
_KERNELS = {'dwconv.conv': 7, 'dwconv2.conv': 7, 'f1.conv': 1, 'g.conv': 1}
_BN = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
_BN_EPS = 1e-5  # of BatchNorm, which an identity has to undo


class LayoutError(ValueError):
    """Shapes do not tell how the tensors are laid out."""


def strip_wrappers(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names without the prefixes of wrappers that all of them have, in any nesting."""
    while prefix := next((p for p in _WRAPPERS if state_dict and all(key.startswith(p) for key in state_dict)), ''):
        state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict


def is_timm(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether the names are those of timm's pull request 2677, where a stage's down-sampling has no container."""
    return 'stages.0.0.conv.weight' in state_dict


def to_timm(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of timm's pull request 2677 for the authors' names."""
    return {re.sub(r'^(stages\.\d+\.0)\.0\.', r'\1.', key): value for key, value in state_dict.items()}


def named_as(state_dict: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors with the authors' names under those that a GmNet has, which may be timm's own."""
    return to_timm(state_dict) if is_timm(model.state_dict()) else state_dict


def to_authors(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The authors' names and torch's layouts for every way in which a GmNet is known to be stored.

    Takes the names of timm's pull request, 1x1 convolutions stored as linear layers, weights of linear layers as (in,
    out) and of convolutions as (height, width, in, out), and files without the norm `g.bn` (fused into `g`) or without
    BatchNorm's counters.

    Returns:
        The tensors, and what was changed, in whole sentences.

    Raises:
        LayoutError: Shapes leave open how the tensors are laid out.
    """
    notes = []
    found = dict(state_dict)
    if is_timm(found):
        found = {re.sub(r'^(stages\.\d+\.0)\.(conv|bn)\.', r'\1.0.\2.', key): value for key, value in found.items()}
        notes.append("The names are those of timm's pull request 2677.")
    if not any(re.fullmatch(r'stages\.\d+\.\d+\.f1\.(conv|layer)\.weight', key) for key in found):
        return found, notes  # not a GmNet, or nothing that can be told
    found = {re.sub(r'\.(f1|g)\.layer\.', r'.\1.conv.', key): value for key, value in found.items()}
    found, changed = _to_torch_layout(found)
    notes += changed
    blocks = sorted({m[1] for key in found if (m := re.match(r'(stages\.\d+\.\d+)\.g\.conv\.weight$', key))})
    if blocks and not any(f'{block}.g.bn.weight' in found for block in blocks):
        for block in blocks:
            like = found[f'{block}.g.conv.weight']
            ones = torch.ones(len(like), dtype=like.dtype)
            values = (ones, 0 * ones, 0 * ones, (1 - _BN_EPS) * ones, torch.tensor(0))
            found.update({f'{block}.g.bn.{name}': value for name, value in zip(_BN, values, strict=True)})
        notes.append('There is no norm g.bn: it was fused into g, and is an identity here.')
    missing = [key.replace('running_var', 'num_batches_tracked') for key in found if key.endswith('.running_var')]
    missing = [key for key in missing if key not in found]
    found.update({key: torch.tensor(0) for key in missing})
    return found, notes


def _to_torch_layout(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights as (out, in, height, width) and (out, in). One file is laid out in one way throughout."""
    candidates = {key: fits for key, value in state_dict.items()
                  if key.endswith('.weight') and (fits := _fitting(key, value, state_dict)) is not None}
    decided = {dims: {next(iter(fits)) for key, fits in candidates.items()
                      if len(fits) == 1 and state_dict[key].dim() == dims} for dims in (2, 4)}
    notes = []
    alone = [key for key in candidates if state_dict[key].dim() == 2] == ['head.weight']
    if alone and len(candidates['head.weight']) > 1 and decided[4] == {'torch'}:
        decided[2] = {'torch'}
        notes.append('The head is square: that it is stored as (out, in) is taken from the convolutions.')
    found, swapped, linear = dict(state_dict), set(), False
    for key, fits in candidates.items():
        value = state_dict[key]
        if not fits:
            continue  # the comparison of shapes says what is wrong
        kinds = fits if len(fits) == 1 else fits & decided[value.dim()]
        if len(kinds) != 1 or (len(fits) > 1 and len(decided[value.dim()]) != 1):
            raise LayoutError(
                f'{key} of shape {tuple(value.shape)} can be read as (out, in) and as (in, out), and no other tensor '
                'tells which')
        if kinds == {'swapped'}:
            value = value.permute(3, 2, 0, 1) if value.dim() == 4 else value.t()
            swapped.add(value.dim())
        if value.dim() == 2 and key != 'head.weight':
            value, linear = value[..., None, None], True
        found[key] = value.contiguous()
    if linear:
        notes.append('1x1 convolutions were stored as linear layers.')
    if 2 in swapped:
        notes.append('Weights of linear layers were stored as (in, out).')
    if 4 in swapped:
        notes.append('Weights of convolutions were stored as (height, width, in, out).')
    return found, notes


def _fitting(key: str, value: torch.Tensor, state_dict: Mapping[str, torch.Tensor]) -> set[str] | None:
    """How a weight can be laid out by its shape and the length of its bias: 'torch', 'swapped'; None for others."""
    name = key.removesuffix('.weight')
    bias = state_dict.get(f'{name}.bias')
    if bias is None or bias.dim() != 1 or value.dim() not in (2, 4):
        return None
    out = len(bias)
    if value.dim() == 2:
        is_map = name == 'head' or name.endswith(('.f1.conv', '.g.conv', '.gate.conv'))
        if not is_map:
            return None
        return {kind for kind, side in zip(('torch', 'swapped'), value.shape, strict=True) if side == out}
    if not name.endswith('conv'):
        return None
    part = '.'.join(name.split('.')[-2:])
    kernels = {_KERNELS[part]} if part in _KERNELS else {1, 3} if part == 'gate.conv' else {3}
    shape = tuple(value.shape)
    found = {'torch'} if shape[0] == out and shape[2] == shape[3] and shape[2] in kernels else set()
    return found | ({'swapped'} if shape[3] == out and shape[0] == shape[1] and shape[0] in kernels else set())
