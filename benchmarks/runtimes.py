"""What runs a model: each runtime makes a function of a model and its input that computes the output, to be timed."""
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gmnet_timm.errors import require

__all__ = ['DTYPES', 'RUNTIMES', 'Forward', 'Unsupported', 'compile_whole']

Forward = Callable[[], torch.Tensor]
# 'tf32' is float32 in memory, computed with products of 10 bits of mantissa; 'float32' is IEEE arithmetic.
DTYPES = {'float32': torch.float32, 'tf32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


class Unsupported(Exception):
    """This combination of runtime, device and dtype does not exist."""


def eager(net: nn.Module, x: torch.Tensor, dtype: str, threads: int) -> Forward:
    net, x = cast(net, x, dtype)
    return lambda: net(x)


def compiled(net: nn.Module, x: torch.Tensor, dtype: str, threads: int) -> Forward:
    net, x = cast(net, x, dtype)
    return first_call(compile_whole(net), x)


def compiled_max(net: nn.Module, x: torch.Tensor, dtype: str, threads: int) -> Forward:
    """Kernels picked by timing them, and on a GPU in a CUDA graph.

    In channels_last Inductor may run 1x1 convolutions as matmuls of its own, whose epilogues can hold the gate.
    """
    net, x = cast(net, x, dtype)
    if x.device.type == 'cuda':
        torch._dynamo.mark_static_address(x)  # or the graph copies its input in each call
    return first_call(compile_whole(net, mode='max-autotune'), x)


def compile_whole(net: nn.Module, mode: str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Compile or raise. Models of one class share a cache unless isolated, and run uncompiled once it is full."""
    options: dict[str, Any] = dict(mode=mode, fullgraph=True, dynamic=False, isolate_recompiles=True)
    return torch.compile(net, **options)


def first_call(net: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Forward:
    """Compile now. Only frozen weights are packed for oneDNN on a CPU, and `options` of torch.compile come too late."""
    with torch._inductor.config.patch(freezing=x.device.type == 'cpu'):
        net(x)
    return lambda: net(x)


def cuda_graph(net: nn.Module, x: torch.Tensor, dtype: str, threads: int) -> Forward:
    """Eager kernels, launched all at once."""
    if x.device.type != 'cuda':
        raise Unsupported('CUDA graphs need a CUDA device')
    net, x = cast(net, x, dtype)
    graphed: Any = torch.cuda.make_graphed_callables(net, (x,))
    return lambda: graphed(x)


def onnxruntime(net: nn.Module, x: torch.Tensor, dtype: str, threads: int) -> Forward:
    if dtype == 'bfloat16' or x.device.type not in ('cpu', 'cuda'):
        raise Unsupported(f'no ONNX Runtime in {dtype} on {x.device.type}')
    ort = require('onnxruntime', 'bench')
    net, x = cast(net, x.contiguous(), dtype)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # or the threads of one model spin on while the next one is timed
    options.add_session_config_entry('session.force_spinning_stop', '1')
    device = x.device.type
    provider = {'cpu': 'CPUExecutionProvider', 'cuda': 'CUDAExecutionProvider'}[device]
    if provider not in ort.get_available_providers():
        raise Unsupported(f'the installed ONNX Runtime has no {provider}')
    # 1 is its default, and TF32 for what was asked as float32; heuristics would pick another algorithm in each session
    provider_options = {'use_tf32': int(dtype == 'tf32'), 'cudnn_conv_algo_search': 'EXHAUSTIVE'}
    with tempfile.TemporaryDirectory() as folder:
        session = ort.InferenceSession(
            str(export_onnx(net, x, Path(folder))), options,
            providers=[(provider, provider_options if device == 'cuda' else {})])
    output = torch.empty_like(net(x))
    binding = session.io_binding()
    element = x.numpy(force=True).dtype
    binding.bind_input(session.get_inputs()[0].name, device, 0, element, tuple(x.shape), x.data_ptr())
    binding.bind_output(session.get_outputs()[0].name, device, 0, element, tuple(output.shape), output.data_ptr())

    def forward(reads_from: torch.Tensor = x) -> torch.Tensor:  # which has to live as long as the binding
        session.run_with_iobinding(binding)
        return output

    return forward


def openvino(net: nn.Module, x: torch.Tensor, dtype: str, threads: int) -> Forward:
    hints = {'float32': 'f32', 'bfloat16': 'bf16'}
    if x.device.type != 'cpu' or dtype not in hints:
        raise Unsupported(f'no OpenVINO in {dtype} on {x.device.type}')
    ov = require('openvino', 'bench')
    core = ov.Core()
    if dtype == 'bfloat16' and 'BF16' not in core.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        raise Unsupported('this CPU has no bfloat16 instructions that OpenVINO uses')
    settings = {
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': threads,
        'INFERENCE_PRECISION_HINT': hints[dtype],  # unasked, it takes bfloat16 where the CPU has it
    }
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(net, x.contiguous(), Path(folder))
        request = core.compile_model(str(path), 'CPU', settings).create_infer_request()
    request.infer([x.contiguous().numpy()])  # it keeps the input

    def forward() -> torch.Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return forward


RUNTIMES: dict[str, Callable[[nn.Module, torch.Tensor, str, int], Forward]] = {
    'eager': eager,
    'compile': compiled,
    'compile-max': compiled_max,
    'cuda-graph': cuda_graph,
    'onnxruntime': onnxruntime,
    'openvino': openvino,
}


def cast(net: nn.Module, x: torch.Tensor, dtype: str):
    if dtype == 'tf32' and x.device.type != 'cuda':
        raise Unsupported(f'no TF32 on {x.device.type}')
    return copy.deepcopy(net).to(DTYPES[dtype]), x.to(DTYPES[dtype])


def export_onnx(net: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    for module in ('onnx', 'onnxscript'):
        require(module, 'bench')
    path = folder / 'model.onnx'
    torch.onnx.export(net, (x,), str(path), dynamo=True, external_data=False, verbose=False)
    return path
