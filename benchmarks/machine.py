"""The machine that is measured: what it is, its clocks, and how its libraries compute."""
import ctypes
import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = [
    'STATE', 'describe_machine', 'gpu_state', 'keep_freed_memory', 'set_arithmetic', 'slug', 'synchronize',
]

PACKAGES = ('torch', 'torchvision', 'timm', 'gmnet-timm', 'onnxruntime', 'onnxruntime-gpu', 'openvino', 'onnx', 'numpy')
# What nvidia-smi knows of a device under load. The reasons are a bit mask, 0 if nothing holds the clock down.
STATE = {
    'sm_mhz': 'clocks.sm',
    'memory_mhz': 'clocks.mem',
    'power_w': 'power.draw',
    'temperature_c': 'temperature.gpu',
    'throttle_reasons': 'clocks_event_reasons.active',
}


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Hardware, versions and commit; what cannot be found out is left out."""
    try:
        cpuinfo = Path('/proc/cpuinfo').read_text()
    except OSError:
        cpuinfo = ''
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(':') for line in cpuinfo.splitlines())}
    info: dict[str, Any] = {
        'date': datetime.date.today().isoformat(),
        'commit': run('git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=12'),
        'os': platform.platform(),
        'python': platform.python_version(),
        'versions': {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES},
        'cpu': cpu.get('model name') or platform.processor() or platform.machine(),
        'cpu_model': ', '.join(f'{key} {cpu[key]}' for key in ('cpu family', 'model', 'stepping') if key in cpu),
        'cores': cpuinfo.count('\nprocessor') + cpuinfo.startswith('processor') or torch.get_num_threads(),
        'cpu_mhz': cpu.get('cpu MHz'),
        'cpu_flags': [flag for flag in cpu.get('flags', '').split() if re.match('avx|amx|fma|sse4', flag)],
        'torch_cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'threads': threads,
        'device': device,
    }
    if torch.device(device).type == 'cuda':
        info['gpu'] = torch.cuda.get_device_name()
        info['cuda'] = torch.version.cuda
        info['cudnn'] = torch.backends.cudnn.version()
        info['cudnn_benchmark'] = torch.backends.cudnn.benchmark
        info['nvidia_smi'] = run(
            'nvidia-smi', '--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode',
            '--format=csv')
    return {key: value for key, value in info.items() if value not in ('', [], None)}


def slug(info: dict[str, Any]) -> str:
    """A file name for the machine."""
    cpu_name = re.sub(r'\(\w+\)|processor|cpu|@.*', '', str(info['cpu']).lower())
    name = info['gpu'] if 'gpu' in info else f'{cpu_name} {info["cores"]} cores'
    return re.sub(r'[^a-z0-9]+', '-', str(name).lower()).strip('-')


def run(*command: str) -> str:
    """What a command prints, '' where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''


def keep_freed_memory() -> bool:
    """Make glibc keep what is freed, instead of giving it back to the system and asking for it again in the next call.

    Otherwise the time of page faults is measured too, which depends on what else the process has allocated before.
    Returns whether it could.
    """
    trim_threshold, mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


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
    """Wait for a device."""
    if torch.device(device).type != 'cpu':
        torch.accelerator.synchronize()


def gpu_state(device: str) -> dict[str, str] | None:
    """Clocks, power, temperature and throttle reasons of the current CUDA device, as nvidia-smi prints them."""
    if torch.device(device).type != 'cuda':
        return None
    uuid = str(torch.cuda.get_device_properties(torch.device(device)).uuid).removeprefix('GPU-')
    line = run('nvidia-smi', f'--id=GPU-{uuid}', f'--query-gpu={",".join(STATE.values())}',
               '--format=csv,noheader,nounits')
    return dict(zip(STATE, line.split(', '))) if line else None
