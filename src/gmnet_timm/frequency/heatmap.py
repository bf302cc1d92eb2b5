"""Error of a classifier under Fourier basis perturbations, by direction and frequency (Yin et al. 2019, 1906.08988)."""
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import check_labels, logits_of
from gmnet_timm.frequency.intervals import wilson_interval
from gmnet_timm.frequency.processes import gathered, own_part
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.tracing import evaluation_mode

__all__ = ['HeatmapPoint', 'directions', 'fourier_basis', 'fourier_heatmap', 'radial_summary']


@dataclasses.dataclass(frozen=True)
class HeatmapPoint:
    """Errors under one perturbation.

    Attributes:
        v: Cycles over the height.
        u: Cycles over the width, from 0: (-v, -u) is the same perturbation.
        amplitude: Root mean square of the perturbation, in pixel values from 0 to 1.
        wrong: Images that are classified wrongly.
        count: Number of images.
    """

    v: int
    u: int
    amplitude: float
    wrong: int
    count: int

    @property
    def error(self) -> float:
        """Percent."""
        return 100 * self.wrong / self.count

    def as_row(self) -> dict[str, Any]:
        """Numbers and bounds of Wilson's 95 % interval for a row of a table, in percent."""
        low, high = wilson_interval(self.wrong, self.count)
        return dict(
            v=self.v, u=self.u, radius=round(math.hypot(self.v, self.u), 4), amplitude=self.amplitude,
            error=round(self.error, 3), error_low=round(100 * low, 3), error_high=round(100 * high, 3),
            wrong=self.wrong, count=self.count)


def fourier_basis(height: int, width: int, v: int, u: int) -> torch.Tensor:
    """The real image of one frequency (H, W), with a mean square of one: its DFT is zero but at (v, u), (-v, -u)."""
    spectrum = torch.zeros(height, width, dtype=torch.complex64)
    spectrum[v % height, u % width] += 1 + 1j
    spectrum[-v % height, -u % width] += 1 - 1j
    image = torch.fft.ifft2(spectrum).real
    return image / image.square().mean().sqrt()


def directions(height: int, width: int, step: int = 1, largest: int | None = None) -> list[tuple[int, int]]:
    """Frequencies (v, u) of one half of the plane on a grid, the mean (0, 0) included.

    Args:
        height: Of the image.
        width: Of the image.
        step: Distance of the grid in cycles per image; a coarse one is for a CPU.
        largest: Largest |v| and |u|, by default up to the corner of the spectrum.
    """
    if step < 1 or (largest is not None and largest < 0):
        raise UserError('The step of the heat map must be 1 or more, its largest frequency 0 or more.')
    rows, columns = (min(n // 2, n if largest is None else largest) // step for n in (height, width))
    return [
        (v * step, u * step) for u in range(columns + 1) for v in range(-rows, rows + 1)
        if (u > 0 or v >= 0) and not (v < 0 and 2 * v * step == -height)  # -H/2 is H/2
    ]


def fourier_heatmap(
        model: nn.Module,
        images: torch.Tensor,
        targets: torch.Tensor,
        std: Sequence[float],
        frequencies: Sequence[tuple[int, int]],
        amplitude: float,
        *,
        mean: Sequence[float] | None = None,
        batch_size: int = 64,
        seed: int = 0,
        on_point: Callable[[HeatmapPoint], None] | None = None,
        show_progress: bool = True,
) -> list[HeatmapPoint]:
    """Error under a perturbation of each frequency, with a random sign for each image and channel.

    The perturbation is added to pixels before normalisation. With an initialised process group each
    process gives a part of the images, every n-th one, and all get the counts of the whole.

    Args:
        model: A classifier, in evaluation mode during the call.
        images: Normalised images (B, C, H, W); of several processes, a process without images gives (0, C, H, W).
        targets: Labels (B,).
        std: Standard deviation that each channel was divided by.
        frequencies: (v, u) in cycles per image, from `directions`.
        amplitude: Root mean square of the perturbation in pixel values from 0 to 1. Yin et al. state the norm over the
            pixels of a channel, which is this times sqrt(H W): 15.7 at 224 x 224 is 0.07.
        mean: Mean that was taken off each channel, to clip perturbed images to the range of pixels, as much of the
            literature does; None for no clipping. At an amplitude of 0.2 this changes errors by points.
        batch_size: Images per pass.
        seed: Of the signs, which do not depend on what was computed before.
        on_point: Called with each point when it is known.
        show_progress: Show how far it is.

    Returns:
        One point per frequency.

    Raises:
        UserError: There are no images, the amplitude is negative, or the logits are NaN or infinite.
    """
    if not amplitude >= 0:
        raise UserError(f'The amplitude must be 0 or more, got {amplitude}.')
    counts = gathered(len(images))
    if not sum(counts):
        raise UserError('There is no image to evaluate.')
    device = next(model.parameters()).device
    scale = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1).expand(images.shape[1], 1, 1)
    offset = torch.zeros_like(scale) if mean is None else torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
    points = []
    for v, u in progress(frequencies, f'heat map, amplitude {amplitude:g}', 'frequency', show=show_progress):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + (v + 100_000) * 200_003 + u)
        signs = torch.randint(0, 2, (max(counts) * len(counts), images.shape[1], 1, 1), generator=generator) * 2. - 1
        signs = own_part(signs)  # an image has the same signs, whichever process has it
        noise = amplitude * fourier_basis(images.shape[-2], images.shape[-1], v, u) / scale
        wrong = 0
        for start in range(0, len(images), batch_size):
            part = slice(start, min(start + batch_size, len(images)))
            with torch.inference_mode(), evaluation_mode(model):
                x = images[part] + signs[part] * noise
                if mean is not None:
                    x = ((x * scale + offset).clamp(0, 1) - offset) / scale
                logits = logits_of(model(x.to(device))).cpu()
            check_labels(targets[part], logits)
            if not logits.isfinite().all():
                raise UserError(f'The logits under a perturbation at ({v}, {u}) are NaN or infinite.')
            wrong += int((logits.argmax(-1) != targets[part]).sum())
        points.append(HeatmapPoint(v, u, amplitude, sum(gathered(wrong)), sum(counts)))
        if on_point is not None:
            on_point(points[-1])
    return points


def radial_summary(points: Sequence[HeatmapPoint]) -> list[dict[str, Any]]:
    """Mean error by amplitude and rounded radius."""
    groups: dict[tuple[float, int], list[HeatmapPoint]] = {}
    for point in points:
        groups.setdefault((point.amplitude, round(math.hypot(point.v, point.u))), []).append(point)
    return [
        dict(amplitude=amplitude, radius=radius, error=sum(point.error for point in group) / len(group),
             directions=len(group))
        for (amplitude, radius), group in sorted(groups.items())
    ]
