"""What the other tests here rely on: the installed wheel, and nobody importing it."""
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
IMPORT = re.compile(r'^\s*(?:import|from) gmnet_timm', re.MULTILINE)


def test_it_is_the_wheel():
    for module in ('gmnet_timm', 'gmnet_timm_autoload'):
        assert 'site-packages' in Path(importlib.util.find_spec(module).origin).parts
    source = json.loads(importlib.metadata.distribution('gmnet-timm').read_text('direct_url.json'))
    assert source['url'].endswith('.whl')


def test_nobody_imports_it():
    files = [*Path(__file__).parent.glob('*.py'), *(ROOT / 'examples').glob('*.py'), ROOT / 'docs' / 'ecosystem.md']
    assert len(files) > 5
    files.remove(Path(__file__).with_name('test_trainers.py'))  # which reads the trainers' files with this package
    assert not [file for file in files if IMPORT.search(file.read_text(encoding='utf-8'))]


def test_importing_a_tool_is_enough():
    code = "import sys, segmentation_models_pytorch; assert 'gmnet_s1' in sys.modules['timm'].list_models()"
    subprocess.run([sys.executable, '-c', code], check=True, timeout=240)
