"""Accuracy of a classifier on images with only some of their frequencies: low-pass, high-pass, band-pass, band-stop."""
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.intervals import wilson_interval
from gmnet_timm.frequency.processes import gathered, interleaved
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.split import check_radii, frequency_bands, restore, spectrum_of
from gmnet_timm.frequency.tracing import evaluation_mode

__all__ = [
    'BANDS', 'Band', 'BandAccuracy', 'BandSplit', 'SplitOptions', 'band_images', 'evaluate_bands', 'list_bands',
]

SPACES = ('normalized', 'pixels')
BORDERS = ('wrap', 'mirror')
BANDS = ('low', 'high', 'band-pass', 'band-stop')


@dataclasses.dataclass(frozen=True)
class SplitOptions:
    """What the paper's definition leaves open. The defaults are its words and nothing more.

    Attributes:
        keep_dc: Add the mean of each channel to high-pass and band-pass images, which have none.
        restore_contrast: Scale each channel of high-pass and band-pass images to the standard deviation of the image's.
        space: Whether the split acts on the tensors that enter the model ('normalized') or on pixels before mean and
            standard deviation are taken off ('pixels'). The paper does not say. The low-pass images are the same. The
            high-pass images differ by a constant: they vary around the data's mean in the first case, around black in
            the second.
        edge_width: Width of the raised-cosine edge of each band in cycles per image, 0 for the paper's hard edge.
        border: 'wrap' takes the image as one period, as a DFT does: where opposite sides differ, that step is a high
            frequency. 'mirror' continues it by its mirror image, as a DCT does.
        clip: Clip filtered images to the range of pixels, from black to white.
    """

    keep_dc: bool = False
    restore_contrast: bool = False
    space: str = 'normalized'
    edge_width: float = 0.
    border: str = 'wrap'
    clip: bool = False

    def __post_init__(self):
        if self.border not in BORDERS:
            raise UserError(f'The border is one of {", ".join(BORDERS)}, got {self.border}.')
        if self.space not in SPACES:
            raise UserError(f'The split acts on one of {", ".join(SPACES)}, got {self.space}.')


@dataclasses.dataclass(frozen=True)
class Band:
    """Which frequencies of an image are kept.

    Attributes:
        kind: 'raw' (all), 'low' (up to the radius), 'high' (beyond it), 'band-pass' (from inner_radius to radius) or
            'band-stop' (all others).
        radius: In cycles per image, None for raw.
        inner_radius: In cycles per image, for band-pass and band-stop.
    """

    kind: str
    radius: float | None = None
    inner_radius: float | None = None

    def __str__(self) -> str:
        if self.radius is None:
            return self.kind
        inner = '' if self.inner_radius is None else f'{self.inner_radius:g}-'
        return f'{self.kind} {inner}{self.radius:g}'


@dataclasses.dataclass(frozen=True)
class BandAccuracy:
    """How many images of one band were classified correctly.

    Attributes:
        band: Which frequencies were kept.
        correct1: Images whose likeliest class is theirs.
        correct5: Images whose class is among the five likeliest.
        count: Number of images.
        answers: Of each image in the order of the data, whether it is among `correct1`, (images,), bool.
    """

    band: Band
    correct1: int
    correct5: int
    count: int
    answers: torch.Tensor = dataclasses.field(default_factory=lambda: torch.empty(0, dtype=torch.bool), compare=False)

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct1 / self.count

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.correct5 / self.count

    def as_row(self) -> dict[str, Any]:
        """Numbers and bounds of 95 % intervals for a row of a table, in percent."""
        inner, outer = (
            '' if radius is None else f'{radius:g}' for radius in (self.band.inner_radius, self.band.radius))
        row: dict[str, Any] = dict(band=self.band.kind, inner_radius=inner, radius=outer)
        for k, correct in ((1, self.correct1), (5, self.correct5)):
            low, high = wilson_interval(correct, self.count)
            row[f'top{k}'] = round(100 * correct / self.count, 3)
            row[f'top{k}_low'], row[f'top{k}_high'] = round(100 * low, 3), round(100 * high, 3)
            row[f'correct{k}'] = correct
        row['count'] = self.count
        return row


def list_bands(radii: Sequence[float], kinds: Sequence[str] = ('low', 'high')) -> list[Band]:
    """The bands of `band_images`: raw, then low and high for each radius, then the bands between each two radii.

    Raises:
        UserError: There is no such kind, the radii are negative or NaN, or one radius was given for bands between two.
    """
    for radius in radii:
        check_radii([radius])
    unknown = [kind for kind in kinds if kind not in BANDS]
    if unknown or not kinds:
        raise UserError(f'The bands are {", ".join(BANDS)}, got {", ".join(unknown) or "none"}.')
    rings = [kind for kind in kinds if kind in ('band-pass', 'band-stop')]
    if rings and len(set(radii)) < 2:
        raise UserError(f'{rings[0]} is between two radii: give at least two by --radii.')
    bands = [Band('raw')]
    bands += [Band(kind, radius) for radius in radii for kind in BANDS[:2] if kind in kinds]
    ordered = sorted(set(radii))
    bands += [Band(kind, b, a) for kind in BANDS[2:] if kind in kinds for a, b in zip(ordered, ordered[1:])]
    return bands


def band_images(
        images: torch.Tensor,
        bands: Sequence[Band],
        options: SplitOptions = SplitOptions(),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
) -> Iterator[torch.Tensor]:
    """Filter images as a model takes them, one result (B, C, H, W) per band.

    Args:
        images: Normalised images (B, C, H, W).
        bands: From `list_bands`.
        options: How to split.
        mean: Mean that was taken off each channel, needed for the space 'pixels' and to clip.
        std: Standard deviation that each channel was divided by, needed for the same.
    """
    yield from map(BandSplit(images, options, mean, std), bands)


class BandSplit:
    """Images that are split again and again: transformed once, then one call per band, `split(band)`.

    Args:
        images: Normalised images (B, C, H, W).
        options: How to split.
        mean: As for `band_images`.
        std: As for `band_images`.
    """

    def __init__(
            self,
            images: torch.Tensor,
            options: SplitOptions = SplitOptions(),
            mean: Sequence[float] | None = None,
            std: Sequence[float] | None = None,
    ):
        no_change = images.new_zeros(()), images.new_ones(())
        if options.space == 'normalized' and not options.clip:
            self.normalisation = no_change
        elif mean is None or std is None:
            raise UserError(
                'To split in the space of pixels or to clip, mean and std of the normalisation are needed.')
        else:
            self.normalisation = images.new_tensor(mean).view(-1, 1, 1), images.new_tensor(std).view(-1, 1, 1)
        self.offset, self.scale = no_change if options.space == 'normalized' else self.normalisation
        self.images = images
        self.options = options
        self.pixels = images * self.scale + self.offset
        self.period = self.pixels
        if options.border == 'mirror':
            for axis in (-2, -1):
                self.period = torch.cat([self.period, self.period.flip(axis)], axis)
        self.spectrum = spectrum_of(self.period)
        self.last: tuple[Any, list[torch.Tensor]] = (None, [])  # low and high of one radius come from one computation

    def __call__(self, band: Band) -> torch.Tensor:
        """Only these frequencies of the images, normalised as they were, (B, C, H, W)."""
        if band.radius is None:
            return self.images
        radii = [band.radius] if band.inner_radius is None else [band.inner_radius, band.radius]
        if self.last[0] != radii:
            height, width = self.pixels.shape[-2:]
            longer = self.period.shape[-1] // width  # a period of two images has twice the cycles
            bands = frequency_bands(
                self.period, [longer * r for r in radii], longer * self.options.edge_width, self.spectrum)
            self.last = radii, [x[..., :height, :width] for x in bands]
        parts = self.last[1]
        if band.kind == 'low':
            x = parts[0]
        elif band.kind == 'band-stop':
            x = parts[0] + parts[2]
        else:  # neither has a mean
            x = restore(parts[1], self.pixels, self.options.keep_dc, self.options.restore_contrast)
        x = (x - self.offset) / self.scale
        if self.options.clip:
            mean, std = self.normalisation
            x = ((x * std + mean).clamp(0, 1) - mean) / std
        return x


def evaluate_bands(
        model: nn.Module,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        radii: Sequence[float],
        *,
        kinds: Sequence[str] = ('low', 'high'),
        options: SplitOptions = SplitOptions(),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        amp_dtype: torch.dtype | None = None,
        show_progress: bool = True,
) -> list[BandAccuracy]:
    """Count correct answers on raw images and on each band, in one pass over the data.

    With an initialised process group each process gives a part of the data, and all get the counts of the whole.

    Args:
        model: A classifier, on its device, in evaluation mode during the call. It returns logits (B, classes), or an
            object of transformers with such `logits`.
        loader: Batches of normalised images (B, C, H, W) and labels (B,).
        radii: Radii in cycles per image, the order does not matter.
        kinds: Which bands, of `BANDS`.
        options: How to split.
        mean: As for `band_images`.
        std: As for `band_images`.
        amp_dtype: Type of autocast, None for none.
        show_progress: Show a bar on a terminal, or a line every so often where the output is piped.

    Returns:
        Accuracies in the order of `list_bands`.

    Raises:
        UserError: Radii or data that cannot be used, labels that the model has no output for, or logits that are NaN
            or infinite.
    """
    bands = list_bands(radii, kinds)
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, dtype=amp_dtype) if amp_dtype else contextlib.nullcontext()
    counts = torch.zeros(len(bands), 4, dtype=torch.long, device=device)
    answers: list[list[torch.Tensor]] = [[torch.empty(0, dtype=torch.bool)] for _ in bands]
    for images, targets in progress(loader, 'bands', 'batch', show=show_progress):
        # not around the loader, whose collectives some versions of torch refuse in inference mode
        with torch.inference_mode(), evaluation_mode(model):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            for i, x in enumerate(band_images(images, bands, options, mean, std)):
                with autocast:
                    logits = logits_of(model(x))
                found, right = _count_correct(logits, targets)
                counts[i] += found
                answers[i].append(right.cpu())
    counts = torch.stack(gathered(counts.cpu())).sum(0)
    if counts[0, 2] == 0:
        raise UserError('There is no image to evaluate.')
    for band, (_, _, count, broken) in zip(bands, counts.tolist(), strict=True):
        if broken:
            raise UserError(
                f'{band}: the logits of {broken} of {count} images are NaN or infinite, which is neither right nor '
                f'wrong. {"Evaluate without --amp." if amp_dtype else "The weights are damaged or have diverged."}')
    whole = interleaved(gathered(torch.stack([torch.cat(parts) for parts in answers], 1)))
    return [BandAccuracy(band, correct1, correct5, count, whole[:, i])
            for i, (band, (correct1, correct5, count, _)) in enumerate(zip(bands, counts.tolist()))]


def logits_of(output: Any) -> torch.Tensor:
    """The logits (B, classes) of what a classifier returns.

    Raises:
        UserError: It returns something else.
    """
    logits = getattr(output, 'logits', output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(output).__name__
        raise UserError(f'The model is not a classifier: it returns {shape} instead of logits (images, classes).')
    return logits


def _count_correct(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Correct within the first, within the first five, all, and those without finite logits; and which are correct."""
    check_labels(targets, logits)
    ranked = logits.topk(min(5, logits.shape[-1])).indices == targets[:, None]
    broken = (~logits.isfinite().all(-1)).sum()
    all_images = ranked.new_tensor(len(targets), dtype=torch.long)
    return torch.stack([ranked[:, 0].sum(), ranked.sum(), all_images, broken]), ranked[:, 0]


def check_labels(targets: torch.Tensor, logits: torch.Tensor) -> None:
    """Raise UserError for labels that are not one index per image of an output of the model."""
    num_classes = logits.shape[-1]
    if targets.shape != logits.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise UserError(
            f'Labels must be one whole number per image, ({len(logits)},), got {tuple(targets.shape)} of '
            f'{targets.dtype}. Of one-hot labels, labels.argmax(-1) are the numbers.')
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
        raise UserError(
            f'The data has labels from {int(targets.min())} to {int(targets.max())}, the model has {num_classes} '
            'outputs.')
