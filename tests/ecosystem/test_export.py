"""What GmNets are exported to computes what eager float32 computes.

The weights are random, with norms, layer scales and clips that matter: leaving out one of them, in one block, changes
the logits by 7 % of their norm or more. Exports in float32 differ by the order of their sums: 70 layers deep that was
up to 8e-7 (docs/ecosystem.md), some ten times what one rounding makes.
"""
import numpy as np
import pytest
import timm
import torch
from model_helpers import create as create_unclipped
from model_helpers import relative_error
from timm.utils import reparameterize_model

timmx = pytest.importorskip('timmx', reason='timmx is installed on Python 3.11 to 3.13')
ct = pytest.importorskip('coremltools')
import ncnn  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
import openvino  # noqa: E402
from coremltools.converters.mil.frontend.milproto.load import load as load_mil  # noqa: E402

pytestmark = pytest.mark.ecosystem

FLOAT32 = 2e-6
# OpenVINO takes bfloat16 by default where the CPU has it
OPENVINO_FLOAT32 = {'INFERENCE_PRECISION_HINT': 'f32'}
DYNAMIC = ({0: torch.export.Dim('batch', min=1, max=8)},)


def create(name, **kwargs):
    """A model whose activations often exceed 6, where ReLU6 clips."""
    model = create_unclipped(name, **kwargs)
    for layer, module in model.named_modules():
        if layer == 'stem.0.conv' or layer.endswith('f1.conv'):
            module.weight.data.mul_(6)
    return model


# --- what runs a file: images (N, 3, H, W) to logits ------------------------------------------------------------------


def run_torch_export(path, images):
    return torch.export.load(path).module()(images)


def run_torchscript(path, images):
    return torch.jit.load(path)(images)


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def run_openvino(path, images):
    return openvino.Core().compile_model(path, 'CPU', OPENVINO_FLOAT32)(images.numpy())[0]


def run_executorch(path, images):
    from executorch.runtime import Runtime
    return Runtime.get().load_program(str(path)).load_method('forward').execute([images])[0]


def run_litert(path, images):
    from ai_edge_litert.interpreter import Interpreter
    run = Interpreter(model_path=str(path)).get_signature_runner('serving_default')
    (name, details), = run.get_input_details().items()
    if details['shape'][-1] == 3:
        images = images.permute(0, 2, 3, 1)
    return next(iter(run(**{name: images.numpy()}).values()))


def run_ncnn(path, images):
    net = ncnn.Net()
    net.load_param(str(path / 'model.ncnn.param'))
    net.load_model(str(path / 'model.ncnn.bin'))
    extractor = net.create_extractor()
    extractor.input('in0', ncnn.Mat(images[0].numpy()))
    return np.array(extractor.extract('out0')[1])[None]


def run_coreml(path, images):
    """Interpret a saved ML program with torch: Core ML itself runs on macOS only."""
    model = ct.models.MLModel(str(path), skip_model_load=True)
    spec = model.get_spec()
    program = load_mil(spec, spec.specificationVersion, file_weights_dir=model.weights_dir)
    values = {spec.description.input[0].name: images}

    def value(var):
        if var.val is None:
            return values[var.name]
        return var.val if isinstance(var.val, str) else torch.as_tensor(var.val)

    for op in program.functions['main'].operations:
        if op.op_type != 'const':
            a = {name: value(var) for name, var in op.inputs.items() if var is not None}
            values[op.outputs[0].name] = MIL_OPS[op.op_type](a)
    return values[spec.description.output[0].name]


def mil_conv(a):
    top, bottom, left, right = a['pad'].tolist()
    assert a['pad_type'] in ('custom', 'valid') and top == bottom and left == right
    return torch.nn.functional.conv2d(
        a['x'], a['weight'], a['bias'], a['strides'].tolist(), (top, left), a['dilations'].tolist(), int(a['groups']))


MIL_OPS = {
    'conv': mil_conv,
    'clip': lambda a: a['x'].clamp(a['alpha'], a['beta']),
    'mul': lambda a: a['x'] * a['y'],
    'add': lambda a: a['x'] + a['y'],
    'batch_norm': lambda a: torch.nn.functional.batch_norm(
        a['x'], a['mean'], a['variance'], a['gamma'], a['beta'], eps=float(a['epsilon'])),
    'reduce_mean': lambda a: a['x'].mean(a['axes'].tolist(), keepdim=bool(a['keep_dims'])),
    'reshape': lambda a: a['x'].reshape(a['shape'].tolist()),
    'linear': lambda a: torch.nn.functional.linear(a['x'], a['weight'], a['bias']),
}


# --- the tools' own ways ----------------------------------------------------------------------------------------------


def export(model, images, dynamic):
    return torch.export.export(model, (images,), dynamic_shapes=DYNAMIC if dynamic else None)


def to_torch_export(model, images, dynamic, folder):
    torch.export.save(export(model, images, dynamic), folder / 'model.pt2')
    return run_torch_export, folder / 'model.pt2'


def to_onnx(model, images, dynamic, folder, opset=None):
    torch.onnx.export(
        model, (images,), folder / 'model.onnx', dynamo=True, opset_version=opset, external_data=False, verbose=False,
        dynamic_shapes=DYNAMIC if dynamic else None)
    onnx.checker.check_model(folder / 'model.onnx', full_check=True)
    return run_onnx, folder / 'model.onnx'


def to_newest_onnx(*args):
    run, path = to_onnx(*args, opset=25)
    assert onnx.load(path).opset_import[0].version == 25
    return run, path


def to_openvino(model, images, dynamic, folder):
    # without `input` even a static program becomes one with dynamic height and width
    shape = [-1 if dynamic else len(images), *images.shape[1:]]
    converted = openvino.convert_model(export(model, images, dynamic), input=shape)
    openvino.save_model(converted, folder / 'model.xml', compress_to_fp16=False)
    return run_openvino, folder / 'model.xml'


def to_openvino_from_onnx(*args):
    return run_openvino, to_onnx(*args)[1]


def to_executorch(model, images, dynamic, folder):
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    program = to_edge_transform_and_lower(export(model, images, dynamic), partitioner=[XnnpackPartitioner()])
    (folder / 'model.pte').write_bytes(program.to_executorch().buffer)
    return run_executorch, folder / 'model.pte'


def to_litert(model, images, dynamic, folder):
    import litert_torch
    litert_torch.convert(model, (images,), dynamic_shapes=DYNAMIC if dynamic else None).export(folder / 'model.tflite')
    return run_litert, folder / 'model.tflite'


def to_coreml(model, images, dynamic, folder):
    program = export(model, images, dynamic).run_decompositions({})
    converted = ct.convert(program, convert_to='mlprogram', compute_precision=ct.precision.FLOAT32)
    converted.save(folder / 'model.mlpackage')
    return run_coreml, folder / 'model.mlpackage'


TOOLS = [to_torch_export, to_onnx, to_newest_onnx, to_openvino, to_openvino_from_onnx, to_executorch, to_litert,
         to_coreml]


def assert_computes_the_same(run, path, model, images, record_property, tolerance=FLOAT32):
    with torch.inference_mode():
        expected = model(images)
        actual = torch.as_tensor(np.asarray(run(path, images)))
    assert actual.shape == expected.shape
    error, largest = relative_error(actual, expected), (actual - expected).abs().max().item()
    record_property('relative_error', error)
    record_property('largest_error', largest)
    assert error < tolerance
    assert largest < 5 * tolerance * expected.abs().max()


# every tool with both kinds of network and of batch, in two exports in place of four
@pytest.mark.parametrize('to, fold, dynamic', [
    pytest.param(to, fold, dynamic, id=f'{to.__name__[3:]}-{"folded" if fold else "plain"}')
    for to in TOOLS
    for fold in (False, True)
    for dynamic in (fold and to is not to_litert,)  # which fails at timm's pooling, see docs/ecosystem.md
])
def test_computes_what_eager_computes(to, fold, dynamic, tmp_path, record_property):
    """Five blocks, with every operation of the sixteen that timmx exports below."""
    model = create('gmnet_s1', depths=(1, 1, 2, 1))
    exported = reparameterize_model(model) if fold else model
    run, path = to(exported, torch.randn(2, 3, 224, 224), dynamic, tmp_path)
    for batch in (1, 3) if dynamic else (2,):
        assert_computes_the_same(run, path, model, torch.randn(batch, 3, 224, 224), record_property)


def test_largest_size(tmp_path, record_property):
    model = create('gmnet_s4')
    _, path = to_onnx(reparameterize_model(model), torch.randn(2, 3, 224, 224), True, tmp_path)
    for run in run_onnx, run_openvino:
        assert_computes_the_same(run, path, model, torch.randn(1, 3, 224, 224), record_property)


# --- timmx, from a checkpoint, folds by itself ------------------------------------------------------------------------


FORMATS = [
    ('torch-export', 'model.pt2', run_torch_export, {}),
    ('torchscript', 'model.pt', run_torchscript, {}),
    ('onnx', 'model.onnx', run_onnx, {}),
    ('openvino', 'model.xml', run_openvino, {'fp16': False}),
    ('executorch', 'model.pte', run_executorch, {}),
    ('litert', 'model.tflite', run_litert, {}),
    ('litert', 'model.tflite', run_litert, {'nhwc_input': True}),
    ('coreml', 'model.mlpackage', run_coreml, {'compute_precision': 'float32'}),
    ('ncnn', 'model_ncnn', run_ncnn, {'fp16': False}),
]


@pytest.mark.filterwarnings('ignore:Fusing a GmNet in training mode')  # timmx calls eval() afterwards
@pytest.mark.parametrize('backend, file, run, options', FORMATS, ids=lambda x: x if isinstance(x, str) else '')
def test_timmx(backend, file, run, options, tmp_path, record_property):
    model = create('gmnet_s1')
    torch.save(model.state_dict(), tmp_path / 'checkpoint.pth')
    path = timmx.export_model(
        backend, 'gmnet_s1', checkpoint=tmp_path / 'checkpoint.pth', output=tmp_path / file, **options)
    # ncnn computes 1x1 and 3x3 convolutions by algorithms of its own, in float16 where the CPU has it
    tolerance = 1e-3 if backend == 'ncnn' else FLOAT32
    assert_computes_the_same(run, path, model, torch.randn(1, 3, 224, 224), record_property, tolerance)


def test_static_export_refuses_another_batch(tmp_path):
    """The dynamic tests above would say nothing if static exports took any batch."""
    run, path = to_onnx(create('gmnet_s1'), torch.randn(2, 3, 64, 64), False, tmp_path)
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match='invalid dimensions'):
        run(path, torch.randn(3, 3, 64, 64))


def test_features_are_exported(tmp_path):
    """A backbone has several outputs."""
    model = timm.create_model('gmnet_s1', features_only=True).eval()
    images = torch.randn(1, 3, 128, 96)
    _, path = to_onnx(model, images, False, tmp_path)
    session = onnxruntime.InferenceSession(path)
    outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for actual, expected in zip(outputs, model(images), strict=True):
        assert relative_error(torch.from_numpy(actual), expected) < FLOAT32
