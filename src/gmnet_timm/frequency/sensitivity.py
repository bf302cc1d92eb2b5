"""Spectrum of a classifier's input gradients: to which frequencies of a pixel change does its loss respond?"""
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import check_labels, logits_of
from gmnet_timm.frequency.intervals import normal_interval
from gmnet_timm.frequency.processes import gathered, interleaved
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.split import modes_per_bin, radial_power_spectrum
from gmnet_timm.frequency.tracing import evaluation_mode

__all__ = ['Sensitivity', 'input_sensitivity']


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Power spectrum of input gradients.

    Attributes:
        size: (H, W) of the images.
        power: Of the gradient with respect to pixels from 0 to 1, sum of each radial bin, mean over channels,
            (images, bins), float64.
    """

    size: tuple[int, int]
    power: torch.Tensor

    @property
    def per_mode(self) -> torch.Tensor:
        """Mean power per frequency of each bin, (bins,)."""
        return self.power.mean(0) / modes_per_bin(*self.size)

    def interval(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each bin's share of the power without the mean, as of `normal_interval`; bin 0 is NaN."""
        power = self.power.clone()
        power[:, 0] = torch.nan
        share = power / power.nansum(1, keepdim=True).clamp(min=1e-300)
        return normal_interval(share)

    def as_rows(self) -> list[dict[str, Any]]:
        """One row per radial bin for a CSV."""
        mean, low, high = self.interval()
        per_mode = self.per_mode
        return [
            dict(height=self.size[0], width=self.size[1], images=len(self.power), radius=k,
                 power=power, power_per_mode=per_mode[k].item(), share=mean[k].item(), share_low=low[k].item(),
                 share_high=high[k].item())
            for k, power in enumerate(self.power.mean(0).tolist())
        ]


def input_sensitivity(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        std: Sequence[float],
        *,
        target: str = 'loss',
        window: str | None = None,
        show_progress: bool = False,
) -> Sensitivity:
    """Radial power spectrum of the gradients of a classifier with respect to its images.

    With an initialised process group each process gives a part of the images, and all get the numbers of the whole.

    Args:
        model: A classifier, in evaluation mode during the call.
        loader: Batches of normalised images (B, C, H, W) and labels (B,).
        std: Standard deviation that each channel was divided by, so that models with other ones can be compared.
        target: 'loss' for the cross-entropy, 'logit' for the logit of the label.
        window: As for `radial_power_spectrum`.
        show_progress: Show how far it is.

    Raises:
        UserError: There are no images, logits or gradients are NaN, infinite or zero, or `target` is something else.
    """
    if target not in ('loss', 'logit'):
        raise UserError(f'The target is loss or logit, got {target}.')
    device = next(model.parameters()).device
    spectra = []
    size = (0, 0)
    for images, labels in progress(loader, 'sensitivity', 'batch', show=show_progress):
        images, labels = images.to(device).requires_grad_(), labels.to(device)
        with evaluation_mode(model):
            logits = logits_of(model(images))
        check_labels(labels, logits)
        if not logits.isfinite().all():
            raise UserError('The logits are NaN or infinite: the weights are damaged or have diverged.')
        values = F.cross_entropy(logits, labels, reduction='none') if target == 'loss' \
            else logits.gather(1, labels[:, None])
        gradient, = torch.autograd.grad(values.sum(), images)
        if not gradient.isfinite().all():
            raise UserError('The gradient is NaN or infinite: the weights are damaged or have diverged.')
        if not gradient.any():
            raise UserError(f'The gradient of the {target} is zero for a whole batch: the logits are so large that '
                            'they saturate, or the weights are damaged.')
        pixels = gradient / gradient.new_tensor(std).view(-1, 1, 1)
        spectra.append(radial_power_spectrum(pixels, window).mean(1).double().cpu())
        size = (images.shape[-2], images.shape[-1])
    parts = [part for part in gathered((size, spectra)) if part[1]]
    if not parts:
        raise UserError('There is no image to look at.')
    return Sensitivity(parts[0][0], interleaved([torch.cat(part) for _, part in parts]))
