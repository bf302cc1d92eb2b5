"""Names of a model's classes, from wherever they are written down."""
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, create_dataset

from gmnet_timm.errors import UserError, listed
from gmnet_timm.weights.config import read_text

__all__ = ['check_class_names', 'class_names_of', 'imagenet_class_names', 'read_class_names']


def read_class_names(spec: str, num_classes: int, run_args: dict[str, Any] | None = None) -> list[str]:
    """Read class names.

    Args:
        spec: An image folder with one sub-folder per class, a text file with one name per line, or `imagenet-1k`.
        num_classes: Number of classes of the model.
        run_args: Arguments of the train.py that trained it. They decide in which order it took the classes of a folder.

    Raises:
        UserError: There are none, there are more or fewer than classes, some occur twice, or their order in training
            cannot be known.
    """
    path = Path(spec)
    if spec == 'imagenet-1k':
        names = imagenet_class_names()
    elif path.is_dir():
        names = _names_of_folder(path, run_args or {})
    elif path.is_file():
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        raise UserError(f'No class names in {spec}: give an image folder, a text file or imagenet-1k.')
    return check_class_names(names, num_classes)


def _names_of_folder(path: Path, run_args: dict[str, Any]) -> list[str]:
    """The classes of an image folder in the order in which a run took them."""
    dataset, class_map = str(run_args.get('dataset') or ''), str(run_args.get('class_map') or '')
    advice = 'Give a text file with the names in the order of the training.'
    if class_map:
        file = Path(class_map)
        if file.suffix != '.txt' or not file.is_file():
            raise UserError(f'The run took its classes in the order of {class_map[:100]}, which is not here. {advice}')
        names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        there = {folder.name for folder in path.rglob('*') if folder.is_dir()}
        missing = [name for name in names if name not in there]
        if missing:
            raise UserError(f'{path} has no folders {listed(missing)}, which {class_map} of the run names. {advice}')
        return names
    if dataset not in ('', 'torch/image_folder', 'torch/folder'):
        raise UserError(f'The run took its classes in the order of the dataset {dataset[:100]}. {advice}')
    try:
        return class_names_of(create_dataset(dataset, root=str(path), split='train'))
    except RuntimeError as e:
        raise UserError(f'No class names in {path}: {e}') from e


def class_names_of(dataset: Any) -> list[str]:
    """Names of the classes of a timm dataset in their order, [] where it does not know them."""
    indices = getattr(getattr(dataset, 'reader', dataset), 'class_to_idx', None) or {}
    return sorted(indices, key=lambda name: indices[name])


def imagenet_class_names() -> list[str]:
    """timm's descriptions of the ImageNet-1k classes; the two pairs that share one also get their synset."""
    info = ImageNetInfo('imagenet-1k')
    names = info.label_names()
    texts = [info.label_name_to_description(name) for name in names]
    return [text if texts.count(text) == 1 else f'{text} ({names[i]})' for i, text in enumerate(texts)]


def check_class_names(names: list[str], num_classes: int) -> list[str]:
    """Class names that fit the model.

    Raises:
        UserError: There are more or fewer than classes, or some occur twice.
    """
    if len(names) != num_classes:
        raise UserError(f'{len(names)} class names do not fit a model of {num_classes} classes.')
    doubles = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if doubles:
        raise UserError(f'Class names must differ, but these occur twice: {", ".join(doubles[:5])}')
    return names
