"""Splitting images by spatial frequency, and their radial power spectra. Pure functions of tensors.

A frequency is a pair of integers (v, u): cycles over the height and over the width of the image. Its radius is the
Euclidean distance sqrt(v^2 + u^2), in cycles per image, which is its distance from the centre of the shifted 2-D DFT.
This is the paper's definition; for images that are not square it measures both directions in cycles per side.

Images are real, so half of the spectrum is computed (`rfft2`). The masks depend on the radius alone, which is the same
for a frequency and its conjugate, and for a frequency on the edge of an even size under either sign.
"""
import functools
import math
from typing import List, Sequence, Tuple

import torch

from gmnet_timm.errors import UserError

__all__ = ['check_corner', 'check_radii', 'frequency_bands', 'num_rings', 'radial_power_spectrum', 'split_frequencies']


def split_frequencies(
        images: torch.Tensor,
        radius: float,
        keep_mean: bool = False,
        restore_contrast: bool = False,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Split images into the frequencies up to a radius, and those beyond it.

    Radius 0 leaves the mean of each channel in the low part, a radius past the corner leaves nothing in the high part.

    Args:
        images: Real images (..., H, W). Half-precision ones are transformed in float32 and returned in their own type.
        radius: Largest radius of the low part, in cycles per image.
        keep_mean: Add the mean of each channel to the high part too, low + high is then no longer the image.
        restore_contrast: Scale each channel of the high part to the standard deviation of the image's.

    Returns:
        Low and high part, each (..., H, W).

    Raises:
        UserError: The radius is negative or not a number, or the input is no real image.
    """
    low, high = frequency_bands(images, [radius])
    if restore_contrast:
        high = _with_contrast_of(high, images)
    if keep_mean:
        high = high + images.mean((-2, -1), keepdim=True)
    return low, high


def frequency_bands(images: torch.Tensor, radii: Sequence[float]) -> List[torch.Tensor]:
    """Split images into rings of frequencies that sum to the image.

    Args:
        images: Real images (..., H, W).
        radii: Increasing outer radii of all rings but the last, in cycles per image.

    Returns:
        One more ring than radii, each (..., H, W): up to the first radius, between each two, beyond the last.

    Raises:
        UserError: As by `split_frequencies`, or the radii do not increase.
    """
    check_radii(radii)
    x = _as_float(images)
    size = (x.shape[-2], x.shape[-1])
    spectrum = torch.fft.rfft2(x)
    squares = _squared_radii(*size, x.device)
    ring_of = torch.zeros_like(squares)
    for r in radii:
        ring_of += squares > math.floor(min(r * r + 1e-9, 2. ** 62))  # 1e-9: sqrt(13) ** 2 has to include 13
    return [
        torch.fft.irfft2(torch.where(ring_of == i, spectrum, 0), s=size).to(images.dtype)
        for i in range(len(radii) + 1)
    ]


def radial_power_spectrum(images: torch.Tensor) -> torch.Tensor:
    """Power of each ring of frequencies, one cycle per image wide.

    The rings of an image sum to the mean square of its pixels (Parseval). A sinusoid of amplitude A that fits the image
    a whole number of times puts A^2 / 2 in one ring, the rounded radius of its frequency.

    Args:
        images: Real images (..., H, W).

    Returns:
        Power (..., `num_rings(H, W)`), index k for radii from k - 0.5 to k + 0.5 cycles per image.
    """
    x = _as_float(images)
    height, width = x.shape[-2:]
    spectrum = torch.fft.rfft2(x, norm='forward')
    power = spectrum.real.square() + spectrum.imag.square()
    ring_of, weight = _rings(height, width, x.device)
    power = (power * weight).flatten(-2)
    rings = power.new_zeros(*power.shape[:-1], num_rings(height, width))
    return rings.index_add(-1, ring_of.flatten(), power)


def num_rings(height: int, width: int) -> int:
    """Number of rings of `radial_power_spectrum` for images of a size: the mean, then one a cycle to the corner."""
    return int((((height // 2) ** 2 + (width // 2) ** 2) ** .5) + .5) + 1


def _with_contrast_of(x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    std = _as_float(x).std((-2, -1), correction=0, keepdim=True)
    wanted = _as_float(images).std((-2, -1), correction=0, keepdim=True)
    # a part with nothing but rounding errors in it stays as it is
    scale = torch.where(std > 1e-5 * wanted, wanted / std.clamp(min=torch.finfo(std.dtype).tiny), 1.)
    return (x * scale).to(x.dtype)


def _as_float(images: torch.Tensor) -> torch.Tensor:
    if images.dim() < 2 or not images.is_floating_point():
        raise UserError(
            f'Images must be real floating point tensors (..., H, W), got {images.dtype}, shape {tuple(images.shape)}.')
    return images if images.dtype == torch.float64 else images.float()


def check_radii(radii: Sequence[float]) -> None:
    if not radii or not all(r >= 0 for r in radii):
        raise UserError(f'Radii must be numbers from 0 on, in cycles per image, got {list(radii)}.')
    if any(radii[i] >= radii[i + 1] for i in range(len(radii) - 1)):
        raise UserError(f'Radii must increase, got {list(radii)}.')


def check_corner(radii: Sequence[float], input_size: Sequence[int]) -> None:
    """Raise UserError for radii that would leave a low-pass or high-pass image of this size empty."""
    height, width = input_size[-2:]
    corner = ((height // 2) ** 2 + (width // 2) ** 2) ** .5
    beyond = [radius for radius in radii if not 0 <= radius < corner]
    if beyond:
        raise UserError(
            f'Radii must be from 0 to below {corner:.1f} cycles per image, the corner of the spectrum of a '
            f'{height}x{width} image, got {", ".join(f"{radius:g}" for radius in beyond)}.')


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


@_cached_by_size
def _squared_radii(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Squared radius of each frequency of `rfft2`, (H, W // 2 + 1), integers: no frequency is misplaced by rounding."""
    v = torch.arange(height, device=device)
    v = torch.minimum(v, height - v)
    u = torch.arange(width // 2 + 1, device=device)
    return v[:, None] ** 2 + u ** 2


@_cached_by_size
def _rings(height: int, width: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """Ring of each frequency of `rfft2`, and how often it is in the whole spectrum: once or, with conjugate, twice."""
    k = torch.arange(num_rings(height, width), device=device)
    ring_of = torch.bucketize(_squared_radii(height, width, device), k * (k + 1))  # (k + 0.5)^2 without the quarter
    weight = torch.full((width // 2 + 1,), 2., device=device)
    weight[0] = 1.
    if width % 2 == 0:
        weight[-1] = 1.
    return ring_of, weight
