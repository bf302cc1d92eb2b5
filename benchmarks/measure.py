"""Measuring: cases are built and checked one by one, then timed turn by turn."""
import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import statistics
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import nn

from .limits import Ceilings, Copy, Work, measure_work, product_forwards
from .models import create, find, fold
from .runtimes import DTYPES, RUNTIMES, Forward, Unsupported, compile_whole

__all__ = ['Case', 'Row', 'Settings', 'measure']

LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}

# Relative error of the logits, against those of the eager float32 model, above which a case is not timed. Random
# weights amplify rounding (MobileNetV2 in bfloat16 to 0.2); logits that have nothing to do with it are at 1.4.
TOLERANCE = {'float32': 1e-4, 'bfloat16': 0.3, 'float16': 0.05}


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    img_size: int
    runtime: str
    folded: bool
    precision: str
    layout: str  # contiguous or channels_last
    batch: int


@dataclasses.dataclass
class Row:
    """What came of a case: times, or the reason why there are none."""

    case: Case
    status: str  # 'ok' or the reason
    error: Optional[float] = None  # relative, of the logits
    memory_mb: Optional[float] = None  # training: the most that was in use
    samples_ms: List[float] = dataclasses.field(default_factory=list)
    roofline_ms: Optional[float] = None
    work: Optional[Work] = None
    params: int = 0  # of the model as it is trained


@dataclasses.dataclass(frozen=True)
class Settings:
    mode: str  # latency, throughput or training
    models: Tuple[str, ...]
    device: str
    runtimes: Tuple[str, ...]
    folded: Tuple[bool, ...]
    precisions: Tuple[str, ...]
    layouts: Tuple[str, ...]
    batch: int  # throughput: where the sweep ends
    threads: int
    rounds: int
    calls: int  # a round
    img_size: Optional[int]  # None for that of the published accuracy
    product_size: int
    copy_mb: int
    warm_up_s: float
    smoke: bool

    def cases(self, batch: int) -> Iterator[Case]:
        """Every combination, but one layout for what lays out data by itself."""
        for name, runtime, folded, precision, layout in itertools.product(
                self.models, self.runtimes, self.folded, self.precisions, self.layouts):
            if runtime in ('onnxruntime', 'openvino') and layout != self.layouts[0]:
                continue
            yield Case(name, self.img_size or find(name).img_size, runtime, folded, precision, layout, batch)


def measure(settings: Settings, log: Callable[[str], None] = print) -> Tuple[List[Row], Ceilings]:
    """Measure every case of the settings.

    Returns:
        A row for each case, whether it could be timed or not, and the machine's ceilings in the same minutes.
    """
    torch.set_num_threads(settings.threads)
    limits: Dict[Any, Forward] = {
        ('product', precision, name): forward
        for precision in settings.precisions
        for name, forward in product_forwards(
            settings.product_size, settings.device, precision, settings.threads).items()
    }
    limits['copy'] = Copy(settings.copy_mb * 2 ** 20, settings.device)
    limit_samples: Dict[Any, List[float]] = {key: [] for key in limits}
    rows: List[Row] = []
    for cases in batches(settings, rows):
        forwards: Dict[Any, Forward] = {}
        for case, forward, row in built(cases, settings):
            log(f'{describe(case)}: {row.status}')
            rows.append(row)
            if forward and row.status == 'ok':
                forwards[case] = forward
        log(f'timing {len(forwards)} cases, {settings.rounds} rounds of {settings.calls} calls')
        samples = interleave({**limits, **forwards}, settings)
        for key in limits:
            limit_samples[key] += samples[key]
        for row in rows:
            row.samples_ms = samples.get(row.case, row.samples_ms)
        del forwards
        torch.compiler.reset()
        release()

    ceilings = ceilings_from(limit_samples, settings)
    for row in rows:
        if row.work is not None:
            row.roofline_ms = ceilings.roofline_ms(row.work, row.case.batch, row.case.precision)
    return rows, ceilings


def ceilings_from(samples_ms: Dict[Any, List[float]], settings: Settings) -> Ceilings:
    """The fastest product of each precision, and the copy, which reads and writes each byte."""
    seconds = {key: 1e-3 * statistics.median(samples) for key, samples in samples_ms.items()}
    copied = 2 * settings.copy_mb * 2 ** 20 / seconds.pop('copy')
    return Ceilings({
        precision: max(settings.product_size ** 3 / s for (_, p, _), s in seconds.items() if p == precision)
        for precision in settings.precisions
    }, copied)


def batches(settings: Settings, rows: List[Row]) -> Iterator[List[Case]]:
    """The cases that are timed together. A throughput sweep doubles the batch until a case slows down or fails."""
    if settings.mode != 'throughput':
        yield list(settings.cases(settings.batch))
        return
    cases = list(settings.cases(1))
    while cases:
        yield cases
        batch = 2 * cases[0].batch
        cases = [
            dataclasses.replace(case, batch=batch) for case in cases
            if batch <= settings.batch and not past_its_best(case, rows)
        ]


def past_its_best(case: Case, rows: List[Row]) -> bool:
    """Whether the last step of a sweep failed, or was slower than one before it."""
    sweep = [row for row in rows if dataclasses.replace(row.case, batch=case.batch) == case]
    if sweep[-1].status != 'ok':
        return True
    rates = [row.case.batch / statistics.median(row.samples_ms) for row in sweep]
    return rates[-1] < max(rates)


def built(cases: Sequence[Case], settings: Settings) -> Iterator[Tuple[Case, Optional[Forward], Row]]:
    """Build and check each case; the ones of one model share its weights."""
    training = settings.mode == 'training'
    for (name, img_size), group in itertools.groupby(cases, key=lambda case: (case.model, case.img_size)):
        net = create(dataclasses.replace(find(name), img_size=img_size))
        params = sum(p.numel() for p in net.parameters())
        image = torch.randn(1, 3, img_size, img_size)
        folded = fold(net, image)
        work = measure_work(net if training else folded, image)
        net, folded = net.to(settings.device), folded.to(settings.device)
        for case in group:
            row = Row(case, 'ok', work=None if training else work, params=params)
            x = torch.randn(case.batch, 3, img_size, img_size, device=settings.device)
            forward = None
            try:
                if training:
                    forward = training_step(net, x, case, row)
                else:
                    forward = inference(net, folded if case.folded else net, x, case, settings, row)
            except Exception as e:  # whatever a runtime raises: it is what the row has to say
                row.status = reason(e)
            yield case, forward, row


def inference(
        net: nn.Module, candidate: nn.Module, x: torch.Tensor, case: Case, settings: Settings, row: Row) -> Forward:
    """A checked forward pass, `net` being the model as it is."""
    with torch.no_grad():  # not inference mode, without which nothing is exported, and which would compile anew
        expected = net(x)
        forward = RUNTIMES[case.runtime](
            candidate.to(memory_format=LAYOUTS[case.layout]), x.to(memory_format=LAYOUTS[case.layout]), case.precision,
            settings.threads)
        row.error = relative_error(forward(), expected)
    if not row.error <= TOLERANCE[case.precision]:  # also for NaN
        row.status = f'wrong output: relative error {row.error:.1e}'
    return forward


def training_step(net: nn.Module, x: torch.Tensor, case: Case, row: Row) -> Forward:
    """Forward, backward and an AdamW step. Lower precisions are autocast, as in timm's train.py."""
    if case.folded or case.runtime not in ('eager', 'compile'):
        raise Unsupported(f'no training {"of a folded model" if case.folded else "with " + case.runtime}')
    step, loss = prepare_training(case, x)
    expected = nn.functional.cross_entropy(net.train()(x), targets(x)).detach()
    net.eval()
    row.error = relative_error(loss(), expected)
    if not row.error <= TOLERANCE[case.precision]:
        row.status = f'wrong loss: relative error {row.error:.1e}'
    row.memory_mb = peak_memory_mb(case, x.device)
    return step


def prepare_training(case: Case, x: torch.Tensor) -> Tuple[Forward, Forward]:
    """A training step, and the loss before it."""
    net = create(dataclasses.replace(find(case.model), img_size=case.img_size)).train()
    net, x = net.to(x.device).to(memory_format=LAYOUTS[case.layout]), x.to(memory_format=LAYOUTS[case.layout])
    forward = compile_whole(net) if case.runtime == 'compile' else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

    def loss() -> torch.Tensor:
        with torch.autocast(x.device.type, DTYPES[case.precision], enabled=case.precision != 'float32'):
            return nn.functional.cross_entropy(forward(x), targets(x))

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    return step, loss


def targets(x: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(x), device=x.device)


def peak_memory_mb(case: Case, device: torch.device) -> Optional[float]:
    """The most memory that a training step uses: weights, gradients, optimizer state, activations and scratch space.

    As allocated by torch on CUDA. On a CPU the growth of a fresh process, where nothing has left free memory behind.
    None where neither can be known.
    """
    if device.type == 'cuda':
        release()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        two_steps(case, device)
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    if device.type != 'cpu':
        return None
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        return pool.apply(resident_growth_mb, (case, torch.get_num_threads()))


def two_steps(case: Case, device: torch.device) -> None:
    """The first step creates the optimizer's state, the second one has all of it at once."""
    step, _ = prepare_training(case, torch.randn(case.batch, 3, case.img_size, case.img_size, device=device))
    step()
    step()


def resident_growth_mb(case: Case, threads: int) -> Optional[float]:
    torch.set_num_threads(threads)
    before = resident_mb('VmRSS')
    two_steps(case, torch.device('cpu'))
    return resident_mb('VmHWM') - before if before else None


def resident_mb(field: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its most (VmHWM); 0 where Linux does not tell."""
    with contextlib.suppress(OSError), open('/proc/self/status') as f:
        return next(int(line.split()[1]) / 2 ** 10 for line in f if line.startswith(field))
    return 0


def interleave(forwards: Dict[Any, Forward], settings: Settings) -> Dict[Any, List[float]]:
    """Time all in turns, so that a machine that slows down slows all of them.

    Returns:
        Milliseconds of each call, between an idle device before and after.
    """
    samples: Dict[Any, List[float]] = {key: [] for key in forwards}
    with torch.set_grad_enabled(settings.mode == 'training'), torch.compiler.set_stance('fail_on_recompile'):
        for forward in forwards.values():
            warm_up(forward, settings)
        for _ in range(settings.rounds):
            for key, forward in forwards.items():
                forward()  # brings weights and activations back into the caches that others have used meanwhile
                for _ in range(settings.calls):
                    samples[key].append(timed_ms(forward, settings.device))
    return samples


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


def synchronize(device: str) -> None:
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().cpu(), expected.double().cpu()
    return ((actual - expected).norm() / expected.norm()).item()


def reason(error: Exception) -> str:
    """One line that says why a case has no times."""
    text = str(error) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return 'out of memory'
    prefix = 'unsupported' if isinstance(error, (Unsupported, ImportError)) else f'failed: {type(error).__name__}'
    return f'{prefix}: {text.strip().splitlines()[0]}'


def describe(case: Case) -> str:
    return (f'{case.model} {case.runtime} {"folded" if case.folded else "plain"} {case.precision} {case.layout} '
            f'batch {case.batch} {case.img_size}x{case.img_size}')
