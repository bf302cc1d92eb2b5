"""How much time `reparameterize_model` saves: the plain and the folded model, timed turn by turn in one run.

    python benchmarks/fusion.py --model gmnet_s3 --device cpu --threads 1

Turns are interleaved, so that a machine that slows down slows both. The ratio is taken turn by turn, and its median and
5th to 95th percentile are printed.
"""
import argparse
import platform
import statistics
import time

import timm
import torch
from timm.utils import reparameterize_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='gmnet_s3')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--img-size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=1, help='CPU threads')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--turns', type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    plain = timm.create_model(args.model).eval().to(args.device, memory_format=layout)
    folded = reparameterize_model(plain)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device).to(memory_format=layout)
    with torch.inference_mode():
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)
        for _ in range(5):
            timed(plain, x)
            timed(folded, x)
        times = [(timed(plain, x), timed(folded, x)) for _ in range(args.turns)]

    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) for model in (plain, folded)]
    layer_scales = [sum(name.endswith('.gamma') for name, _ in model.named_parameters()) for model in (plain, folded)]
    ratios = sorted(f / p for p, f in times)
    print(f'{args.model}, batch {args.batch_size}, {args.img_size}x{args.img_size}, float32, {layout}, '
          f'{device_name(args.device)}, {args.threads} thread(s), torch {torch.__version__}, timm {timm.__version__}')
    print(f'BatchNorms {norms[0]} -> {norms[1]}, layer scales {layer_scales[0]} -> {layer_scales[1]}')
    print(f'plain {1e3 * statistics.median(p for p, _ in times):.2f} ms, '
          f'folded {1e3 * statistics.median(f for _, f in times):.2f} ms (medians of {args.turns} turns)')
    print(f'folded / plain {statistics.median(ratios):.3f} '
          f'({ratios[len(ratios) // 20]:.3f} to {ratios[-1 - len(ratios) // 20]:.3f})')


def timed(model: torch.nn.Module, x: torch.Tensor) -> float:
    """Seconds of one forward pass, with the device idle before and after."""
    synchronize(x.device)
    start = time.perf_counter()
    model(x)
    synchronize(x.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == '__main__':
    main()
