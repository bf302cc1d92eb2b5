"""The examples reach on unseen parts of their photographs what they are there to show."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / 'examples'


def run(name, folder, pattern):
    """Numbers in what an example prints last."""
    done = subprocess.run([sys.executable, EXAMPLES / name], cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return [float(number) for number in re.fullmatch(pattern, done.stdout.splitlines()[-1]).groups()]


@pytest.mark.timeout(600)
def test_segmentation(tmp_path):
    learnt, guess = run('segmentation.py', tmp_path, r'mIoU on unseen rows ([\d.]+), of one class everywhere ([\d.]+)')
    assert learnt > .8 and guess < .5


@pytest.mark.timeout(600)
def test_detection(tmp_path):
    pattern = r'(\d+) of (\d+) unseen coins found, boxes without a coin: (\d+)'
    found, coins, wrong = run('detection.py', tmp_path, pattern)
    assert coins == 6 and found >= 5 and wrong <= 3


def test_they_are_short():
    for name in ('segmentation.py', 'detection.py'):
        assert len((EXAMPLES / name).read_text(encoding='utf-8').splitlines()) < 65, name
