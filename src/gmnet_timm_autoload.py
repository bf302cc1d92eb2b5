"""Registers the models of gmnet_timm with timm, without anybody importing gmnet_timm.

torch calls `install` at the end of `import torch` (entry-point group `torch.backends`). It only leaves a hook behind,
which registers the models once `timm.models` has been imported. `import gmnet_timm` leaves the same hook behind.

This is a module of its own, because `import gmnet_timm` always registers the models. Set GMNET_TIMM_AUTOLOAD=0 to turn
the entry point off.
"""
import contextlib
import functools
import os
import sys
import types
import warnings


def install() -> None:
    """Arrange for the models to be registered with timm. Never raises: `import torch` must not fail for it."""
    try:
        if os.environ.get('GMNET_TIMM_AUTOLOAD', '1') != '0':
            register_with_timm()
    except Exception as e:
        _report(e)


def register_with_timm() -> None:
    """Register the models: now if `timm.models` has been imported, otherwise as soon as it has been.

    Raises:
        Exception: Whatever importing the models now raises. What it raises later is reported, and not raised.
    """
    if not _timm_models_imported():
        if not any(map(_is_ours, sys.meta_path)):
            sys.meta_path.insert(0, _TimmModelsFinder())
        if type(sys.modules.get('timm')) is types.ModuleType:
            sys.modules['timm'].__class__ = _TimmModule
        if not _timm_models_imported():  # another thread may have finished before the lines above
            return
    _import_models()
    _remove_hooks()


def _timm_models_imported():
    return sys.modules.get('timm.models') is not None and not _being_imported('timm.models')


def _being_imported(name):  # in any thread; Python's own import statement goes by this attribute
    return getattr(getattr(sys.modules.get(name), '__spec__', None), '_initializing', False)


class _TimmModelsFinder:
    """A meta path finder. It finds `timm.models` as the finders after it do, and has the models registered after it.

    It treats our own modules alike. One that is still being imported may be in the way of registering, see `_register`.
    """

    def find_spec(self, fullname, path=None, target=None):
        # Python calls this under its global import lock: whatever imports or waits in here hangs other threads.
        finders = iter(list(sys.meta_path))
        watched = fullname == 'timm.models' or fullname.startswith('gmnet_timm.')
        if not watched or self not in finders:  # `in` advances to the finder after this one
            return None
        for finder in finders:
            find_spec = getattr(finder, 'find_spec', None)
            spec = find_spec(fullname, path, target) if find_spec else None
            if spec is not None:
                return self._with_registration(spec)
        return None

    def _with_registration(self, spec):
        try:
            if spec.loader is not None:  # None: a folder without __init__.py
                spec.loader = _Loader(spec)
        except Exception as e:
            _report(e)
        return spec


class _Loader:
    """Stands in for a module's own loader until the module is loaded. Then that one loads it, and is left in place."""

    _loader = None

    def __init__(self, spec):
        self._spec, self._loader = spec, spec.loader

    def __getattr__(self, name):
        attribute = getattr(self._loader, name)
        if name in ('exec_module', 'load_module'):
            return functools.partial(self._load, attribute)
        return attribute

    def _load(self, load, module):  # load_module gets the name of the module
        self._spec.loader = self._loader
        if getattr(module, '__loader__', None) is self:
            module.__loader__ = self._loader
        result = load(module)
        if self._spec.name == 'timm.models' or _timm_models_imported():
            _register(self._spec.name)
        return result


class _TimmModule(types.ModuleType):
    """The module `timm`, in case another thread is importing `timm.models` and looked for it before the finder came."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == 'models':  # Python sets it after the import
            _register(name)


def _register(loaded):
    imported_by_user = 'gmnet_timm' in sys.modules
    try:
        _import_models()
    except Exception as e:
        others = (name for name in list(sys.modules) if name.startswith('gmnet_timm.') and name != loaded)
        if any(map(_being_imported, others)):  # one of them imports timm itself; after it, its _Loader calls this again
            return
        _report(e, asked_for=imported_by_user)
    _remove_hooks()


def _import_models():
    from timm import layers
    if not hasattr(layers, 'get_device_dtype'):  # timm before 1.0.31, such as that beside train.py in a checkout
        layers.get_device_dtype = _get_device_dtype
    import gmnet_timm.gated
    import gmnet_timm.gmnet  # noqa: F401


def _get_device_dtype(module):
    parameter = next(module.parameters())
    return {'device': parameter.device, 'dtype': parameter.dtype}


def _remove_hooks():
    for finder in filter(_is_ours, list(sys.meta_path)):
        with contextlib.suppress(ValueError):  # another thread has removed it
            sys.meta_path.remove(finder)
    if _is_ours(sys.modules.get('timm')):
        sys.modules['timm'].__class__ = types.ModuleType


def _is_ours(hook):
    return type(hook).__module__ == __name__  # also after this module was reloaded, which makes new classes


def _report(error, asked_for=False):
    """Warn. Print what a filter must not hide because somebody imported gmnet_timm, or would turn into an error."""
    with contextlib.suppress(Exception):
        message = f'gmnet_timm could not register its models with timm: {error!r}'
        if not asked_for:
            with contextlib.suppress(Warning):
                return warnings.warn(message, stacklevel=2)
        print(f'warning: {message}', file=sys.stderr)
