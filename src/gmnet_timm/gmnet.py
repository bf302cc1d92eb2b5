"""GmNet (Gating Mechanism Network)

A lightweight convolutional network whose only nonlinearity inside a block is the gate `relu6(x) * x`.

Papers:
    * `GmNet: Revisiting Gating Mechanisms From A Frequency View` - https://arxiv.org/abs/2503.22841 (ICLR 2026)

Written from the paper and the published description of the authors' code (https://github.com/YFWang1999/GmNet), with
its names and initialisation. They released `gmnet_s3`. The other sizes are reconstructed from the paper's numbers.
"""
import re
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerType, calculate_drop_path_rates, create_classifier, \
    get_act_layer, get_device_dtype, get_norm_layer, trunc_normal_
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP, checkpoint, checkpoint_seq
from ._registry import generate_default_cfgs, register_model

__all__ = ['GmNet']


def _is_plain(module: nn.Module, kind: type) -> bool:
    """Whether a layer is just of this type, with weight and bias of its own: no subclass, weight norm or pruning."""
    return type(module) is kind and {'weight', 'bias'} <= dict(module.named_parameters(recurse=False)).keys()


class ConvBn(nn.Module):
    """Convolution with bias and 'same' padding, followed by a norm layer if one is given."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            dilation: int = 1,
            groups: int = 1,
            norm_layer: Optional[LayerType] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(
            in_chs, out_chs, kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups, **dd)
        self.bn = get_norm_layer(norm_layer)(out_chs, **dd) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return one convolution that equals this module in evaluation mode, or this module where there is none."""
        if isinstance(self.bn, nn.Identity):
            return self.conv
        if _is_plain(self.conv, nn.Conv2d) and _is_plain(self.bn, nn.BatchNorm2d) and self.bn.track_running_stats:
            return fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        return self


def create_gate(gate: str, chs: int, dilation: int = 1, device=None, dtype=None) -> nn.Module:
    """Create what the activation is multiplied with: nothing more, or one of the paper's ablations."""
    dd = {'device': device, 'dtype': dtype}
    if gate == 'identity':
        return nn.Identity()
    if gate == 'fc':
        return ConvBn(chs, chs, **dd)
    if gate == 'dw':
        # The paper does not state the kernel. Its 8.0 M parameters for S3 are nearest to the 7.92 M of a 3x3 kernel.
        return ConvBn(chs, chs, 3, dilation=dilation, groups=chs, **dd)
    if gate == 'ln':
        return LayerNorm2d(chs, **dd)
    raise ValueError(f'gate must be identity, fc, dw or ln, got {gate}')


class GmNetBlock(nn.Module):
    """Depthwise conv, pointwise expansion, `act(x) * gate(x)`, pointwise reduction, depthwise conv, with residual."""

    def __init__(
            self,
            dim: int,
            mlp_ratio: int = 3,
            dilation: int = 1,
            drop_path: float = 0.,
            init_values: float = 1e-6,
            act_layer: LayerType = 'relu6',
            gate: str = 'identity',
            norm_layer: LayerType = 'batchnorm2d',
            recompute_gate: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.recompute_gate = recompute_gate
        hidden_dim = mlp_ratio * dim
        self.dwconv = ConvBn(dim, dim, 7, dilation=dilation, groups=dim, norm_layer=norm_layer, **dd)
        self.f1 = ConvBn(dim, hidden_dim, **dd)
        self.act = get_act_layer(act_layer)().to(**dd)  # never in place, the gate needs its input twice
        if recompute_gate and any(True for _ in self.act.parameters()):
            raise ValueError('recompute_gate is for activations without parameters')
        self.gate = create_gate(gate, hidden_dim, dilation=dilation, **dd)
        self.g = ConvBn(hidden_dim, dim, norm_layer=norm_layer, **dd)
        self.dwconv2 = ConvBn(dim, dim, 7, dilation=dilation, groups=dim, **dd)
        gamma = nn.Parameter(torch.full((dim,), init_values, **dd)) if init_values else None
        self.gamma: Optional[nn.Parameter] = gamma
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    @torch.jit.ignore
    def _recomputes(self) -> bool:
        is_on = self.recompute_gate and self.training and not torch.compiler.is_compiling()
        return is_on and _is_plain(self.g.conv, nn.Conv2d)

    def _gated_conv(self, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor):
        if not self.training:
            raise RuntimeError('recompute_gate: the model left training mode before its backward pass')
        return torch.func.functional_call(self.g.conv, dict(weight=weight, bias=bias), (self.act(x) * gate,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.f1(self.dwconv(x))
        gate = self.gate(x)
        if not torch.jit.is_scripting() and self._recomputes():
            # The second computation takes the parameters of the first. The norm would count its statistics twice.
            x = checkpoint(self._gated_conv, x, gate, self.g.conv.weight, self.g.conv.bias, use_reentrant=False)
            x = self.g.bn(x)
        else:
            x = self.g(self.act(x) * gate)
        x = self.dwconv2(x)
        if self.gamma is not None:
            x = x * self.gamma.view(1, -1, 1, 1)
        return shortcut + self.drop_path(x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fuse the layer scale into the last convolution, in place (the children fuse themselves)."""
        if self.gamma is None or not isinstance(self.dwconv2, ConvBn) or not _is_plain(self.dwconv2.conv, nn.Conv2d):
            return
        conv = self.dwconv2.conv
        conv.weight.mul_(self.gamma.view(-1, 1, 1, 1))
        conv.bias.mul_(self.gamma)
        self.gamma = None


class GmNet(nn.Module):
    """A stem and four stages, each halving the resolution, with channels doubling from stage to stage."""

    def __init__(
            self,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'avg',
            output_stride: int = 32,
            stem_chs: int = 32,
            base_dim: int = 48,
            depths: Tuple[int, ...] = (3, 3, 8, 3),
            mlp_ratios: Tuple[int, ...] = (4, 4, 4, 4),
            init_values: float = 1e-6,
            act_layer: LayerType = 'relu6',
            gate: str = 'identity',
            norm_layer: LayerType = 'batchnorm2d',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            recompute_gate: bool = False,
            device=None,
            dtype=None,
    ):
        """
        Args:
            in_chans: Number of input image channels.
            num_classes: Number of classifier classes, 0 for none.
            global_pool: Global pooling type, '' for none.
            output_stride: Network output stride (8, 16 or 32). Down-sampling is replaced by dilation beyond it.
            stem_chs: Output channels of the stem.
            base_dim: Channels of the first stage, doubled in each following one.
            depths: Number of blocks per stage.
            mlp_ratios: Ratio of hidden to outer channels of the blocks, per stage.
            init_values: Initial value of the layer scale, 0 for no layer scale.
            act_layer: Activation layer of the stem and the gates.
            gate: What the activation is multiplied with: 'identity' for the block's own input, or the paper's ablations
                'fc', 'dw' and 'ln'.
            norm_layer: Normalization layer.
            drop_rate: Classifier dropout rate.
            drop_path_rate: Stochastic depth rate, linearly increasing across blocks.
            recompute_gate: Compute the gates again in the backward pass of eager training, with the same gradients and
                40 % less memory. Has no effect for a `g.conv` that is reparametrized, pruned or replaced. Raises for
                activations with parameters, in torch.func transforms, and if training mode ends before the backward.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []

        self.stem = nn.Sequential(
            ConvBn(in_chans, stem_chs, 3, stride=2, norm_layer=norm_layer, **dd),
            get_act_layer(act_layer)().to(**dd),
        )

        block_args = dict(
            init_values=init_values, act_layer=act_layer, gate=gate, norm_layer=norm_layer,
            recompute_gate=recompute_gate, **dd)
        dpr = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        net_stride, dilation, prev_chs = 2, 1, stem_chs
        for i, (depth, mlp_ratio) in enumerate(zip(depths, mlp_ratios)):
            dim = base_dim * 2 ** i
            stride, first_dilation = 2, dilation
            if net_stride * stride > output_stride:
                stride = 1
                dilation *= 2
            net_stride *= stride
            downsample = ConvBn(prev_chs, dim, 3, stride=stride, dilation=first_dilation, norm_layer=norm_layer, **dd)
            blocks = [
                GmNetBlock(dim, mlp_ratio=mlp_ratio, dilation=dilation, drop_path=dpr[i][j], **block_args)
                for j in range(depth)
            ]
            # the down-sampling has a container of its own to match the names of the authors' checkpoints
            stages.append(nn.Sequential(nn.Sequential(downsample), *blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=net_stride, module=f'stages.{i}'))
            prev_chs = dim
        self.stages = nn.Sequential(*stages)
        self.num_features = prev_chs
        self.norm = get_norm_layer(norm_layer)(self.num_features, **dd)
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        # The published models keep PyTorch's defaults for everything but the classifier. The authors' function is
        # written for convolutions too, but its `isinstance(m, nn.Linear or nn.Conv2d)` only ever matches nn.Linear.
        if isinstance(m, nn.Linear):
            trunc_normal_(m.weight, std=.02)
            nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=[
                (r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)', None),
                (r'^norm', MATCH_PREV_GROUP),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.head = create_classifier(self.num_features, num_classes, pool_type=pool_type, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.head.apply(self._init_weights)
        self.global_pool.train(self.training)
        self.head.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward features that returns intermediates.

        Args:
            x: Input images (B, C, H, W).
            indices: Take last n stages if int, all if None, select matching indices if sequence.
            norm: Apply the final norm to the last stage's output.
            stop_early: Stop iterating over stages when last desired intermediate hit.
            output_fmt: Shape of intermediate feature outputs, only 'NCHW'.
            intermediates_only: Only return intermediate features.

        Returns:
            Features and list of intermediate features or just intermediate features.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last_idx = len(self.stages) - 1

        x = self.stem(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice stages in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max_index + 1]
        feat_idx = 0
        for feat_idx, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(self.norm(x) if norm and feat_idx == last_idx else x)

        if intermediates_only:
            return intermediates

        if feat_idx == last_idx:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        self.stages = self.stages[:max_index + 1]
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # sized for the last stage
        if prune_end:
            self.num_features = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self.stages:
                x = checkpoint_seq(stage, x)  # each block is a segment
        else:
            x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Map the names of timm pull request 2677, `stages.i.0.conv`, to those of the authors' checkpoints."""
    return {re.sub(r'^(stages\.\d+\.0)\.(?=conv\.|bn\.)', r'\1.0.', k): v for k, v in state_dict.items()}


def _cfg(url: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0.conv', 'classifier': 'head',
        'paper_ids': 'arXiv:2503.22841',
        'paper_name': 'GmNet: Revisiting Gating Mechanisms From A Frequency View',
        'origin_url': 'https://github.com/YFWang1999/GmNet',
        'license': 'apache-2.0',
        **kwargs,
    }


# Tags name the published training data, no weights are claimed.
default_cfgs = generate_default_cfgs({
    'gmnet_s1.in1k': _cfg(),
    'gmnet_s2.in1k': _cfg(),
    'gmnet_s3.in1k': _cfg(),
    'gmnet_s4.in1k': _cfg(),
})


def _create_gmnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GmNet:
    return build_model_with_cfg(
        GmNet, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **kwargs,
    )


@register_model
def gmnet_s1(pretrained: bool = False, **kwargs: Any) -> GmNet:
    """GmNet-S1, reconstructed configuration."""
    model_args = dict(base_dim=40, depths=(2, 2, 10, 2), mlp_ratios=(3, 3, 3, 2))
    return _create_gmnet('gmnet_s1', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def gmnet_s2(pretrained: bool = False, **kwargs: Any) -> GmNet:
    """GmNet-S2, reconstructed configuration."""
    model_args = dict(base_dim=48, depths=(2, 2, 8, 3), mlp_ratios=(3, 3, 3, 3))
    return _create_gmnet('gmnet_s2', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def gmnet_s3(pretrained: bool = False, **kwargs: Any) -> GmNet:
    """GmNet-S3, the authors' released configuration."""
    model_args = dict(base_dim=48, depths=(3, 3, 8, 3), mlp_ratios=(4, 4, 4, 4))
    return _create_gmnet('gmnet_s3', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def gmnet_s4(pretrained: bool = False, **kwargs: Any) -> GmNet:
    """GmNet-S4, reconstructed configuration."""
    model_args = dict(base_dim=68, depths=(3, 3, 11, 3), mlp_ratios=(4, 4, 4, 4))
    return _create_gmnet('gmnet_s4', pretrained=pretrained, **dict(model_args, **kwargs))
