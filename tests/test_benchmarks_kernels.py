"""What Inductor makes of GmNet for GPUs that are not there: traced with fake tensors, compiled to machine code."""
import contextlib
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

# the newest torch comes with it: what is asked of Inductor here has other names in older ones
pytest.importorskip('onnxscript', reason="what benchmarks need is not installed: pip install 'gmnet-timm[bench]'")
triton = pytest.importorskip('triton', reason='Triton, which comes with the CUDA builds of torch, is not installed')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason='torch is built without CUDA'),
    pytest.mark.skipif(torch.cuda.is_available(), reason='a real GPU compiles for itself: make bench-gpu'),
]


class CodeIsThere(Exception):
    """Ends the compilation before anything would be loaded into a GPU."""


@contextlib.contextmanager
def pretended_gpu(capability: int):
    """Answers of a CUDA device of this compute capability (80: A100, 90: H100) to what Inductor and Triton ask it."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils._triton import has_triton
    from triton.backends.compiler import GPUTarget
    properties = SimpleNamespace(
        name='pretended', major=capability // 10, minor=capability % 10, multi_processor_count=108, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024)
    shared = {80: 166912, 90: 232448}[capability]
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget('cuda', capability, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device('cuda', 0),
        utils=SimpleNamespace(get_device_properties=lambda device: {'max_shared_mem': shared}))
    answers = {
        'is_available': True, 'device_count': 1, 'current_device': 0, 'get_device_properties': properties,
        'get_device_capability': (properties.major, properties.minor), '_lazy_init': None, 'random._lazy_init': None,
        'get_rng_state': torch.empty(0), 'set_rng_state': None, '_exchange_device': 0, '_maybe_exchange_device': 0,
        'synchronize': None,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(f'torch.cuda.{name}', lambda *args, answer=answer: answer))
        for interface in (CudaInterface, CudaInterface.Worker):
            stack.enter_context(mock.patch.object(
                interface, 'get_device_properties', staticmethod(lambda device=None: properties)))
        stack.enter_context(mock.patch.object(
            CudaInterface, 'get_compute_capability', staticmethod(lambda device=None: capability)))
        stack.enter_context(mock.patch.object(triton_helpers, 'set_driver_to_gpu'))
        stack.enter_context(mock.patch.object(triton.runtime.driver, '_active', driver))
        stack.enter_context(torch._inductor.config.patch(
            fx_graph_cache=False, force_disable_caches=True, use_static_triton_launcher=False))
        remembered = (DeviceProperties.create, has_triton)  # what other tests have asked, and what they may ask
        for answer in remembered:
            answer.cache_clear()
        yield
    for answer in remembered:
        answer.cache_clear()


def on_fake_device(net: torch.nn.Module) -> None:
    """Replace weights and buffers by fake ones on a CUDA device. Needs an active FakeTensorMode."""
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device='cuda')
                    tensors[name] = fake if tensors is module._buffers else torch.nn.Parameter(fake, False)


def generated_kernels(net: torch.nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Names and sources of the Triton kernels of a fused model in channels_last, batch 8."""
    from torch._inductor import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    net = reparameterize_model(net.eval()).to(dtype)
    with FakeTensorMode(), torch.no_grad():
        on_fake_device(net)
        weights = {
            name: w.to(memory_format=torch.channels_last) if w.ndim == 4 else w for name, w in net.state_dict().items()}
        x = torch.empty(8, 3, 224, 224, device='cuda', dtype=dtype).to(memory_format=torch.channels_last)

        def forward(x, *tensors):
            return (torch.func.functional_call(net, dict(zip(weights, tensors)), (x,)),)

        graph = make_fx(forward, decomposition_table=select_decomp_table())(x, *weights.values())
    for node in graph.graph.nodes:
        node.meta['original_aten'] = node.target  # what a kernel is made of is listed in its name
    code: list[str] = []

    def keep(text: str) -> None:
        code.append(text)
        raise CodeIsThere

    with mock.patch.object(GraphLowering, 'save_output_code', keep), pytest.raises(Exception, match='CodeIsThere'):
        compile_fx.compile_fx_inner(graph, [x, *weights.values()])
    return dict(re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code[0], re.M | re.S))


def machine_code(name: str, source: str) -> list:
    """The kernel compiled with each of Inductor's configurations of block sizes and warps."""
    from torch._inductor.codecache import PyCodeCache
    kernel = getattr(PyCodeCache.load(source), name)
    kernel.precompile(warm_cache_only=True)
    return [result.kernel.asm for result in kernel.compile_results]


@pytest.mark.parametrize('capability', [80, 90])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_gates_compile_for_gpus(capability, dtype):
    """Each gate of GmNet becomes one kernel, together with the bias of the convolution before it."""
    net = timm.create_model('gmnet_s1', depths=(1, 1, 1, 1))
    with pretended_gpu(capability):
        kernels = generated_kernels(net, dtype)
        gates = {
            name: source for name, source in kernels.items()
            if 'minimum(' in source and re.search(r'tmp\d+ \* tmp\d+', source)}
        assert len(gates) == 4, list(kernels)
        assert all('convolution' in name and '+' in source for name, source in gates.items())
        name, source = next(iter(gates.items()))
        for asm in machine_code(name, source):
            assert re.search(rf'\.target sm_{capability}', asm['ptx'])
            assert asm['cubin'][:4] == b'\x7fELF'
