"""Images of the study: patches of the demo's photographs.

Three parts share no pixel: one to train on, one to choose the learning rate with, one to test on. `standardize` takes
from each image its own mean and contrast, so that neither can tell one class from another.
"""
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from gmnet_timm.demo import PHOTOS, photo_pixels
from gmnet_timm.errors import UserError

__all__ = ['Batches', 'PhotoData', 'TrainingBatches', 'standardize']

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

# row and column of the quarters of each photograph that a part is cut from
QUARTERS = {'train': ((0, 0), (1, 1)), 'tune': ((0, 1),), 'test': ((1, 0),)}
MIN_STD = 8.  # grey levels of 255: patches of sky are left out, whose contrast would be that of the rounding


def standardize(images: torch.Tensor) -> torch.Tensor:
    """Give each channel of each image (..., H, W) a mean of 0 and a standard deviation of 1."""
    x = images - images.mean((-2, -1), keepdim=True)
    return x / x.std((-2, -1), correction=0, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


class PhotoData:
    """Greyscale patches of the eight photographs, each one class, drawn anew for each seed and epoch.

    Each photograph is cut into quarters: upper left and lower right train, upper right chooses the learning rate, lower
    left tests. A patch lies within its quarter, so that no two parts share a pixel.
    """

    channels = 1

    def __init__(self, size: int = 56, train: int = 96, test: int = 32, batch_size: int = 32):
        """
        Args:
            size: Side of a patch in pixels.
            train: Training patches per photograph and epoch.
            test: Patches per photograph to tune or test with.
            batch_size: Patches per batch.

        Raises:
            UserError: A quarter has fewer patches of this size.
            MissingExtraError: scikit-image is not installed.
        """
        self.size, self.batch_size = size, batch_size
        self.description = dict(images='photographs', size=size, train=train, test=test, batch_size=batch_size)
        self.counts = {'train': train, 'tune': test, 'test': test}
        self.classes = tuple(sorted(PHOTOS))
        self.photos = [photo_pixels(name) for name in self.classes]
        self.corners = {part: [_corners(photo, quarters, size) for photo in self.photos]
                        for part, quarters in QUARTERS.items()}
        for part, found in self.corners.items():
            for name, corners in zip(self.classes, found, strict=True):
                if len(corners) < self.counts[part]:
                    raise UserError(
                        f'{name} has {len(corners)} patches of {size} pixels for the part {part}, not '
                        f'{self.counts[part]}: use smaller or fewer ones.')
        pixels = np.concatenate([
            photo[rows, columns].ravel() for photo in self.photos
            for rows, columns in (_quarter(photo, *quarter) for quarter in QUARTERS['train'])])
        self.mean, self.std = float(pixels.mean()), float(pixels.std())

    def draw(self, part: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Different patches of a part in random order, (N, 1, size, size) and their classes (N,)."""
        patches = []
        for photo, corners in zip(self.photos, self.corners[part], strict=True):
            rows, columns = rng.permutation(corners)[:self.counts[part]].T
            patches.append(sliding_window_view(photo, (self.size, self.size))[rows, columns])
        order = rng.permutation(len(patches) * self.counts[part])
        images = torch.from_numpy(np.concatenate(patches)[order, None]).float()
        labels = torch.arange(len(patches)).repeat_interleave(self.counts[part])
        return (images - self.mean) / self.std, labels[torch.from_numpy(order)]

    def training(self, seed: int) -> 'TrainingBatches':
        """Batches of one epoch at each pass, drawn anew, in an order that depends on the seed; half are mirrored."""
        return TrainingBatches(self, np.random.default_rng([seed, 0]))

    def evaluation(self, part: str, seed: int) -> Batches:
        """Patches of the part 'tune' or 'test', which depend on the seed, in an order that does too."""
        images, labels = self.draw(part, np.random.default_rng([seed, 1]))
        return zip(images.split(self.batch_size), labels.split(self.batch_size))


@dataclasses.dataclass
class TrainingBatches:
    """Batches of one epoch at each pass."""

    data: PhotoData
    rng: np.random.Generator

    def __len__(self) -> int:
        return len(self.data.classes) * self.data.counts['train'] // self.data.batch_size

    def __iter__(self) -> Batches:
        images, labels = self.data.draw('train', self.rng)
        mirrored = torch.from_numpy(self.rng.random(len(images)) < .5)
        images[mirrored] = images[mirrored].flip(-1)
        size = self.data.batch_size
        for i in range(len(self)):
            yield images[i * size:(i + 1) * size], labels[i * size:(i + 1) * size]


def _quarter(photo: np.ndarray, row: int, column: int) -> tuple[slice, slice]:
    """Rows and columns of a quarter of a photograph."""
    height, width = (n // 2 for n in photo.shape)
    return slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)


def _corners(photo: np.ndarray, quarters: tuple[tuple[int, int], ...], size: int) -> np.ndarray:
    """Top left pixels (N, 2) of the patches within the quarters whose contrast is enough."""
    found = []
    for quarter in quarters:
        rows, columns = _quarter(photo, *quarter)
        pixels = photo[rows, columns].astype(np.float64)
        if min(pixels.shape) >= size:
            variance = _box_mean(pixels ** 2, size) - _box_mean(pixels, size) ** 2
            found.append(np.argwhere(variance >= MIN_STD ** 2) + (rows.start, columns.start))
    return np.concatenate(found) if found else np.empty((0, 2), int)


def _box_mean(x: np.ndarray, size: int) -> np.ndarray:
    """Mean of each square of `size` pixels, by its top left pixel."""
    sums = np.pad(x.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return (sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]) / size ** 2
