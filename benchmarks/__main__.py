"""Measure GmNet and other models, and report.

    python -m benchmarks run latency --threads 1
    python -m benchmarks report benchmarks/results/*.json
    python -m benchmarks report benchmarks/results/*-latency.json --figure docs/benchmarks.svg
"""
import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from gmnet_timm.device import resolve_device
from gmnet_timm.errors import UserError

from .figure import draw
from .machine import describe_machine, keep_freed_memory, slug
from .measure import MEMORY_FORMATS, MODES, Settings, measure
from .models import MODELS, split
from .report import Results, report
from .runtimes import DTYPES, RUNTIMES

FOLDER = Path(__file__).parent / 'results'
BATCH_SIZES = {'latency': [1], 'throughput': [1, 32, 256], 'training': [32]}
FUSED = {'yes': (True,), 'no': (False,), 'both': (False, True)}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        'python -m benchmarks', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest='command', required=True)

    run = commands.add_parser('run', help='measure, and write a result file')
    run.add_argument('mode', choices=MODES)
    run.add_argument('--models', nargs='+', default=list(MODELS), metavar='MODEL',
                     help="names of timm, also with arguments: 'gmnet_s3 gate=fc' (default: GmNet and its peers)")
    run.add_argument('--device', default='auto')
    run.add_argument('--runtimes', nargs='+', choices=list(RUNTIMES), default=['eager'])
    run.add_argument('--fuse', dest='fused', choices=list(FUSED), help='default: yes, for training no')
    run.add_argument('--dtypes', nargs='+', choices=list(DTYPES), default=['float32'])
    run.add_argument('--memory-formats', nargs='+', choices=list(MEMORY_FORMATS), default=['channels_last'])
    run.add_argument('--batch-sizes', nargs='+', type=int, help=f'default: {BATCH_SIZES}')
    run.add_argument('--threads', type=int, help='of the CPU (default: as torch chooses)')
    run.add_argument('--img-size', type=int, help='default: that of the published accuracy')
    run.add_argument('--rounds', type=int, default=20, help='in each of which every case is timed (default: 20)')
    run.add_argument('--iterations', type=int, default=5, help='timed iterations per round (default: 5)')
    run.add_argument('--minutes', type=float, help='build no case after this time; the rest is reported as not run')
    run.add_argument('--smoke', action='store_true', help='see that everything works, in seconds; measures nothing')
    run.add_argument('--output', type=Path, help='default: benchmarks/results/MACHINE-MODE.json')

    show = commands.add_parser('report', help='print tables, draw the figure')
    show.add_argument('files', nargs='+', type=Path)
    show.add_argument('--figure', type=Path, help='draw accuracy against latency to this file, .svg or .png')
    return top


def settings(args: argparse.Namespace) -> Settings:
    device = resolve_device(args.device)
    large = torch.device(device).type != 'cpu'
    unknown = [name for name, _ in map(split, args.models) if not timm.is_model(name)]
    if unknown:
        raise UserError(f'timm has no model {", ".join(unknown)}: see timm.list_models().')
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in vars(args).items()}
    del values['command'], values['output']
    values |= dict(
        device=device,
        fused=FUSED[args.fused or ('no' if args.mode == 'training' else 'yes')],
        batch_sizes=tuple(args.batch_sizes or BATCH_SIZES[args.mode]),
        threads=args.threads or torch.get_num_threads(),
        matmul_size=8192 if large else 2048,
        copy_mb=1024 if large else 256,
        warm_up_s=3,
    )
    if args.smoke:
        values |= dict(
            models=values['models'][:2], batch_sizes=values['batch_sizes'][:1] if args.mode == 'latency' else (2,),
            rounds=2, iterations=1, img_size=64, matmul_size=256, copy_mb=16, warm_up_s=0.1)
    return Settings(**values)


def run(args: argparse.Namespace) -> None:
    chosen = settings(args)
    torch.backends.cudnn.benchmark = True  # its heuristics alone change the speed of convolutions
    kept = keep_freed_memory()
    machine = describe_machine(chosen.device, chosen.threads)
    machine['allocator'] = 'freed memory kept' if kept else 'default'
    rows, peak = measure(chosen, log=lambda line: print(line, file=sys.stderr, flush=True))
    command = 'python -m benchmarks ' + shlex.join(sys.argv[1:])
    results = Results(machine, dataclasses.asdict(chosen), command, peak, rows)
    path = args.output or FOLDER / ('smoke' if chosen.smoke else '') / f'{slug(machine)}-{chosen.mode}.json'
    results.save(path)
    print(report([results]))
    print(f'wrote {path}')


def show(args: argparse.Namespace) -> None:
    results = [Results.load(path) for path in args.files]
    print(report(results))
    if args.figure:
        draw(results, args.figure)


def main() -> None:
    args = parser().parse_args()
    try:
        run(args) if args.command == 'run' else show(args)
    except UserError as e:
        sys.exit(f'error: {e}')


if __name__ == '__main__':
    main()
