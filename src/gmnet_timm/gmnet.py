"""GmNet (Gating Mechanism Network)

A lightweight convolutional network whose only nonlinearity inside a block is the gate `relu6(x) * x`. The paper argues
that such a product widens the spectrum of the features, so that the network is less biased to low frequencies than
others of its size.

Papers:
    * `GmNet: Revisiting Gating Mechanisms From A Frequency View` - https://arxiv.org/abs/2503.22841 (ICLR 2026)

Written from the paper and the published description of the authors' code (https://github.com/YFWang1999/GmNet),
with the parameter names and the initialisation of that code, so that its checkpoints load without remapping.

`gmnet_s3` is the configuration the authors released. No code was released for `gmnet_s1`, `gmnet_s2` and `gmnet_s4`:
their `base_dim`, `depths` and `mlp_ratios` are reconstructed from the paper's parameter counts and FLOPs, which they
reproduce.

For deployment, `reparameterize_model(model.eval())` fuses BatchNorm and layer scale into the convolutions.
"""
import warnings
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d, LayerType, calculate_drop_path_rates, create_classifier, \
    get_act_layer, get_norm_layer, trunc_normal_
from timm.models._builder import build_model_with_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP, checkpoint, checkpoint_seq
from ._registry import generate_default_cfgs, register_model

__all__ = ['GmNet']


def _warn_training(module: nn.Module) -> None:
    """Fusing is for evaluation. Not an error, because timm's scripts and timmx fuse before they call eval()."""
    if module.training:
        warnings.warn(
            'Fusing a GmNet in training mode: BatchNorm is fused with its running statistics, which equals the model '
            'after model.eval(). Do not train the result.',
            stacklevel=1,  # one place for all layers, so that Python shows it once
        )


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
        self.conv = nn.Conv2d(
            in_chs,
            out_chs,
            kernel_size,
            stride=stride,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            groups=groups,
            **dd,
        )
        self.bn = get_norm_layer(norm_layer)(out_chs, **dd) if norm_layer else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return one convolution that equals this module in evaluation mode."""
        _warn_training(self)
        if isinstance(self.bn, nn.Identity):
            return self.conv
        if isinstance(self.bn, nn.BatchNorm2d):
            return fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
        return self  # other norm layers cannot be fused


def create_gate(gate: str, chs: int, dilation: int = 1, device=None, dtype=None) -> nn.Module:
    """Create what the activation is multiplied with, one of the paper's ablations.

    Args:
        gate: 'identity', 'fc' (full linear map of the channels, with bias), 'dw' (depthwise convolution) or 'ln'
            (LayerNorm over channels).
        chs: Number of channels.
        dilation: Dilation of the depthwise convolution.
    """
    dd = {'device': device, 'dtype': dtype}
    if gate == 'identity':
        return nn.Identity()
    if gate == 'fc':
        return ConvBn(chs, chs, **dd)
    if gate == 'dw':
        # The paper does not state the kernel, 3 is our choice: its 8.0 M parameters for S3 are nearer to the 7.92 M of
        # a 3x3 kernel than to the 8.12 M of a 5x5 one.
        return ConvBn(chs, chs, 3, dilation=dilation, groups=chs, **dd)
    if gate == 'ln':
        return LayerNorm2d(chs, **dd)
    raise ValueError(f'gate must be identity, fc, dw or ln, got {gate}')


def _has_hooks(*modules: nn.Module) -> bool:
    """Whether calls of these modules are watched or changed by hooks, their own or global ones."""
    kinds = ('forward_pre_hooks', 'forward_hooks', 'backward_pre_hooks', 'backward_hooks')
    return any(getattr(nn.modules.module, f'_global_{k}') or any(getattr(m, f'_{k}') for m in modules) for k in kinds)


class GmNetBlock(nn.Module):
    """Depthwise conv, pointwise expansion, `act(x) * gate(x)`, pointwise reduction, depthwise conv, with residual."""

    def __init__(
            self,
            dim: int,
            mlp_ratio: int = 3,
            dilation: int = 1,
            drop_path: float = 0.,
            init_values: Optional[float] = 1e-6,
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
        self.act = get_act_layer(act_layer)()  # never in place, the gate needs its input twice
        self.gate = create_gate(gate, hidden_dim, dilation=dilation, **dd)
        self.g = ConvBn(hidden_dim, dim, norm_layer=norm_layer, **dd)
        self.dwconv2 = ConvBn(dim, dim, 7, dilation=dilation, groups=dim, **dd)
        self.gamma: Optional[nn.Parameter] = \
            nn.Parameter(init_values * torch.ones(dim, **dd)) if init_values else None
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()

    @torch.jit.ignore
    def _recomputes_gate(self, x: torch.Tensor) -> bool:
        """In eager training, and where nothing depends on how often `act` and `g` are called."""
        return (
            self.recompute_gate and self.training and torch.is_grad_enabled()
            and isinstance(x, torch.Tensor) and not torch.jit.is_tracing()  # torch.fx passes proxies
            and not torch.compiler.is_compiling()  # the compiler decides by itself what to keep
            and not torch._C._are_functorch_transforms_active()  # which have no hooks on saved tensors
            and isinstance(self.g, ConvBn) and type(self.g.conv) is nn.Conv2d  # neither fused nor wrapped
            and not _has_hooks(self.act, self.g, self.g.conv)
        )

    def _gated_conv(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return self.g.conv(self.act(x) * gate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.dwconv(x)
        x = self.f1(x)
        gate = self.gate(x)
        if not torch.jit.is_scripting() and self._recomputes_gate(x):
            # Activation and product, two of the three widest tensors, are computed again in the backward pass. The
            # convolution is not, because nothing behind it is kept; a norm would update its statistics twice.
            x = checkpoint(
                self._gated_conv, x, gate,
                use_reentrant=False,
                preserve_rng_state=isinstance(self.act, nn.RReLU),  # the one activation that draws random numbers
            )
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
        _warn_training(self)
        if self.gamma is None:
            return
        conv = self.dwconv2.conv
        conv.weight.mul_(self.gamma.view(-1, 1, 1, 1))
        conv.bias.mul_(self.gamma)
        self.gamma = None


class GmNet(nn.Module):
    """GmNet, `GmNet: Revisiting Gating Mechanisms From A Frequency View` - https://arxiv.org/abs/2503.22841

    A stem and four stages, each halving the resolution, with channels doubling from stage to stage.
    """

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
            init_values: Optional[float] = 1e-6,
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
            init_values: Initial value of the layer scale, no layer scale if 0 (or None, which create_model drops).
            act_layer: Activation layer of the stem and the gates.
            gate: What the activation is multiplied with: 'identity' for the block's own input, or the paper's ablations
                'fc', 'dw' and 'ln'.
            norm_layer: Normalization layer.
            drop_rate: Classifier dropout rate.
            drop_path_rate: Stochastic depth rate, linearly increasing across blocks.
            recompute_gate: Compute activation and product of the gates again in the backward pass of eager training,
                instead of keeping them: 40 % less memory for 3 to 7 % more time, with the same gradients.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride must be 8, 16 or 32, got {output_stride}')
        if len(depths) != len(mlp_ratios):
            raise ValueError(f'depths and mlp_ratios must have the same length, got {depths} and {mlp_ratios}')
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.feature_info = []

        self.stem = nn.Sequential(
            ConvBn(in_chans, stem_chs, 3, stride=2, norm_layer=norm_layer, **dd),
            get_act_layer(act_layer)(),
        )

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
            downsample = ConvBn(
                prev_chs, dim, 3, stride=stride, dilation=first_dilation, norm_layer=norm_layer, **dd)
            blocks = [
                GmNetBlock(
                    dim,
                    mlp_ratio=mlp_ratio,
                    dilation=dilation,
                    drop_path=dpr[i][j],
                    init_values=init_values,
                    act_layer=act_layer,
                    gate=gate,
                    norm_layer=norm_layer,
                    recompute_gate=recompute_gate,
                    **dd,
                )
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
        p = next(self.parameters())
        dd: Dict[str, Any] = {'device': p.device, 'dtype': p.dtype}
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
        x = self.norm(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


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
        GmNet,
        variant,
        pretrained,
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
