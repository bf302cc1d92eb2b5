"""Evaluation data that counts what it cannot decode, where timm's loaders put the next image in its place."""
import io
import itertools
import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import ImageDataset, create_dataset, create_transform
from timm.data.readers.img_extensions import get_img_extensions
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from gmnet_timm.errors import UserError, listed
from gmnet_timm.frequency.processes import gathered
from gmnet_timm.weights.class_names import class_names_of

__all__ = [
    'CountingLoader', 'create_band_loader', 'image_mode', 'open_dataset', 'prepare_picture', 'read_picture', 'to_mode',
    'to_pixels',
]

_logger = logging.getLogger(__name__)

MAX_PIXELS = 50_000_000  # of a single picture, as it is and as it is resized for a model
# Not all that PIL knows: for EPS it starts Ghostscript, and some of the others are decoded by little-used code.
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'TIFF')
_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}

# names that timm takes for the same split
_SYNONYMS: tuple[tuple[str, ...], ...] = (
    ('train', 'training'), ('validation', 'val', 'valid', 'eval', 'evaluation'), ('test',))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8 bits per channel, 'L' or 'RGB', by the range of its own type.

    PIL clips 16-bit pixels at 255 instead.

    Raises:
        UserError: The pixels are of a type that has no range, such as float.
    """
    if image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PNG'):  # by versions of PIL
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8))
    elif image.mode in ('I', 'F'):
        raise UserError(
            f'{getattr(image, "filename", "") or "An image"} has {"32-bit float" if image.mode == "F" else "32-bit"} '
            'pixels, and does not say what is black and what is white. Convert it to 8 or 16 bits.')
    return image.convert(mode)


def image_mode(channels: int) -> str:
    """The mode of PIL that has this many channels.

    Raises:
        UserError: There is none.
    """
    if channels not in _MODES:
        raise UserError(
            f'The model takes {channels} channels, image files have 1 to 4. A single picture of so many can be '
            'given as an array (.npy).')
    return _MODES[channels]


def read_picture(
        source: str | Path | BinaryIO | bytes,
        channels: int,
        *,
        name: str | None = None,
) -> Image.Image | torch.Tensor:
    """Read one picture, upright as browsers and telephones show it.

    timm's own loader, and with it every evaluation on a dataset, ignores the orientation that a camera records (EXIF).

    Args:
        source: Path, file or content of an image (of `FORMATS`), or of an array of NumPy of shape (H, W, channels) or
            (H, W), uint8 or floats from 0 to 1, for numbers of channels that image files do not have.
        channels: Channels of the model.
        name: What to call it in errors, by default the name of the file.

    Returns:
        An image of the mode `image_mode(channels)`, or for an array a tensor (C, H, W), 0 to 1.

    Raises:
        UserError: It is not an image, or not one of this size or number of channels.
    """
    try:
        if isinstance(source, (str, Path)):
            name = name or Path(source).name
            with open(source, 'rb') as opened_here:
                return read_picture(opened_here, channels, name=name)
        name = name or 'The picture'
        file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else source
        is_array = file.read(6) == b'\x93NUMPY'
        file.seek(0)
        if is_array:
            return _read_array(file, name, channels)
        mode = image_mode(channels)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # the limit here is our own
            opened = Image.open(file, formats=FORMATS)
        with opened:
            _check_pixels(name, *opened.size)
            upright = ImageOps.exif_transpose(opened)
            upright.format = opened.format
            return to_mode(upright, mode)
    except Image.DecompressionBombError as e:  # raised on opening, before anything is decoded
        raise UserError(f'{name} is too large: {e}') from e
    except UnidentifiedImageError as e:
        raise UserError(
            f'{name} cannot be read as an image: it is not one, or not of {", ".join(FORMATS)} or NumPy.') from e
    except OSError as e:
        raise UserError(f'{name} cannot be read as an image: {e.strerror or e}.') from e
    except (SyntaxError, ValueError, EOFError) as e:
        raise UserError(f'{name} cannot be read as an image: {e}.') from e


def prepare_picture(picture: Image.Image | torch.Tensor, data_config: dict[str, Any]) -> torch.Tensor:
    """A picture from `read_picture` as a model takes it, by timm's evaluation preprocessing, (1, C, H, W).

    Raises:
        UserError: Resized, it would have more than `MAX_PIXELS`: timm fits the shorter side of a picture.
    """
    width, height = picture.size if isinstance(picture, Image.Image) else (picture.shape[2], picture.shape[1])
    if data_config.get('crop_mode') not in ('squash', 'border'):
        scale = max(side / data_config['crop_pct'] / given for side, given in zip(
            data_config['input_size'][1:], (height, width)))
        if max(1., scale) ** 2 * width * height > MAX_PIXELS:
            raise UserError(
                f'A picture of {width}x{height} pixels is too narrow: its shorter side is resized to '
                f'{data_config["input_size"][1]} pixels and more, which makes it larger than {MAX_PIXELS / 1e6:.3g} '
                'million pixels. Cut it first.')
    return create_transform(**data_config, is_training=False)(picture)[None]


def to_pixels(images: torch.Tensor, data_config: dict[str, Any]) -> torch.Tensor:
    """Undo the normalisation of images (…, C, H, W): 0 is black, 1 is white."""
    mean, std = (images.new_tensor(data_config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    return images * std + mean


def _read_array(file: BinaryIO, name: str, channels: int) -> torch.Tensor:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f'its version {version} of NumPy\'s format is not known')
    shape, _, dtype = readers[version](file)
    size = (*shape, 1) if len(shape) == 2 else shape
    if len(size) != 3 or size[-1] != channels:
        raise UserError(f'{name} has the shape {shape}, the model takes (height, width, {channels}).')
    _check_pixels(name, size[1], size[0])
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
        raise UserError(f'{name} must hold uint8, or floats from 0 to 1.')
    file.seek(0)
    array = np.load(file, allow_pickle=False).reshape(size)
    if dtype == np.uint8:
        array = array / np.float32(255)
    elif not 0 <= array.min() <= array.max() <= 1:
        raise UserError(f'{name} must hold uint8, or floats from 0 to 1.')
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f'{name} has {width}x{height} pixels, {width * height / 1e6:.3g} million. At most {MAX_PIXELS / 1e6:.3g} '
            'million are taken: make it smaller first.')


class _DecodedImages(Dataset):
    """Transformed images and labels of a timm dataset, None for an image that cannot be decoded."""

    def __init__(self, dataset: Dataset, transform, img_mode: str):
        self.dataset = dataset
        self.transform = transform
        self.img_mode = img_mode

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | None:
        try:
            if isinstance(self.dataset, ImageDataset):
                image, target = self.dataset.reader[index][:2]  # the dataset itself replaces what it cannot decode
                image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
            else:
                image, target = self.dataset[index]
            image = to_mode(image, self.img_mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # of PIL, for damaged files
            filename = getattr(self.dataset, 'filename', lambda *_: index)(index)
            _logger.warning(f'{filename} cannot be decoded, and is left out: {" ".join(str(e).split())[:100]}')
            return None
        return self.transform(image), -1 if target is None else int(target)


class _StreamedImages(IterableDataset):
    """Transformed images and labels of a timm dataset that can only be read from its start, and decodes by itself."""

    def __init__(self, dataset: IterableDataset, transform, img_mode: str, num_images: int | None):
        self.dataset = dataset
        self.transform = transform
        self.img_mode = img_mode
        self.num_images = num_images

    def __iter__(self):
        for image, target in itertools.islice(self.dataset, self.num_images):
            yield self.transform(to_mode(image, self.img_mode)), int(target)


class CountingLoader:
    """Batches of a data loader without the images that could not be decoded.

    Attributes:
        skipped: Images left out in the last pass, of all processes where there are several.
        ignored: Files of an image folder that look like images, but whose extension timm does not read.
        classes: Names of the classes of the data in their order, [] where it does not say.
    """

    def __init__(self, loader: DataLoader, ignored: int = 0, classes: Sequence[str] = ()):
        self.loader = loader
        self.ignored = ignored
        self.classes = list(classes)
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.loader)  # TypeError for a stream, as of any loader that does not know

    def __iter__(self):
        self.skipped = 0
        try:
            for batch, skipped in self.loader:
                self.skipped += skipped
                if batch is not None:
                    yield batch
        except UserError as e:  # of a worker, whose traceback torch puts before the message
            raise UserError(str(e).rpartition('UserError: ')[2].strip()) from e
        self.skipped = sum(gathered(self.skipped))


def create_band_loader(
        root: str | None,
        data_config: dict[str, Any],
        *,
        dataset: str = '',
        split: str | None = None,
        class_map: str = '',
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 64,
        workers: int = 2,
        num_images: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        root_from: str = '--data-dir',
) -> CountingLoader:
    """Create a loader of normalised images and labels with timm's evaluation preprocessing.

    Args:
        root: Folder of the data.
        data_config: As from `timm.data.resolve_data_config`.
        dataset: Name of a dataset as for `timm.data.create_dataset`, '' for an image folder with one sub-folder per
            class.
        split: Name of the split. For an image folder this is a sub-folder of `root` (train, validation and their
            synonyms count as one), or '.' for `root` itself. By default 'validation'; an image folder without splits
            is taken as it is.
        class_map: File with the order of the classes, as for `timm.data.create_dataset`.
        num_classes: Outputs of the model, to be compared with the classes of the data.
        class_names: Names of the model's classes in their order, to be compared with those of the data.
        batch_size: Images per batch.
        workers: Processes that load images, 0 for none.
        num_images: Use this many images, evenly spaced (of a stream the first ones), None for all.
        rank: Which part of the data to load, every `world_size`-th image from this one on.
        world_size: Number of parts.
        root_from: Where `root` was stated, for error messages.

    Raises:
        UserError: The data cannot be read, has no such split, is empty, or has another number or another order of
            classes than the model.
    """
    mode = image_mode(data_config['input_size'][0])
    images, root = open_dataset(root, dataset, split, class_map, mode=mode, root_from=root_from)
    transform = create_transform(**data_config, is_training=False)
    if isinstance(images, IterableDataset):
        if world_size > 1:
            raise UserError(f'{dataset} is a stream, which cannot be split exactly. Evaluate it with one process.')
        stream = _StreamedImages(images, transform, mode, num_images)
        return CountingLoader(DataLoader(stream, batch_size, collate_fn=_collate))  # several workers would split it
    if len(images) == 0:
        raise UserError(f'The data {dataset or root} holds no images.')
    classes = class_names_of(images)
    _check_classes(classes, num_classes, class_names, str(dataset or root))
    decoded: Dataset = _DecodedImages(images, transform, mode)
    indices: Sequence[int] = range(len(images))
    if num_images is not None and num_images < len(images):
        indices = [i * len(images) // num_images for i in range(num_images)]
    loader = DataLoader(
        Subset(decoded, indices[rank::world_size]),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
    return CountingLoader(loader, _count_ignored(root) if not dataset and root else 0, classes)


def open_dataset(
        root: str | None,
        dataset: str = '',
        split: str | None = None,
        class_map: str = '',
        *,
        mode: str = 'RGB',
        root_from: str = '--data-dir',
) -> tuple[Any, str | None]:
    """Open a dataset of timm for evaluation.

    Args:
        root: As for `create_band_loader`.
        dataset: As for `create_band_loader`.
        split: As for `create_band_loader`.
        class_map: As for `create_band_loader`.
        mode: Mode of PIL that images are converted to.
        root_from: Where `root` was stated, for error messages.

    Returns:
        The dataset, and its folder where it is in one: that of the split.

    Raises:
        UserError: The data cannot be read, or has no such split.
    """
    if not root and not dataset:
        raise UserError('There is no data: give an image folder (--data-dir) or a dataset name of timm (--dataset).')
    is_folder = '/' not in dataset or dataset.lower() in ('torch/folder', 'torch/image_folder')
    if is_folder and root and not Path(root).exists():
        raise UserError(
            f'The data folder {root}, from {root_from}, cannot be read: there is no such folder. '
            'Say where the data is by --data-dir.')
    if is_folder and root and Path(root).is_dir():
        root, split = str(_split_folder(Path(root), split)), '.'
    try:
        images = create_dataset(
            dataset,
            root,
            split=split or 'validation',
            class_map=class_map,  # type: ignore[arg-type]
            input_img_mode=mode,
        )
    except (RuntimeError, OSError, AssertionError, ValueError, ImportError) as e:
        # timm asserts without a word
        reason = (str(e) or 'no such folder, or none with images below it').replace('/..', ':').rstrip('.')
        ignored = _count_ignored(root) if is_folder and root else 0
        others = f' Image files of other types there, which timm does not read: {ignored}.' if ignored else ''
        raise UserError(f'The data {dataset or root} cannot be read: {reason}.{others}') from e
    if is_folder and not dataset and root and Path(root).is_dir():
        _check_folder(root, class_map, class_names_of(images))
    return images, root


def _split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split, where timm would take the root itself for a split that is not there."""
    if split == '.':
        return root
    wanted = split or 'validation'
    names = next((names for names in _SYNONYMS[:2] if wanted in names), (wanted,))
    for name in dict.fromkeys((wanted, *names)):
        if (root / name).is_dir():
            return root / name
    known = [name for names in _SYNONYMS for name in names if (root / name).is_dir()]
    if split is None and not known:
        return root
    there = f'the splits are {", ".join(known)}' if known else 'it has no splits; give --split . to take it as it is'
    raise UserError(f'{root} has no split {wanted}: {there}.')


def _count_ignored(root: str) -> int:
    """Files that PIL reads by their extension and timm's image folder does not."""
    Image.init()
    others = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN} - set(get_img_extensions())
    return sum(
        Path(name).suffix.lower() in others
        for folder, _, names in os.walk(root, followlinks=True) for name in names if folder != str(root))


def _check_classes(
        classes: list[str],
        num_classes: int | None,
        class_names: Sequence[str] | None,
        where: str,
) -> None:
    """Compare the classes of data, in their order, with those of a model; [] where the data does not name them."""
    if num_classes is not None and classes and len(classes) != num_classes:
        raise UserError(
            f'The data has {len(classes)} classes ({listed(classes)}), the model has {num_classes} outputs. For part '
            'of the classes of the training data, give their order by --class-map.')
    if not classes or not class_names or classes == list(class_names):
        return
    if sorted(classes) == sorted(class_names):
        raise UserError(
            f"{where} has the model's classes in another order: {listed(classes)}, and not "
            f'{listed(class_names)}. Give that order by --class-map, a text file with one name per line.')
    _logger.warning(
        f"The data's classes ({listed(classes, 3)}) are called otherwise by the model ({listed(class_names, 3)}): "
        'nothing shows that their order is the same.')


def _check_folder(root: str, class_map: str, classes: list[str]) -> None:
    """Refuse a folder without classes, and a class map that does not name its folders; say what a map leaves out."""
    folders = sorted(path.name for path in Path(root).iterdir() if path.is_dir() and not path.name.startswith('.'))
    if not folders:
        raise UserError(f'{root} has no sub-folders. It needs one per class, with the images of the class in it.')
    left_out = [name for name in folders if name not in classes]
    absent = [name for name in classes if name not in folders]
    if not class_map or not left_out or any(Path(root).glob('*/*/')):  # names of folders further below
        return
    if absent:
        mark = ' The map begins with a byte order mark: save it as plain UTF-8.' if absent[0][0] == '\ufeff' else ''
        raise UserError(
            f'{class_map} names {listed([repr(name) for name in absent])}, for which {root} has no folder, and not '
            f'{listed(left_out)}, which it has.{mark}')
    _logger.warning(f'{class_map} does not name {listed(left_out)}: the images in these folders are left out.')


def _collate(samples: list[tuple[torch.Tensor, int] | None]):
    good = [sample for sample in samples if sample is not None]
    return default_collate(good) if good else None, len(samples) - len(good)
