"""GmNet for timm. Importing this package registers its models: `timm.create_model('gmnet_s1')`.

It imports neither timm nor torch. If timm has not been imported yet, the models are registered as soon as it is.
"""
import importlib
from typing import TYPE_CHECKING, Any

import gmnet_timm_autoload

if TYPE_CHECKING:
    from gmnet_timm.gated import Gate
    from gmnet_timm.gmnet import GmNet, gmnet_s1, gmnet_s2, gmnet_s3, gmnet_s4

__version__ = '0.1.0'

__all__ = ['Gate', 'GmNet', 'gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4']


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        importlib.import_module('timm')  # alone first: while another thread imports timm, its parts cannot be imported
        module = importlib.import_module('gmnet_timm.gated' if name == 'Gate' else 'gmnet_timm.gmnet')
    except AttributeError as e:  # Python would take it for "no such name", and hide it
        raise ImportError(f'gmnet_timm.{name} could not be imported: {e!r}') from e
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


gmnet_timm_autoload.register_with_timm()
