"""What a page is about: models, data, and a picture as each model takes it."""
import dataclasses
import functools
import io
import shlex
import tempfile
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
from gmnet_timm.frequency.evaluation import EvalSettings
from gmnet_timm.frequency.explore.turns import Job, Turns
from gmnet_timm.frequency.split import largest_radius
from gmnet_timm.source import LoadedModel

__all__ = ['Data', 'Exploration', 'Picture', 'Subject', 'read_upload', 'shown_bands']

TOP = 5  # classes that are shown
TABLE = 'freq-explore.csv'


@dataclasses.dataclass(frozen=True)
class Subject:
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


class Data:
    """Images to choose from, and to evaluate models on.

    Args:
        root: As for `data.create_band_loader`, as are the others.
        dataset: See there.
        split: See there.
        class_map: See there.
    """

    def __init__(self, root: str | None, dataset: str = '', split: str | None = None, class_map: str = ''):
        self.root, self.dataset, self.split, self.class_map = root, dataset, split, class_map
        self.images, self.folder = open_dataset(root, dataset, split, class_map)
        try:
            self.count = len(self.images)
        except TypeError:  # a stream
            self.count = 0
        self.table, self.note = self._where_to_write()

    def settings(self, num_images: int, radii: Sequence[float], options: SplitOptions) -> EvalSettings:
        """What is evaluated, for `evaluation.evaluate_models`."""
        return EvalSettings(
            self.root, self.dataset, self.split, self.class_map, num_images, tuple(radii), options=options)

    def name(self, index: int) -> str:
        """The file of an image, from the folder of the data where it is in one."""
        if isinstance(self.images, ImageDataset):
            return str(Path(self.folder or '', self.images.filename(index)))
        return f'image {index}'

    def read(self, index: int, channels: int, max_pixels: int | None = None) -> Image.Image | torch.Tensor:
        """One of the images, as `data.read_picture` would read it."""
        if isinstance(self.images, ImageDataset):
            file = self.images.reader[index][0]
            return read_picture(io.BytesIO(file) if isinstance(file, bytes) else file, channels, max_pixels)
        return to_mode(self.images[index][0], 'L' if channels == 1 else 'RGB')

    def _where_to_write(self) -> tuple[Path, str]:
        """The table beside the data, or where that cannot be written one that vanishes, and why."""
        if self.root and Path(self.root).is_dir():
            try:
                with tempfile.TemporaryFile(dir=self.root):
                    return Path(self.root, TABLE), ''
            except OSError as e:
                note = f'{self.root} cannot be written ({e.strerror})'
        else:
            note = 'the data is not in a folder'
        self._vanishes = tempfile.TemporaryDirectory(prefix='gmnet-timm-')
        return Path(self._vanishes.name, TABLE), f'Not kept, as {note}: save the numbers before you stop the page.'


@dataclasses.dataclass(frozen=True)
class Exploration:
    """What a page is about.

    Attributes:
        subjects: The models.
        data: Images to choose from, None for none.
        device: Where models run.
        workers: Processes that load images for accuracies.
        stated: Options that describe models, as on the command line, for the commands that the page shows.
        stated_names: The option that names classes, likewise.
        stated_data: Options that describe the data, likewise.
        max_pixels: Largest picture that is taken.
        max_bytes: Largest file that is taken.
        turns: Who computes next.
        job: Accuracies in the background.
    """

    subjects: tuple[Subject, ...]
    data: Data | None = None
    device: torch.device = torch.device('cpu')
    workers: int = 2
    stated: tuple[str, ...] = ()
    stated_names: tuple[str, ...] = ()
    stated_data: tuple[str, ...] = ()
    max_pixels: int = 50_000_000
    max_bytes: int = 20_000_000
    turns: Turns = dataclasses.field(default_factory=Turns)
    job: Job = dataclasses.field(default_factory=Job)

    @property
    def largest_radius(self) -> int:
        """Largest radius that all models have frequencies beyond."""
        return min(largest_radius(subject.config['input_size']) for subject in self.subjects)

    def groups(self) -> list[list[int]]:
        """Numbers of the models that take images prepared the same way."""
        found: dict[str, list[int]] = {}
        for i, subject in enumerate(self.subjects):
            found.setdefault(repr(sorted(subject.config.items())), []).append(i)
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
        by_channels = {channels: read(channels) for channels in {subject.channels for subject in self.subjects}}
        images: list[Any] = [None] * len(self.subjects)
        for group in self.groups():
            subject = self.subjects[group[0]]
            image = prepare_picture(by_channels[subject.channels], subject.config).to(self.device)
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
        config = self.about.subjects[number].config
        return BandSplit(self.images[number], options, config['mean'], config['std'])

    def _pixels(self, number: int, band: Band, options: SplitOptions) -> torch.Tensor:
        """Pixels (C, H, W) of a part, 0 to 1 for the raw picture."""
        return to_pixels(self.split(number, options)(band)[0], self.about.subjects[number].config)

    def answers(self, number: int, bands: Sequence[Band], options: SplitOptions) -> list[list[tuple[str, float]]]:
        """The likeliest classes of each part and their confidences. Each part is asked about once."""
        subject = self.about.subjects[number]
        missing = [band for band in bands if (number, band, options) not in self._answers]
        if missing:
            found = confidences(subject.loaded.model, self.split(number, options), missing)
            for band, confidence in zip(missing, found, strict=True):
                self._answers[number, band, options] = top_classes(confidence, TOP, subject.class_names)
        return [self._answers[number, band, options] for band in bands]

    def rows(self, bands: Sequence[Band], options: SplitOptions) -> list[dict[str, Any]]:
        """The same as rows for a CSV."""
        return [
            dict(model=subject.label, picture=self.name, band=band.kind,
                 inner_radius='' if band.inner_radius is None else f'{band.inner_radius:g}',
                 radius='' if band.radius is None else f'{band.radius:g}',
                 rank=rank, answer=name, confidence=confidence, **dataclasses.asdict(options))
            for number, subject in enumerate(self.about.subjects)
            for band, lines in zip(bands, self.answers(number, bands, options), strict=True)
            for rank, (name, confidence) in enumerate(lines, 1)
        ]


def shown_bands(radius: float, other: float) -> list[Band]:
    """The parts that the page shows for two radii: all, up to the first, between both, beyond the first."""
    inner, outer = sorted((radius, other))
    bands = [Band('raw'), Band('low', radius)]
    bands += [Band('band-pass', outer, inner)] if inner < outer else []
    return [*bands, Band('high', radius)]


def read_upload(path: str, about: Exploration) -> Picture:
    """Open a file that a visitor sent.

    Raises:
        UserError: It is too large, or not an image.
    """
    size = Path(path).stat().st_size
    if size > about.max_bytes:
        raise UserError(
            f'{Path(path).name} has {size / 1e6:.3g} MB, at most {about.max_bytes / 1e6:.3g} MB are taken.')
    return about.open_picture(
        Path(path).name, lambda channels: read_picture(path, channels, max_pixels=about.max_pixels))
