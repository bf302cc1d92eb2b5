"""What the benchmarks do with a CUDA device, as far as it shows without one."""
import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip('onnxscript', reason="what benchmarks need is not installed: pip install 'gmnet-timm[bench]'")

from benchmarks import __main__ as main
from benchmarks import measure as measuring
from benchmarks.machine import set_arithmetic
from benchmarks.measure import TOLERANCE, Case, Row, Settings, measure, reference
from benchmarks.models import Model, create
from benchmarks.report import Results, conditions, table
from benchmarks.roofline import Peak, Work
from benchmarks.runtimes import RUNTIMES, Unsupported

ROOT = Path(__file__).parent.parent
SETTINGS = Settings(
    mode='throughput', models=('gmnet_s1', 'starnet_s1'), device='cuda', runtimes=('eager', 'cuda-graph'),
    fused=(True,), dtypes=('tf32', 'bfloat16'), memory_formats=('channels_last',), batch_sizes=(1, 32, 256),
    threads=1, rounds=2, iterations=2, img_size=32, matmul_size=64, copy_mb=1, warm_up_s=0., smoke=False)
CASE = Case('gmnet_s1', 32, 'eager', True, 'float32', 'channels_last', 1)


class OnCuda(torch.Tensor):
    """A tensor that says it is on a CUDA device."""

    device = torch.device('cuda')

    def cpu(self):
        return self.as_subclass(torch.Tensor)


class Tf32Conv(nn.Module):
    """A convolution with operands of 10 bits of mantissa, on that device and only there."""

    def __init__(self, conv, always=False):
        super().__init__()
        self.conv, self.always = conv, always

    def forward(self, x):
        if not self.always and not isinstance(x, OnCuda):
            return self.conv(x)
        return self.conv._conv_forward(rounded(x), rounded(self.conv.weight), self.conv.bias)


def rounded(x):
    """To the nearest number of TF32, float32 with 13 bits of mantissa less."""
    return ((x.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def with_tf32(net, always=False):
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.Conv2d):
            net.set_submodule(name, Tf32Conv(module, always))
    return net


@pytest.fixture(autouse=True)
def _arithmetic():
    yield
    set_arithmetic('float32')


@pytest.mark.parametrize('dtype, expected', [('float32', 'ieee'), ('tf32', 'tf32'), ('bfloat16', 'ieee')])
def test_arithmetic_of_every_library(dtype, expected):
    for other in ('tf32', 'float32'):
        set_arithmetic(other)
        set_arithmetic(dtype)
        libraries = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
        assert [library.fp32_precision for library in libraries] == 3 * [expected]
        torch.export.export(nn.Conv2d(3, 4, 1), (torch.randn(1, 3, 8, 8),))  # reads the older flags


@pytest.mark.parametrize('name', ['gmnet_s1', 'mobilenetv2_100', 'starnet_s1'])
def test_tf32_is_wrong_as_float32_and_right_as_tf32(name):
    net, x = create(Model(name, 64)), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(x)
        error = measuring.relative_error(with_tf32(net, always=True)(x), expected)
    assert TOLERANCE['float32'] < error < TOLERANCE['tf32']


def test_a_reference_that_is_not_ieee_is_refused():
    net = create(Model('gmnet_s1', 32))
    x = torch.randn(2, 3, 32, 32).as_subclass(OnCuda)
    with torch.no_grad():
        reference(net, x)
        with pytest.raises(ArithmeticError, match='float32 on cuda is not IEEE: relative error .* to the CPU'):
            reference(with_tf32(net), x)


def test_tf32_needs_cuda():
    net, x = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8)
    for runtime in ('eager', 'compile', 'onnxruntime'):
        with pytest.raises(Unsupported, match='no TF32 on cpu'):
            RUNTIMES[runtime](net, x, 'tf32', 1)
    with pytest.raises(Unsupported, match='no OpenVINO in tf32 on cpu'):
        RUNTIMES['openvino'](net, x, 'tf32', 1)


def test_plan_holds_one_model_at_a_time():
    plan = SETTINGS.groups()
    assert [(cases[0].batch_size, {case.model for case in cases}) for cases in plan] == [
        (1, {'gmnet_s1'}), (1, {'starnet_s1'}), (32, {'gmnet_s1'}), (32, {'starnet_s1'}),
        (256, {'gmnet_s1'}), (256, {'starnet_s1'})]
    assert all(len(cases) == 4 for cases in plan)  # both runtimes in both dtypes are timed against each other
    on_cpu = dataclasses.replace(SETTINGS, device='cpu').groups()
    assert [len(cases) for cases in on_cpu] == [8, 8, 8]


@pytest.mark.slow
def test_time_is_up():
    settings = dataclasses.replace(SETTINGS, device='cpu', dtypes=('float32',), minutes=1e-9, batch_sizes=(1,))
    rows, _ = measure(settings, log=lambda line: None)
    assert {row.status for row in rows} == {'not run: the time given by --minutes was over'} and len(rows) == 4


def test_report_of_a_gpu():
    state = {'sm_mhz': '1980', 'memory_mhz': '2619', 'power_w': '640.5', 'temperature_c': '61',
             'throttle_reasons': '0x4'}
    rows = [
        Row(dataclasses.replace(CASE, dtype='bfloat16', batch_size=batch, runtime='compile-max'), 'ok',
            samples_ms=[ms], roofline_ms=ms / 2, work=Work(10 ** 9, 1, 1), params=10 ** 6, gpu_state=state)
        for batch, ms in ((1, 1.), (256, 8.))]
    settings = dict(dataclasses.asdict(SETTINGS), dtypes=('bfloat16',), batch_sizes=(1, 256))
    machine = {'cpu': 'a CPU', 'gpu': 'NVIDIA H100', 'versions': {}, 'python': '3', 'date': 'today',
               'allocator': 'default'}
    results = Results(machine, settings, 'command', Peak({'bfloat16': 4e14}, 3e12), rows)
    assert 'compile-max, bfloat16, batch 256' in table(results) and '| 32,000 |' in re.sub(' +', ' ', table(results))
    text = conditions(results)
    assert 'NVIDIA H100' in text and 'Images per second at batches of 1, 256' in text
    assert 'Clocks: 1980 to 1980 MHz, 640 to 640 W; throttle reasons seen: 0x4.' in text


def test_make_bench_gpu(monkeypatch):
    """It installs nothing, takes less than 8 minutes, and each of its commands is one."""
    run = subprocess.run(['make', '-n', 'bench-gpu'], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = run.stdout.replace('\\\n', ' ').splitlines()
    assert 'pip' not in run.stdout and '-m venv' not in run.stdout
    monkeypatch.setattr(main, 'resolve_device', lambda device: device)
    commands = [shlex.split(line)[3:] for line in lines if ' -m benchmarks ' in line]
    plans = [main.settings(main.parser().parse_args(command)) for command in commands]
    assert {plan.mode for plan in plans} == {'latency', 'throughput', 'training'}
    assert all(plan.device == 'cuda' and not plan.smoke for plan in plans)
    assert all(plan.models[:1] == ('gmnet_s3',) or {f'gmnet_s{i}' for i in (1, 2, 3, 4)} <= set(plan.models)
               for plan in plans)
    tests = sum(int(seconds) for seconds in re.findall(r'timeout (\d+) ', run.stdout))
    assert sum(plan.minutes for plan in plans) + tests / 60 < 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('runtime', ['eager', 'cuda-graph'])
def test_cuda(runtime):
    settings = dataclasses.replace(
        SETTINGS, runtimes=(runtime,), dtypes=('float32', 'tf32', 'bfloat16'), batch_sizes=(2,), models=('gmnet_s1',))
    rows, peak = measure(settings, log=lambda line: None)
    assert [row.status for row in rows] == 3 * ['ok'] and all(row.samples_ms for row in rows)
    assert set(peak.compute_macs_per_s) == {'float32', 'tf32', 'bfloat16'}
