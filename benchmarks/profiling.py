"""Where the time of a forward pass goes, by kind of operation."""
from collections import Counter

import torch

from .models import create, find, fuse
from .runtimes import RUNTIMES, openvino_request

__all__ = ['profile']

ITERATIONS = 30


def profile(name: str, runtime: str, dtype: str, threads: int) -> str:
    """Milliseconds of one fused model on one image, on the CPU, by what the runtime calls its kernels.

    Args:
        name: A model of timm.
        runtime: 'openvino', or one that runs in torch.
        dtype: float32, or what else the runtime has.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    model = find(name)
    x = torch.randn(1, 3, model.img_size, model.img_size)
    with torch.no_grad():
        net = fuse(create(model), x).to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
        times = (of_openvino if runtime == 'openvino' else of_torch)(net, x, runtime, dtype, threads)
    lines = [f'{ms:8.3f} ms  {kind}' for kind, ms in times.most_common(12)]
    return '\n'.join([f'{sum(times.values()):8.3f} ms  {name}, {runtime}, {dtype}, {threads} thread(s)', *lines])


def of_torch(net, x, runtime, dtype, threads) -> Counter[str]:
    forward = RUNTIMES[runtime](net, x, dtype, threads)
    for _ in range(5):
        forward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(ITERATIONS):
            forward()
    return Counter({e.key: 1e-3 * e.self_cpu_time_total / ITERATIONS for e in profiler.key_averages()})


def of_openvino(net, x, runtime, dtype, threads) -> Counter[str]:
    request = openvino_request(net, x, dtype, threads, profile=True)
    times: Counter[str] = Counter()
    for _ in range(ITERATIONS):
        request.infer()
        for node in request.get_profiling_info():
            times[f'{node.node_type} {node.exec_type}'] += 1e3 * node.real_time.total_seconds() / ITERATIONS
    return +times  # what was not executed took no time
