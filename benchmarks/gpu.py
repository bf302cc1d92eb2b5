"""What a CUDA device needs that a CPU does not: arithmetic modes, events, its clocks."""
import subprocess
from typing import Any

import torch

__all__ = ['STATE', 'device_ms', 'gpu_state', 'release', 'set_arithmetic', 'synchronize']

# What nvidia-smi knows of a device under load. The reasons are a bit mask, 0 if nothing holds the clock down.
STATE = {
    'sm_mhz': 'clocks.sm',
    'memory_mhz': 'clocks.mem',
    'power_w': 'power.draw',
    'temperature_c': 'temperature.gpu',
    'throttle_reasons': 'clocks_event_reasons.active',
}


def set_arithmetic(dtype: str) -> None:
    """Let 'tf32' use TF32 and everything else IEEE arithmetic for float32 operands, in every CUDA library of torch.

    By default cuDNN computes float32 convolutions in TF32, but cuBLAS matmuls in IEEE float32. The older flags are set
    too, because torch.export reads them and refuses to go on where they contradict `fp32_precision`.
    """
    tf32 = dtype == 'tf32'
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    libraries: list[Any] = [matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    for library in libraries:
        library.fp32_precision = 'tf32' if tf32 else 'ieee'


def synchronize(device: str) -> None:
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize()


def release() -> None:
    """Give unused memory of the CUDA allocator back."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class device_ms:
    """Milliseconds between entry and exit on the device, from CUDA events; None elsewhere.

    Read `value` after the device has been synchronised.
    """

    def __init__(self, device: str):
        self.events = None
        if torch.device(device).type == 'cuda':
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __enter__(self):
        if self.events:
            self.events[0].record()
        return self

    def __exit__(self, *error) -> None:
        if self.events:
            self.events[1].record()

    @property
    def value(self) -> float | None:
        return self.events[0].elapsed_time(self.events[1]) if self.events else None


def gpu_state(device: str) -> dict[str, str] | None:
    """Clocks, power, temperature and throttle reasons of the current CUDA device, as nvidia-smi prints them."""
    if torch.device(device).type != 'cuda':
        return None
    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid).removeprefix('GPU-')
    query = f'--query-gpu={",".join(STATE.values())}'
    command = ['nvidia-smi', f'--id=GPU-{uuid}', query, '--format=csv,noheader,nounits']
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return dict(zip(STATE, line.split(', ')))
