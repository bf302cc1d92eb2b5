"""Radial power spectra of a model's features, before and after its gates."""
import contextlib
import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.gates import Tap, find_gates
from gmnet_timm.frequency.split import radial_power_spectrum

__all__ = ['LayerSpectrum', 'layer_spectra']


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectra of one layer's input and output, means over channels, by image and ring of frequencies.

    A feature map of H x W has rings from 0 to its corner, in cycles per image; its Nyquist radius is min(H, W) / 2.
    """

    name: str
    size: Tuple[int, int]  # (H, W)
    before: torch.Tensor  # power (images, rings), float64
    after: torch.Tensor  # power (images, rings), float64

    @property
    def cutoff(self) -> int:
        """Last ring that counts as low: half of the Nyquist radius."""
        return max(1, min(self.size) // 4)

    def high_low_ratio(self, after: bool) -> float:
        """Energy beyond the cutoff over energy up to it, without the mean; not a number for maps without both."""
        power = (self.after if after else self.before).mean(0)
        low, high = power[1:self.cutoff + 1].sum().item(), power[self.cutoff + 1:].sum().item()
        return high / low if low and self.cutoff + 1 < len(power) else math.nan

    def gain(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Power after over power before, by ring.

        Returns:
            Geometric mean over images, and the lower and upper end of its 95 % interval (normal, of the logarithm).
            The ends are not numbers for one image, all three are not for rings that are empty in some image.
        """
        log = (self.after / self.before).log()
        mean = log.mean(0)
        half = 1.959964 * log.std(0) / len(log) ** .5
        gain, low, high = (torch.where(x.isfinite(), x.exp(), math.nan) for x in (mean, mean - half, mean + half))
        return gain, low, high

    def as_rows(self) -> List[Dict[str, Any]]:
        """One line a ring for a CSV."""
        gain, low, high = self.gain()
        return [
            dict(
                layer=self.name, height=self.size[0], width=self.size[1], images=len(self.before), radius=k,
                power_before=self.before[:, k].mean().item(), power_after=self.after[:, k].mean().item(),
                gain=gain[k].item(), gain_low=low[k].item(), gain_high=high[k].item(),
                high_low_before=self.high_low_ratio(False), high_low_after=self.high_low_ratio(True),
                cutoff=self.cutoff,
            )
            for k in range(self.before.shape[1])
        ]


def layer_spectra(
        model: nn.Module,
        loader: Iterable[Tuple[torch.Tensor, torch.Tensor]],
        modules: Optional[Sequence[str]] = None,
        max_images: Optional[int] = None,
) -> List[LayerSpectrum]:
    """Mean radial power spectra of layers' inputs and outputs over a set of images.

    Args:
        model: Any model, run on the device and in the mode it is left in.
        loader: Batches of normalised images (B, C, H, W) and labels.
        modules: Names of modules, whose input and output are compared. All gates by default.
        max_images: Stop after this many images.

    Returns:
        One entry a layer, in the model's order. Hooks are removed whatever happens.

    Raises:
        UserError: The model has no gates or no such module, a module gives no feature maps, or there are no images.
    """
    collected: Dict[Tuple[str, str], List[torch.Tensor]] = {}
    sizes: Dict[str, Tuple[int, int]] = {}

    def collect(name: str, side: str, x: Any) -> None:
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            raise UserError(f'{name} has no feature maps (B, C, H, W) as its {side}.')
        size = (x.shape[-2], x.shape[-1])
        if sizes.setdefault(name, size) != size:
            raise UserError(f'{name} changes the size of its feature maps, the rings of two sizes cannot be compared.')
        collected.setdefault((name, side), []).append(radial_power_spectrum(x).double().mean(1).cpu())

    device = next(model.parameters()).device
    points = {} if modules is None else {
        name: (Tap(name, _module(model, name), False), Tap(name, _module(model, name), True)) for name in modules}
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise UserError('There is no image to look at.')
    if modules is None:
        points = _gates(model, first[0][:1].to(device))
    seen = 0
    with torch.inference_mode(), contextlib.ExitStack() as hooks:
        for name, (before, after) in points.items():
            hooks.callback(_hook(before, functools.partial(collect, name, 'input')).remove)
            hooks.callback(_hook(after, functools.partial(collect, name, 'output')).remove)
        for images, _ in itertools.chain([first], batches):
            images = images[:None if max_images is None else max_images - seen]
            model(images.to(device))
            seen += len(images)
            if max_images is not None and seen >= max_images:
                break
    if not seen:
        raise UserError('There is no image to look at.')
    return [
        LayerSpectrum(name, sizes[name], *(torch.cat(collected[name, side]) for side in ('input', 'output')))
        for name in points if name in sizes
    ]


def _gates(model: nn.Module, x: torch.Tensor) -> Dict[str, Tuple[Tap, Tap]]:
    points = {}
    for name, gate in find_gates(model, x).items():
        if gate.after is None:
            raise UserError(f'The product in {name} cannot be read: no module takes or returns it.')
        points[name] = (gate.before, gate.after)
    if not points:
        raise UserError('The model has no gates. Name the modules to look at.')
    return points


def _hook(tap: Tap, collect: Callable[[Any], None]) -> RemovableHandle:
    if tap.is_output:
        return tap.module.register_forward_hook(lambda module, args, output: collect(output))
    return tap.module.register_forward_pre_hook(lambda module, args: collect(args[0]))  # it may work in place


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as e:
        raise UserError(f'The model has no module {name}.') from e
