"""Measure GmNet and other models, report, compare and profile.

    python -m benchmarks run latency --threads 1
    python -m benchmarks report benchmarks/results/*.json
    python -m benchmarks compare before.json after.json
    python -m benchmarks profile gmnet_s3 --runtime openvino
"""
import argparse
import shlex
import sys
from pathlib import Path

import timm
import torch

from gmnet_timm.device import resolve_device
from gmnet_timm.errors import UserError

from .machine import describe_machine, keep_freed_memory, slug
from .measure import LAYOUTS, Settings, measure
from .models import MODELS
from .profiling import profile
from .report import compare, report
from .results import Results
from .runtimes import DTYPES, RUNTIMES

ROOT = Path(__file__).parent


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        'python -m benchmarks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest='command', required=True)

    run = commands.add_parser('run', help='measure, and write a result file')
    run.add_argument('mode', choices=['latency', 'throughput', 'training'])
    run.add_argument('--models', nargs='+', default=list(MODELS), help='names of timm (default: GmNet and its peers)')
    run.add_argument('--device', default='auto')
    run.add_argument('--runtimes', nargs='+', choices=list(RUNTIMES), default=['eager'])
    run.add_argument('--fold', choices=['yes', 'no', 'both'], help='default: yes, for training no')
    run.add_argument('--precisions', nargs='+', choices=list(DTYPES), default=['float32'])
    run.add_argument('--layouts', nargs='+', choices=list(LAYOUTS), default=['channels_last'])
    run.add_argument('--batch-size', type=int, help='latency: 1, training: 32, throughput: where the sweep ends, 256')
    run.add_argument('--threads', type=int, help='of the CPU (default: as torch chooses)')
    run.add_argument('--img-size', type=int, help='default: that of the published accuracy')
    run.add_argument('--rounds', type=int, default=20, help='turns that each case gets (default: 20)')
    run.add_argument('--calls', type=int, default=5, help='timed calls a turn (default: 5)')
    run.add_argument('--default-allocator', action='store_true', help='let glibc give freed memory back')
    run.add_argument('--smoke', action='store_true', help='see that everything works, in seconds; measures nothing')
    run.add_argument('--output', type=Path, help='default: benchmarks/results/MACHINE-MODE.json')

    draw = commands.add_parser('report', help='draw the figure and write the table from result files')
    draw.add_argument('files', nargs='+', type=Path)
    draw.add_argument('--figure', type=Path, help='a file to draw accuracy against latency to')
    draw.add_argument('--document', type=Path, help='a Markdown file whose tables are replaced, between its markers')

    look = commands.add_parser('profile', help='where the time of a folded model goes, on the CPU')
    look.add_argument('model')
    look.add_argument('--runtime', choices=['eager', 'compile', 'compile-max', 'openvino'], default='eager')
    look.add_argument('--precision', choices=list(DTYPES), default='float32')
    look.add_argument('--threads', type=int, default=1)

    both = commands.add_parser('compare', help='ratios of two result files')
    both.add_argument('before', type=Path)
    both.add_argument('after', type=Path)
    return top


def settings(args: argparse.Namespace) -> Settings:
    training = args.mode == 'training'
    device = resolve_device(args.device)
    on_cpu = torch.device(device).type == 'cpu'
    unknown = [name for name in args.models if not timm.is_model(name)]
    if unknown:
        raise UserError(f'timm has no model {", ".join(unknown)}: see timm.list_models().')
    fold = args.fold or ('no' if training else 'yes')
    if args.smoke:
        args.rounds, args.calls, args.img_size = 2, 1, 64
        args.batch_size = 2 if args.mode != 'latency' else 1
        if args.models == list(MODELS):
            args.models = ['gmnet_s1', 'mobilenetv2_100']
    return Settings(
        mode=args.mode,
        models=tuple(args.models),
        device=device,
        runtimes=tuple(args.runtimes),
        folded={'yes': (True,), 'no': (False,), 'both': (False, True)}[fold],
        precisions=tuple(args.precisions),
        layouts=tuple(args.layouts),
        batch=args.batch_size or {'latency': 1, 'training': 32, 'throughput': 256}[args.mode],
        threads=args.threads or torch.get_num_threads(),
        rounds=args.rounds,
        calls=args.calls,
        img_size=args.img_size,
        product_size=256 if args.smoke else 2048 if on_cpu else 8192,
        copy_mb=16 if args.smoke else 256 if on_cpu else 1024,
        warm_up_s=0.1 if args.smoke else 3,
        smoke=args.smoke,
    )


def run(args: argparse.Namespace) -> None:
    chosen = settings(args)
    kept = not args.default_allocator and keep_freed_memory()
    machine = describe_machine(chosen.device, chosen.threads)
    machine['allocator'] = 'freed memory kept' if kept else 'default'
    rows, ceilings = measure(chosen, log=lambda line: print(line, file=sys.stderr, flush=True))
    command = 'python -m benchmarks ' + shlex.join(sys.argv[1:])
    results = Results(machine, chosen, command, ceilings, rows)
    name = f'{"smoke-" if chosen.smoke else ""}{slug(machine)}-{chosen.mode}.json'
    path = args.output or ROOT / 'results' / name
    results.save(path)
    print(report([results]))
    print(f'wrote {path} and {path.with_suffix(".csv").name}')


def main() -> None:
    args = parser().parse_args()
    try:
        if args.command == 'run':
            run(args)
        elif args.command == 'report':
            results = [Results.load(path) for path in args.files]
            print(report(results, args.figure, args.document))
        elif args.command == 'profile':
            print(profile(args.model, args.runtime, args.precision, args.threads))
        else:
            print(compare(Results.load(args.before), Results.load(args.after)))
    except UserError as e:
        sys.exit(f'error: {e}')


if __name__ == '__main__':
    main()
