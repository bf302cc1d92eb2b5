import math

import numpy as np
import pytest
import torch

from gmnet_timm.errors import UserError
from gmnet_timm.frequency import frequency_bands, num_radial_bins, radial_power_spectrum, split_frequencies
from gmnet_timm.frequency.split import high_frequency_energy, power_spectrum, spectral_centroid, spectral_slope

SIZES = [(8, 8), (9, 9), (16, 12), (7, 10), (10, 7), (64, 64), (1, 6)]


def _numpy_split(image, radius):
    """The paper's definition, word by word: the whole DFT, zero frequency at the centre, a disc of coefficients."""
    height, width = image.shape
    spectrum = np.fft.fftshift(np.fft.fft2(image))
    rows, cols = np.mgrid[:height, :width]
    inside = np.hypot(rows - height // 2, cols - width // 2) <= radius
    return [np.fft.ifft2(np.fft.ifftshift(spectrum * mask)).real for mask in (inside, ~inside)]


def _sinusoid(height, width, v, u, phase=.3):
    rows = torch.arange(height, dtype=torch.float64)[:, None]
    cols = torch.arange(width, dtype=torch.float64)
    return torch.cos(2 * math.pi * (v * rows / height + u * cols / width) + phase)


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('radius', [0, 1, 2.5, math.sqrt(13), 4, 100, math.inf])
def test_split_equals_the_definition_in_numpy(size, radius):
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    low, high = split_frequencies(images, radius)
    for i in range(2):
        for c in range(3):
            expected_low, expected_high = _numpy_split(images[i, c].numpy(), radius)
            np.testing.assert_allclose(low[i, c], expected_low, atol=1e-13)
            np.testing.assert_allclose(high[i, c], expected_high, atol=1e-13)


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2 ** -6), (torch.float16, 2 ** -9)])
@pytest.mark.parametrize('size', SIZES + [(224, 224), (225, 160)])
def test_low_and_high_sum_to_the_image(size, dtype, tolerance):
    images = torch.randn(3, *size, dtype=torch.float64).to(dtype)
    low, high = split_frequencies(images, 3)
    assert low.dtype == high.dtype == dtype
    assert (low.double() + high.double() - images.double()).abs().max() <= tolerance * images.double().abs().max()


@pytest.mark.parametrize('size', SIZES)
def test_rings_sum_to_the_image_and_hold_their_own_frequencies(size):
    images = torch.randn(4, *size, dtype=torch.float64)
    rings = frequency_bands(images, [0, 1.5, 3])
    torch.testing.assert_close(sum(rings), images, rtol=0, atol=1e-13)
    for a, first in enumerate(rings):
        for second in rings[a + 1:]:
            assert (first * second).sum().abs() < 1e-10  # orthogonal
    torch.testing.assert_close(rings[0] + rings[1], split_frequencies(images, 1.5)[0], rtol=0, atol=1e-13)


def test_radius_zero_keeps_the_mean_and_a_radius_past_the_corner_everything():
    images = torch.randn(2, 3, 12, 9)
    low, high = split_frequencies(images, 0)
    torch.testing.assert_close(low, images.mean((-2, -1), keepdim=True).expand_as(images))
    assert high.mean((-2, -1)).abs().max() < 1e-6
    low, high = split_frequencies(images, math.hypot(6, 4))
    torch.testing.assert_close(low, images)
    assert not high.any()


@pytest.mark.parametrize('size', [(16, 16), (15, 15), (24, 16), (9, 14)])
def test_a_sinusoid_lands_in_its_ring_alone(size):
    height, width = size
    for v in range(-((height - 1) // 2), (height - 1) // 2 + 1):
        for u in range(1, (width - 1) // 2 + 1):
            spectrum = radial_power_spectrum(3 * _sinusoid(height, width, v, u))
            ring = math.floor(math.hypot(v, u) + .5)
            assert spectrum[ring] == pytest.approx(4.5, rel=1e-12)
            spectrum[ring] = 0.
            assert spectrum.abs().max() < 1e-25


@pytest.mark.parametrize('size', [(16, 16), (15, 21)])
def test_a_sinusoid_is_in_the_part_of_its_radius(size):
    for v, u in [(3, 4), (-3, 4), (0, 5), (5, 0), (1, 5), (4, 4)]:
        wave = _sinusoid(*size, v, u)
        low, high = split_frequencies(wave, 5)
        inside = v * v + u * u <= 25
        torch.testing.assert_close(low, wave if inside else torch.zeros_like(wave), rtol=0, atol=1e-12)
        torch.testing.assert_close(high, torch.zeros_like(wave) if inside else wave, rtol=0, atol=1e-12)


@pytest.mark.parametrize('size', SIZES + [(33, 50)])
def test_parseval(size):
    images = torch.randn(2, 3, *size, dtype=torch.float64) + 1
    spectrum = radial_power_spectrum(images)
    assert spectrum.shape == (2, 3, num_radial_bins(*size))
    torch.testing.assert_close(spectrum.sum(-1), images.square().mean((-2, -1)), rtol=1e-12, atol=0)
    torch.testing.assert_close(spectrum[..., 0], images.mean((-2, -1)).square(), rtol=1e-12, atol=0)


def test_spectrum_equals_numpy_histogram():
    image = torch.randn(18, 25, dtype=torch.float64)
    power = np.abs(np.fft.fft2(image.numpy()) / image.numel()) ** 2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(18) * 18, np.fft.fftfreq(25) * 25, indexing='ij'))
    expected = np.bincount(np.floor(radius + .5).astype(int).ravel(), power.ravel())
    np.testing.assert_allclose(radial_power_spectrum(image), expected, rtol=1e-10)


def test_options_of_the_high_part():
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64) * torch.tensor([1., 2., 5.])[:, None, None] + 4
    _, plain = split_frequencies(images, 4)
    low, high = split_frequencies(images, 4, keep_dc=True)
    torch.testing.assert_close(high, plain + images.mean((-2, -1), keepdim=True))
    torch.testing.assert_close(low, split_frequencies(images, 4)[0])
    _, high = split_frequencies(images, 4, keep_dc=True, restore_contrast=True)
    torch.testing.assert_close(high.mean((-2, -1)), images.mean((-2, -1)))
    torch.testing.assert_close(high.std((-2, -1)), images.std((-2, -1)))


def test_restoring_contrast_does_not_blow_up_rounding_errors():
    images = _sinusoid(32, 32, 2, 1).float()
    _, high = split_frequencies(images, 5, restore_contrast=True)
    assert high.abs().max() < 1e-5


def test_gradients():
    images = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_frequencies(x, 2, True, True), images)
    assert torch.autograd.gradcheck(radial_power_spectrum, images)


def test_inference_mode_first_does_not_spoil_training_later():
    size = (11, 13)  # used nowhere else, so that this fills the cache
    with torch.inference_mode():
        radial_power_spectrum(torch.randn(size)), split_frequencies(torch.randn(size), 2)
    images = torch.randn(size, requires_grad=True)
    # squared: the FFT of torch 2.5 cannot take the broadcast gradient of a plain sum
    (radial_power_spectrum(images).sum() + split_frequencies(images, 2)[0].square().sum()).backward()
    assert images.grad is not None


def _everything(x):
    return *split_frequencies(x, 3, keep_dc=True, restore_contrast=True), radial_power_spectrum(x)


@pytest.mark.parametrize('backend', ['eager', pytest.param('inductor', marks=pytest.mark.slow)])
def test_compile(backend):
    images = torch.randn(2, 3, 16, 18)
    compiled = torch.compile(_everything, backend=backend, fullgraph=True)
    for got, expected in zip(compiled(images), _everything(images), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_equals_cpu():
    images = torch.randn(2, 3, 33, 40)
    for got, expected in zip(_everything(images.cuda()), _everything(images), strict=True):
        assert got.device.type == 'cuda'
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('radii', [[], [-1], [math.nan], [3, 3], [5, 2]])
def test_bad_radii(radii):
    with pytest.raises(UserError, match='Radii must'):
        frequency_bands(torch.zeros(4, 4), radii)


@pytest.mark.parametrize('images', [torch.zeros(4), torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 4) * 1j])
def test_bad_images(images):
    with pytest.raises(UserError, match='real floating point'):
        radial_power_spectrum(images)


def test_a_smooth_edge_still_sums_to_the_image_and_rings_less():
    step = torch.zeros(64, 64, dtype=torch.float64)
    step[:, 16:48] = 1
    for width in (0., 3., 8.):
        bands = frequency_bands(step, [8., 16.], edge_width=width)
        torch.testing.assert_close(sum(bands), step, rtol=0, atol=1e-12)
    hard, smooth = (split_frequencies(step, 10, edge_width=width)[0] for width in (0., 8.))
    assert hard.max() - 1 == pytest.approx(.09, abs=.03)  # Gibbs
    away = [(x[:, 28:36] - 1).abs().max() for x in (hard, smooth)]  # 12 pixels from both steps
    assert away[1] < .2 * away[0]
    with pytest.raises(UserError, match='edge'):
        split_frequencies(step, 10, edge_width=-1)


@pytest.mark.parametrize('radius, width', [(10, 4), (5.5, 1)])
def test_gain_of_a_smooth_edge(radius, width):
    for frequency in range(1, 16):
        wave = _sinusoid(32, 32, frequency, 0)
        low, _ = split_frequencies(wave, radius, edge_width=width)
        position = min(max((frequency - radius) / width, -.5), .5)
        torch.testing.assert_close(low, wave * (.5 - .5 * math.sin(math.pi * position)), rtol=0, atol=1e-12)


def test_window_removes_the_leak_across_the_border():
    ramp = torch.arange(64, dtype=torch.float64).expand(64, 64)
    share = {}
    for window in (None, 'hann'):
        power = radial_power_spectrum(ramp, window)[1:]
        share[window] = (power[3:].sum() / power.sum()).item()
    # the DFT of a ramp is 1 / sin^2(pi u / N)
    u = np.arange(1, 64)
    exact = 1 / np.sin(np.pi * u / 64) ** 2
    assert share[None] == pytest.approx(exact[np.minimum(u, 64 - u) > 3].sum() / exact.sum(), rel=1e-9)
    assert share[None] == pytest.approx(.17, abs=.01) and share['hann'] < .01
    assert radial_power_spectrum(ramp, 'hann')[0] == pytest.approx(31.5 ** 2, rel=1e-3)


def test_window_keeps_the_power_of_white_noise():
    noise = torch.randn(200, 32, 32, dtype=torch.float64)
    plain, tapered = (radial_power_spectrum(noise, window)[:, 1:].sum(1).mean() for window in (None, 'hann'))
    assert tapered.item() == pytest.approx(plain.item(), rel=.02)
    with pytest.raises(UserError, match='hann'):
        radial_power_spectrum(noise, 'boxcar')


@pytest.mark.parametrize('size', SIZES)
def test_modes_per_bin_equal_numpys_histogram(size):
    from gmnet_timm.frequency import modes_per_bin
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) * n for n in size), indexing='ij'))
    assert modes_per_bin(*size).tolist() == np.bincount(np.floor(radius + .5).astype(int).ravel()).tolist()


# Summaries of a spectrum


@pytest.mark.parametrize('size', [(4, 4), (7, 7), (8, 8), (56, 56), (5, 32), (32, 5), (7, 12), (224, 224)])
def test_summaries_of_white_noise_and_of_power_laws(size):
    """White noise gives 1, 1 and 0 at every size and shape; a power law its exponent, and numbers by brute force."""
    height, width = size
    count = max(50, 400_000 // (height * width))
    noise = torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
    power = power_spectrum(noise).double().mean(0)
    assert high_frequency_energy(power, width).item() == pytest.approx(1, abs=.02)
    assert spectral_centroid(power, width).item() == pytest.approx(1, abs=.02)
    assert spectral_slope(power, width) == pytest.approx(0, abs=.05)
    full = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))  # cycles per pixel
    law = np.where(full > 0, np.maximum(full, 1e-9) ** -1.7, 5.)
    half = torch.from_numpy(law[:, :width // 2 + 1].copy())
    assert spectral_slope(half, width) == pytest.approx(-1.7, abs=1e-6)
    law[0, 0] = 0
    high, modes = full > .25, full > 0
    assert high_frequency_energy(half, width).item() == pytest.approx(
        law[high].sum() / law.sum() / (high.sum() / modes.sum()))
    assert spectral_centroid(half, width).item() == pytest.approx((law * full).sum() / law.sum() / full[modes].mean())


@pytest.mark.parametrize('size, undefined', [
    ((1, 1), 'high centroid slope'), ((2, 2), 'high'), ((3, 3), 'high'), ((1, 2), 'high centroid slope'),
    ((1, 4), ''), ((4, 4), '')])
def test_summaries_of_tiny_maps(size, undefined):
    power = power_spectrum(torch.randn(9, *size)).mean(0)
    found = dict(
        high=high_frequency_energy(power, size[1]).item(), centroid=spectral_centroid(power, size[1]).item(),
        slope=spectral_slope(power, size[1]))
    assert ' '.join(name for name, value in found.items() if math.isnan(value)) == undefined
    constant = power_spectrum(torch.ones(*size))
    assert math.isnan(high_frequency_energy(constant, size[1])) and math.isnan(spectral_slope(constant, size[1]))
