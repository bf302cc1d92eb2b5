"""Relative log amplitude of features by depth (Park & Kim 2022, arXiv 2202.06709), above that of white noise."""
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.intervals import normal_interval
from gmnet_timm.frequency.positions import Layout
from gmnet_timm.frequency.processes import gathered, interleaved
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.spectra import chosen_blocks, module_layouts
from gmnet_timm.frequency.tracing import evaluation_mode, trace, uncompiled, watch_modules

__all__ = ['LogAmplitude', 'log_amplitudes', 'relative_log_amplitude']


@dataclasses.dataclass(frozen=True)
class LogAmplitude:
    """Relative log amplitude of one layer's output.

    Attributes:
        name: Of the module.
        depth: From 0 (first) to 1 (last of those that were looked at).
        size: (H, W) of its maps.
        curves: Of each image, as of `relative_log_amplitude`, (images, points), float64.
    """

    name: str
    depth: float
    size: tuple[int, int]
    curves: torch.Tensor

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.curves)

    @property
    def curve(self) -> torch.Tensor:
        """Mean over images, (points,)."""
        return self.curves.mean(0)

    @property
    def high(self) -> float:
        """Next to the corner: the number of the paper's figures by depth. NaN for maps without such a frequency."""
        return self.curve[-1].item() if self.curves.shape[1] > 1 else math.nan

    def interval(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean over images and the bounds of its 95 % interval, as of `normal_interval`, each (points,)."""
        return normal_interval(self.curves)

    def as_rows(self) -> list[dict[str, Any]]:
        """One row per point of the half-diagonal for a CSV; a frequency of 1 is the corner."""
        columns = zip(*(values.tolist() for values in self.interval()), strict=True)
        return [
            dict(layer=self.name, depth=self.depth, height=self.size[0], width=self.size[1], images=self.images,
                 frequency=2 * i / min(self.size), relative_log_amplitude=value, low=low, high=high)
            for i, (value, low, high) in enumerate(columns)
        ]


def relative_log_amplitude(maps: torch.Tensor) -> torch.Tensor:
    """Log amplitude along the half-diagonal of the 2-D DFT minus that at zero frequency, above that of white noise.

    As the code of Park & Kim, it ends one frequency before the corner of a map of even size, where the coefficient is
    real. Their number for white noise, ln(2) / 2 as the coefficient at zero is real and all others are complex, is
    subtracted here, so that noise has 0 at every frequency and size.

    Args:
        maps: Real maps (B, C, H, W).

    Returns:
        Natural logarithms, mean over channels, (B, ceil(min(H, W) / 2)): zero frequency, and those up to the corner.
    """
    height, width = maps.shape[-2:]
    maps = maps if maps.dtype == torch.float64 else maps.float()
    points = (min(height, width) + 1) // 2
    v, u = (torch.linspace(0, (n - 1) // 2, points, device=maps.device).round().long() for n in (height, width))
    amplitude = torch.fft.rfft2(maps)[..., v, u].abs()
    log = (amplitude + 1e-6).log().mean(1)  # as the paper's code, so that an empty frequency stays finite
    relative = log - log[:, :1] - math.log(2) / 2
    relative[:, 0] = 0
    return relative


def log_amplitudes(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        modules: Sequence[str] | None = None,
        *,
        layout: str | None = None,
        show_progress: bool = False,
) -> list[LogAmplitude]:
    """Relative log amplitude of the outputs of modules, over a set of images.

    With an initialised process group each process gives a part of the images, and all get the numbers of the whole.

    Args:
        model: Any model that takes images, in evaluation mode during the call.
        loader: Batches of normalised images (B, C, H, W) and labels.
        modules: Names or patterns, by default the model's blocks, as timm groups its parameters or by their names.
        layout: As for `layer_spectra`.
        show_progress: Show how far it is.

    Returns:
        One entry per module in the order of the pass.

    Raises:
        UserError: As by `layer_spectra`.
    """
    model = uncompiled(model)
    device = next(model.parameters(), torch.empty(0)).device
    curves: dict[str, list[torch.Tensor]] = {}
    layouts: dict[str, Layout] = {}

    def on_module(name: str, side: str, x: torch.Tensor) -> None:
        if side == 'output' and name in layouts:
            found = relative_log_amplitude(layouts[name].maps(x)).double().cpu()
            if not found.isfinite().all():
                raise UserError(f'The output of {name} is NaN or infinite: the weights are damaged or have diverged.')
            curves.setdefault(name, []).append(found)

    for batch, *_ in progress(loader, 'amplitude', 'batch', show=show_progress):
        batch = batch.to(device)
        with torch.no_grad(), evaluation_mode(model):
            if not layouts:
                layouts.update(_output_layouts(model, batch[:2], modules, layout))
            names = list(dict.fromkeys(name.partition('#')[0] for name in layouts))
            with watch_modules(model, names, on_module):
                model(batch)
    own = {name: (found.size, torch.cat(curves[name])) for name, found in layouts.items()}
    parts = [part for part in gathered(own) if part]
    if not parts:
        raise UserError('There is no image to look at.')
    last = max(1, len(parts[0]) - 1)
    return [
        LogAmplitude(name, i / last, size, interleaved([part[name][1] for part in parts]))
        for i, (name, (size, _)) in enumerate(parts[0].items())
    ]


def _output_layouts(
        model: nn.Module,
        images: torch.Tensor,
        modules: Sequence[str] | None,
        layout: str | None,
) -> dict[str, Layout]:
    found = trace(model, images)
    both = module_layouts(model, found, modules if modules is not None else chosen_blocks(model, found), layout)
    layouts = {name: both[name, side] for name, side in both if side == 'output'}
    if not layouts:
        raise UserError('The model has no blocks that hold maps. Name the modules to look at (--modules).')
    return layouts
