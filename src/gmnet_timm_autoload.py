"""Registers the models of gmnet_timm with timm, without anybody importing gmnet_timm.

torch calls `install` at the end of `import torch` (entry-point group `torch.backends`). It only leaves a hook behind,
which imports gmnet_timm once `timm.models` has been imported. This is a module of its own because importing gmnet_timm
here would import timm in the middle of `import torch`.

Set GMNET_TIMM_AUTOLOAD=0 to turn it off.
"""
import contextlib
import importlib.util
import os
import sys
import warnings

_TRIGGER = 'timm.models'


def install() -> None:
    """Arrange for gmnet_timm to be imported after timm.models. Never raises: `import torch` must not fail for it."""
    try:
        if os.environ.get('GMNET_TIMM_AUTOLOAD', '1') == '0':
            return
        if _TRIGGER in sys.modules:
            _register()
        elif not any(isinstance(finder, _TimmModelsFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _TimmModelsFinder())
    except Exception as e:
        _warn(e)


class _TimmModelsFinder:
    """A one-shot meta path finder: finds `timm.models` as Python would, and registers the models once it has run."""

    def __init__(self):
        self._searching = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != _TRIGGER or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(fullname)
            if spec is not None:
                self._call_after_exec(spec.loader)
            return spec
        except Exception as e:
            _warn(e)
            return None  # the finders after this one import timm.models without us
        finally:
            self._searching = False

    def _call_after_exec(self, loader):
        # Shadowed on the instance, so that the module still gets timm's own loader, with all that it can do.
        exec_module = loader.exec_module

        def exec_and_register(module):
            del loader.exec_module
            exec_module(module)
            sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_and_register


def _register():
    try:
        import gmnet_timm  # noqa: F401
    except Exception as e:
        _warn(e)


def _warn(error):
    with contextlib.suppress(Warning):  # `python -W error` must not turn this into a failed `import torch`
        warnings.warn(f'gmnet_timm could not register its models with timm: {error!r}', stacklevel=2)
