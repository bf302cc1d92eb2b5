"""What pip installs: the wheel, its metadata and its dependencies."""
import ast
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gmnet_timm

ROOT = Path(__file__).parent.parent


def test_five_base_dependencies_with_the_floors_that_are_tested():
    base = [r for r in importlib.metadata.requires('gmnet-timm') if 'extra ==' not in r]
    floors = {re.split('[>=]', r)[0].replace('-', '_'): r.split('>=')[1] for r in base}
    assert sorted(floors) == ['huggingface_hub', 'safetensors', 'timm', 'torch', 'torchvision']
    lowest = (ROOT / 'tests' / 'constraints-lowest.txt').read_text()
    tested = dict(line.split('==') for line in lowest.splitlines() if '==' in line)
    for name, floor in floors.items():
        assert tested[name] == floor or tested[name] == f'{floor}.0', name


# What a folder imports beyond the base dependencies, by the extra that declares it; and what base dependencies declare.
EXTRAS = {
    'src/gmnet_timm': 'demo', 'src/gmnet_timm/frequency': 'freq', 'src/gmnet_timm/explore': 'explore',
    'src/gmnet_timm/hub': 'onnx', 'benchmarks': 'bench',
}
PROMISED = {'numpy': 'torchvision', 'pillow': 'torchvision', 'pyyaml': 'timm', 'tqdm': 'huggingface_hub'}


def _required(package, extra=None):
    """Names of the distributions that a package requires, those of one extra and of the extras it names included."""
    names = set()
    for line in importlib.metadata.requires(package):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({'extra': extra or ''}):
            name = canonicalize_name(requirement.name)
            names |= {name}.union(*(_required(package, inner) for inner in requirement.extras if name == 'gmnet-timm'))
    return names


def test_what_base_dependencies_bring_is_promised_by_them():
    for name, package in PROMISED.items():
        assert name in _required(package), name


@functools.cache
def _providers():
    return importlib.metadata.packages_distributions()


@pytest.mark.parametrize('folder', EXTRAS)
def test_what_is_imported_is_declared(folder):
    declared = _required('gmnet-timm', EXTRAS[folder]) | {*PROMISED}
    providers = _providers()
    ours = {'gmnet_timm', 'gmnet_timm_autoload', 'benchmarks'}
    inner = [ROOT / other for other in EXTRAS if other.startswith(f'{folder}/')]
    files = [path for path in (ROOT / folder).rglob('*.py') if not {*path.parents} & {*inner}]
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in {name.split('.')[0] for name in modules} - {*sys.stdlib_module_names} - ours:
                names = {canonicalize_name(name) for name in providers.get(module, [module])}
                assert names & declared, f'{path}: {module}'


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version('gmnet-timm') == gmnet_timm.__version__
    assert f'\nversion: {gmnet_timm.__version__}\n' in (ROOT / 'CITATION.cff').read_text()


def test_importing_the_package_is_cheap():
    """It imports neither timm nor torch, which take seconds, nor anything else of that size."""
    code = "import gmnet_timm, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert 'gmnet_timm' in modules and 'gmnet_timm.gmnet' not in modules
    assert not {'torch', 'torchvision', 'timm', 'huggingface_hub', 'safetensors', 'numpy', 'yaml', 'PIL'} & {*modules}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', '--wheel-dir', str(folder), str(ROOT)]
    subprocess.run(pip, check=True, timeout=240)
    return next(folder.glob('gmnet_timm-*.whl'))


@pytest.mark.slow
def test_wheel_holds_the_package(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    sources = {str(path.relative_to(ROOT / 'src')) for path in (ROOT / 'src').rglob('*')
               if path.is_file() and '__pycache__' not in path.parts}
    assert names == sources
    assert {'gmnet_timm_autoload.py', 'gmnet_timm/py.typed'} <= names


@pytest.mark.slow
def test_wheel_works_like_the_checkout(wheel, tmp_path):
    """Installed without the checkout in sight; only the dependencies are those of this environment."""
    venv = tmp_path / 'venv'
    subprocess.run([sys.executable, '-m', 'venv', str(venv)], check=True)
    python = venv / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', wheel], check=True)
    site = next(venv.glob('lib/python*/site-packages'))
    dependencies = tmp_path / 'dependencies'
    dependencies.mkdir()
    for path in Path(sysconfig.get_path('purelib')).iterdir():
        if 'gmnet_timm' not in path.name:  # the checkout, and the entry point that names it
            (dependencies / path.name).symlink_to(path)
    (site / 'dependencies.pth').write_text(str(dependencies))
    code = (
        "import timm; model = timm.create_model('gmnet_s1'); import gmnet_timm, gmnet_timm_autoload; "
        "print(gmnet_timm.__file__, gmnet_timm_autoload.__file__, timm.list_models('gmnet*'))"
    )
    output = subprocess.run([python, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert output.count(str(site)) == 2 and 'gmnet_s4' in output
    info = subprocess.run([venv / 'bin' / 'gmnet-timm', 'info'], capture_output=True, text=True, check=True)
    assert '17,061,460' in info.stdout

    # An entry point whose module is gone: torch says what the documents quote, and both of their remedies help
    (site / 'gmnet_timm_autoload.py').unlink()
    import_torch = [python, '-c', 'import torch']
    failed = subprocess.run(import_torch, capture_output=True, text=True)
    message = 'Failed to load the backend extension: gmnet_timm'
    assert f'RuntimeError: {message}.' in failed.stderr
    for document in ('docs/models.md', 'docs/training.md'):
        text = (ROOT / document).read_text()
        for quoted in (message, 'TORCH_DEVICE_BACKEND_AUTOLOAD=0', 'pip uninstall gmnet-timm'):
            assert f'`{quoted}`' in text
    subprocess.run(import_torch, check=True, env={**os.environ, 'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'})
    subprocess.run([python, '-m', 'pip', 'uninstall', '--quiet', '--yes', 'gmnet-timm'], check=True)
    subprocess.run(import_torch, check=True)


@pytest.mark.slow
def test_a_package_index_shows_absolute_links(wheel):
    """It has no files beside the README, so every link and picture of the README is that of the version's tag."""
    with zipfile.ZipFile(wheel) as archive:
        name, = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = archive.read(name).decode()
    links = re.findall(r'(!?)\[[^\]]*\]\(([^)]+)\)', metadata)
    assert len(links) > 2 and all(link.startswith('https://') for _, link in links) and '<img' not in metadata
    assert 'Models and weights: [Publishing]' not in metadata and 'Models and weights' in metadata


def test_no_address_but_the_papers_authors():
    """The repository has none yet: the owner fills it in, in pyproject.toml alone."""
    found = set()
    for path in [*ROOT.glob('*.*'), *(ROOT / 'docs').rglob('*.md'), *(ROOT / 'src').rglob('*.py'), ROOT / 'mkdocs.yml']:
        if path.suffix in ('.md', '.toml', '.yml', '.cff', '.py'):
            found |= set(re.findall(r'github(?:usercontent)?\.(?:com|io)/[\w-]+/[\w-]+', path.read_text()))
    assert found == {
        'github.com/YFWang1999/GmNet', 'github.com/huggingface/pytorch-image-models', 'github.com/Boulaouaney/timmx'}


def test_one_citation_everywhere():
    """README, the cards and CITATION.cff name the same authors in the same order."""
    from gmnet_timm.info import BIBTEX

    assert f'```bibtex\n{BIBTEX}\n```' in (ROOT / 'README.md').read_text()
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())['preferred-citation']
    names = [f'{author["family-names"]}, {author["given-names"]}' for author in citation['authors']]
    authors = re.search(r'author\s*= \{(.*?)\},\n', BIBTEX, re.DOTALL)[1]
    assert ' '.join(authors.split()).split(' and ') == names
    assert citation['title'] == re.search(r'title\s*= \{(.*)\},', BIBTEX)[1].replace('{', '').replace('}', '')
