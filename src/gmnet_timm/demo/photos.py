"""Patches of real photographs as an image folder, from the ones that scikit-image's wheel carries.

Each photograph is one class. Its patches are cut from two bands of rows, the upper for training and the lower for
validation, a patch height apart. Nothing is downloaded.

Photographs and their licences, as scikit-image's documentation of `skimage.data` states them:

| class | licence |
|---|---|
| brick | CC0 (CC0Textures) |
| camera | CC0 (Lav Varshney) |
| chelsea | CC0 (Stefan van der Walt) |
| coins | no known copyright restrictions (Brooklyn Museum) |
| grass | CC0 (linolafett) |
| gravel | CC0 (CC0Textures) |
| hubble | public domain (NASA) |
| ihc | no known copyright restrictions (Center for Microscopy and Molecular Imaging) |

Left out, although free: cell, clock, retina and rocket, where a third or more of the patches is nearly constant
(standard deviation below 8 of 255 grey levels); astronaut and coffee, whose upper and lower rows show different things,
so that the lower do not test what was learnt from the upper (camera is such a photograph too: expect its patches to
be most of the errors). Left out because no licence is stated: moon, motorcycle, page.
"""
import dataclasses
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.files import writing

__all__ = ['PHOTOS', 'PhotoPatches', 'photo_pixels', 'prepare_photo_patches']

# class -> file in skimage/data, in the order of timm's class indices
PHOTOS = {
    'brick': 'brick.png',
    'camera': 'camera.png',
    'chelsea': 'chelsea.png',
    'coins': 'coins.png',
    'grass': 'grass.png',
    'gravel': 'gravel.png',
    'hubble': 'hubble_deep_field.jpg',
    'ihc': 'ihc.png',
}
PATCH_SIZE = 64
SPLITS = ('train', 'validation')
MANIFEST = 'patches.json'
PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class PhotoPatches:
    """A folder of greyscale patches that `timm.data.create_dataset` and train.py's `--data-dir` read.

    Attributes:
        root: Folder with `train/CLASS/*.png`, `validation/CLASS/*.png` and the manifest `patches.json`. A patch is
            named by the row and column of its top left pixel in the photograph.
        classes: Names of the classes in the order of their indices.
        mean: Mean of all training pixels, in 0…1.
        std: Standard deviation of all training pixels, in 0…1.
        num_train: Number of training patches.
        num_val: Number of validation patches.
        bands: Rows of the photograph, first and one past the last, that the patches of a split and class were cut from.
    """
    root: Path
    classes: tuple[str, ...]
    mean: float
    std: float
    num_train: int
    num_val: int
    bands: dict[str, dict[str, tuple[int, int]]]


def photo_pixels(name: str) -> np.ndarray:
    """Read a photograph that scikit-image's wheel carries, never downloading.

    Args:
        name: A key of `PHOTOS`.

    Returns:
        Grey levels (H, W), uint8.
    """
    spec = importlib.util.find_spec('skimage')
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError('scikit-image', 'demo')
    path = Path(next(iter(spec.submodule_search_locations)), 'data', PHOTOS[name])
    if not path.is_file():
        raise UserError(f'The installed scikit-image does not carry {path.name}, looked for {path}')
    with Image.open(path) as image:
        return np.asarray(image.convert('L'))


def prepare_photo_patches(root: PathLike, *, patches: int = 320, seed: int = 42) -> PhotoPatches:
    """Write the patches, or recognise those that an earlier call with the same arguments wrote.

    A folder that holds anything else is left alone.

    Args:
        root: Folder to write.
        patches: Training patches per class. For validation there are a quarter as many.
        seed: Seed of the positions.

    Returns:
        The patches' folder, classes and statistics.
    """
    root = Path(root)
    wanted = {'format': 1, 'patches': patches, 'seed': seed, 'size': PATCH_SIZE, 'photos': PHOTOS}
    manifest = _read_manifest(root)
    if manifest is None or manifest.get('parameters') != wanted:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            what = 'not a folder of photo patches' if manifest is None else 'a folder of other photo patches'
            raise UserError(f'{root} is {what}, so it is left as it is. Choose another folder.')
        manifest = _build_patches(root, wanted)
    return PhotoPatches(
        root=root,
        classes=tuple(sorted(PHOTOS)),
        mean=manifest['mean'],
        std=manifest['std'],
        num_train=len(PHOTOS) * patches,
        num_val=len(PHOTOS) * max(1, patches // 4),
        bands={split: {name: (lo, hi) for name, (lo, hi) in b.items()} for split, b in manifest['bands'].items()},
    )


def _read_manifest(root: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _build_patches(root: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Write a complete tree beside `root`, then rename it, so that an interrupted call leaves nothing half done."""
    rng = np.random.default_rng(parameters['seed'])
    photos = {name: photo_pixels(name) for name in sorted(PHOTOS)}
    bands = {split: {name: _band(len(photo), split) for name, photo in photos.items()} for split in SPLITS}
    counts = {'train': parameters['patches'], 'validation': max(1, parameters['patches'] // 4)}
    with writing(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        tmp = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
        try:
            pixels = [
                _write_patches(tmp / split / name, photo, bands[split][name], counts[split], rng)
                for split in SPLITS
                for name, photo in photos.items()
            ]
            train = np.concatenate(pixels[:len(photos)]) / 255.
            manifest = dict(parameters=parameters, bands=bands, mean=float(train.mean()), std=float(train.std()))
            (tmp / MANIFEST).write_text(json.dumps(manifest, indent=2))
            tmp.chmod(0o755)  # mkdtemp makes it private
            tmp.rename(root)  # takes the place of an empty folder, and of nothing else
        finally:
            shutil.rmtree(tmp, ignore_errors=True)
    return json.loads(json.dumps(manifest))


def _band(height: int, split: str) -> tuple[int, int]:
    """Rows of a split: the upper ones train, the lower ones validate, a patch height between them is unused."""
    usable = height - PATCH_SIZE
    val_height = max(PATCH_SIZE, int(.35 * usable))
    return (0, usable - val_height) if split == 'train' else (height - val_height, height)


def _write_patches(
        folder: Path,
        photo: np.ndarray,
        band: tuple[int, int],
        count: int,
        rng: np.random.Generator,
) -> np.ndarray:
    """Cut patches at different random positions of a band, returns their pixels (count, size, size)."""
    folder.mkdir(parents=True)
    rows, cols = band[1] - band[0] - PATCH_SIZE + 1, photo.shape[1] - PATCH_SIZE + 1
    if count > rows * cols:
        raise UserError(f'{folder.name} has only {rows * cols} positions for {count} patches')
    pixels = np.empty((count, PATCH_SIZE, PATCH_SIZE), np.uint8)
    for i, position in enumerate(rng.choice(rows * cols, count, replace=False)):
        row, col = band[0] + int(position) // cols, int(position) % cols
        pixels[i] = photo[row:row + PATCH_SIZE, col:col + PATCH_SIZE]
        Image.fromarray(pixels[i]).save(folder / f'r{row:04d}-c{col:04d}.png')
    return pixels
