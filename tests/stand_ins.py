"""Stand-ins for torch, timm and the model files. They need no packages, so they run with every Python there is, and
sleep while they are imported, so that imports in two threads meet in the middle."""
import functools
import os
import shutil
import subprocess
import sys
import textwrap
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


PYTHONS = [
    pytest.param(minor, id=f'python3.{minor}', marks=() if minor == sys.version_info[1] else pytest.mark.slow)
    for minor in sorted({10, 13, sys.version_info[1]})  # CI runs the others
]


def call(code, folder, *args, python=sys.executable, options=('-S',), env=None):
    """Run code in a fresh interpreter that searches the folder first. Returns what it printed, errors included."""
    result = subprocess.run(
        [python, *options, '-c', textwrap.dedent(code), *map(str, args)],
        env={**os.environ, 'PYTHONPATH': str(folder), **(env or {})},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )
    assert result.returncode == 0, f'{code} {args}\n{result.stdout}'
    return result.stdout.strip()


CHECK = """
import sys, timm
assert timm.is_model('resnet18') and timm.is_model('gmnet_s1') and timm.is_model('resnet18_ewp')
assert type(timm) is type(sys)
assert not [finder for finder in sys.meta_path if type(finder).__module__ == 'gmnet_timm_autoload']
assert type(timm.models.__loader__).__module__ != 'gmnet_timm_autoload'
assert timm.models.__loader__ is timm.models.__spec__.loader
"""
