"""ResNet18 and MobileNetV2 with a gate in place of an activation, the subjects of the paper's frequency analysis.

A block's activation (ResNet18: between the two convolutions; MobileNetV2: after the expansion) becomes `act(x) * x`.
Everything else, also the activation after the residual sum, is timm's. No variant has a parameter more or another name
for one, so that weights of timm's originals load.

The originals are timm's own `resnet18` and `mobilenetv2_100`; GmNet's gates are an argument of `GmNet`.

Papers:
    * `GmNet: Revisiting Gating Mechanisms From A Frequency View` - https://arxiv.org/abs/2503.22841 (ICLR 2026)
"""
from typing import Any, Dict

import torch
import torch.nn as nn

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, get_act_layer
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.efficientnet import _gen_mobilenet_v2
from timm.models.resnet import BasicBlock, ResNet
from ._registry import generate_default_cfgs, register_model

__all__ = ['Gate']


class Gate(nn.Module):
    """The gate `act(x) * x`, for use as an activation layer."""

    def __init__(self, act_layer: LayerType = 'relu6'):
        super().__init__()
        self.act = get_act_layer(act_layer)()  # never in place, the product needs its input twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) * x


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'url': '',
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'paper_ids': 'arXiv:2503.22841',
        'paper_name': 'GmNet: Revisiting Gating Mechanisms From A Frequency View',
        **kwargs,
    }


_resnet_cfg = _cfg(first_conv='conv1', classifier='fc')
_mobilenet_cfg = _cfg(first_conv='conv_stem', classifier='classifier')

# Tags name the paper's training data, no weights are claimed.
default_cfgs = generate_default_cfgs({
    'resnet18_ewp.in1k': _resnet_cfg,
    'resnet18_gate_relu6.in1k': _resnet_cfg,
    'resnet18_gate_gelu.in1k': _resnet_cfg,
    'mobilenetv2_100_ewp.in1k': _mobilenet_cfg,
    'mobilenetv2_100_gate_relu6.in1k': _mobilenet_cfg,
    'mobilenetv2_100_gate_gelu.in1k': _mobilenet_cfg,
})


def _create_resnet18(variant: str, act_layer: LayerType, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    model = build_model_with_cfg(ResNet, variant, pretrained, **dict(model_args, **kwargs))
    for module in model.modules():  # also of a feature extractor, which has no layers by name
        if isinstance(module, BasicBlock):
            module.act1 = Gate(act_layer)
    return model


def _create_mobilenetv2(variant: str, act_layer: LayerType, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model = _gen_mobilenet_v2(variant, 1.0, pretrained=pretrained, **kwargs)
    for module in model.modules():
        if isinstance(module, InvertedResidual):
            module.bn1.act = Gate(act_layer)
    return model


@register_model
def resnet18_ewp(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet18 with the element-wise product x * x, the paper's Res18-Ewp."""
    return _create_resnet18('resnet18_ewp', 'identity', pretrained=pretrained, **kwargs)


@register_model
def resnet18_gate_relu6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet18 with the gate relu6(x) * x, the paper's Res18-Gate-ReLU6."""
    return _create_resnet18('resnet18_gate_relu6', 'relu6', pretrained=pretrained, **kwargs)


@register_model
def resnet18_gate_gelu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet18 with the gate gelu(x) * x, the paper's Res18-Gate-GELU."""
    return _create_resnet18('resnet18_gate_gelu', 'gelu', pretrained=pretrained, **kwargs)


@register_model
def mobilenetv2_100_ewp(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2-1.0 with the element-wise product x * x after each expansion."""
    return _create_mobilenetv2('mobilenetv2_100_ewp', 'identity', pretrained=pretrained, **kwargs)


@register_model
def mobilenetv2_100_gate_relu6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2-1.0 with the gate relu6(x) * x after each expansion."""
    return _create_mobilenetv2('mobilenetv2_100_gate_relu6', 'relu6', pretrained=pretrained, **kwargs)


@register_model
def mobilenetv2_100_gate_gelu(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV2-1.0 with the gate gelu(x) * x after each expansion."""
    return _create_mobilenetv2('mobilenetv2_100_gate_gelu', 'gelu', pretrained=pretrained, **kwargs)
