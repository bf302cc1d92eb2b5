"""Networks of the study: two bodies, and what takes the place of an activation in their blocks."""
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.gated import Gate, replace_activations

__all__ = ['BODIES', 'COMPARISONS', 'STUDIED', 'VARIANTS', 'create_study_model']

SCALE = 4.  # of the gate that is clipped: at 6 / 4 = 1.5
SMALLEST_MAP = 7


class ScaledReLU6(nn.Module):
    """relu6(scale * x) / scale, which clips at 6 / scale."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(SCALE * x) / SCALE


class TwoBranchGate(nn.Module):
    """silu(a) * b and silu(b) * a for the two halves a and b of the channels: SwiGLU's product without a parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x) * x.roll(x.shape[1] // 2, 1)


# label -> makes the module
VARIANTS: dict[str, Callable[[], nn.Module]] = {
    'ReLU(x)': nn.ReLU,
    'GELU(x)': nn.GELU,
    'x·x': lambda: Gate('identity'),
    'ReLU(x)·x': lambda: Gate('relu'),
    'ReLU6(x)·x': lambda: Gate('relu6'),
    'GELU(x)·x': lambda: Gate('gelu'),
    'ReLU6(4x)/4·x': lambda: Gate(ScaledReLU6),
    'SiLU(a)·b': TwoBranchGate,
}
# what is trained by default: with both bodies, what the paper's claims need, and with the cheaper one all
STUDIED: dict[str, tuple[str, ...]] = {
    'ResNet': tuple(VARIANTS),
    'MobileNetV2': ('ReLU(x)', 'GELU(x)', 'x·x', 'ReLU6(x)·x', 'GELU(x)·x'),
}

# first, second, and the question that first - second answers; one family of tests over both bodies
COMPARISONS: tuple[tuple[str, str, str], ...] = (
    ('x·x', 'ReLU(x)', "the paper's Ewp against the plain network"),
    ('ReLU6(x)·x', 'ReLU(x)', "the paper's Gate-ReLU6 against the plain network"),
    ('GELU(x)·x', 'ReLU(x)', "the paper's Gate-GELU against the plain network"),
    ('ReLU6(x)·x', 'GELU(x)·x', "the paper's order of the two gates"),
    ('ReLU(x)·x', 'ReLU(x)', 'a gate against its own activation, with a kink'),
    ('GELU(x)·x', 'GELU(x)', 'a gate against its own activation, smooth'),
    ('SiLU(a)·b', 'GELU(x)', 'two branches against one smooth activation'),
    ('ReLU6(4x)/4·x', 'ReLU(x)·x', 'a kink at the top that values reach'),
    ('ReLU6(x)·x', 'ReLU(x)·x', 'control: one function under two names'),
)


def _small_resnet(**kwargs: Any) -> nn.Module:
    return timm.create_model(
        'resnet18', layers=(1, 1, 1, 1), channels=(8, 16, 24, 32), stem_type='deep', stem_width=4, output_stride=8,
        **kwargs)


def _small_mobilenetv2(**kwargs: Any) -> nn.Module:
    stages = [['ds_r1_k3_s2_c8'], ['ir_r1_k3_s1_e6_c8'], ['ir_r1_k3_s2_e6_c16'], ['ir_r2_k3_s1_e6_c16']]
    return EfficientNet(
        decode_arch_def(stages), stem_size=8, num_features=64, round_chs_fn=round, act_layer='relu6', **kwargs)


BODIES: dict[str, Callable[..., nn.Module]] = {'ResNet': _small_resnet, 'MobileNetV2': _small_mobilenetv2}


def create_study_model(body: str, variant: str, size: int, in_chans: int, num_classes: int) -> nn.Module:
    """Create a network.

    Args:
        body: A key of `BODIES`.
        variant: A key of `VARIANTS`.
        size: Side of the images in pixels.
        in_chans: Channels of the images.
        num_classes: Number of classes.

    Raises:
        UserError: A gate works on maps below 7x7.
    """
    model = BODIES[body](in_chans=in_chans, num_classes=num_classes)
    sides: list[int] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: sides.extend(args[0].shape[-2:]))
             for module in replace_activations(model, VARIANTS[variant])]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, in_chans, size, size))
    for hook in hooks:
        hook.remove()
    if min(sides) < SMALLEST_MAP:
        raise UserError(
            f'Images of {size} pixels leave {body} gates on maps of {min(sides)}x{min(sides)}. Use larger ones: '
            f'maps must be at least {SMALLEST_MAP}x{SMALLEST_MAP}, on smaller ones frequencies mean little.')
    return model
