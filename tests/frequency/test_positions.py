"""Where features have their positions in the image, found by following them through the computation."""
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.positions import stated_layout
from gmnet_timm.frequency.tracing import trace


def _size(name):
    return timm.get_pretrained_cfg(name).input_size[-1]


def _layout(module, images):
    found = trace(nn.Sequential(module), images)
    return found.modules['0', 'output']


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


IMAGES = torch.randn(2, 6, 8, 6)


def _tokens(x):
    return x.flatten(2).mT


LAYOUTS = {
    'NCHW': lambda x: x * 2,
    'NHWC': lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,)),
    'NLC': lambda x: _tokens(x) + 1,
    'NCL': lambda x: x.flatten(2),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_layouts(name):
    """The axes are never told by their lengths: channels are as many as columns."""
    layout = _layout(Call(LAYOUTS[name]), IMAGES)
    assert layout.name == name and layout.size == (8, 6)


def _windows(x, size=2):
    b, c, h, w = x.shape
    return x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1).reshape(-1, size * size, c)


@pytest.mark.parametrize('arranged', [
    lambda x: x.permute(0, 2, 3, 1),
    lambda x: x.flatten(2),
    lambda x: _tokens(x),
    lambda x: torch.cat([torch.zeros(2, 3, 6), _tokens(x)], 1),  # class and register tokens
    lambda x: torch.cat([_tokens(x), torch.zeros(2, 1, 6)], 1),
    lambda x: _windows(x),
    lambda x: _windows(x.roll((1, 1), (2, 3))),
    lambda x: _tokens(x)[:, torch.randperm(48, generator=torch.Generator().manual_seed(0))],
    lambda x: x.permute(0, 3, 1, 2),
], ids=['NHWC', 'NCL', 'NLC', 'prefix', 'suffix', 'windows', 'shifted windows', 'shuffled', 'NWCH'])
def test_maps_are_put_back(arranged):
    """Whatever the arrangement, the maps of its layout are those that went in."""
    layout = _layout(Call(arranged), IMAGES)
    for images in (IMAGES, torch.randn(3, 6, 8, 6)):
        x = arranged(images) if len(images) == 2 or 'zeros' not in arranged.__code__.co_names else None
        if x is not None:
            assert torch.equal(layout.maps(x), images)


@pytest.mark.parametrize('function', [
    lambda x: x.mean((2, 3)),
    lambda x: nn.PixelUnshuffle(2)(x),  # neighbouring channels stand for different pixels
    lambda x: _tokens(x).mT @ torch.randn(48, 48),  # mixes tokens: its output has no order that could be known
    lambda x: x.sort(2).values,
    lambda x: x.flatten(1),
    lambda x: torch.fft.fft2(x).real,
    lambda x: torch.randn(2, 6, 8, 6),
], ids=['pooled', 'unshuffled', 'mixed tokens', 'sorted', 'flat', 'frequencies', 'independent of the image'])
def test_what_holds_no_maps(function):
    assert _layout(Call(function), IMAGES) is None


def test_attention_hands_on_the_positions_of_its_queries():
    class Attention(nn.Module):
        def forward(self, x):
            tokens = _tokens(x)
            return (tokens @ tokens.mT).softmax(-1) @ tokens

    assert _layout(Attention(), IMAGES).name == 'NLC'
    mha = nn.MultiheadAttention(6, 2, batch_first=True)
    assert _layout(Call(lambda x: mha(_tokens(x), _tokens(x), _tokens(x))[0]), IMAGES).size == (8, 6)


def test_layers_that_change_resolution():
    for module, size in [
            (nn.Conv2d(6, 5, 3, 2, 1), (4, 3)), (nn.MaxPool2d(2), (4, 3)), (nn.Upsample(scale_factor=2), (16, 12)),
            (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(24, 3, 1)), (4, 3)),
            (nn.ConvTranspose2d(6, 5, 2, 2), (16, 12))]:
        layout = trace(nn.Sequential(module), IMAGES).modules['0', 'output']
        assert layout is not None and layout.size == size


@pytest.mark.parametrize('name, module, layout, size', [
    ('swin_tiny_patch4_window7_224', 'layers.0.blocks.0', 'NHWC', (56, 56)),
    ('swin_tiny_patch4_window7_224', 'layers.1.blocks.1.attn', 'other', (28, 28)),  # shifted windows
    ('convnext_tiny', 'stages.0.blocks.0.mlp.act', 'NHWC', (56, 56)),
    ('vit_tiny_patch16_224', 'blocks.0', 'NLC', (14, 14)),
    ('vit_small_patch14_reg4_dinov2', 'blocks.0.mlp.act', 'NLC', (37, 37)),
    ('mixer_s16_224', 'blocks.0.mlp_tokens', 'NCL', (14, 14)),
])
@pytest.mark.slow
def test_layouts_of_known_models(name, module, layout, size):
    kwargs = dict(depth=1) if name.startswith('vit') else {}
    model = timm.create_model(name, **kwargs).eval()
    found = trace(model, torch.randn(2, 3, _size(name), _size(name))).modules[module, 'output']
    if name.startswith('mixer'):
        assert found is None  # token mixing ends without an order that could be known: --layout states it
    else:
        assert (found.name, found.size) == (layout, size)


def test_stated_layouts():
    images = torch.Size([2, 3, 32, 64])
    assert stated_layout('NHWC', torch.Size([2, 4, 8, 5]), images).size == (4, 8)
    assert stated_layout('NLC', torch.Size([2, 33, 5]), images, prefix=1).size == (4, 8)
    with pytest.raises(UserError, match='do not fill the grid'):
        stated_layout('NLC', torch.Size([2, 33, 5]), images)
    with pytest.raises(UserError, match='does not have the layout'):
        stated_layout('NCHW', torch.Size([2, 33, 5]), images)
