"""The models are there whenever timm is, in processes that never import gmnet_timm themselves."""
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from model_helpers import SIZES, create
from timm.models import get_pretrained_cfg

import gmnet_timm

ROOT = Path(__file__).parent.parent
OFF = {'GMNET_TIMM_AUTOLOAD': '0'}


def run(code, *python_args, env=None, command=None):
    """Run code in a fresh interpreter; returns what it printed to stdout and stderr together."""
    command = command or [sys.executable, *python_args, '-c', textwrap.dedent(code)]
    env = {**os.environ, **(env or {})}
    result = subprocess.run(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert result.returncode == 0, result.stdout
    return result.stdout.strip()


CREATE = "assert timm.create_model('gmnet_s1').num_classes == 1000; print(timm.list_models('gmnet*'))"


@pytest.mark.parametrize('imports', [
    'import timm',
    pytest.param('from timm.models.resnet import ResNet; import timm', marks=pytest.mark.slow),
])
def test_no_import_is_needed_in_any_order(imports):
    """With the real packages. tests/test_autoload.py has all orders of stand-ins, which are imported in no time."""
    assert run(f'{imports}; {CREATE}') == str(list(SIZES))


@pytest.mark.slow
def test_autoload_can_be_turned_off():
    """timm then says what docs/models.md and docs/training.md quote, with the remedy that is tested here."""
    output = run('''
        import timm
        assert timm.list_models('gmnet*') == []
        try:
            timm.create_model('gmnet_s3')
        except RuntimeError as e:
            print(e)
        import gmnet_timm
        print(len(timm.list_models('gmnet*')))
    ''', env=OFF)
    assert output.splitlines() == ['Unknown model (gmnet_s3)', '4']
    assert run(f'import gmnet_timm, timm; {CREATE}', env=OFF) == str(list(SIZES))
    for document in ('docs/models.md', 'docs/training.md'):
        assert '`Unknown model (gmnet_s3)`' in (ROOT / document).read_text()


def test_public_names():
    names = {}
    exec('from gmnet_timm import *', names)
    public = {*gmnet_timm.__all__}
    assert public == names.keys() - {'__builtins__'} and public <= {*dir(gmnet_timm)}
    assert gmnet_timm.GmNet is gmnet_timm.gmnet.GmNet is names['GmNet']
    for name in gmnet_timm.__all__:
        assert pickle.loads(pickle.dumps(names[name])) is names[name]
    with pytest.raises(AttributeError, match="'gmnet_timm' has no attribute 'gmnet_s5'"):
        gmnet_timm.gmnet_s5  # noqa: B018
    with pytest.raises(ImportError, match='gmnet_s5'):
        exec('from gmnet_timm import gmnet_s5')


@pytest.mark.slow
def test_pickled_model_in_a_process_that_imports_nothing(tmp_path):
    model = create('gmnet_s1', num_classes=3)
    (tmp_path / 'model').write_bytes(pickle.dumps(model))
    output = run(f'''
        import pickle
        model = pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))
        import timm, torch
        assert timm.is_model('gmnet_s1') and timm.is_model('resnet18_ewp')
        print(model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).sum().item())
    ''', env=OFF)
    expected = model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)).sum().item()
    assert float(output) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_hook_waits_for_timm_and_leaves_no_trace():
    """Importing torch loads nothing; looking for timm.models does not use the hook up; timm keeps its own loader."""
    assert run(f'''
        import importlib.machinery, importlib.util, sys, torch
        assert 'gmnet_timm_autoload' in sys.modules
        assert not [name for name in sys.modules if name.split('.')[0] in ('timm', 'gmnet_timm')]
        import warnings
        warnings.simplefilter('default')  # for timm itself
        assert importlib.util.find_spec('timm.models')
        import timm; {CREATE}
        assert not [f for f in sys.meta_path if type(f).__module__ == 'gmnet_timm_autoload']
        loader = timm.models.__spec__.loader
        assert type(loader) is importlib.machinery.SourceFileLoader and 'exec_module' not in vars(loader)
    ''', '-W', 'error::UserWarning') == str(list(SIZES))


@pytest.mark.slow
def test_a_broken_plugin_is_seen_and_breaks_nothing(tmp_path):
    (tmp_path / 'gmnet_timm').mkdir()
    (tmp_path / 'gmnet_timm' / '__init__.py').write_text('raise RuntimeError("broken on purpose")')
    output = run('''
        import warnings
        warnings.filterwarnings('ignore', category=DeprecationWarning)  # torch's own
        import torch, timm
        print(timm.is_model('resnet18'))
    ''', '-W', 'error', env={'PYTHONPATH': os.pathsep.join([str(tmp_path), str(ROOT / 'src')])})
    assert 'True' in output.splitlines()
    assert output.count("could not register its models with timm: RuntimeError('broken on purpose')") == 1


@pytest.mark.slow
def test_spawned_workers(tmp_path):
    script = tmp_path / 'spawn.py'
    script.write_text(textwrap.dedent('''
        import multiprocessing
        import timm
        import torch

        def work(model):
            return type(model).__name__, type(timm.create_model('gmnet_s2')).__name__

        if __name__ == '__main__':
            with multiprocessing.get_context('spawn').Pool(1) as pool:
                print(pool.apply(work, [timm.create_model('gmnet_s1')]))
    '''))
    assert run('', command=[sys.executable, str(script)]) == "('GmNet', 'GmNet')"


@pytest.mark.slow
def test_torchrun(tmp_path):
    script = tmp_path / 'ranks.py'
    script.write_text("import os, timm; timm.create_model('gmnet_s1'); open(os.environ['RANK'], 'w').close()")
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--standalone', str(script)],
        cwd=tmp_path, check=True, capture_output=True, timeout=240)
    assert (tmp_path / '0').exists() and (tmp_path / '1').exists()


@pytest.mark.slow
def test_models_that_timm_ships_stay():
    output = run('''
        import sys, types, timm.models, timm
        module = sys.modules['timm.models.gmnet'] = types.ModuleType('timm.models.gmnet')
        exec("""
        def gmnet_s1(pretrained=False, **kwargs):
            return "timm's own"
        def gmnet_s2(pretrained=False, **kwargs):
            return "timm's own"
        """.replace("\\n        ", "\\n"), vars(module))
        timm.models.register_model(module.gmnet_s1)
        timm.models.register_model(module.gmnet_s2)
        import gmnet_timm
        print(timm.create_model.__module__, timm.models.model_entrypoint('gmnet_s1')(), timm.is_model('gmnet_s3'))
    ''', env=OFF)
    assert output.count('timm ships gmnet_s1 itself') == 1 and 'Overwriting' not in output
    assert output.endswith("timm's own True")


# --- pretrained configs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', SIZES)
def test_pretrained_config(name):
    cfg = get_pretrained_cfg(f'{name}.in1k')
    assert get_pretrained_cfg(name) == cfg
    assert (cfg.architecture, cfg.tag, cfg.num_classes) == (name, 'in1k', 1000)
    assert (cfg.input_size, cfg.interpolation, cfg.crop_pct) == ((3, 224, 224), 'bicubic', 0.875)
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert cfg.paper_ids == 'arXiv:2503.22841' and 'Revisiting Gating Mechanisms' in cfg.paper_name
    assert not cfg.has_weights and not timm.is_model_pretrained(f'{name}.in1k')


def test_no_weights_are_claimed():
    assert timm.list_pretrained('gmnet*') == []
    with pytest.raises(RuntimeError) as e:
        timm.create_model('gmnet_s3', pretrained=True)
    for way in ("pretrained_cfg_overlay=dict(file=", 'hf-hub:owner/name', 'GMNET_TIMM_HUB_ORG', 'pretrained=False'):
        assert way in str(e.value)


def test_other_errors_of_pretrained_models_are_not_hidden(tmp_path):
    with pytest.raises(FileNotFoundError):
        timm.create_model('gmnet_s3', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'none.pth')))
