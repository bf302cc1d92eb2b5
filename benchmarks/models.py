"""The models that are measured, the accuracy that was published for them, and weights to measure them with."""
import copy
import dataclasses
from typing import Dict, Optional

import timm
import torch
from timm.layers import BatchNormAct2d
from timm.utils import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gmnet_timm.info import PAPER

__all__ = ['MODELS', 'Model', 'create', 'find', 'fold']


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of timm, and its published top-1 on ImageNet-1k, in percent."""

    name: str
    img_size: int = 224  # height and width, those of the published accuracy
    top1: Optional[float] = None  # trained without a teacher
    top1_distilled: Optional[float] = None  # trained with one
    source: str = ''  # where both come from


GMNET = 'arXiv 2503.22841'
TIMM = 'results-imagenet.csv of timm'  # the released weights, as evaluated by timm

MODELS: Dict[str, Model] = {model.name: model for model in [
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
]}


def find(name: str) -> Model:
    """What is known of a model of timm, which may be no more than its name."""
    return MODELS.get(name, Model(name))


def create(model: Model) -> nn.Module:
    """A model in evaluation mode whose numbers are of the size that those of a trained model have.

    Speed does not depend on what weights mean, but it may on numbers that vanish or overflow, and the check of outputs
    is blind to layers that a fresh layer scale of 1e-6 hides. So layer scales are drawn from 0.1 to 0.5, and BatchNorms
    take their statistics from random images.
    """
    torch.manual_seed(0)
    net = timm.create_model(model.name)
    norms = {m: m.momentum for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))}
    for name, p in net.named_parameters():
        if p.abs().max() < 1e-3 and p.ndim and not name.endswith('bias'):
            nn.init.uniform_(p, 0.1, 0.5)
    for norm in norms:
        norm.momentum = None  # a plain average over the batches below
    with torch.no_grad():
        for _ in range(2):
            net.train()(torch.randn(4, 3, model.img_size, model.img_size))
    for norm, momentum in norms.items():
        norm.momentum = momentum
    return net.eval()


def fold(net: nn.Module, x: torch.Tensor) -> nn.Module:
    """A copy with all that can be folded: what the model offers to timm, then BatchNorms right behind a convolution.

    Args:
        net: In evaluation mode.
        x: An input; one pass finds out which BatchNorm follows which convolution.
    """
    net = reparameterize_model(copy.deepcopy(net))
    outputs: Dict[int, tuple] = {}
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
