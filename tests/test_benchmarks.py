import subprocess
import sys
from pathlib import Path


def test_fusion():
    script = Path(__file__).parent.parent / 'benchmarks' / 'fusion.py'
    command = [sys.executable, str(script), '--img-size', '32', '--turns', '3', '--device', 'cpu']
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    # S3: stem, four down-samplings and two in each of 17 blocks are folded, the final norm is not
    assert 'BatchNorms 40 -> 1, layer scales 17 -> 0' in out
    assert 'folded / plain' in out
