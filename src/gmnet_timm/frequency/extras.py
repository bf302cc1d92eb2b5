"""Packages that only some capabilities need."""
import importlib
import importlib.util
from types import ModuleType

from gmnet_timm.errors import MissingExtraError

__all__ = ['require_gradio', 'require_matplotlib', 'require_scipy']


def require_gradio() -> None:
    """Fail before models are loaded for a page that cannot be served.

    Raises:
        MissingExtraError: Gradio is not installed.
    """
    if importlib.util.find_spec('gradio') is None:  # it takes seconds to import
        raise MissingExtraError('gradio', 'explore')


def require_matplotlib() -> None:
    """Fail before the work that a figure is to show.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        importlib.import_module('matplotlib')
    except ImportError as e:
        raise MissingExtraError('matplotlib', 'freq') from e


def require_scipy(module: str) -> ModuleType:
    """A module of scipy, such as 'stats'.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        return importlib.import_module(f'scipy.{module}')
    except ImportError as e:
        raise MissingExtraError('scipy', 'freq') from e
