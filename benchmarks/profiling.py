"""Where the time of a forward pass goes, by kind of operation."""
import collections
from typing import Counter

import torch

from .models import create, find, fold
from .runtimes import RUNTIMES, openvino_request

__all__ = ['profile']

CALLS = 30


def profile(name: str, runtime: str, precision: str, threads: int) -> str:
    """Milliseconds of one folded model on one image, on the CPU, by what the runtime calls its kernels.

    Args:
        name: A model of timm.
        runtime: 'openvino', or one that runs in torch.
        precision: float32, or what else the runtime has.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    model = find(name)
    x = torch.randn(1, 3, model.img_size, model.img_size)
    with torch.no_grad():
        net = fold(create(model), x).to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        times = (of_openvino if runtime == 'openvino' else of_torch)(net, x, runtime, precision, threads)
    lines = [f'{ms:8.3f} ms  {kind}' for kind, ms in times.most_common(12)]
    return '\n'.join([f'{sum(times.values()):8.3f} ms  {name}, {runtime}, {precision}, {threads} thread(s)', *lines])


def of_torch(net, x, runtime, precision, threads) -> Counter[str]:
    forward = RUNTIMES[runtime](net, x, precision, threads)
    for _ in range(5):
        forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(CALLS):
            forward()
    return collections.Counter({e.key: 1e-3 * e.self_cpu_time_total / CALLS for e in profiler.key_averages()})


def of_openvino(net, x, runtime, precision, threads) -> Counter[str]:
    request = openvino_request(net, x, precision, threads, profile=True)
    times: Counter[str] = collections.Counter()
    for _ in range(CALLS):
        request.infer()
        for node in request.get_profiling_info():
            times[f'{node.node_type} {node.exec_type}'] += 1e3 * node.real_time.total_seconds() / CALLS
    return +times  # what was not executed took no time
