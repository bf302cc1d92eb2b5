"""timm's own tests of its models, run against ours. They ship in timm's source distribution, which pip gets."""
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

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
            archive.extractall(CACHE, filter='data')
    return folder / 'tests'


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_timm_suite(suite):
    names = our_models()
    assert {'gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4'} <= set(names)
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rs', '-p', 'gmnet_timm', '-p', 'no:cacheprovider',
         'test_models.py', '-k', ' or '.join(names)],
        cwd=suite, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = result.stdout.strip().splitlines()[-1]
    print(summary)
    assert result.returncode == 0, result.stdout[-5000:]
    # eight tests select every model of timm; one that skipped would not have tested anything
    passed = int(summary.split(' passed')[0].split()[-1])
    assert passed >= 8 * len(names) and 'skipped' not in summary, result.stdout[-5000:]
