"""What a measurement was taken on."""
import ctypes
import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ['describe_machine', 'keep_freed_memory', 'slug']

PACKAGES = ('torch', 'torchvision', 'timm', 'gmnet-timm', 'onnxruntime', 'onnxruntime-gpu', 'openvino',
            'onnx', 'numpy', 'torch-tensorrt')


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Hardware, clocks, versions and commit; what cannot be found out is left out."""
    info: dict[str, Any] = {
        'date': datetime.date.today().isoformat(),
        'commit': run('git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty', '--abbrev=12'),
        'os': platform.platform(),
        'python': platform.python_version(),
        'versions': versions(),
        'cpu': cpu('model name') or platform.processor() or platform.machine(),
        'cpu_model': ', '.join(f'{key} {cpu(key)}' for key in ('cpu family', 'model', 'stepping') if cpu(key)),
        'cores': len(re.findall(r'^processor', cpuinfo(), re.MULTILINE)) or torch.get_num_threads(),
        'cpu_mhz': sorted({float(mhz) for mhz in re.findall(r'^cpu MHz\s*: (.+)$', cpuinfo(), re.MULTILINE)}),
        'cpu_flags': [flag for flag in (cpu('flags') or '').split() if re.match('avx|amx|fma|sse4', flag)],
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


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpuinfo() -> str:
    try:
        return Path('/proc/cpuinfo').read_text()
    except OSError:
        return ''


def cpu(key: str) -> str:
    found: list[str] = re.findall(rf'^{key}\s*: (.+)$', cpuinfo(), re.MULTILINE)
    return found[0] if found else ''


def run(*command: str) -> str:
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
