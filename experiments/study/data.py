"""Images of the study: patches of the demo's photographs, or an image folder such as ImageNet.

Three parts share no pixel: one to train on, one to choose the learning rate with, one to test on. `standardize` takes
from each image its own mean and contrast, so that neither can tell one class from another.
"""
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from timm.data import create_dataset, create_transform
from torch.utils.data import DataLoader, Subset

from gmnet_timm.demo import PHOTOS, photo_pixels
from gmnet_timm.errors import UserError

__all__ = ['FolderData', 'PhotoData', 'StudyData', 'standardize']

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

# row and column of the quarters of each photograph that a part is cut from
QUARTERS = {'train': ((0, 0), (1, 1)), 'tune': ((0, 1),), 'test': ((1, 0),)}
MIN_STD = 8.  # grey levels of 255: patches of sky are left out, whose contrast would be that of the rounding


def standardize(images: torch.Tensor) -> torch.Tensor:
    """Give each channel of each image (..., H, W) a mean of 0 and a standard deviation of 1."""
    x = images - images.mean((-2, -1), keepdim=True)
    return x / x.std((-2, -1), correction=0, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


class StudyData(Protocol):
    """What the study asks of its images, which come normalised by mean and standard deviation of the whole data."""

    classes: tuple[str, ...]
    channels: int
    size: int
    description: dict[str, Any]  # what decides the images, for the files of runs

    def training(self, seed: int) -> 'TrainingBatches':
        """Batches of one epoch at each pass, in an order that depends on the seed."""
        ...

    def evaluation(self, part: str, seed: int) -> Batches:
        """All images of the part 'tune' or 'test' in an order that depends on the seed."""
        ...


class TrainingBatches(Protocol):
    """An iterable with a length."""

    def __len__(self) -> int:
        ...

    def __iter__(self) -> Batches:
        ...


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
        """As of `StudyData`; half of the patches are mirrored."""
        return _PatchBatches(self, np.random.default_rng([seed, 0]))

    def evaluation(self, part: str, seed: int) -> Batches:
        """As of `StudyData`; the patches depend on the seed too."""
        images, labels = self.draw(part, np.random.default_rng([seed, 1]))
        return zip(images.split(self.batch_size), labels.split(self.batch_size))


@dataclasses.dataclass
class _PatchBatches:
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


class FolderData:
    """An image folder with the splits `train` and `validation`, one sub-folder per class, such as ImageNet.

    The validation split tests. One in `tune_every` training images chooses the learning rate, and is not trained on.
    """

    channels = 3

    def __init__(self, root: Path, size: int = 224, batch_size: int = 64, workers: int = 8, tune_every: int = 50):
        """
        Args:
            root: Folder with `train/CLASS/*` and `validation/CLASS/*`.
            size: Side of the images in pixels.
            batch_size: Images per batch.
            workers: Processes that load images.
            tune_every: One training image in this many is kept to tune with.

        Raises:
            UserError: The folder cannot be read, or is too small.
        """
        self.size, self.batch_size, self.workers = size, batch_size, workers
        self.description = dict(images=str(root), size=size, tune_every=tune_every, batch_size=batch_size)
        try:
            splits = {split: create_dataset('', str(root), split=split) for split in ('train', 'validation')}
        except (RuntimeError, OSError, AssertionError, ValueError) as e:
            raise UserError(f'{root} cannot be read as an image folder with train and validation: {e}') from e
        classes = {split: tuple(dataset.reader.class_to_idx) for split, dataset in splits.items()}
        if classes['train'] != classes['validation']:
            raise UserError(f'{root} has not the same classes in train and validation.')
        self.classes = classes['train']
        order = np.random.default_rng(0).permutation(len(splits['train']))
        kept = len(order) // tune_every
        if not kept or len(order) - kept < batch_size:
            raise UserError(f'{root} has {len(order)} training images, too few to keep one in {tune_every} of them.')
        evaluation = create_transform((3, size, size), is_training=False)
        tune = create_dataset('', str(root), split='train', transform=evaluation)
        splits['train'].transform = create_transform(
            (3, size, size), is_training=True, color_jitter=None)  # type: ignore[arg-type]  # timm's way to turn it off
        splits['validation'].transform = evaluation
        self.parts = {
            'train': Subset(splits['train'], order[kept:].tolist()),
            'tune': Subset(tune, order[:kept].tolist()),
            'test': splits['validation'],
        }

    def training(self, seed: int) -> TrainingBatches:
        """As of `StudyData`, with timm's random crops and mirroring."""
        return self._loader('train', seed)

    def evaluation(self, part: str, seed: int) -> Batches:
        """As of `StudyData`, with timm's preprocessing."""
        return iter(self._loader(part, seed))

    def _loader(self, part: str, seed: int) -> DataLoader:
        return DataLoader(
            self.parts[part], self.batch_size, shuffle=True, drop_last=part == 'train', num_workers=self.workers,
            generator=torch.Generator().manual_seed(seed), pin_memory=torch.cuda.is_available())


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
