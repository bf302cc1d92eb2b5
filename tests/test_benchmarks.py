import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from model_helpers import randomize, relative_error
from torch import nn

pytest.importorskip('openvino', reason="what benchmarks need is not installed: pip install 'gmnet-timm[bench]'")

from benchmarks import measure as measuring
from benchmarks.__main__ import main
from benchmarks.figure import draw, frontier
from benchmarks.measure import Case, Row, Settings, measure
from benchmarks.models import MODELS, Model, create, find, fuse, split
from benchmarks.report import Results, conditions, report, table
from benchmarks.roofline import Peak, Work, measure_work
from benchmarks.runtimes import RUNTIMES
from gmnet_timm.errors import UserError
from gmnet_timm.info import count_cost

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / 'benchmarks' / 'results').glob('*.json'))

SETTINGS = Settings(
    mode='latency', models=('gmnet_s1',), device='cpu', runtimes=('eager',), fused=(True,), dtypes=('float32',),
    memory_formats=('channels_last',), batch_sizes=(1,), threads=1, rounds=2, iterations=2, img_size=32, matmul_size=64,
    copy_mb=1, warm_up_s=0., smoke=True)
CASE = Case('gmnet_s1', 32, 'eager', True, 'float32', 'channels_last', 1)


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(rows, **settings) -> Results:
    machine = {'cpu': 'a CPU', 'versions': {'torch': '1'}, 'python': '3', 'date': 'today', 'allocator': 'default'}
    chosen = {**dataclasses.asdict(SETTINGS), **settings}
    return Results(machine, chosen, 'command', Peak({'float32': 1e9}, 1e9), rows)


def test_all_models_exist():
    assert set(MODELS) <= set(timm.list_models())
    assert all(model.source and (model.top1 or model.top1_distilled) for model in MODELS.values())


PEERS = 'mobilenetv2_100', 'starnet_s1', 'repvit_m1_0'


@pytest.mark.parametrize('name', ['gmnet_s1', *(pytest.param(name, marks=pytest.mark.slow) for name in PEERS)])
def test_fuse(name):
    x = torch.randn(2, 3, 64, 64)
    net = create(Model(name, 64))
    fused = fuse(net, x)
    with torch.no_grad():
        assert relative_error(fused(x), net(x)) < 1e-4
    # what is left stands before a convolution or a linear layer, not behind one
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (net, fused)]
    assert norms[1] <= {'starnet_s1': 1, 'gmnet_s1': 1}.get(name, 0) < norms[0]


def test_fuse_leaves_a_norm_that_does_not_follow_its_convolution():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x) * 2)

    net = randomize(Shared()).eval()
    assert isinstance(fuse(net, torch.randn(1, 3, 8, 8)).norm, nn.BatchNorm2d)


def test_arguments_behind_a_name():
    assert split('gmnet_s3 gate=fc recompute_gate=True drop_rate=0.5') == (
        'gmnet_s3', {'gate': 'fc', 'recompute_gate': True, 'drop_rate': 0.5})
    assert find('shvit_s4 act_layer=gelu').img_size == 256 and find('shvit_s4 act_layer=gelu').top1 is None
    net = create(Model('gmnet_s1 gate=fc', 32))
    assert net.stages[0][1].gate.conv.weight.shape == (120, 120, 1, 1)
    with pytest.raises(UserError, match='Arguments of gmnet_s1 are written KEY=VALUE, not gate'):
        split('gmnet_s1 gate')


def test_weights_show_every_layer():
    """A fresh layer scale would hide what is wrong inside of a block."""
    net = create(Model('gmnet_s1', 32))
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = net(x)
        net.stages[2][1].f1.conv.weight.mul_(0.9)
        assert relative_error(net(x), expected) > 1e-3


def test_work_of_one_convolution():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8)).eval()
    work = measure_work(net, torch.randn(1, 3, 10, 10))
    assert work == Work(macs=8 * 100 * 3 * 9, weights=8 * 3 * 9 + 8, activations=3 * 100 + 8 * 100)


def test_work_of_a_model():
    net = create(Model('gmnet_s3', 64))
    work = measure_work(fuse(net, torch.randn(1, 3, 64, 64)), torch.randn(1, 3, 64, 64))
    assert work.macs == count_cost(timm.create_model('gmnet_s3'), (3, 64, 64))[0]


def test_roofline():
    peak = Peak({'float32': 1e9, 'tf32': 2e9, 'bfloat16': 4e9}, bandwidth_bytes_per_s=1e9)
    work = Work(macs=2 * 10 ** 6, weights=10 ** 5, activations=10 ** 4)
    assert peak.roofline_ms(work, 1, 'float32') == pytest.approx(2)  # bound by arithmetic
    assert peak.roofline_ms(work, 10, 'float32') == pytest.approx(20)
    assert peak.roofline_ms(dataclasses.replace(work, macs=0), 10, 'float32') == pytest.approx(0.8)  # by memory
    assert peak.roofline_ms(dataclasses.replace(work, macs=0), 10, 'bfloat16') == pytest.approx(0.4)
    assert peak.roofline_ms(work, 10, 'tf32') == pytest.approx(10)
    assert peak.roofline_ms(dataclasses.replace(work, macs=0), 10, 'tf32') == pytest.approx(0.8)  # 4 bytes in memory


@pytest.mark.slow
def test_latency_rows():
    rows, peak = measure(dataclasses.replace(SETTINGS, fused=(False, True)), log=lambda line: None)
    assert [row.case.fused for row in rows] == [False, True]
    for row in rows:
        assert row.status == 'ok' and len(row.samples_ms) == 4 and row.error < 1e-5
        assert row.roofline_ms == peak.roofline_ms(row.work, 1, 'float32')
    assert peak.compute_macs_per_s['float32'] > 1e8 and peak.bandwidth_bytes_per_s > 1e7


@pytest.mark.slow
def test_a_fast_wrong_model_is_not_timed(monkeypatch):
    def wrong(net, x, dtype, threads):
        output = 1.01 * net(x)
        return lambda: output

    monkeypatch.setitem(RUNTIMES, 'eager', wrong)
    (row,), _ = measure(SETTINGS, log=lambda line: None)
    assert row.status == 'wrong output: relative error 1.0e-02' and not row.samples_ms


@pytest.mark.parametrize('error, status', [
    (torch.OutOfMemoryError('CUDA out of memory'), 'out of memory'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 'out of memory'),
    (ValueError('what\nnow'), 'failed: ValueError: what'),
])
@pytest.mark.slow
def test_what_fails_becomes_a_row(monkeypatch, error, status):
    def fail(net, x, dtype, threads):
        raise error

    monkeypatch.setitem(RUNTIMES, 'cuda-graph', fail)
    monkeypatch.setattr(measuring, 'matmul_forwards', lambda *args: {'eager': lambda: torch.zeros(1)})
    rows, _ = measure(dataclasses.replace(SETTINGS, runtimes=('eager', 'cuda-graph')), log=lambda line: None)
    assert [row.status for row in rows] == ['ok', status]


def test_unsupported():
    rows, _ = measure(dataclasses.replace(
        SETTINGS, runtimes=('cuda-graph', 'onnxruntime'), dtypes=('bfloat16',)), log=lambda line: None)
    assert [row.status for row in rows] == [
        'unsupported: CUDA graphs need a CUDA device', 'unsupported: no ONNX Runtime in bfloat16 on cpu']


@pytest.mark.slow
def test_throughput():
    rows, _ = measure(dataclasses.replace(SETTINGS, mode='throughput', batch_sizes=(1, 2)), log=lambda line: None)
    assert [row.case.batch_size for row in rows] == [1, 2]


@pytest.mark.slow
def test_training():
    settings = dataclasses.replace(
        SETTINGS, mode='training', batch_sizes=(2,), fused=(False, True), img_size=64,
        models=('gmnet_s1', 'gmnet_s1 recompute_gate=True'))
    rows, _ = measure(settings, log=lambda line: None)
    full, fused, less, _ = rows
    assert fused.status == 'unsupported: no training of a fused model'
    assert full.status == less.status == 'ok'
    # of each block's gate two tensors of three, (2, 2, 10, 2) blocks of (3, 3, 3, 2) * dim * 2 ** i channels
    wide = sum(n * r * 40 * 2 ** i * (16 // 2 ** i) ** 2 for i, (n, r) in enumerate(zip((2, 2, 10, 2), (3, 3, 3, 2))))
    assert full.kept_mb - less.kept_mb == pytest.approx(2 * 4 * wide / 2 ** 20, rel=1e-6)


def test_weights_are_not_counted_as_kept():
    net, x = nn.Linear(100, 300), torch.randn(16, 100)
    assert measuring.kept_mb(lambda: net(x).square().sum(), net, 16) == 4 * (100 + 300) / 2 ** 20

    def loss():
        with torch.autocast('cpu', torch.bfloat16):
            return net(x).square().sum()

    assert measuring.kept_mb(loss, net, 16) <= 4 * (100 + 300) / 2 ** 20


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs /proc')
@pytest.mark.slow
def test_counting_memory_keeps_none():
    def resident_mb():
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2 ** 20

    net, x = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Sigmoid()) for _ in range(8))), torch.randn(512, 512)
    kept = [measuring.kept_mb(lambda: net(x).sum(), net, 512) for _ in range(5)]
    before = resident_mb()
    kept += [measuring.kept_mb(lambda: net(x).sum(), net, 512) for _ in range(40)]  # of 8 MiB or more each
    assert resident_mb() - before < 80
    assert len(set(kept)) == 1


def test_results_read_back(tmp_path):
    rows = [
        Row(CASE, 'ok', 1e-7, None, [1.0, 2.0], 0.5, Work(1, 2, 3), 4),
        Row(dataclasses.replace(CASE, batch_size=2), 'out of memory', params=4),
    ]
    results(rows).save(tmp_path / 'r.json')
    loaded = Results.load(tmp_path / 'r.json')
    assert loaded.rows == rows and loaded.peak == results(rows).peak and loaded.settings['batch_sizes'] == [1]


def test_no_result_file(tmp_path):
    (tmp_path / 'r.json').write_text('{"rows": []}')
    with pytest.raises(UserError, match='is not a result file of `python -m benchmarks run`'):
        Results.load(tmp_path / 'r.json')


def test_report(tmp_path):
    rows = [
        Row(CASE, 'ok', 1e-7, None, [1.0, 4.0, 2.0], 0.5, Work(10 ** 9, 2, 3), 4 * 10 ** 6),
        Row(dataclasses.replace(CASE, model='starnet_s1'), 'out of memory', None, None, [], 1, Work(1, 2, 3), 4),
    ]
    ours, theirs = report([results(rows, smoke=False)]).splitlines()[2:4]
    assert [cell.strip() for cell in ours.split('|')[1:-1]] == [
        '`gmnet_s1`', '75.5', '4.0 M', '1.00 G', '2', '0.5 (x 4.00)']
    assert 'out of memory' in theirs


def latency_rows(times):
    return [Row(dataclasses.replace(CASE, model=name, img_size=224), 'ok', 1e-7, None, [ms], 0.5, Work(1, 2, 3), 4)
            for name, ms in times.items()]


@pytest.mark.slow
def test_labels_of_the_figure(tmp_path, monkeypatch):
    """Labels stay within the axes and apart from each other; every axis has numbers."""
    import adjustText
    loaded = Results.load(ROOT / 'benchmarks' / 'results' / 'amd-epyc-2-cores-latency.json')
    names = list(dict.fromkeys(row.case.model for row in loaded.rows))
    rows = [row for row in loaded.rows if row.case.model in names and row.case.runtime == 'openvino']
    placed = []
    original = adjustText.adjust_text
    monkeypatch.setattr(adjustText, 'adjust_text', lambda texts, ax, **kw: placed.append(
        (texts, ax, original(texts, ax=ax, **kw))))
    draw([dataclasses.replace(loaded, rows=rows)], tmp_path / 'figure.svg')
    ((texts, ax, _),) = placed
    boxes = {text.get_text(): text.get_window_extent() for text in texts}
    axes = ax.get_window_extent()
    assert len(boxes) == len(names) == len(set(boxes))
    assert all(axes.x0 <= box.x0 and box.x1 <= axes.x1 and axes.y0 <= box.y0 and box.y1 <= axes.y1
               for box in boxes.values())
    assert not [(a, b) for a in boxes for b in boxes if a < b and boxes[a].overlaps(boxes[b])]
    assert len(ax.get_xticks()) >= 3
    svg = (tmp_path / 'figure.svg').read_text()
    assert all(f'>{name}</text>' in svg for name in names)


def test_smoke_runs_are_not_drawn(tmp_path):
    assert 'its times say nothing' in report([results(latency_rows({'gmnet_s1': 1.}))])
    with pytest.raises(UserError, match='A smoke run measures nothing'):
        draw([results(latency_rows({'gmnet_s1': 1.}))], tmp_path / 'figure.svg')
    assert not (tmp_path / 'figure.svg').exists()


def test_frontier():
    assert frontier([(3, 70), (1, 60), (2, 75), (4, 76)]) == ([1, 2, 4], [60, 75, 76])


@pytest.mark.parametrize('path', FILES, ids=[path.stem for path in FILES])
def test_committed_results(path):
    loaded = Results.load(path)
    assert not loaded.settings['smoke'] and len(loaded.rows) > 5
    assert all(row.error is None or row.error < 0.3 for row in loaded.rows if row.samples_ms)


@pytest.mark.parametrize('document', ['README.md', 'docs/benchmarks.md'])
def test_published_tables_are_those_of_the_results(document):
    """What stands between `<!-- benchmarks: VIEW NAME ... -->` and `<!-- benchmarks: end -->` is what the files say."""
    sections = re.findall(r'<!-- benchmarks: (\w+) ([\w -]+) -->\n(.*?)\n<!-- benchmarks: end -->',
                          (ROOT / document).read_text(encoding='utf-8'), re.DOTALL)
    assert sections
    for view, names, text in sections:
        if view == 'brief':
            name, *models = names.split()
            loaded = Results.load(ROOT / 'benchmarks' / 'results' / f'{name}.json')
            rows = [row for row in loaded.rows if row.case.model in models]
            expected = table(dataclasses.replace(loaded, rows=rows), against_roofline=False)
            expected += '\n\n' + '\n'.join(conditions(loaded).splitlines()[:2])
        else:
            loaded = [Results.load(ROOT / 'benchmarks' / 'results' / f'{name}.json') for name in names.split()]
            expected = report(loaded)
        assert text == expected, (view, names)


@pytest.mark.slow
@pytest.mark.parametrize('mode, options', [
    ('latency', ['--runtimes', 'eager', 'compile', 'onnxruntime', 'openvino', 'cuda-graph']),
    ('throughput', []),
    ('training', ['--runtimes', 'eager', 'openvino']),
])
def test_smoke(tmp_path, monkeypatch, capsys, mode, options):
    path = tmp_path / 'smoke.json'
    monkeypatch.setattr('benchmarks.__main__.keep_freed_memory', lambda: False)  # for good
    monkeypatch.setattr(sys, 'argv', [
        'benchmarks', 'run', mode, '--smoke', '--models', 'gmnet_s1', *options, '--output', str(path)])
    main()
    assert 'SMOKE RUN' in capsys.readouterr().out
    status = {row['case']['runtime']: row['status'] for row in json.loads(path.read_text())['rows']}
    assert status.pop('cuda-graph', 'unsupported').startswith('unsupported') != torch.cuda.is_available()
    assert all(s == ('unsupported: no training with openvino' if (mode, r) == ('training', 'openvino') else 'ok')
               for r, s in status.items()), status


@pytest.mark.slow
def test_unknown_model():
    command = [sys.executable, '-m', 'benchmarks', 'run', 'latency', '--smoke', '--models', 'gmnet_s9']
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 1 and run.stderr.endswith('error: timm has no model gmnet_s9: see timm.list_models().\n')


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    monkeypatch.setattr(measuring, 'matmul_forwards', lambda *args: {'eager': lambda: torch.zeros(1)})
    (row,), _ = measure(dataclasses.replace(SETTINGS, runtimes=('onnxruntime',)), log=lambda line: None)
    assert row.status == (
        "unsupported: onnxruntime is not installed. Install it with: pip install 'gmnet-timm[bench]'")
