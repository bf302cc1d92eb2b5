"""The models that are measured, the accuracy that was published for them, and weights to measure them with."""
import argparse
import copy
import dataclasses
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.utils import ParseKwargs, reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

from gmnet_timm.errors import UserError
from gmnet_timm.info import PAPER

__all__ = ['MODELS', 'Model', 'create', 'find', 'fuse', 'split']


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of timm, and its published top-1 on ImageNet-1k, in percent."""

    name: str  # of timm, and what else its entry point is given: 'gmnet_s3 gate=fc'
    img_size: int = 224  # height and width, those of the published accuracy
    top1: float | None = None  # trained without a teacher
    top1_distilled: float | None = None  # trained with one, or on more than ImageNet-1k
    source: str = ''  # where both come from


GMNET = 'arXiv 2503.22841'
TIMM = 'results-imagenet.csv of timm'  # the released weights, as evaluated by timm

MODELS: dict[str, Model] = {model.name: model for model in [
    *(Model(name, 224, paper.top1, source=GMNET) for name, paper in PAPER.items()),
    Model('starnet_s1', 224, 73.5, source=TIMM),
    Model('starnet_s2', 224, 74.7, source=TIMM),
    Model('starnet_s3', 224, 77.4, source=TIMM),
    Model('starnet_s4', 224, 78.8, source=TIMM),
    Model('repvit_m1_0', 224, 78.6, 80.2, f'{GMNET}; distilled: {TIMM}'),
    Model('repvit_m1_5', 224, 81.2, 82.4, f'{GMNET}; distilled: {TIMM}'),
    Model('efficientformerv2_s1', 224, 77.9, 79.7, f'{GMNET}; distilled: {TIMM}'),
    Model('mobilenetv2_100', 224, 72.9, source=TIMM),
    Model('mobileone_s2', 224, 77.5, source=TIMM),
    Model('levit_256', 224, None, 81.5, TIMM),
    Model('mobilenetv4_conv_medium', 224, 79.1, source=TIMM),
    Model('shvit_s4', 256, 79.4, source=TIMM),
    Model('efficientvim_m2', 224, 75.4, 76.7, 'authors\' repository, mlvlab/EfficientViM'),
    Model('fastvit_t8', 256, 76.2, 77.2, TIMM),
    Model('efficientvit_b1', 224, 79.3, source=TIMM),
    Model('cpubone_b0_bfrobust', 224, 77.6, source='authors\' repository, altair199797/CPUBone'),
    Model('cpubone_b1_bfrobust', 224, 78.7, source='authors\' repository, altair199797/CPUBone'),
    Model('iformer_s', 224, 78.8, source='authors\' model page, BillionZheng/iFormer'),
    Model('iformer_m', 224, 80.4, source='authors\' model page, BillionZheng/iFormer'),
    Model('lowformer_b0', 224, 78.4, source='authors\' repository, altair199797/LowFormer'),
    Model('lowformer_b1', 224, 79.9, source='authors\' repository, altair199797/LowFormer'),
    Model('mambaout_femto', 224, 78.9, source=TIMM),
    Model('mambaout_kobe', 224, 80.0, source=TIMM),
    Model('fasternet_t2', 224, 78.7, source=TIMM),
    Model('convnext_femto_ols', 224, 77.9, source=TIMM),
    Model('hgnetv2_b1', 224, None, 78.9, TIMM),
    Model('hgnetv2_b2', 224, None, 81.6, TIMM),
    Model('tiny_vit_5m_224', 224, 79.2, 80.9, f'{TIMM}; distilled: on ImageNet-22k'),
    Model('repvit_m1_1', 224, None, 80.8, TIMM),
    Model('mobilenetv4_hybrid_medium', 224, 80.4, source=TIMM),
    Model('lcnetv2_base', 224, 77.0, 80.1, 'authors\' repository, PaddlePaddle/PaddleClas'),
]}


def split(spec: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of 'gmnet_s3 gate=fc recompute_gate=True'."""
    name, *pairs = spec.split()
    parsed = argparse.Namespace()
    try:
        ParseKwargs([], 'kwargs')(argparse.ArgumentParser(), parsed, pairs)
    except ValueError as e:
        raise UserError(f'Arguments of {name} are written KEY=VALUE, not {" ".join(pairs)}.') from e
    return name, parsed.kwargs


def find(spec: str) -> Model:
    """What is known of a model of timm, which may be no more than its name. Accuracies are those of its defaults."""
    name, _ = split(spec)
    return MODELS.get(spec, Model(spec, MODELS[name].img_size if name in MODELS else 224))


def create(model: Model) -> nn.Module:
    """A model in evaluation mode whose activations have realistic magnitudes.

    Speed does not depend on what weights mean, but it may on numbers that vanish or overflow, and the check of outputs
    is blind to layers that a fresh layer scale of 1e-6 hides. So layer scales are drawn from 0.1 to 0.5, and BatchNorms
    take their statistics from random images.
    """
    torch.manual_seed(0)
    name, kwargs = split(model.name)
    net = timm.create_model(name, **kwargs)
    for name, p in net.named_parameters():
        if p.abs().max() < 1e-3 and p.ndim and not name.endswith('bias'):
            nn.init.uniform_(p, 0.1, 0.5)
    update_bn((torch.randn(4, 3, model.img_size, model.img_size) for _ in range(2)), net)
    return net.eval()


def fuse(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy with all that can be fused: what the model offers to timm, then BatchNorms right behind a convolution.

    Args:
        net: In evaluation mode.
        x: An input; one pass finds out which BatchNorm follows which convolution.
    """
    net = reparameterize_model(copy.deepcopy(net))
    outputs: dict[int, tuple] = {}
    pairs = []

    def after_convolution(module, args, output):
        outputs[id(output)] = (module, output)  # holding the output keeps its id from being given again

    def before_norm(module, args):
        if id(args[0]) in outputs:
            pairs.append((outputs[id(args[0])][0], module))

    hooks = []
    for module in net.modules():
        if type(module) is nn.Conv2d:
            hooks.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(before_norm))
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()

    names = {module: name for name, module in net.named_modules()}
    for conv, norm in pairs:
        rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
        net.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm))
        net.set_submodule(names[norm], rest)
    return net
