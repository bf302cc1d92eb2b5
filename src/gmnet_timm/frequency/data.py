"""Evaluation data that counts what it cannot decode, where timm's loaders put the next image in its place."""
import io
import itertools
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from gmnet_timm.errors import UserError

__all__ = ['CountingLoader', 'create_band_loader']


class _DecodedImages(Dataset):
    """Transformed images and labels of a timm dataset, None for an image that cannot be decoded."""

    def __init__(self, dataset: Dataset, transform, img_mode: str):
        self.dataset = dataset
        self.transform = transform
        self.img_mode = img_mode

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Optional[Tuple[torch.Tensor, int]]:
        try:
            if isinstance(self.dataset, ImageDataset):
                image, target = self.dataset.reader[index][:2]  # the dataset itself replaces what it cannot decode
                image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            else:
                image, target = self.dataset[index]
            image = image.convert(self.img_mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what PIL raises for damaged files
            return None
        return self.transform(image), -1 if target is None else int(target)


class _StreamedImages(IterableDataset):
    """Transformed images and labels of a timm dataset that can only be read from its start, and decodes by itself."""

    def __init__(self, dataset: IterableDataset, transform, img_mode: str, limit: Optional[int]):
        self.dataset = dataset
        self.transform = transform
        self.img_mode = img_mode
        self.limit = limit

    def __iter__(self):
        for image, target in itertools.islice(self.dataset, self.limit):
            yield self.transform(image.convert(self.img_mode)), int(target)


class CountingLoader:
    """Batches of a data loader without the images that could not be decoded.

    Attributes:
        skipped: Images left out in the last pass, of all processes where there are several.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.loader)  # TypeError for a stream, as of any loader that does not know

    def __iter__(self):
        self.skipped = 0
        for batch, skipped in self.loader:
            self.skipped += skipped
            if batch is not None:
                yield batch
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            skipped = [0] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(skipped, self.skipped)
            self.skipped = sum(skipped)


def create_band_loader(
        root: Optional[str],
        data_config: Dict[str, Any],
        *,
        dataset: str = '',
        split: str = 'validation',
        class_map: str = '',
        num_classes: Optional[int] = None,
        batch_size: int = 64,
        workers: int = 2,
        limit: Optional[int] = None,
        rank: int = 0,
        world_size: int = 1,
) -> CountingLoader:
    """Create a loader of normalised images and labels with timm's evaluation preprocessing.

    Args:
        root: Folder of the data.
        data_config: As from `timm.data.resolve_data_config`.
        dataset: Name of a dataset as for `timm.data.create_dataset`, '' for a folder with a folder a class.
        split: Name of the split, a folder of this name in `root` is found.
        class_map: File with the order of the classes, as for `timm.data.create_dataset`.
        num_classes: Outputs of the model, to be compared with the classes of the data.
        batch_size: Images a batch.
        workers: Processes that load images, 0 for none.
        limit: Use this many images, evenly spaced (of a stream the first ones), None for all.
        rank: Which part of the data to load, every `world_size`-th image from this one on.
        world_size: Number of parts.

    Raises:
        UserError: The data cannot be read, is empty, or has another number of classes than the model.
    """
    if not root and not dataset:
        raise UserError('There is no data: give an image folder (--data-dir) or a dataset name of timm (--dataset).')
    img_mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    try:
        images = create_dataset(dataset, root, split=split, class_map=class_map, input_img_mode=img_mode)  # type: ignore[arg-type]
    except (RuntimeError, OSError, AssertionError, ValueError, ImportError) as e:
        reason = str(e) or 'no such folder, or none with images below it'  # timm asserts without a word
        raise UserError(f'The data {dataset or root} cannot be read: {reason}.') from e
    transform = create_transform(**data_config, is_training=False)
    if isinstance(images, IterableDataset):
        if world_size > 1:
            raise UserError(f'{dataset} is a stream, which cannot be split exactly. Evaluate it with one process.')
        stream = _StreamedImages(images, transform, img_mode, limit)
        return CountingLoader(DataLoader(stream, batch_size, collate_fn=_collate))  # several workers would split it
    if len(images) == 0:
        raise UserError(f'The data {dataset or root} holds no images.')
    _check_classes(images, num_classes)
    decoded: Dataset = _DecodedImages(images, transform, img_mode)
    indices: Sequence[int] = range(len(images))
    if limit is not None and limit < len(images):
        indices = [i * len(images) // limit for i in range(limit)]
    loader = DataLoader(
        Subset(decoded, indices[rank::world_size]),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    return CountingLoader(loader)


def _check_classes(dataset: Dataset, num_classes: Optional[int]) -> None:
    class_to_idx = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None)
    if num_classes is not None and class_to_idx is not None and len(class_to_idx) != num_classes:
        raise UserError(
            f'The data has {len(class_to_idx)} classes, the model has {num_classes} outputs. For part of the classes '
            f'of the training data, give their order by --class-map.')


def _collate(samples: List[Optional[Tuple[torch.Tensor, int]]]):
    good = [sample for sample in samples if sample is not None]
    return default_collate(good) if good else None, len(samples) - len(good)
