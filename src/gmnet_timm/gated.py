"""ResNet18 and MobileNetV2 with a gate in place of an activation, the subjects of the paper's frequency analysis.

A block's activation (ResNet18: between the two convolutions; MobileNetV2: after the expansion) becomes `act(x) * x`.
The model's name fixes the `act` of its gates. `act_layer` means what it means in timm, the activation everywhere else:
in the stem, after the residual sum, after the depthwise convolution, in the head.

The models are timm's `resnet18` and `mobilenetv2_100` in everything else, and take all their arguments. No parameter is
added or renamed, so weights of the originals load. GmNet's own gates are an argument of `GmNet`.

Papers:
    * `GmNet: Revisiting Gating Mechanisms From A Frequency View` - https://arxiv.org/abs/2503.22841 (ICLR 2026)
"""
from functools import partial
from typing import Any, Callable, Dict, List

import torch
import torch.nn as nn

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerType, get_act_layer
from timm.models._builder import build_model_with_cfg, pretrained_cfg_for_features
from timm.models.efficientnet import mobilenetv2_100
from timm.models.resnet import BasicBlock, resnet18
from ._registry import generate_default_cfgs, register_model

__all__ = ['Gate', 'replace_activations']


class Gate(nn.Module):
    """The gate `act(x) * x`, for use as an activation layer."""

    def __init__(self, act_layer: LayerType = 'relu6'):
        super().__init__()
        self.act = get_act_layer(act_layer)()  # never in place, the product needs its input twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x) * x


def replace_activations(model: nn.Module, act_layer: Callable[[], nn.Module]) -> List[nn.Module]:
    """Put a module where the paper puts its gates: into each basic block (ResNet) and inverted residual (MobileNetV2).

    Args:
        model: A model of timm's, changed in place.
        act_layer: Makes the module that takes the place of one activation.

    Returns:
        The new modules, in the order of the blocks.
    """
    replaced = []
    for module in list(model.modules()):
        if isinstance(module, BasicBlock):
            module.act1 = act_layer()
            replaced.append(module.act1)
        elif hasattr(module, 'conv_pwl'):  # has an expansion, which the first block has not
            module.bn1.act = act_layer()
            replaced.append(module.bn1.act)
    return replaced


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


# timm calls these where it would call a model's class: gates are in place before it wraps, traces or cuts a model.


def _gated(create: Callable[..., nn.Module], gate: LayerType, **kwargs: Any) -> nn.Module:
    model = create(**kwargs)
    replace_activations(model, partial(Gate, gate))
    return model


def _create_resnet18(variant: str, gate: LayerType, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(partial(_gated, resnet18, gate), variant, pretrained, **kwargs)


def _create_mobilenetv2(variant: str, gate: LayerType, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    feature_cls = kwargs.get('feature_cls')
    if kwargs.get('features_only', False) and feature_cls is None:
        # by default, this family's feature extractor is a class of its own and not a wrapper
        kwargs = {key: value for key, value in kwargs.items() if key not in ('features_only', 'feature_cls')}
        create = partial(_gated, mobilenetv2_100, gate, features_only=True)
        model: Any = build_model_with_cfg(create, variant, pretrained, pretrained_strict=False, **kwargs)
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
        return model
    if feature_cls in ('list', 'dict'):
        kwargs.setdefault('feature_cfg', dict(flatten_sequential=True))  # they find no stage without
    return build_model_with_cfg(partial(_gated, mobilenetv2_100, gate), variant, pretrained, **kwargs)


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
