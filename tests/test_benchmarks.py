import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import randomize, relative_error
from torch import nn

pytest.importorskip('openvino', reason="what benchmarks need is not installed: pip install 'gmnet-timm[bench]'")

from benchmarks import measure as measuring
from benchmarks.limits import Ceilings, Work, measure_work
from benchmarks.measure import Case, Row, Settings, measure, past_its_best
from benchmarks.models import MODELS, Model, create, fold
from benchmarks.profiling import profile
from benchmarks.report import END, START, compare, frontier, ratio_with_interval, report
from benchmarks.results import Results
from benchmarks.runtimes import RUNTIMES
from gmnet_timm.errors import UserError
from gmnet_timm.info import count_macs

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / 'benchmarks' / 'results').glob('*.json'))

SETTINGS = Settings(
    mode='latency', models=('gmnet_s1',), device='cpu', runtimes=('eager',), folded=(True,), precisions=('float32',),
    layouts=('channels_last',), batch=1, threads=1, rounds=2, calls=2, img_size=32, product_size=64, copy_mb=1,
    warm_up_s=0., smoke=True)
CASE = Case('gmnet_s1', 32, 'eager', True, 'float32', 'channels_last', 1)


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def results(rows, **settings) -> Results:
    machine = {'cpu': 'a CPU', 'versions': {'torch': '1'}, 'python': '3', 'date': 'today', 'allocator': 'default'}
    ceilings = Ceilings({'float32': 1e9}, 1e9)
    return Results(machine, dataclasses.replace(SETTINGS, **settings), 'command', ceilings, rows)


def test_all_models_exist():
    assert set(MODELS) <= set(timm.list_models())
    assert all(model.source and (model.top1 or model.top1_distilled) for model in MODELS.values())


@pytest.mark.parametrize('name', ['gmnet_s1', 'mobilenetv2_100', 'starnet_s1', 'repvit_m1_0'])
def test_fold(name):
    x = torch.randn(2, 3, 64, 64)
    net = create(Model(name, 64))
    folded = fold(net, x)
    with torch.no_grad():
        assert relative_error(folded(x), net(x)) < 1e-4
    # what is left stands before a convolution or a linear layer, not behind one
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) for model in (net, folded)]
    assert norms[1] <= {'starnet_s1': 1, 'gmnet_s1': 1}.get(name, 0) < norms[0]


def test_fold_leaves_a_norm_that_does_not_follow_its_convolution():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x) * 2)

    net = randomize(Shared()).eval()
    assert isinstance(fold(net, torch.randn(1, 3, 8, 8)).norm, nn.BatchNorm2d)


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
    work = measure_work(fold(net, torch.randn(1, 3, 64, 64)), torch.randn(1, 3, 64, 64))
    assert work.macs == count_macs(timm.create_model('gmnet_s3'), (3, 64, 64))


def test_roofline():
    ceilings = Ceilings({'float32': 1e9, 'bfloat16': 4e9}, bytes_per_s=1e9)
    work = Work(macs=2 * 10 ** 6, weights=10 ** 5, activations=10 ** 4)
    assert ceilings.roofline_ms(work, 1, 'float32') == pytest.approx(2)  # bound by arithmetic
    assert ceilings.roofline_ms(work, 10, 'float32') == pytest.approx(20)
    assert ceilings.roofline_ms(dataclasses.replace(work, macs=0), 10, 'float32') == pytest.approx(0.8)  # by memory
    assert ceilings.roofline_ms(dataclasses.replace(work, macs=0), 10, 'bfloat16') == pytest.approx(0.4)


def test_latency_rows():
    rows, ceilings = measure(dataclasses.replace(SETTINGS, folded=(False, True)), log=lambda line: None)
    assert [row.case.folded for row in rows] == [False, True]
    for row in rows:
        assert row.status == 'ok' and len(row.samples_ms) == 4 and row.error < 1e-5
        assert row.roofline_ms == ceilings.roofline_ms(row.work, 1, 'float32')
    assert ceilings.macs_per_s['float32'] > 1e8 and ceilings.bytes_per_s > 1e7


def test_a_fast_wrong_model_is_not_timed(monkeypatch):
    def wrong(net, x, precision, threads):
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
def test_what_fails_becomes_a_row(monkeypatch, error, status):
    def fail(net, x, precision, threads):
        raise error

    monkeypatch.setitem(RUNTIMES, 'cuda-graph', fail)
    monkeypatch.setattr(measuring, 'product_forwards', lambda *args: {'eager': lambda: torch.zeros(1)})
    rows, _ = measure(dataclasses.replace(SETTINGS, runtimes=('eager', 'cuda-graph')), log=lambda line: None)
    assert [row.status for row in rows] == ['ok', status]


def test_unsupported():
    rows, _ = measure(dataclasses.replace(
        SETTINGS, runtimes=('cuda-graph', 'onnxruntime'), precisions=('bfloat16',)), log=lambda line: None)
    assert [row.status for row in rows] == [
        'unsupported: CUDA graphs need a CUDA device', 'unsupported: no ONNX Runtime in bfloat16 on cpu']


def test_sweep_ends_at_the_best_batch_or_a_failure():
    def row(batch, ms, status='ok'):
        return Row(dataclasses.replace(CASE, batch=batch), status, samples_ms=[ms] if ms else [])

    assert not past_its_best(CASE, [row(1, 10), row(2, 15)])
    assert past_its_best(CASE, [row(1, 10), row(2, 15), row(4, 40)])
    assert past_its_best(CASE, [row(1, 10), row(2, None, 'out of memory')])
    other = Row(dataclasses.replace(CASE, model='gmnet_s2', batch=4), 'ok', samples_ms=[100])
    assert not past_its_best(CASE, [row(1, 10), other])


def test_throughput_and_training():
    rows, _ = measure(dataclasses.replace(SETTINGS, mode='throughput', batch=2), log=lambda line: None)
    assert [row.case.batch for row in rows] == [1, 2]
    rows, _ = measure(dataclasses.replace(
        SETTINGS, mode='training', batch=2, folded=(False, True)), log=lambda line: None)
    assert [row.status for row in rows] == ['ok', 'unsupported: no training of a folded model']
    # at the least: weights, gradients and the two moments of AdamW
    params = sum(p.numel() for p in timm.create_model('gmnet_s1').parameters())
    assert 4 * 4 * params / 2 ** 20 < rows[0].memory_mb < 1000


def test_results_read_back(tmp_path):
    rows = [
        Row(CASE, 'ok', 1e-7, None, [1.0, 2.0], 0.5, Work(1, 2, 3), 4),
        Row(dataclasses.replace(CASE, batch=2), 'out of memory', params=4),
    ]
    results(rows).save(tmp_path / 'r.json')
    assert Results.load(tmp_path / 'r.json') == results(rows)
    lines = (tmp_path / 'r.csv').read_text().splitlines()
    assert lines[0].startswith('model,img_size,runtime') and 'out of memory' in lines[2]


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

    readme = tmp_path / 'README.md'
    readme.write_text('no markers')
    with pytest.raises(UserError, match='has no markers'):
        report([results(rows, smoke=False)], document=readme)
    readme.write_text(f'before\n{START}\nold\n{END}\nafter\n')
    report([results(rows, smoke=False)], tmp_path / 'figure.png', readme)
    assert readme.read_text().startswith(f'before\n{START}\n| model') and readme.read_text().endswith(f'{END}\nafter\n')
    assert (tmp_path / 'figure.png').stat().st_size > 10000


def test_smoke_runs_are_not_published(tmp_path):
    rows = [Row(CASE, 'ok', 1e-7, None, [1.0], 0.5, Work(1, 2, 3), 4)]
    assert 'its times say nothing' in report([results(rows)])
    with pytest.raises(UserError, match='A smoke run measures nothing'):
        report([results(rows)], tmp_path / 'figure.png')
    assert not (tmp_path / 'figure.png').exists()


def test_frontier():
    assert frontier([(3, 70), (1, 60), (2, 75), (4, 76)]) == ([1, 2, 4], [60, 75, 76])


def test_compare():
    rows = [Row(CASE, 'ok', 0., None, [10.0, 10.2, 10.1, 9.9], 1., Work(1, 2, 3), 4)]
    faster = [dataclasses.replace(rows[0], samples_ms=[ms / 2 for ms in rows[0].samples_ms])]
    text = compare(results(rows), results(faster))
    assert "1.000  the machine's copy" in text and '0.500 (0.4' in text
    with pytest.raises(UserError, match='no measurement in common'):
        compare(results(rows), results(faster, mode='training'))


def test_interval_covers_the_ratio():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(60):
        before, after = ((1 + 0.1 * torch.randn(30, generator=generator)) for _ in range(2))
        ratio, low, high = ratio_with_interval(before.tolist(), (0.8 * after).tolist(), draws=300)
        assert low <= ratio <= high
        covered += low <= 0.8 <= high
    assert covered >= 50  # 95 % of 60 are 57


@pytest.mark.parametrize('path', FILES, ids=[path.stem for path in FILES])
def test_committed_results(path):
    loaded = Results.load(path)
    assert not loaded.settings.smoke and len(loaded.rows) > 5
    csv = path.with_suffix('.csv').read_text().splitlines()
    assert len(csv) == len(loaded.rows) + 1
    assert all(row.error is None or row.error < 0.3 for row in loaded.rows if row.samples_ms)


@pytest.mark.parametrize('document, names', [
    ('README.md', ['latency']),
    ('docs/benchmarks.md', ['latency-folding', 'latency-bfloat16', 'throughput', 'training']),
])
def test_published_tables_are_those_of_the_results(document, names):
    loaded = [Results.load(ROOT / 'benchmarks' / 'results' / f'amd-epyc-2-cores-{name}.json') for name in names]
    assert f'{START}\n{report(loaded)}\n{END}' in (ROOT / document).read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.parametrize('mode, options', [
    ('latency', ['--runtimes', 'eager', 'compile', 'onnxruntime', 'openvino', 'cuda-graph']),
    ('throughput', []),
    ('training', ['--runtimes', 'eager', 'openvino']),
])
def test_smoke(tmp_path, mode, options):
    path = tmp_path / 'smoke.json'
    command = [sys.executable, '-m', 'benchmarks', 'run', mode, '--smoke', '--models', 'gmnet_s1', *options,
               '--output', str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert 'SMOKE RUN' in run.stdout and path.exists()
    status = {row['case']['runtime']: row['status'] for row in json.loads(path.read_text())['rows']}
    assert status.pop('cuda-graph', 'unsupported').startswith('unsupported') != torch.cuda.is_available()
    assert all(s == ('unsupported: no training with openvino' if (mode, r) == ('training', 'openvino') else 'ok')
               for r, s in status.items()), status


def test_unknown_model():
    command = [sys.executable, '-m', 'benchmarks', 'run', 'latency', '--smoke', '--models', 'gmnet_s9']
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.returncode == 1 and run.stderr.endswith('error: timm has no model gmnet_s9: see timm.list_models().\n')


@pytest.mark.parametrize('runtime, kind', [
    ('eager', 'aten::mul'),
    ('openvino', 'GroupConvolution'),
    pytest.param('compile', 'mkldnn::_convolution_pointwise', marks=pytest.mark.slow),  # only if it has been frozen
])
def test_profile(runtime, kind):
    total, *kinds = profile('gmnet_s1', runtime, 'float32', threads=1).splitlines()
    ms = [float(line.split()[0]) for line in kinds]
    assert any(kind in line for line in kinds) and ms == sorted(ms, reverse=True)
    assert sum(ms) == pytest.approx(float(total.split()[0]), rel=0.1)  # the kinds that are left out are small


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    (row,), _ = measure(dataclasses.replace(SETTINGS, runtimes=('onnxruntime',)), log=lambda line: None)
    assert row.status == (
        "unsupported: onnxruntime is not installed. Install it with: pip install 'gmnet-timm[bench]'")
