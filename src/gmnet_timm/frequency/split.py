"""Splitting images by spatial frequency, and their radial power spectra. Pure functions of tensors.

A frequency is a pair of integers (v, u): cycles over the height and over the width of the image. Its radius is the
Euclidean distance sqrt(v^2 + u^2), in cycles per image, which is its distance from the centre of the shifted 2-D DFT.
This is the paper's definition; for images that are not square it measures both directions in cycles per side.

Images are real, so half of the spectrum is computed (`rfft2`). The masks depend on the radius alone, which is the same
for a frequency and its conjugate, and for a frequency on the edge of an even size under either sign.
"""
import functools
import math
from collections.abc import Sequence

import torch

from gmnet_timm.errors import UserError

__all__ = [
    'check_corner', 'check_radii', 'default_radii', 'frequency_bands', 'high_frequency_energy', 'largest_radius',
    'log_amplitude_spectrum', 'modes_per_bin', 'num_radial_bins', 'radial_power_spectrum', 'spectral_centroid',
    'spectral_slope', 'spectrum_of', 'split_frequencies',
]


def split_frequencies(
        images: torch.Tensor,
        radius: float,
        keep_dc: bool = False,
        restore_contrast: bool = False,
        edge_width: float = 0.,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split images into the frequencies up to a radius, and those beyond it.

    Radius 0 leaves the mean of each channel in the low-pass image, a radius past the corner leaves nothing in the
    high-pass image.

    Args:
        images: Real images (..., H, W). Half-precision ones are transformed in float32 and returned in their own type.
        radius: Largest radius of the low-pass image, in cycles per image.
        keep_dc: Add the mean of each channel to the high-pass image too; low + high is then no longer the image.
        restore_contrast: Scale each channel of the high-pass image to the standard deviation of the image's.
        edge_width: As for `frequency_bands`.

    Returns:
        Low-pass and high-pass image, each (..., H, W).

    Raises:
        UserError: The radius or the edge is negative or NaN, or the input is not a real image.
    """
    low, high = frequency_bands(images, [radius], edge_width)
    return low, restore(high, images, keep_dc, restore_contrast)


def restore(x: torch.Tensor, images: torch.Tensor, keep_dc: bool, restore_contrast: bool) -> torch.Tensor:
    """Give a filtered image without a mean the contrast and the mean of the image that it comes from."""
    if restore_contrast:
        x = _with_contrast_of(x, images)
    return x + images.mean((-2, -1), keepdim=True) if keep_dc else x


def frequency_bands(
        images: torch.Tensor,
        radii: Sequence[float],
        edge_width: float = 0.,
        spectrum: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Split images into bands of frequencies that sum to the image.

    Args:
        images: Real images (..., H, W).
        radii: Increasing outer radii of all bands but the last, in cycles per image.
        edge_width: Width of the raised-cosine edge between two bands, centred at the radius, in cycles per image. 0 is
            the paper's hard edge, whose filters ring.
        spectrum: From `spectrum_of(images)`, where they are split more than once.

    Returns:
        One more band than radii, each (..., H, W): up to the first radius, between each two, beyond the last.

    Raises:
        UserError: As by `split_frequencies`, or the radii do not increase.
    """
    check_radii(radii)
    if not edge_width >= 0:
        raise UserError(f'The width of the edge must be 0 or more cycles per image, got {edge_width}.')
    x = _as_float(images)
    size = (x.shape[-2], x.shape[-1])
    spectrum = spectrum_of(x) if spectrum is None else spectrum
    squares = _squared_radii(*size, x.device)
    masks = [_low_pass_mask(squares, radius, edge_width).to(x.dtype) for radius in radii]
    inner = [torch.zeros_like(squares, dtype=x.dtype), *masks]
    outer = [*masks, torch.ones_like(squares, dtype=x.dtype)]
    return [torch.fft.irfft2(spectrum * (b - a), s=size).to(images.dtype) for a, b in zip(inner, outer, strict=True)]


def spectrum_of(images: torch.Tensor) -> torch.Tensor:
    """The half of the DFT that real images (..., H, W) have, (..., H, W // 2 + 1), for `frequency_bands`."""
    return torch.fft.rfft2(_as_float(images))


def _low_pass_mask(squares: torch.Tensor, radius: float, edge_width: float) -> torch.Tensor:
    if edge_width == 0:
        return squares <= math.floor(min(radius * radius + 1e-9, 2. ** 62))  # sqrt(13) ** 2 has to include 13
    position = (squares.double().sqrt() - radius) / edge_width  # -1/2 … 1/2 over the edge
    return .5 - .5 * torch.sin(math.pi * position.clamp(-.5, .5))


def radial_power_spectrum(images: torch.Tensor, window: str | None = None) -> torch.Tensor:
    """Power of each radial bin, one cycle per image wide.

    The bins of an image sum to the mean square of its pixels (Parseval). A sinusoid of amplitude A that fits the image
    a whole number of times puts A^2 / 2 in one bin, the rounded radius of its frequency.

    Args:
        images: Real images (..., H, W).
        window: 'hann' tapers the image, without its mean, towards its border, where opposite sides do not meet: a DFT
            takes that step for a frequency. The window is scaled to keep the power of white noise.

    Returns:
        Power (..., `num_radial_bins(H, W)`), index k for radii from k - 0.5 to k + 0.5 cycles per image.
    """
    x = _as_float(images)
    height, width = x.shape[-2:]
    return bin_power(power_spectrum(x, window), height, width)


def power_spectrum(x: torch.Tensor, window: str | None = None) -> torch.Tensor:
    """|DFT|^2 of real images (..., H, W) by frequency of `rfft2`, (..., H, W // 2 + 1); squared means at [0, 0]."""
    if window not in (None, 'hann'):
        raise UserError(f'The window is hann or none, got {window}.')
    mean = None
    if window is not None:
        mean = x.mean((-2, -1), keepdim=True)
        x = (x - mean) * _hann(x.shape[-2], x.shape[-1], x.device).to(x.dtype)
    spectrum = torch.view_as_real(torch.fft.rfft2(x.contiguous()))  # MKL of torch 2.8 fails for some strides
    # in place, which is several times as fast, as is scaling here and not by norm='forward'
    squares = spectrum.mul_(1 / (x.shape[-2] * x.shape[-1])).square_()
    power = squares[..., 0] + squares[..., 1]
    if mean is not None:
        power[..., :1, :1] += mean.square()
    return power


def bin_power(power: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sum the power of `power_spectrum` over each radial bin, (..., H, W // 2 + 1) to (..., bins)."""
    bin_of, weight = _bins(height, width, power.device)
    power = (power * weight.to(power.dtype)).flatten(-2)
    bins = power.new_zeros(*power.shape[:-1], num_radial_bins(height, width))
    return bins.index_add(-1, bin_of.flatten(), power)


def high_frequency_energy(power: torch.Tensor, width: int) -> torch.Tensor:
    """Share of the energy beyond a quarter cycle per pixel, relative to that of white noise on the same map.

    1 for white noise of every size and shape. NaN for maps that have no frequencies on one side of the quarter (sides
    of three and less), or no energy besides their mean.

    Args:
        power: Power by frequency of `power_spectrum`, (..., H, W // 2 + 1).
        width: W.

    Returns:
        One value per map, (...).
    """
    high, total = high_and_total_energy(power, width)
    white_high, white_total = high_and_total_energy(torch.ones_like(power[(0,) * (power.dim() - 2)]), width)
    if not 0 < white_high < white_total:
        return torch.full_like(total, math.nan)
    return high / total / (white_high / white_total)


def high_and_total_energy(power: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Energy beyond a quarter cycle per pixel, and all but the mean's; arguments as for `high_frequency_energy`."""
    height = power.shape[-2]
    power = power * _without_mean(height, width, power.device)
    v, u = _whole_frequencies(height, width, power.device)
    is_high = 16 * ((v * width) ** 2 + (u * height) ** 2) > (height * width) ** 2  # whole numbers: nothing is rounded
    return (power * is_high).sum((-2, -1)), power.sum((-2, -1))


def spectral_centroid(power: torch.Tensor, width: int) -> torch.Tensor:
    """Mean frequency of the energy in cycles per pixel, relative to that of white noise on the same map.

    1 for white noise of every size and shape, NaN for maps with only one frequency or no energy besides their mean.
    Arguments and result as for `high_frequency_energy`.
    """
    height = power.shape[-2]
    weight, frequency = _without_mean(height, width, power.device), _cycles_per_pixel(height, width, power.device)
    white = (weight * frequency).sum() / weight.sum()
    if len(frequency[weight > 0].unique()) < 2:
        return torch.full_like(power.sum((-2, -1)), math.nan)
    return (power * weight * frequency).sum((-2, -1)) / (power * weight).sum((-2, -1)) / white


def spectral_slope(power: torch.Tensor, width: int) -> float:
    """Slope of the logarithm of power against that of frequency: 0 for white noise, -a for power as frequency^-a.

    A least-squares line through all frequencies. Of noise, the logarithm of one map's power scatters: give the mean
    over many. NaN for maps with only one frequency or no energy besides their mean.

    Args:
        power: Power by frequency of `power_spectrum`, (H, W // 2 + 1).
        width: W.
    """
    height = power.shape[-2]
    weight = _without_mean(height, width, power.device)
    used = (weight > 0) & (power > 1e-12 * (power * (weight > 0)).max())  # rounding errors are no power
    x = _cycles_per_pixel(height, width, power.device)[used].log()
    if len(x.unique()) < 2:
        return math.nan
    y, weight = power[used].double().log(), weight[used].double()
    x, y = (values - (values * weight).sum() / weight.sum() for values in (x, y))
    return ((weight * x * y).sum() / (weight * x * x).sum()).item()


def num_radial_bins(height: int, width: int) -> int:
    """Number of bins of `radial_power_spectrum` for a size: the mean, then one per cycle up to the corner."""
    return int(_corner(height, width) + .5) + 1


def _corner(height: int, width: int) -> float:
    """Radius of the corner of the spectrum, the largest there is."""
    return ((height // 2) ** 2 + (width // 2) ** 2) ** .5


def modes_per_bin(height: int, width: int) -> torch.Tensor:
    """Number of frequencies (DFT coefficients) in each radial bin, (bins,): power over it is the power per mode."""
    return bin_power(torch.ones(height, width // 2 + 1), height, width)


def _with_contrast_of(x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    std = _as_float(x).std((-2, -1), correction=0, keepdim=True)
    wanted = _as_float(images).std((-2, -1), correction=0, keepdim=True)
    # an image with nothing but rounding errors in it stays as it is
    scale = torch.where(std > 1e-5 * wanted, wanted / std.clamp(min=torch.finfo(std.dtype).tiny), 1.)
    return (x * scale).to(x.dtype)


def _as_float(images: torch.Tensor) -> torch.Tensor:
    if images.dim() < 2 or not images.is_floating_point():
        raise UserError(
            f'Images must be real floating point tensors (..., H, W), got {images.dtype}, shape {tuple(images.shape)}.')
    return images if images.dtype == torch.float64 else images.float()


def check_radii(radii: Sequence[float]) -> None:
    """Raise UserError for radii that are negative or NaN, or do not increase."""
    if not radii or not all(r >= 0 for r in radii):
        raise UserError(f'Radii must be numbers from 0 on, in cycles per image, got {list(radii)}.')
    if any(radii[i] >= radii[i + 1] for i in range(len(radii) - 1)):
        raise UserError(f'Radii must increase, got {list(radii)}.')


def check_corner(radii: Sequence[float], input_size: Sequence[int]) -> None:
    """Raise UserError for radii that would leave a low-pass or high-pass image of this size empty."""
    height, width = input_size[-2:]
    corner = _corner(height, width)
    beyond = [radius for radius in radii if not 0 <= radius < corner]
    if beyond:
        raise UserError(
            f'Radii must be from 0 to below {corner:.1f} cycles per image, the corner of the spectrum of a '
            f'{height}x{width} image, got {", ".join(f"{radius:g}" for radius in beyond)}.')


def largest_radius(input_size: Sequence[int]) -> int:
    """The largest whole radius that `check_corner` takes for images (…, H, W)."""
    return math.ceil(_corner(*input_size[-2:])) - 1


def default_radii(input_sizes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Two radii to begin with, for images (…, H, W) of all these sizes: the paper's 12 and 36 at 224 x 224 pixels."""
    side = min(min(size[-2:]) for size in input_sizes)
    return round(12 * side / 224), round(36 * side / 224)


def log_amplitude_spectrum(images: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of |DFT| of real images (..., H, W) with the zero frequency at the centre, for pictures of it.

    The centre is NaN, since the mean would hide the rest. Amplitudes are bounded from below at 1e-6 of the largest.
    """
    x = _as_float(images)
    amplitude = torch.fft.fftshift(torch.fft.fft2(x - x.mean((-2, -1), keepdim=True)).abs(), (-2, -1))
    amplitude = torch.maximum(amplitude, 1e-6 * amplitude.amax((-2, -1), keepdim=True))
    log = amplitude.clamp(min=torch.finfo(x.dtype).tiny).log()
    log[..., x.shape[-2] // 2, x.shape[-1] // 2] = math.nan
    return log


def _cached_by_size(fn):
    """Cache tensors by size and device; while torch.compile traces, they become part of the graph instead."""
    @functools.lru_cache(maxsize=64)
    def cached(height: int, width: int, device: torch.device):
        with torch.inference_mode(False):  # the cache may be filled in inference mode and then used in training
            return fn(height, width, device)

    @functools.wraps(fn)
    def wrapper(height: int, width: int, device: torch.device):
        return (fn if torch.compiler.is_compiling() else cached)(height, width, device)

    return wrapper


def _whole_frequencies(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cycles over the height (H, 1) and over the width (W // 2 + 1,) of the frequencies of `rfft2`, without signs."""
    v = torch.arange(height, device=device)
    return torch.minimum(v, height - v)[:, None], torch.arange(width // 2 + 1, device=device)


@_cached_by_size
def _squared_radii(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Squared radius of each frequency of `rfft2`, (H, W // 2 + 1), integers: no frequency is misplaced by rounding."""
    v, u = _whole_frequencies(height, width, device)
    return v ** 2 + u ** 2


def _cycles_per_pixel(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Frequency of each coefficient of `rfft2`, (H, W // 2 + 1), float64."""
    v, u = _whole_frequencies(height, width, device)
    return ((v / height).double() ** 2 + (u / width).double() ** 2).sqrt()


def _without_mean(height: int, width: int, device: torch.device) -> torch.Tensor:
    """How often each frequency of `rfft2` is in the whole spectrum, (H, W // 2 + 1); the mean never."""
    weight = _bins(height, width, device)[1].expand(height, -1).clone()
    weight[0, 0] = 0
    return weight


@_cached_by_size
def _bins(height: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Bin of each frequency of `rfft2`, and how often it is in the whole spectrum: once or, with conjugate, twice."""
    k = torch.arange(num_radial_bins(height, width), device=device)
    bin_of = torch.bucketize(_squared_radii(height, width, device), k * (k + 1))  # (k + 0.5)^2 without the quarter
    weight = torch.full((width // 2 + 1,), 2., device=device)
    weight[0] = 1.
    if width % 2 == 0:
        weight[-1] = 1.
    return bin_of, weight


@_cached_by_size
def _hann(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Separable Hann window with a mean square of one."""
    rows, columns = (
        torch.hann_window(n, periodic=True, dtype=torch.float64, device=device) if n > 1
        else torch.ones(1, dtype=torch.float64, device=device) for n in (height, width))
    window = rows[:, None] * columns
    return window / window.square().mean().sqrt()
