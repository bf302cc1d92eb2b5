"""Names of a model's classes, from wherever they are written down."""
from pathlib import Path

from timm.data import ImageNetInfo, create_dataset

from gmnet_timm.checkpoint.config import read_text
from gmnet_timm.errors import UserError

__all__ = ['check_class_names', 'imagenet_class_names', 'read_class_names']


def read_class_names(spec: str, num_classes: int) -> list[str]:
    """Read class names.

    Args:
        spec: An image folder with one sub-folder per class, a text file with one name per line, or `imagenet-1k`.
        num_classes: Number of classes of the model.

    Raises:
        UserError: There are none, there are more or fewer than classes, or some occur twice.
    """
    path = Path(spec)
    if spec == 'imagenet-1k':
        names = imagenet_class_names()
    elif path.is_dir():
        try:
            indices = create_dataset('', root=spec, split='train').reader.class_to_idx
        except RuntimeError as e:
            raise UserError(f'No class names in {spec}: {e}') from e
        names = sorted(indices, key=indices.get)
    elif path.is_file():
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        raise UserError(f'No class names in {spec}: give an image folder, a text file or imagenet-1k.')
    return check_class_names(names, num_classes)


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
