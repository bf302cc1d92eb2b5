"""The hook that registers the models: it hangs no import, breaks no import, and leaves nothing behind.

Most tests use stand-ins for torch, timm and the model files. They need no packages, so they run with every Python there
is, and sleep while they are imported, so that imports in two threads meet in the middle.
"""
import concurrent.futures
import functools
import itertools
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / 'src'
OFF = {'GMNET_TIMM_AUTOLOAD': '0'}

STAND_INS = {
    'torch.py': '''
        import time
        time.sleep(SLEEP)
        import gmnet_timm_autoload
        gmnet_timm_autoload.install()
    ''',
    'timm/__init__.py': '''
        from .layers import DropPath
        from .models import is_model
    ''',
    'timm/layers.py': '''
        import time
        import torch
        time.sleep(SLEEP)
        DropPath = object
    ''',
    'timm/data.py': '''
        import time
        import torch
        from timm.layers import DropPath
        time.sleep(SLEEP)
        create_transform = object
    ''',
    'timm/models/__init__.py': '''
        from .resnet import ResNet
        import time
        time.sleep(SLEEP)
        from ._registry import is_model, register_model
    ''',
    'timm/models/resnet.py': '''
        import torch
        from timm.data import create_transform
        from ._registry import register_model
        ResNet = object
        register_model('resnet18')
    ''',
    'timm/models/_registry.py': '''
        names = set()
        is_model, register_model = names.__contains__, names.add
    ''',
    'gmnet_timm/_registry.py': 'from timm.models import register_model',
    'gmnet_timm/gmnet.py': '''
        import time
        import torch
        from timm.data import create_transform
        from ._registry import register_model
        time.sleep(SLEEP)
        GmNet = gmnet_s1 = gmnet_s2 = gmnet_s3 = gmnet_s4 = object
        register_model('gmnet_s1')
    ''',
    'gmnet_timm/gated.py': '''
        from timm.layers import DropPath
        from ._registry import register_model
        Gate = object
        register_model('resnet18_ewp')
    ''',
}


def write_stand_ins(folder, sleep=0.0):
    for name, code in STAND_INS.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code).replace('SLEEP', str(sleep)))
    for name in ('gmnet_timm/__init__.py', 'gmnet_timm_autoload.py'):
        shutil.copy(SRC / name, folder / name)
    return folder


@functools.cache
def find_python(minor):
    versions = Path(os.environ.get('PYENV_ROOT', '~/.pyenv')).expanduser() / 'versions'
    for python in (sys.executable, shutil.which(f'python3.{minor}'), *versions.glob(f'3.{minor}.*/bin/python')):
        if python:
            version = subprocess.run([python, '-c', 'import sys; print(sys.version_info[1])'], capture_output=True)
            if version.stdout.decode().strip() == str(minor):
                return python
    pytest.skip(f'there is no Python 3.{minor} here')


@pytest.fixture(params=[
    pytest.param(minor, id=f'python3.{minor}', marks=() if minor == sys.version_info[1] else pytest.mark.slow)
    for minor in sorted({10, 13, sys.version_info[1]})  # CI runs the others
])
def python(request):
    return find_python(request.param)


def call(code, folder, *args, python=sys.executable, options=('-S',), env=None):
    """Run code in a fresh interpreter that searches the folder first. Returns what it printed, errors included."""
    result = subprocess.run(
        [python, *options, '-c', textwrap.dedent(code), *map(str, args)],
        env={**os.environ, 'PYTHONPATH': str(folder), **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )
    assert result.returncode == 0, f'{code} {args}\n{result.stdout}'
    return result.stdout.strip()


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


CHECK = """
import sys, timm
assert timm.is_model('resnet18') and timm.is_model('gmnet_s1') and timm.is_model('resnet18_ewp')
assert type(timm) is type(sys)
assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'gmnet_timm_autoload']
assert type(timm.models.__loader__).__module__ != 'gmnet_timm_autoload'
assert timm.models.__loader__ is timm.models.__spec__.loader
"""


# --- first imports in two threads -----------------------------------------------------------------------------------


PAIR = """
import faulthandler, sys, threading, time

def run(code, delay):
    time.sleep(delay)
    try:
        exec(code, {})
    except BaseException as e:
        print(f'{e!r} raised by {code!r}')

first, second, delay, limit = sys.argv[1:]
faulthandler.dump_traceback_later(float(limit), exit=True)
threads = [threading.Thread(target=run, args=args) for args in [(first, 0), (second, float(delay))]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
""" + CHECK
KNOWN_AT_ONCE = "; assert is_model('gmnet_s1')"  # in the thread that imported, whatever the other one is doing
WHOLE = [
    'from timm import is_model' + KNOWN_AT_ONCE,
    'import gmnet_timm; from timm import is_model' + KNOWN_AT_ONCE,
    'from gmnet_timm import GmNet; from timm import is_model' + KNOWN_AT_ONCE,
    'import gmnet_timm',
    'import torch',
    "import importlib.util; importlib.util.find_spec('timm.models')",
]
# Python itself may fail to import two parts of one package in two threads. timm's parts import one another in circles:
# of the real ones, one part is enough for that, beside an import of timm.
PARTS = [
    'from timm.models import is_model' + KNOWN_AT_ONCE,
    'from timm.data import create_transform',
    'from timm.layers import DropPath',
    'import gmnet_timm.gmnet',
]
SLEEP = 0.03
DELAYS = [0, 1.5 * SLEEP, 2.5 * SLEEP]


@pytest.fixture(scope='module')
def slow_folder(tmp_path_factory):
    return write_stand_ins(tmp_path_factory.mktemp('stand-ins'), SLEEP)


def is_part(code):
    return code.startswith(('from timm.', 'import gmnet_timm.'))


def run_pair(folder, first, second, delay, may_fail=False, **kwargs):
    if 'import gmnet_timm.gmnet' in (first, second):  # holds the models while it waits for the other thread's timm
        first, second = first.replace(KNOWN_AT_ONCE, ''), second.replace(KNOWN_AT_ONCE, '')
    output = call(PAIR, folder, first, second, delay, 60, **kwargs)
    case = f'{first} | {second} | {delay}: {output}'
    assert 'could not register' not in output and 'AssertionError' not in output, case
    assert may_fail or 'raised by' not in output, case


def run_stand_in_pairs(folder, triples, **kwargs):
    def run(triple):
        first, second, delay = triple
        parts = is_part(first) + is_part(second)
        try:
            run_pair(folder, *triple, may_fail=parts == 2, **kwargs)
        except AssertionError as e:
            # Python itself fails, rarely, where a thread locks a part before the other one has begun with timm: where
            # others use the processor, after any delay. It is not to happen twice.
            if parts == 0 or '_DeadlockError' not in str(e):
                raise
            run_pair(folder, *triple, **kwargs)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # they sleep most of the time
        assert len(list(pool.map(run, triples))) >= 5


def test_imports_in_two_threads(slow_folder):
    timm, gmnet_timm, names, *_ = WHOLE
    run_stand_in_pairs(slow_folder, [
        (timm, 'from timm.data import create_transform', 1.5 * SLEEP),
        (timm, gmnet_timm, 0),
        (timm, 'import gmnet_timm.gmnet', 1.5 * SLEEP),
        (timm, PARTS[0], 0.5 * SLEEP),
        (PARTS[0], names, 2.5 * SLEEP),
    ])


@pytest.mark.slow
def test_all_imports_in_two_threads(slow_folder, python):
    delays = DELAYS if python == sys.executable else DELAYS[1:2]
    run_stand_in_pairs(slow_folder, itertools.product([*WHOLE, *PARTS], [*WHOLE, *PARTS], delays), python=python)


@pytest.mark.slow
def test_all_imports_in_two_threads_without_the_entry_point(slow_folder):
    explicit = [code for code in [*WHOLE, *PARTS] if 'gmnet_timm' in code]
    others = [code.replace(KNOWN_AT_ONCE, '') for code in [*WHOLE, *PARTS] if code not in explicit]
    pairs = [*itertools.product(explicit, others), *itertools.product(others, explicit)]
    run_stand_in_pairs(slow_folder, [(*pair, delay) for pair in pairs for delay in DELAYS], env=OFF)


@pytest.mark.slow
@pytest.mark.parametrize('first, second, delay', [
    (WHOLE[0], PARTS[1], 0.1), (WHOLE[0], WHOLE[1], 0.1), (WHOLE[1], WHOLE[4], 0), (WHOLE[2], PARTS[0], 0.5),
    (WHOLE[0], PARTS[3], 1.2),
])
def test_real_imports_in_two_threads(first, second, delay):
    run_pair(SRC, first, second, delay, may_fail=is_part(second), options=())


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
