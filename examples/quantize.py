"""Quantise a trained model to int8 with ONNX Runtime and with OpenVINO, and measure what it costs and what it saves.

    pip install 'gmnet-timm[ecosystem,demo]'
    gmnet-timm demo --output output/demo
    python examples/quantize.py local-dir:output/demo/model output/demo/data --output output/int8
"""
import argparse
import time
from pathlib import Path

try:
    import nncf
    import numpy as np
    import onnxruntime
    import openvino
    import timm
    import torch
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    from timm.data import create_dataset, create_transform, resolve_model_data_config
    from timm.utils import reparameterize_model
except ModuleNotFoundError as e:
    raise SystemExit(f"{e.name} is not installed. Install it with: pip install 'gmnet-timm[ecosystem,demo]'") from e

CALIBRATION_IMAGES, BATCH = 256, 64
TURNS, RUNS = 60, 10  # of the measurement of time


def read(model, data_dir, split, count=None):
    """Images (N, C, H, W) as float32 and labels (N,); `count` of them at random."""
    config = resolve_model_data_config(model)
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    dataset = create_dataset('', data_dir, split=split, input_img_mode=mode, transform=create_transform(**config))
    indices = np.random.default_rng(0).permutation(len(dataset))[:count]
    images, labels = zip(*(dataset[int(i)] for i in indices))
    return torch.stack(images).numpy(), np.array(labels)


def with_onnxruntime(model, calibration, folder):
    """Write float and int8 ONNX files; returns their paths and what runs them on one thread."""
    paths = folder / 'float.onnx', folder / 'int8.onnx'
    torch.onnx.export(
        model, (torch.from_numpy(calibration[:2]),), paths[0], dynamo=True, external_data=False, verbose=False,
        input_names=['images'], dynamic_shapes=({0: torch.export.Dim('batch')},))

    class Images(CalibrationDataReader):
        batches = iter([{'images': calibration[i:i + BATCH]} for i in range(0, len(calibration), BATCH)])

        def get_next(self):
            return next(self.batches, None)

    quant_pre_process(paths[0], folder / 'prepared.onnx')
    # by default ranges go from the smallest to the largest value: what the gate lets through has a long tail.
    # Weights of 7 bits, because sums of two products saturate at 16 bits on a CPU without VNNI
    quantize_static(
        folder / 'prepared.onnx', paths[1], Images(), per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider']) for path in paths]
    return paths, [lambda x, s=s: s.run(None, {'images': x})[0] for s in sessions]


def with_openvino(model, calibration, folder):
    """Write float and int8 OpenVINO files; returns their paths and what runs them on one thread."""
    paths = folder / 'float.xml', folder / 'int8.xml'
    example = torch.from_numpy(calibration[:2])
    program = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    network = openvino.convert_model(program, input=[-1, *calibration.shape[1:]])
    openvino.save_model(network, paths[0], compress_to_fp16=False)
    quantized = nncf.quantize(
        network,
        nncf.Dataset(list(calibration[:, None])),
        preset=nncf.QuantizationPreset.MIXED,  # activations need not be symmetric around zero
        subset_size=len(calibration),
        # NNCF's default, the mean over images of each image's largest value, cuts off what bright images need
        advanced_parameters=nncf.AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX),
    )
    openvino.save_model(quantized, paths[1])
    # where the CPU has bfloat16, that is the default
    options = {'INFERENCE_NUM_THREADS': 1, 'NUM_STREAMS': 1, 'INFERENCE_PRECISION_HINT': 'f32'}
    networks = [openvino.Core().compile_model(path, 'CPU', options) for path in paths]
    return [path.with_suffix('.bin') for path in paths], [lambda x, n=n: n(x)[0] for n in networks]


def time_of(run, image):
    start = time.perf_counter()
    for _ in range(RUNS):
        run(image)
    return (time.perf_counter() - start) / RUNS


def compare(name, paths, runs, images, labels):
    """Print what int8 changes. Times are those of one image, turn by turn."""
    said = [np.concatenate([run(images[i:i + BATCH]) for i in range(0, len(images), BATCH)]).argmax(1) for run in runs]
    top1 = [100 * (s == labels).mean() for s in said]
    size = [path.stat().st_size / 1e6 for path in paths]
    times = np.array([[time_of(run, images[:1]) for run in runs] for _ in range(TURNS + 3)][3:])  # three to warm up
    ratio, low, high = np.percentile(times[:, 1] / times[:, 0], [50, 5, 95])
    print(f'{name:<12} top-1 {top1[0]:.2f} -> {top1[1]:.2f} %, same answer {100 * (said[0] == said[1]).mean():.2f} %, '
          f'{size[0]:.2f} -> {size[1]:.2f} MB, {1e3 * np.median(times[:, 0]):.2f} ms x {ratio:.2f} '
          f'({low:.2f} to {high:.2f})')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='name for timm.create_model, e.g. local-dir:FOLDER or hf-hub:OWNER/NAME')
    parser.add_argument('data_dir', type=Path, help='folder with train/CLASS/IMAGE and validation/CLASS/IMAGE')
    parser.add_argument('--output', type=Path, default=Path('output/int8'), help='folder for the models')
    args = parser.parse_args()
    if not (args.data_dir / 'validation').is_dir():
        parser.error(f'there is no folder {args.data_dir}/validation')
    args.output.mkdir(parents=True, exist_ok=True)

    model = reparameterize_model(timm.create_model(args.model, pretrained=True).eval())
    calibration, _ = read(model, args.data_dir, 'train', CALIBRATION_IMAGES)
    images, labels = read(model, args.data_dir, 'validation')
    compare('ONNX Runtime', *with_onnxruntime(model, calibration, args.output), images, labels)
    compare('OpenVINO', *with_openvino(model, calibration, args.output), images, labels)


if __name__ == '__main__':
    main()
