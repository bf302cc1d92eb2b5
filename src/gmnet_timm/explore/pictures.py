"""What the page is about: models, images to choose from, and a picture as each model takes it."""
import dataclasses
import functools
import io
import os
import shlex
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset

from gmnet_timm.errors import UserError
from gmnet_timm.frequency.answers import confidences, top_classes
from gmnet_timm.frequency.bands import Band, BandSplit, SplitOptions
from gmnet_timm.frequency.data import open_dataset, prepare_picture, read_picture, to_mode, to_pixels
from gmnet_timm.frequency.split import largest_radius
from gmnet_timm.weights.class_names import class_names_of
from gmnet_timm.weights.model import LoadedModel

__all__ = ['Exploration', 'Images', 'Picture', 'ShownModel', 'read_upload', 'shown_bands']

TOP = 5  # classes that are shown
MAX_BYTES = 20_000_000  # of a file that is taken


@dataclasses.dataclass(frozen=True)
class ShownModel:
    """A model on the page.

    Attributes:
        label: Its name there.
        spec: How it was named on the command line.
        loaded: The model, on the device it runs on.
        class_names: Names of its classes, empty where they have none.
    """

    label: str
    spec: str
    loaded: LoadedModel
    class_names: Sequence[str] = ()

    @property
    def config(self) -> dict[str, Any]:
        """Preprocessing, as arguments of `timm.data.create_transform`."""
        return self.loaded.data_config

    @property
    def channels(self) -> int:
        """Channels of the images that it takes."""
        return self.config['input_size'][0]


class Images:
    """Images to choose from. Arguments as for `data.open_dataset`."""

    def __init__(self, root: str | None, dataset: str = '', split: str | None = None, class_map: str = ''):
        self.images, self.folder = open_dataset(root, dataset, split, class_map)
        self.class_names = class_names_of(self.images)
        try:
            self.count = len(self.images)
        except TypeError:  # a stream
            self.count = 0

    def name(self, index: int) -> str:
        """The file of an image, from the folder of the data where it is in one."""
        if isinstance(self.images, ImageDataset):
            return str(Path(self.folder or '', self.images.filename(index)))
        return f'image {index}'

    def read(self, index: int, channels: int) -> Image.Image | torch.Tensor:
        """One of the images, as `data.read_picture` would read it."""
        if isinstance(self.images, ImageDataset):
            file = self.images.reader[index][0]
            content = file if isinstance(file, bytes) else file.read()
            return read_picture(io.BytesIO(content), channels, name=self.name(index))
        return to_mode(self.images[index][0], 'L' if channels == 1 else 'RGB')


@dataclasses.dataclass(frozen=True)
class Exploration:
    """What a page is about.

    Attributes:
        models: The models.
        images: Images to choose from, None for none.
        device: Where models run.
        stated: Options that describe models, as on the command line, for the commands that the page shows.
        stated_names: The option that names classes, likewise.
        lock: Held while a model computes: on two cores, two at once take longer than one after the other.
    """

    models: tuple[ShownModel, ...]
    images: Images | None = None
    device: torch.device = torch.device('cpu')
    stated: tuple[str, ...] = ()
    stated_names: tuple[str, ...] = ()
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    @property
    def largest_radius(self) -> int:
        """Largest radius that all models have frequencies beyond."""
        return min(largest_radius(model.config['input_size']) for model in self.models)

    def groups(self) -> list[list[int]]:
        """Numbers of the models that take images prepared the same way."""
        found: dict[str, list[int]] = {}
        for i, model in enumerate(self.models):
            found.setdefault(repr(sorted(model.config.items())), []).append(i)
        return list(found.values())

    def command(self, name: str, *words: Any) -> str:
        """A command line of `gmnet-timm freq` with what was stated of the models."""
        return shlex.join(['gmnet-timm', 'freq', name, *map(str, words), *self.stated])

    def open_picture(self, name: str, read: Callable[[int], Image.Image | torch.Tensor]) -> 'Picture':
        """Read a picture and prepare it for each model.

        Args:
            name: Its file.
            read: Reads it with a number of channels, as `data.read_picture`.

        Raises:
            UserError: It cannot be read so.
        """
        by_channels = {channels: read(channels) for channels in {model.channels for model in self.models}}
        images: list[Any] = [None] * len(self.models)
        for group in self.groups():
            model = self.models[group[0]]
            image = prepare_picture(by_channels[model.channels], model.config).to(self.device)
            for i in group:
                images[i] = image
        first = next(iter(by_channels.values()))
        size = first.size if isinstance(first, Image.Image) else (first.shape[2], first.shape[1])
        return Picture(name, (size[0], size[1]), images, self)


class Picture:
    """A picture that is looked at, as each model takes it, and what was found out about it.

    Args:
        name: Its file.
        size: Width and height in pixels of the file.
        images: Normalised images (1, C, H, W), by the number of the model.
        about: What the page is about.
    """

    def __init__(self, name: str, size: tuple[int, int], images: list[torch.Tensor], about: Exploration):
        self.name = name
        self.size = size
        self.images = images
        self.about = about
        self._answers: dict[Any, list[tuple[str, float]]] = {}
        self.split = functools.lru_cache(maxsize=2 * len(images))(self._split)
        self.pixels = functools.lru_cache(maxsize=64)(self._pixels)

    def _split(self, number: int, options: SplitOptions) -> BandSplit:
        """The picture transformed for one model."""
        config = self.about.models[number].config
        return BandSplit(self.images[number], options, config['mean'], config['std'])

    def _pixels(self, number: int, band: Band, options: SplitOptions) -> torch.Tensor:
        """Pixels (C, H, W) of a part, 0 to 1 for the raw picture."""
        return to_pixels(self.split(number, options)(band)[0], self.about.models[number].config)

    def answers(self, number: int, bands: Sequence[Band], options: SplitOptions) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each part and their confidences. Each part is asked about once."""
        model = self.about.models[number]
        missing = [band for band in bands if (number, band, options) not in self._answers]
        if missing:
            found = confidences(model.loaded.model, self.split(number, options), missing)
            for band, confidence in zip(missing, found, strict=True):
                self._answers[number, band, options] = top_classes(confidence, TOP, model.class_names)
        return [self._answers[number, band, options] for band in bands]


def shown_bands(radius: float, other: float) -> list[Band]:
    """The parts that the page shows for two radii: all, up to the first, between both, beyond the first."""
    inner, outer = sorted((radius, other))
    bands = [Band('raw'), Band('low', radius)]
    bands += [Band('band-pass', outer, inner)] if inner < outer else []
    return [*bands, Band('high', radius)]


def read_upload(path: str, folder: str, max_bytes: int = MAX_BYTES) -> tuple[str, bytes]:
    """Read a file that a visitor sent, once.

    The path comes from the visitor's browser. Only what Gradio's upload writes is read: a regular file in a folder of
    its own in the folder for uploads.

    Returns:
        Name and content of the file.

    Raises:
        UserError: The path is something else, or the file is larger than `max_bytes`.
    """
    file, root = os.path.abspath(path), os.path.realpath(folder)
    name = os.path.basename(file)
    is_upload = os.path.dirname(os.path.dirname(file)) == root and os.path.realpath(file) == file
    if not (is_upload and os.path.isfile(file)):
        raise UserError('This is not an uploaded picture. Drop it on the page again.')
    with open(file, 'rb') as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f'{name} is too large: at most {max_bytes / 1e6:.3g} MB are taken.')
    return name, content
