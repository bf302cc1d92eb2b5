"""Several processes, each with a part of the images, give the numbers of one."""
import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from gmnet_timm.cli.main import main
from gmnet_timm.frequency.processes import gathered, interleaved, is_first, own_part, share

COMMANDS = {  # and the tables that they write
    'layers': (['--gates', '*', '--modules', 'stages.*.0'], ['layers.csv', 'layers-summary.csv']),
    'amplitude': ([], ['amplitude.csv']),
    'sensitivity': ([], ['sensitivity.csv']),
    'heatmap': (['--step', '16'], ['heatmap.csv', 'heatmap-radial.csv']),
    'layers of one picture': (['--image', '0.png'], ['layers.csv', 'layers-summary.csv']),
}
# one start of Python for all commands: a process group each
WORKER = """
import json, os, sys
from gmnet_timm.cli.main import main
for port, argv in json.loads(sys.argv[1]):
    os.environ['MASTER_PORT'] = str(port)
    assert main(argv) == 0, argv
"""


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def _assert_same(a, b):
    for key, value in a.items():
        try:
            assert float(b[key]) == pytest.approx(float(value), rel=1e-3, abs=1e-6, nan_ok=True), key
        except ValueError:
            assert b[key] == value, key


def test_one_process_is_all_of_them():
    x = torch.arange(6)
    assert gathered(3) == [3] and is_first() and share(4) == 4 and torch.equal(own_part(x), x)
    assert torch.equal(interleaved([x[::3], x[1::3], x[2::3]]), x)
    assert torch.equal(interleaved([x[::4], x[1::4], x[2::4], x[3::4]]), x)


@pytest.mark.slow
@pytest.mark.parametrize('processes, images, names', [
    (2, 7, ['layers', 'amplitude', 'sensitivity', 'heatmap', 'layers of one picture']),
    (3, 2, ['layers', 'heatmap']),  # one of three has no image
])
def test_processes_equal_one(tmp_path, monkeypatch, processes, images, names):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(images):
        (tmp_path / 'data' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'data' / 'ab'[i % 2] / f'{i}.png')
    Image.fromarray(pixels).save(tmp_path / '0.png')
    torch.manual_seed(0)
    model = timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 2, 1), num_classes=2)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    commands = [
        ['freq', name.split()[0], 'model.pth', '--data-dir', 'data', '--img-size', '64', '--workers', '0', '--device',
         'cpu', '--no-figure', *COMMANDS[name][0], '--output']
        for name in names]
    several = [[*argv, str(tmp_path / 'several' / name)] for argv, name in zip(commands, names)]
    started = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, json.dumps(list(zip(ports, several)))],
            env={**os.environ, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': str(processes),
                 'MASTER_ADDR': '127.0.0.1', 'OMP_NUM_THREADS': '1'})
        for ports in [_free_ports(len(commands))] for rank in range(processes)]
    try:
        for argv, name in zip(commands, names):
            assert main([*argv, str(tmp_path / 'one' / name)]) == 0
        assert [process.wait(timeout=120) for process in started] == [0] * processes
    finally:
        for process in started:
            process.kill()
    for table in (Path(name, table) for name in names for table in COMMANDS[name][1]):
        one, more = _rows(tmp_path / 'one' / table), _rows(tmp_path / 'several' / table)
        assert len(one) == len(more) > 0
        for a, b in zip(one, more):
            _assert_same(a, b)
