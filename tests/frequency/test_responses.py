"""Relative log amplitude, Fourier heat maps and input gradients against closed forms."""
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency import (
    LogAmplitude,
    directions,
    fourier_basis,
    fourier_heatmap,
    input_sensitivity,
    log_amplitudes,
    radial_power_spectrum,
    radial_summary,
    relative_log_amplitude,
)
from gmnet_timm.frequency.heatmap import HeatmapPoint
from gmnet_timm.frequency.plots import plot_log_amplitude

# --- relative log amplitude ------------------------------------------------------------------------------------------


def test_log_amplitude_equals_numpys_shifted_fft():
    maps = torch.randn(3, 4, 16, 16, dtype=torch.float64) + 2
    log = np.log(np.abs(np.fft.fftshift(np.fft.fft2(maps.numpy()), axes=(-2, -1))) + 1e-6).mean((0, 1))
    diagonal = np.diag(log)[8:]  # as the code of Park & Kim
    got = relative_log_amplitude(maps)
    assert got.shape == (3, 8)
    np.testing.assert_allclose(got.mean(0)[1:], (diagonal - diagonal[0])[1:] - math.log(2) / 2, rtol=1e-9)


@pytest.mark.parametrize('size', [(3, 3), (4, 4), (7, 7), (8, 8), (14, 14), (56, 56), (7, 12), (64, 9)])
def test_white_noise_has_no_relative_log_amplitude(size):
    noise = torch.randn(4000, 8, *size, generator=torch.Generator().manual_seed(1))
    curve = relative_log_amplitude(noise).mean(0)
    assert len(curve) == math.ceil(min(size) / 2) and curve.abs().max() < .03


def test_a_known_filter_adds_its_log_gain():
    """A 3 x 3 box has the gain (1 + 2 cos w)^2 / 9 along the diagonal, for any image."""
    blur = nn.Conv2d(1, 1, 3, padding=1, padding_mode='circular', bias=False)
    nn.init.constant_(blur.weight, 1 / 9)
    model = nn.Sequential(nn.Identity(), blur)
    images = torch.rand(4, 1, 32, 32)
    plain, blurred = log_amplitudes(model, [(images[:2], None), (images[2:], None)], ['0', '1'])
    w = 2 * math.pi * torch.arange(16.) / 32
    gain = ((1 + 2 * torch.cos(w)) ** 2 / 9).double()
    usable = gain > 1e-3
    torch.testing.assert_close((blurred.curve - plain.curve)[usable], gain.log()[usable], rtol=1e-2, atol=1e-3)
    assert (plain.depth, blurred.depth) == (0, 1) and plain.images == 4
    assert blurred.high < plain.high - 2
    _, low, high = blurred.interval()
    assert (low[1:] < blurred.curve[1:]).all() and (blurred.curve[1:] < high[1:]).all() and low[0] == high[0] == 0


def test_maps_without_a_frequency_next_to_the_corner_are_not_drawn():
    layers = [LogAmplitude(str(i), i / 3, (size, size), relative_log_amplitude(torch.randn(5, 2, size, size)).double())
              for i, size in enumerate((8, 8, 4, 2))]
    pytest.importorskip('matplotlib').use('Agg')
    ax = plot_log_amplitude({'a model': layers})
    assert ax.lines[0].get_xdata().tolist() == [0, 1 / 3, 2 / 3]
    (band,) = ax.collections
    assert band.get_paths()[0].vertices[:, 0].max() == 2 / 3


def test_log_amplitude_of_blocks_by_default():
    layers = log_amplitudes(timm.create_model('test_vit').eval(), [(torch.randn(2, 3, 160, 160), None)])
    assert len(layers) > 1 and all(layer.name.startswith('blocks.') for layer in layers)
    assert all(layer.curve[0] == 0 and layer.curve.isfinite().all() for layer in layers)
    with pytest.raises(UserError, match='no image'):
        log_amplitudes(nn.Identity(), [])


# --- heat maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('size', [(8, 8), (9, 7), (8, 6)])
def test_basis_images_have_one_frequency(size):
    for v, u in directions(*size):
        image = fourier_basis(*size, v, u)
        assert image.square().mean().item() == pytest.approx(1, rel=1e-5)
        amplitude = np.abs(np.fft.fft2(image.double().numpy())) / math.prod(size)
        found = {tuple(index) for index in np.argwhere(amplitude > 1e-4)}
        assert found == {(v % size[0], u % size[1]), (-v % size[0], -u % size[1])}


@pytest.mark.parametrize('size', [(8, 8), (9, 7), (8, 6)])
def test_directions_cover_the_plane_once(size):
    both = [(s * v % size[0], s * u % size[1]) for v, u in directions(*size) for s in (1, -1)]
    assert set(both) == {(v, u) for v in range(size[0]) for u in range(size[1])}
    halves = [frozenset([(v % size[0], u % size[1]), (-v % size[0], -u % size[1])]) for v, u in directions(*size)]
    nyquist = 2 * size[0] if size[1] % 2 == 0 else 0  # (v, W/2) and (-v, W/2) are the same, and both are there
    assert len(halves) - len(set(halves)) <= nyquist


class Linear(nn.Module):
    """Two classes, told apart by the sign of w * x + b."""

    def __init__(self, size, bias=0.):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, *size))
        self.bias = bias

    def forward(self, x):
        score = (x * self.w).sum((1, 2, 3)) + self.bias
        return torch.stack([-score, score], 1)


def test_heat_map_of_a_linear_classifier_in_closed_form():
    """An image is wrong if the perturbation, w . basis with a random sign for each channel, exceeds its margin."""
    torch.manual_seed(0)
    size, std, amplitude = (8, 8), (.2, .25, .5), .3
    model = Linear(size)
    images = torch.randn(400, 3, *size)
    targets = (model(images).argmax(1)).long()
    margin = (images * model.w).sum((1, 2, 3)).abs().detach()
    points = fourier_heatmap(model, images, targets, std, directions(*size), amplitude, show_progress=False)
    for point in points:
        basis = fourier_basis(*size, point.v, point.u)
        response = (model.w.detach() * basis).sum((1, 2)) * amplitude / torch.tensor(std)  # by channel
        signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], dtype=torch.float32)
        flips = ((signs @ response)[:, None] < -margin).float().mean(0)  # probability for each image
        spread = (flips * (1 - flips)).sum().sqrt().item()
        assert abs(point.wrong - flips.sum().item()) <= 4.5 * spread + 1e-6
    assert max(point.error for point in points) > 10 + min(point.error for point in points)


def test_noise_is_in_pixels_before_normalisation():
    """With an amplitude in pixels, the error does not depend on how pixels are normalised."""
    torch.manual_seed(0)
    model = Linear((8, 8))
    pixels = torch.rand(60, 3, 8, 8)
    targets = torch.randint(0, 2, (60,))
    frequencies = directions(8, 8, step=2)
    expected = fourier_heatmap(model, pixels, targets, (1., 1., 1.), frequencies, .1, show_progress=False)
    scaled = Linear((8, 8))
    scaled.w.data = model.w.data * .25
    got = fourier_heatmap(scaled, pixels / .25, targets, (.25,) * 3, frequencies, .1, show_progress=False)
    assert [p.wrong for p in got] == [p.wrong for p in expected]


def test_no_noise_gives_the_clean_error():
    model, images = Linear((8, 8)), torch.randn(20, 3, 8, 8)
    clean = (model(images).argmax(1) != 0).sum().item()
    point, = fourier_heatmap(model, images, torch.zeros(20, dtype=torch.long), (1., 1., 1.), [(1, 2)], 0., batch_size=7)
    assert (point.wrong, point.count) == (clean, 20)


def test_radial_summary():
    points = [HeatmapPoint(0, 5, .1, 4, 10), HeatmapPoint(3, 4, .1, 2, 10), HeatmapPoint(0, 1, .1, 1, 10)]
    assert [(row['radius'], row['error'], row['directions']) for row in radial_summary(points)] == [
        (1, 10., 1), (5, 30., 2)]


# --- input gradients -------------------------------------------------------------------------------------------------


def test_gradients_of_a_linear_classifier_are_its_weights():
    model, std = Linear((12, 10)), (.2, .25, .5)
    batches = [(torch.randn(n, 3, 12, 10), torch.ones(n, dtype=torch.long)) for n in (2, 3)]
    got = input_sensitivity(model, batches, std, target='logit')
    expected = radial_power_spectrum(model.w.detach() / torch.tensor(std)[:, None, None]).mean(0)
    assert got.power.shape == (5, len(expected))
    torch.testing.assert_close(got.power.mean(0).float(), expected)
    mean, low, high = got.interval()
    assert mean[1:].sum().item() == pytest.approx(1) and torch.allclose(low[1:], high[1:])  # all images are alike
    with pytest.raises(UserError, match='loss or logit'):
        input_sensitivity(model, batches, std, target='nonsense')
    with pytest.raises(UserError, match='labels from 7'):
        input_sensitivity(model, [(batches[0][0], torch.full((2,), 7))], std)


def test_gradients_of_a_classifier_behind_a_low_pass_filter():
    class LowPass(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Linear((16, 16))

        def forward(self, x):
            from gmnet_timm.frequency import split_frequencies
            return self.head(split_frequencies(x, 4)[0])

    got = input_sensitivity(LowPass(), [(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long))], (1., 1., 1.))
    assert got.per_mode[5:].max() < 1e-9 * got.per_mode[1:4].max()
