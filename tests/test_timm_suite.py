"""timm's own tests of its models, run against ours: as a plugin, and with gmnet.py moved into timm.

They ship in timm's source distribution, which pip gets.
"""
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
import timm
from model_helpers import SIZES

import gmnet_timm.gmnet

CACHE = Path(__file__).parent.parent / '.cache' / 'timm-sdist'


def our_models():
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith('gmnet_timm.')]


@pytest.fixture(scope='module')
def suite():
    """Path of timm's tests for the installed version."""
    folder = CACHE / f'timm-{timm.__version__}'
    if not folder.exists():
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm']
        download = subprocess.run(
            [*pip, '--dest', str(CACHE), f'timm=={timm.__version__}'], capture_output=True, text=True, timeout=240)
        if download.returncode and not os.environ.get('CI'):
            pytest.skip(f'the source distribution of timm {timm.__version__} cannot be downloaded')
        assert download.returncode == 0, download.stderr
        with tarfile.open(CACHE / f'timm-{timm.__version__}.tar.gz') as archive:
            # the argument `filter` is in the newest patch releases of Python 3.10 and 3.11 only
            archive.extraction_filter = getattr(tarfile, 'data_filter', lambda member, path: member)
            archive.extractall(CACHE)
    return folder / 'tests'


@pytest.fixture(scope='module')
def timm_with_gmnet(tmp_path_factory):
    """A folder with a copy of the installed timm that ships gmnet.py, unchanged, as a pull request would add it."""
    root = tmp_path_factory.mktemp('timm-with-gmnet')
    shutil.copytree(Path(timm.__file__).parent, root / 'timm', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copyfile(gmnet_timm.gmnet.__file__, root / 'timm' / 'models' / 'gmnet.py')
    _insert(root / 'timm' / 'models' / '__init__.py', 'from .hardcorenas import *\n', 'from .gmnet import *\n')
    return root


def _insert(path, before, line):
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, line + before))


def _run_pytest(*args, cwd, env=None):
    """Number of tests passed. None may fail or skip: what skips does not test anything."""
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'no:cacheprovider', *args],
        cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = result.stdout.strip().splitlines()[-1]
    print(summary)
    assert result.returncode == 0 and 'skipped' not in summary, result.stdout[-5000:]
    return int(summary.split(' passed')[0].split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_timm_suite(suite):
    """A gate of each kind of both bodies. All sizes of GmNet are tested below, in timm itself."""
    names = ['resnet18_ewp', 'mobilenetv2_100_gate_gelu']
    assert set(names) <= set(our_models())
    # eight tests select every model of timm
    assert _run_pytest('-p', 'gmnet_timm', 'test_models.py', '-k', ' or '.join(names), cwd=suite) >= 8 * len(names)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_timm_suite_with_gmnet_in_timm(suite, timm_with_gmnet):
    """All of timm's tests of models, three more than for a plugin, pass if gmnet.py is copied into timm."""
    shutil.copytree(suite, timm_with_gmnet / 'tests')
    shutil.copyfile(suite.parent / 'pyproject.toml', timm_with_gmnet / 'pyproject.toml')
    tests = timm_with_gmnet / 'tests' / 'test_models.py'
    text = tests.read_text()
    assert text.count('FEAT_INTER_FILTERS = [') == 1
    tests.write_text(text.replace('FEAT_INTER_FILTERS = [', "FEAT_INTER_FILTERS = [\n    'gmnet',"))
    (timm_with_gmnet / 'tests' / 'test_what_was_tested.py').write_text(textwrap.dedent(f"""
        import sys
        import timm
        import timm.models._registry as registry

        def test_gmnet_is_the_copied_file():
            for name in {SIZES}:
                module = sys.modules[timm.model_entrypoint(name).__module__]
                assert module.__name__ == 'timm.models.gmnet'
                assert module.__file__ == {str(timm_with_gmnet / 'timm' / 'models' / 'gmnet.py')!r}
                assert open(module.__file__, 'rb').read() == open({gmnet_timm.gmnet.__file__!r}, 'rb').read()
                assert type(timm.create_model(name)) is module.GmNet is timm.models.GmNet
                assert module.register_model is registry.register_model
                assert module.generate_default_cfgs is registry.generate_default_cfgs
            assert not [name for name in sys.modules if name.startswith('gmnet_timm')]
    """))
    env = {**os.environ, 'PYTHONPATH': str(timm_with_gmnet), 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}
    files = ('tests/test_models.py', 'tests/test_what_was_tested.py')
    assert _run_pytest(*files, '-k', 'gmnet', cwd=timm_with_gmnet, env=env) >= 11 * len(SIZES) + 1


@pytest.mark.slow
def test_plugin_beside_a_timm_that_ships_gmnet(timm_with_gmnet):
    code = f"""
        import sys, warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            import timm
        assert 'gmnet_timm.gmnet' in sys.modules, 'the plugin did not load'
        messages = [str(w.message) for w in caught if 'gmnet' in str(w.message)]
        assert len(messages) == 1 and messages[0].startswith('timm ships gmnet_s1 itself'), messages
        assert timm.list_models('gmnet*') == list({SIZES}), timm.list_models('gmnet*')
        assert timm.list_models('resnet18_ewp') == ['resnet18_ewp']
        for name in {SIZES}:
            assert timm.model_entrypoint(name).__module__ == 'timm.models.gmnet'
        model = timm.create_model('gmnet_s1')
        assert type(model) is timm.models.GmNet is not sys.modules['gmnet_timm'].GmNet
        from gmnet_timm.frequency import find_gates
        assert len(find_gates(model)) == 16 and 'stages.0.1' in find_gates(model)
    """
    path = os.pathsep.join([str(timm_with_gmnet), *filter(None, [os.environ.get('PYTHONPATH')])])
    result = subprocess.run(
        [sys.executable, '-c', textwrap.dedent(code)], cwd=timm_with_gmnet, env={**os.environ, 'PYTHONPATH': path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
