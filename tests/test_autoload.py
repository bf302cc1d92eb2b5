"""The hook that registers the models: it hangs no import, breaks no import, and leaves nothing behind."""
import itertools
import shutil
import textwrap
import zipfile

import pytest
from stand_ins import CHECK, OFF, PYTHONS, call, find_python, write_stand_ins


@pytest.fixture(params=PYTHONS)
def python(request):
    return find_python(request.param)


@pytest.fixture
def run(tmp_path, python):
    """Runs code beside the stand-ins, after replacing some files, and checks that all is well in the end."""
    folder = write_stand_ins(tmp_path / 'stand-ins')

    def run(code, *options, check=False, files=None, env=None):
        for name, text in (files or {}).items():
            (folder / name).write_text(textwrap.dedent(text))
        code = textwrap.dedent(code) + (CHECK if check else '')
        return call(code, folder, python=python, options=['-S', *options], env=env)
    run.folder = folder
    return run


# --- whatever goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize('order', [*itertools.permutations(
    ['import torch', 'import timm', 'import gmnet_timm', 'from gmnet_timm import Gate, GmNet'], 3)], ids=' '.join)
@pytest.mark.parametrize('env', [None, OFF], ids=['on', 'off'])
def test_any_order(run, order, env):
    assert run('\n'.join(order), check=True, env=env) == ''


@pytest.mark.parametrize('module', ['_registry', 'gated', 'gmnet'])
@pytest.mark.parametrize('env', [None, OFF], ids=['on', 'off'])
def test_the_first_import_is_one_of_our_modules(run, module, env):
    """Then timm is imported, and the models are to be registered, while that module is half imported."""
    assert run(f'import gmnet_timm.{module}', check=True, env=env) == ''


LOADERS = """
import importlib.machinery, sys, torch

class Slots:
    __slots__ = ('loader',)  # so that nothing else can be set
    def __init__(self, loader):
        self.loader = loader
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        self.loader.exec_module(module)

class Loader(Slots):
    pass

class ReadOnly(Slots):
    def __init__(self, loader):
        object.__setattr__(self, 'loader', loader)
    def __setattr__(self, name, value):
        raise AttributeError(name)

class Old:
    def __init__(self, loader):
        self.loader = loader
    def load_module(self, name):
        return self.loader.load_module(name)

class ReadOnlySpec(importlib.machinery.ModuleSpec):
    def __setattr__(self, name, value):
        if name == 'loader' and 'loader' in vars(self):
            raise AttributeError(name)
        super().__setattr__(name, value)

class Finder:
    @classmethod
    def find_spec(cls, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        return CHANGE(spec) if name == 'timm.models' else None

def change_loader(loader):
    def change(spec):
        spec.loader = loader(spec.loader)
        return spec
    return change

def change_spec(spec):
    changed = ReadOnlySpec(spec.name, spec.loader, origin=spec.origin, is_package=True)
    changed.submodule_search_locations = spec.submodule_search_locations
    return changed

sys.meta_path.insert(1, Finder)
import timm
"""


@pytest.mark.parametrize('change', ['change_loader(Loader)', 'change_loader(Slots)', 'change_loader(ReadOnly)'])
def test_any_loader(run, change):
    loader = change[len('change_loader('):-1]
    assert run(
        LOADERS.replace('CHANGE', change) + f'assert type(timm.models.__loader__) is {loader}', check=True) == ''


def test_loader_without_exec_module(run):
    check = "assert timm.is_model('gmnet_s1') and timm.is_model('resnet18')"
    assert run(LOADERS.replace('CHANGE', 'change_loader(Old)') + check) == ''


def test_spec_that_cannot_be_changed(run):
    """Then the models are not registered, and that is said."""
    output = run(LOADERS.replace('CHANGE', 'change_spec') + "assert timm.is_model('resnet18')")
    assert output.count('gmnet_timm could not register its models with timm: AttributeError') == 1


def test_other_finders_are_asked_as_python_asks_them(run):
    assert run("""
        import sys, torch

        class Finder:
            def find_spec(*args):
                asked.append(args)
        class Blocking:
            def find_spec(self, name, path, target=None):
                if name == 'timm.models':
                    raise ImportError('blocked')
        asked, finder, blocking = [], Finder(), Blocking()
        sys.meta_path[1:1] = [finder, blocking]
        try:
            import timm
        except ImportError as e:
            assert str(e) == 'blocked'
        else:
            raise AssertionError
        (args,) = [args for args in asked if args[1] == 'timm.models']
        assert args[0] is finder and len(args) == 4 and args[2][0].endswith('timm') and args[3] is None, args
        sys.meta_path.remove(blocking)
        import timm
    """, check=True) == ''


def test_no_timm(run):
    shutil.rmtree(run.folder / 'timm')
    assert run("""
        import torch, gmnet_timm
        for name in ('timm', 'timm.models'):
            try:
                __import__(name)
            except ModuleNotFoundError as e:
                assert e.name == 'timm'
            else:
                raise AssertionError
    """) == ''


@pytest.mark.parametrize('empty', [True, False], ids=['no models', 'a folder without __init__.py'])
def test_something_else_called_timm(run, empty):
    (run.folder / 'timm' / 'models' / '__init__.py').unlink()
    if empty:
        shutil.rmtree(run.folder / 'timm' / 'models')
    assert run(f"""
        import torch, timm
        try:
            import timm.models
        except ModuleNotFoundError as e:
            assert {empty} and e.name == 'timm.models'
        else:
            assert not {empty}
    """, files={'timm/__init__.py': ''}) == ''


@pytest.mark.parametrize('code, registered', [
    ('import torch; sys.meta_path[:] = others()', False),
    ('import torch; sys.meta_path = others()', False),
    ('import torch; sys.meta_path = list(sys.meta_path)', True),
    ('import torch; sys.meta_path.insert(0, importlib.machinery.PathFinder)', False),  # asked first
    ('import torch; sys.meta_path.extend(sys.meta_path)', True),
])
def test_others_change_the_finders(run, code, registered):
    assert run(f"""
        import importlib.machinery, sys

        def others():
            return [finder for finder in sys.meta_path if type(finder).__module__ != 'gmnet_timm_autoload']

        {code}
        import timm
        assert timm.is_model('resnet18') and timm.is_model('gmnet_s1') == {registered}
        import gmnet_timm
    """, check=True) == ''


def test_the_finder_is_removed_while_timm_is_imported(run):
    assert run('import torch, timm', check=True, files={'timm/models/resnet.py': """
        import sys
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != 'gmnet_timm_autoload']
        from ._registry import register_model
        ResNet = object
        register_model('resnet18')
    """}) == ''


@pytest.mark.parametrize('before, after', [
    ('reload(autoload)', ''),
    ('reload(autoload); autoload.install()', 'reload(autoload); autoload.install()'),
    ('reload(gmnet_timm)', 'reload(gmnet_timm); reload(timm.models)'),
    ('', 'reload(timm.models); autoload.install(); reload(timm); autoload.install()'),
    ('load_copy().install()', 'reload(timm.models)'),
    ('sys.meta_path.clear(); sys.meta_path.extend(finders); load_copy().install(); autoload.install()', ''),
    ("del sys.modules['gmnet_timm_autoload']; import gmnet_timm_autoload; gmnet_timm_autoload.install()", ''),
])
@pytest.mark.parametrize('first', ['import torch', 'import gmnet_timm', 'import torch, gmnet_timm'])
def test_reloaded_and_installed_again(run, first, before, after):
    assert run(f"""
        import importlib.util, sys
        from importlib import reload
        finders = list(sys.meta_path)

        def load_copy():
            spec = importlib.util.spec_from_file_location('copy_of_autoload', autoload.__file__)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module

        {first}
        import gmnet_timm_autoload as autoload, gmnet_timm
        {before}
        import timm, gmnet_timm
        {after}
    """, check=True) == ''


@pytest.mark.parametrize('file', ['timm/models/resnet.py', 'gmnet_timm/gmnet.py', 'gmnet_timm/gated.py'])
@pytest.mark.parametrize('first', ['import torch', 'import timm', 'import gmnet_timm'])
def test_interrupted_and_tried_again(run, first, file):
    interrupt = 'import sys\nif not hasattr(sys, "again"):\n    sys.again = True\n    raise KeyboardInterrupt\n'
    assert run(f"""
        try:
            {first}
            import timm
        except KeyboardInterrupt:
            import timm
        else:
            raise AssertionError
    """, check=True, files={file: interrupt + (run.folder / file).read_text()}) == ''


def test_timm_models_stays_usable(run):
    assert run("""
        import importlib.resources, importlib.util, inspect, pickle, sys, torch, timm
        assert 'is_model' in inspect.getsource(timm.models)
        assert (importlib.resources.files(timm.models) / 'resnet.py').is_file()
        assert pickle.loads(pickle.dumps(timm.models.__spec__)) == timm.models.__spec__
        assert type(timm.models.__loader__) is importlib.machinery.SourceFileLoader
        assert vars(timm.models.__loader__).keys() == vars(timm.layers.__loader__).keys()
        assert importlib.util.find_spec('timm.models') is timm.models.__spec__
        assert importlib.reload(timm.models) is timm.models
    """, check=True) == ''


def test_the_spec_can_be_used_before_the_import(run):
    assert run("""
        import copy, importlib.util, sys, torch
        spec = importlib.util.find_spec('timm.models')
        assert 'timm.models' not in sys.modules
        assert 'is_model' in spec.loader.get_source('timm.models') and spec.loader.is_package('timm.models')
        assert copy.copy(spec.loader).get_filename('timm.models') == copy.deepcopy(spec).loader.path == spec.origin
        assert not hasattr(spec.loader, 'nothing')
        import timm.models
        timm.is_model = timm.models.is_model
    """, check=True, files={'timm/__init__.py': ''}) == ''


def test_timm_in_a_zip_file(run):
    with zipfile.ZipFile(run.folder / 'timm.zip', 'w') as archive:
        for path in (run.folder / 'timm').rglob('*.py'):
            archive.write(path, path.relative_to(run.folder))
    shutil.rmtree(run.folder / 'timm')
    assert run(f"""
        import sys, torch, zipimport
        sys.path.insert(0, {str(run.folder / 'timm.zip')!r})
        import timm
        assert type(timm.models.__loader__) is zipimport.zipimporter
    """, check=True) == ''


@pytest.mark.parametrize('lazy', ['timm', 'timm.models'])
def test_lazy_loader(run, lazy):
    assert run(f"""
        import importlib.util, sys, torch
        spec = importlib.util.find_spec({lazy!r})
        spec.loader = importlib.util.LazyLoader(spec.loader)
        module = sys.modules[{lazy!r}] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert 'timm.models.resnet' not in sys.modules
        is_model = module.is_model
        import timm
        timm.models, timm.is_model = sys.modules['timm.models'], is_model  # as far as {lazy} did not do it
    """, check=True, files={'timm/__init__.py': ''} if lazy == 'timm.models' else {}) == ''


# --- failures are seen ----------------------------------------------------------------------------------------------


BROKEN = {'gmnet_timm/gmnet.py': 'raise RuntimeError("broken on purpose")'}
SAID = "gmnet_timm could not register its models with timm: RuntimeError('broken on purpose')"


@pytest.mark.parametrize('options', [(), ('-W', 'error'), ('-W', 'ignore')], ids=' '.join)
@pytest.mark.parametrize('first', ['import torch, timm', 'import gmnet_timm, timm', 'import timm'])
def test_broken_models_do_not_break_timm_and_are_seen(run, first, options):
    output = run(f"{first}; assert timm.is_model('resnet18') and not timm.is_model('gmnet_s1')", *options, files=BROKEN)
    silenced = 'gmnet_timm' not in first and options == ('-W', 'ignore')  # nobody asked for our models
    assert output.count(SAID) == (0 if silenced else 1)


@pytest.mark.parametrize('code', [
    'import timm, gmnet_timm',
    'import gmnet_timm, timm, gmnet_timm.gmnet',
    'from gmnet_timm import GmNet',
    'import gmnet_timm, timm; gmnet_timm.GmNet',
    'from gmnet_timm import *',
])
@pytest.mark.parametrize('broken', ['RuntimeError', 'AttributeError'])
def test_broken_models_fail_where_they_are_imported(run, code, broken):
    output = run(f"""
        try:
            {code}
        except Exception as e:
            print('raised', repr(e))
    """, files={'gmnet_timm/gmnet.py': f'raise {broken}("broken on purpose")'}, env=OFF)
    assert 'raised' in output and 'broken on purpose' in output.split('raised')[1]


def test_no_stderr(run):
    assert run("import sys; sys.stderr = None; import gmnet_timm, timm; assert timm.is_model('resnet18')", files=BROKEN)


# --- importing gmnet_timm -------------------------------------------------------------------------------------------


def test_importing_gmnet_timm_imports_neither_torch_nor_timm(run):
    assert run("""
        import sys
        before = set(sys.modules)
        import gmnet_timm
        assert 'GmNet' in dir(gmnet_timm) and '__version__' in dir(gmnet_timm)
        for name in ('nothing', 'pytest_plugins', '__path', 'gmnet_s5'):
            assert not hasattr(gmnet_timm, name)
        new = {name.partition('.')[0] for name in set(sys.modules) - before}
        assert new & {'torch', 'torchvision', 'timm', 'numpy', 'gmnet_timm'} == {'gmnet_timm'}, new
        assert not {'gmnet_timm.gmnet', 'gmnet_timm.gated'} & set(sys.modules)
    """, files={'torch.py': 'raise AssertionError', 'timm/__init__.py': 'raise AssertionError'}) == ''
