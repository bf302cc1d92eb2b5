"""Every example of the README and of docs/ is run as it is printed.

In a document, blocks are run in order, ```python blocks that follow each other in one process, the lines of ```bash
blocks in a shell or, if they only call `gmnet-timm`, in this process, which has imported torch already. They start in
an empty folder that holds `photo.jpg`. A block after `<!-- not run: reason -->` is not run. The demo is shortened here:
tests/ecosystem/test_quantize.py runs more of it.
"""
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from gmnet_timm.cli.main import main

ROOT = Path(__file__).parent.parent
# `make` and installing are what CI itself does before it comes here
NOT_AGAIN = re.compile(r'^(make|pip install|git clone|cd) .*\n', re.MULTILINE)


def parts(document: Path):
    """Language and code of the blocks, those of Python that follow each other in one."""
    pattern = r'(<!-- not run: [^\n]+-->\n)?```(python|bash)\n(.*?)```'
    blocks = re.findall(pattern, document.read_text(), re.DOTALL)
    found = [(language, code) for skip, language, code in blocks if not skip]
    for language, together in itertools.groupby(found, key=lambda part: part[0]):
        codes = [code for _, code in together]
        yield from [(language, '\n'.join(codes))] if language == 'python' else [(language, code) for code in codes]


@pytest.fixture
def folder(tmp_path):
    Image.radial_gradient('L').convert('RGB').resize((500, 375)).save(tmp_path / 'photo.jpg')
    return tmp_path


def run(command, folder):
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT), 'PATH': path}
    result = subprocess.run(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    assert result.returncode == 0, result.stdout


# docs/publishing.md needs a Hub: tests/hub/test_push.py runs it against one of its own
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize('document', [
    'README.md',
    'docs/models.md',
    'docs/frequency.md',
    pytest.param('docs/ecosystem.md', marks=[
        pytest.mark.ecosystem, pytest.mark.skipif(
            not (3, 11) <= sys.version_info < (3, 14), reason='timmx is installed on Python 3.11 to 3.13')]),
])
def test_examples(document, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for language, code in parts(ROOT / document):
        if language == 'python':
            run([sys.executable, '-c', code], folder)
        else:
            code = re.sub('(gmnet-timm demo .*)', r'\1 --epochs 1 --patches 16', NOT_AGAIN.sub('', code))
            for line in code.replace('\\\n', '').splitlines():
                program, *arguments = shlex.split(line, comments=True) or ['']
                if program == 'gmnet-timm' and '$' not in line:
                    assert main(arguments) == 0, line
                else:
                    run(['bash', '-euo', 'pipefail', '-c', line], folder)


DOCUMENTS = [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'experiments').rglob('*.md')]


def test_links_and_pictures_exist():
    for document in DOCUMENTS:
        for target in re.findall(r'\]\(([^)#]+)[^)]*\)|src="([^"]+)"', document.read_text()):
            target = ''.join(target)
            assert target.startswith('https://') or (document.parent / target).exists(), f'{document}: {target}'


def test_documents_and_ci_take_the_scripts_of_the_installed_timm():
    tag = r'''git clone .*--branch "v\$\(\S*python -c 'import timm; print\(timm.__version__\)'\)"'''
    for path in ('README.md', 'docs/training.md', '.github/workflows/ci.yml'):
        assert len(re.findall(tag, (ROOT / path).read_text())) == 1, path


def test_lines_have_at_most_120_columns():
    """Tables may be wider, and so may what a program wrote: sections between markers, and ```text blocks."""
    generated = re.compile(r'^<!-- [^\n]*: .*?^<!-- \w+: end -->|^```text.*?^```', re.MULTILINE | re.DOTALL)
    assert [
        f'{document.relative_to(ROOT)}: {line}'
        for document in DOCUMENTS if not document.name.startswith('plan')  # plans are never edited
        for line in generated.sub('', document.read_text()).splitlines()
        if len(line) > 120 and not line.startswith('|')
    ] == []
