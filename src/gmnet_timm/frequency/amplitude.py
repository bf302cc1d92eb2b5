"""Relative log amplitude of features by depth (Park & Kim 2022, arXiv 2202.06709)."""
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.spectra import find_blocks, module_layouts
from gmnet_timm.frequency.tracing import trace, watch_modules

__all__ = ['LogAmplitude', 'log_amplitudes', 'relative_log_amplitude']


@dataclasses.dataclass(frozen=True)
class LogAmplitude:
    """Relative log amplitude of one layer's output.

    Attributes:
        name: Of the module.
        depth: From 0 (first) to 1 (last of those that were looked at).
        size: (H, W) of its maps.
        curve: Natural log amplitude from zero frequency to the corner, minus that at zero frequency, (points,).
        images: Number of images.
    """

    name: str
    depth: float
    size: tuple[int, int]
    curve: torch.Tensor
    images: int

    @property
    def high(self) -> float:
        """At the corner, pi in both directions: the number of the paper's figures by depth."""
        return self.curve[-1].item()

    def as_rows(self) -> list[dict[str, Any]]:
        """One row per point of the half-diagonal for a CSV; a frequency of 1 is the corner."""
        last = max(1, len(self.curve) - 1)
        return [
            dict(layer=self.name, depth=self.depth, height=self.size[0], width=self.size[1], images=self.images,
                 frequency=i / last, relative_log_amplitude=value)
            for i, value in enumerate(self.curve.tolist())
        ]


def relative_log_amplitude(maps: torch.Tensor) -> torch.Tensor:
    """Log amplitude along the half-diagonal of the 2-D DFT minus that at zero frequency, mean over images and channels.

    Args:
        maps: Real maps (B, C, H, W).

    Returns:
        Natural logarithms, (min(H, W) // 2 + 1,); the last point is the corner of the spectrum.
    """
    height, width = maps.shape[-2:]
    maps = maps if maps.dtype == torch.float64 else maps.float()
    points = min(height, width) // 2 + 1
    v, u = (torch.linspace(0, n // 2, points, device=maps.device).round().long() for n in (height, width))
    amplitude = torch.fft.rfft2(maps)[..., v, u].abs()
    log = (amplitude + 1e-6).log().mean((0, 1))  # as the paper's code, so that an empty frequency stays finite
    return log - log[0]


def log_amplitudes(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        modules: Sequence[str] | None = None,
        *,
        layout: str | None = None,
        show_progress: bool = False,
) -> list[LogAmplitude]:
    """Relative log amplitude of the outputs of modules, over a set of images.

    Args:
        model: Any model that takes images.
        loader: Batches of normalised images (B, C, H, W) and labels.
        modules: Names or patterns, by default the model's blocks (`find_blocks`).
        layout: As for `layer_spectra`.
        show_progress: Show how far it is.

    Returns:
        One entry per module in the order of the pass.

    Raises:
        UserError: As by `layer_spectra`.
    """
    device = next(model.parameters(), torch.empty(0)).device
    sums: dict[str, torch.Tensor] = {}
    layouts: dict[str, Any] = {}
    count = 0
    for batch, *_ in progress(loader, 'amplitude', 'batch', show=show_progress):
        batch = batch.to(device)
        if not count:
            found = trace(model, batch[:2])
            chosen = modules if modules is not None else find_blocks(found)
            both = module_layouts(model, found, chosen, layout, batch[:2])
            layouts = {name: both[name, side] for name, side in both if side == 'output'}
            if not layouts:
                raise UserError('The model has no blocks that hold maps. Name the modules to look at (--modules).')

        def on_module(name: str, side: str, x: torch.Tensor) -> None:
            if side == 'output' and name in layouts:  # noqa: B023, called within this turn of the loop
                curve = relative_log_amplitude(layouts[name].maps(x)).double().cpu() * len(batch)  # noqa: B023
                sums[name] = sums.get(name, 0) + curve

        names = list(dict.fromkeys(name.partition('#')[0] for name in layouts))
        with torch.no_grad(), watch_modules(model, names, on_module):
            model(batch)
        count += len(batch)
    if not count:
        raise UserError('There is no image to look at.')
    last = max(1, len(layouts) - 1)
    return [
        LogAmplitude(name, i / last, layout_.size, sums[name] / count, count)
        for i, (name, layout_) in enumerate(layouts.items())
    ]
