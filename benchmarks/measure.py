"""Measuring: cases are built and checked one by one, then timed in interleaved rounds."""
import copy
import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .machine import gpu_state, set_arithmetic, synchronize
from .models import create, find, fuse
from .roofline import Peak, Work, matmul_forwards, measure_work
from .runtimes import DTYPES, RUNTIMES, Forward, Unsupported, compile_whole

__all__ = ['Case', 'MEMORY_FORMATS', 'MODES', 'Row', 'Settings', 'measure']

MODES = ('latency', 'throughput', 'training')
MEMORY_FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}

# Relative error of the logits, against those of the eager model in IEEE float32, above which a case is not timed.
# Random weights amplify rounding (MobileNetV2 in bfloat16 to 0.2); logits that have nothing to do with it are at 1.4.
# TF32 rounds to the 10 bits of float16.
TOLERANCE = {'float32': 1e-4, 'tf32': 0.05, 'bfloat16': 0.3, 'float16': 0.05}

TIME_IS_UP = 'not run: the time given by --minutes was over'


@dataclasses.dataclass(frozen=True)
class Case:
    model: str  # name of timm, and arguments behind it
    img_size: int
    runtime: str
    fused: bool
    dtype: str
    memory_format: str  # contiguous or channels_last
    batch_size: int


@dataclasses.dataclass
class Row:
    """What came of a case: times, or the reason why there are none."""

    case: Case
    status: str  # 'ok' or the reason
    error: float | None = None  # relative, of the logits or the loss
    memory_mb: float | None = None  # training on CUDA: the most that was in use, MiB
    samples_ms: list[float] = dataclasses.field(default_factory=list)
    roofline_ms: float | None = None
    work: Work | None = None
    params: int = 0  # of the model as it is trained
    kept_mb: float | None = None  # training: what autograd keeps for the backward pass, MiB per image
    gpu_state: dict[str, str] | None = None  # right after the last round


@dataclasses.dataclass(frozen=True)
class Settings:
    mode: str
    models: tuple[str, ...]
    device: str
    runtimes: tuple[str, ...]
    fused: tuple[bool, ...]
    dtypes: tuple[str, ...]
    memory_formats: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    threads: int
    rounds: int
    iterations: int  # per round
    img_size: int | None  # None for that of the published accuracy
    matmul_size: int
    copy_mb: int
    warm_up_s: float
    smoke: bool
    minutes: float | None = None  # after which no case is built any more

    def cases(self) -> Iterator[Case]:
        """Every combination, but one memory format for what chooses its own."""
        for batch_size, name, runtime, fused, dtype, memory_format in itertools.product(
                self.batch_sizes, self.models, self.runtimes, self.fused, self.dtypes, self.memory_formats):
            if runtime in ('onnxruntime', 'openvino') and memory_format != self.memory_formats[0]:
                continue
            yield Case(name, self.img_size or find(name).img_size, runtime, fused, dtype, memory_format, batch_size)

    def groups(self) -> list[list[Case]]:
        """Cases that are built and timed together: of one batch size, and on a GPU of one model."""
        on_cpu = torch.device(self.device).type == 'cpu'
        key = lambda case: (case.batch_size, on_cpu or case.model)  # noqa: E731
        return [list(group) for _, group in itertools.groupby(self.cases(), key)]


def measure(settings: Settings, log: Callable[[str], None] = print) -> tuple[list[Row], Peak]:
    """Measure every case of the settings.

    Returns:
        A row for each case, whether it could be timed or not, and the machine's peaks in the same minutes.
    """
    torch.set_num_threads(settings.threads)
    deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else float('inf')
    peaks: dict[Any, Forward] = {
        ('matmul', dtype, name): forward
        for dtype in settings.dtypes
        for name, forward in matmul_forwards(settings.matmul_size, settings.device, dtype, settings.threads).items()
    }
    source = torch.ones(settings.copy_mb * 2 ** 20, dtype=torch.uint8, device=settings.device)  # larger than any cache
    peaks['copy'] = functools.partial(torch.empty_like(source).copy_, source)
    peak_samples: dict[Any, list[float]] = {key: [] for key in peaks}
    rows: list[Row] = []
    for cases in settings.groups():
        forwards: dict[Any, Forward] = {}
        for case, forward, row in built(cases, settings, deadline):
            log(f'{describe(case)}: {row.status}')
            rows.append(row)
            if forward and row.status == 'ok':
                forwards[case] = forward
        if not forwards and any(peak_samples.values()):  # the time is up: that of the peaks too
            continue
        log(f'timing {len(forwards)} cases, {settings.rounds} rounds of {settings.iterations} iterations')
        samples = interleave({**peaks, **forwards}, settings)
        state = gpu_state(settings.device)
        for key in peaks:
            peak_samples[key] += samples[key]
        for row in rows:
            if row.case in forwards:
                row.samples_ms, row.gpu_state = samples[row.case], state
        del forwards
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()

    # of each dtype the fastest matmul; and the copy, which reads and writes each byte
    seconds = {key: 1e-3 * statistics.median(samples) for key, samples in peak_samples.items()}
    bandwidth = 2 * settings.copy_mb * 2 ** 20 / seconds.pop('copy')
    peak = Peak({
        dtype: max(settings.matmul_size ** 3 / s for (_, d, _), s in seconds.items() if d == dtype)
        for dtype in settings.dtypes
    }, bandwidth)
    for row in rows:
        if row.work is not None:
            row.roofline_ms = peak.roofline_ms(row.work, row.case.batch_size, row.case.dtype)
    return rows, peak


def built(
        cases: Sequence[Case], settings: Settings, deadline: float) -> Iterator[tuple[Case, Forward | None, Row]]:
    """Build and check each case; the ones of one model share its weights."""
    training = settings.mode == 'training'
    for (name, img_size), group in itertools.groupby(cases, key=lambda case: (case.model, case.img_size)):
        if time.monotonic() > deadline:
            yield from ((case, None, Row(case, TIME_IS_UP)) for case in group)
            continue
        net = create(dataclasses.replace(find(name), img_size=img_size))
        params = sum(p.numel() for p in net.parameters())
        image = torch.randn(1, 3, img_size, img_size)
        fused = fuse(net, image)
        work = None if training else measure_work(fused, image)
        net, fused = net.to(settings.device), fused.to(settings.device)
        for case in group:
            row = Row(case, 'ok', work=work, params=params)
            forward = None
            try:
                if time.monotonic() > deadline:
                    raise TimeoutError
                x = torch.randn(case.batch_size, 3, img_size, img_size, device=settings.device)
                if training:
                    forward = training_step(net, x, case, row)
                else:
                    forward = inference(net, fused if case.fused else net, x, case, settings, row)
            except Exception as e:  # whatever a runtime raises: it is what the row has to say
                row.status = reason(e)
            yield case, forward, row


def reference(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits in IEEE float32. What a device computes of the first image is compared with the CPU.

    Raises:
        ArithmeticError: The device does not compute in IEEE float32.
    """
    set_arithmetic('float32')
    expected = net(x)
    if x.device.type != 'cpu':
        error = relative_error(net(x[:1]), copy.deepcopy(net).cpu()(x[:1].cpu()))
        if not error <= TOLERANCE['float32']:
            raise ArithmeticError(f'float32 on {x.device.type} is not IEEE: relative error {error:.1e} to the CPU')
    return expected


def inference(
        net: nn.Module, candidate: nn.Module, x: torch.Tensor, case: Case, settings: Settings, row: Row) -> Forward:
    """A checked forward pass, `net` being the model as it is."""
    with torch.no_grad():  # no_grad, because export fails under inference_mode and torch.compile would recompile
        expected = reference(net, x)
        set_arithmetic(case.dtype)
        memory_format = MEMORY_FORMATS[case.memory_format]
        forward = RUNTIMES[case.runtime](
            candidate.to(memory_format=memory_format), x.to(memory_format=memory_format), case.dtype,
            settings.threads)
        row.error = relative_error(forward(), expected)
    if not row.error <= TOLERANCE[case.dtype]:  # also for NaN
        row.status = f'wrong output: relative error {row.error:.1e}'
    return forward


def training_step(net: nn.Module, x: torch.Tensor, case: Case, row: Row) -> Forward:
    """Forward, backward and AdamW step, whose loss and memory are known. Lower dtypes are autocast, as in train.py."""
    if case.fused or case.runtime not in ('eager', 'compile'):
        raise Unsupported(f'no training {"of a fused model" if case.fused else "with " + case.runtime}')
    if case.dtype == 'tf32' and x.device.type != 'cuda':
        raise Unsupported(f'no TF32 on {x.device.type}')
    set_arithmetic('float32')
    expected = nn.functional.cross_entropy(net.train()(x), targets(x)).detach()
    net.eval()
    set_arithmetic(case.dtype)
    step, loss, trained = prepare_training(case, x)
    row.kept_mb = kept_mb(loss, trained, len(x))
    row.error = relative_error(loss(), expected)
    if not row.error <= TOLERANCE[case.dtype]:
        row.status = f'wrong loss: relative error {row.error:.1e}'
    row.memory_mb = peak_memory_mb(case, x.device)
    return step


def kept_mb(loss: Forward, net: nn.Module, batch_size: int) -> float:
    """What autograd keeps of each image between forward and backward pass, in MiB.

    What has the shape of a parameter is left out: weights, also those that autocast has cast.
    """
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.detach()
        return tensor.detach()  # itself it would keep the graph that keeps it, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()  # whose graph keeps what was packed, so that no address comes twice
    own = [*net.parameters(), *net.buffers()]
    shapes = {t.shape for t in own} | {t.shape[::-1] for t in own}  # linear layers keep their weight transposed
    size = sum(t.untyped_storage().nbytes() for t in kept.values() if t.shape not in shapes)
    del value
    return size / batch_size / 2 ** 20


def prepare_training(case: Case, x: torch.Tensor) -> tuple[Forward, Forward, nn.Module]:
    """A training step, the loss before it, and the model that is trained."""
    memory_format = MEMORY_FORMATS[case.memory_format]
    net = create(dataclasses.replace(find(case.model), img_size=case.img_size)).train()
    net, x = net.to(x.device).to(memory_format=memory_format), x.to(memory_format=memory_format)
    forward = compile_whole(net) if case.runtime == 'compile' else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def loss() -> torch.Tensor:
        with torch.autocast(x.device.type, DTYPES[case.dtype], enabled=DTYPES[case.dtype] != torch.float32):
            return nn.functional.cross_entropy(forward(x), targets(x))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    return step, loss, net


def targets(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x), device=x.device)


def peak_memory_mb(case: Case, device: torch.device) -> float | None:
    """The most memory that a training step uses: weights, gradients, optimizer state, activations and scratch space.

    As allocated by torch on CUDA, None on other devices.
    """
    if device.type != 'cuda':
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step, *_ = prepare_training(case, torch.randn(case.batch_size, 3, case.img_size, case.img_size, device=device))
    for _ in range(2):  # the first step creates the optimizer's state, the second one has all of it at once
        step()
    return (torch.cuda.max_memory_allocated() - before) / 2 ** 20


def interleave(forwards: dict[Any, Forward], settings: Settings) -> dict[Any, list[float]]:
    """Time all of them in each round, so that a machine that slows down slows all of them.

    Returns:
        Milliseconds of each iteration, between an idle device before and after.
    """
    samples: dict[Any, list[float]] = {key: [] for key in forwards}
    with torch.set_grad_enabled(settings.mode == 'training'), torch.compiler.set_stance('fail_on_recompile'):
        for key, forward in forwards.items():
            set_arithmetic(dtype_of(key))
            warm_up(forward, settings)
        for _ in range(settings.rounds):
            for key, forward in forwards.items():
                set_arithmetic(dtype_of(key))
                forward()  # brings weights and activations back into the caches that others have used meanwhile
                samples[key] += [timed_ms(forward, settings.device) for _ in range(settings.iterations)]
    return samples


def dtype_of(key: Any) -> str:
    """The dtype of a case, or of a measurement of the machine's peak."""
    if isinstance(key, Case):
        return key.dtype
    return 'float32' if key == 'copy' else key[1]


def warm_up(forward: Forward, settings: Settings) -> None:
    """Call until a call is no faster than the ones before it by more than a percent, or the time is over."""
    end = time.perf_counter() + settings.warm_up_s
    best = float('inf')
    while time.perf_counter() < end:
        times = [timed_ms(forward, settings.device) for _ in range(3)]
        if min(times) > 0.99 * best:
            break
        best = min(times)


def timed_ms(forward: Forward, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    forward()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def reason(error: Exception) -> str:
    """One line that says why a case has no times."""
    text = str(error) or type(error).__name__
    if isinstance(error, TimeoutError):
        return TIME_IS_UP
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return 'out of memory'
    prefix = 'unsupported' if isinstance(error, (Unsupported, ImportError)) else f'failed: {type(error).__name__}'
    return f'{prefix}: {text.strip().splitlines()[0]}'


def describe(case: Case) -> str:
    return (f'{case.model} {case.runtime} {"fused" if case.fused else "not fused"} {case.dtype} {case.memory_format} '
            f'batch {case.batch_size} {case.img_size}x{case.img_size}')
