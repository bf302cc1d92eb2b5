"""Spectra around the gates of trained GmNets, and activations in their place: python -m experiments.spectra

Trains GmNet-S1 on the demo's photographs with each function and seed, then measures `high` on validation images.
"""
import argparse
import math
import sys
from pathlib import Path

from experiments.command import parser_for, run_command


def parser() -> argparse.ArgumentParser:
    parser = parser_for('spectra', _run_spectra, __doc__)
    parser.add_argument('--variants', nargs='+', metavar='NAME', help="(default: 'ReLU6(x)·x' 'ReLU(x)' 'GELU(x)')")
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3], help='(default: 0 to 3)')
    parser.add_argument('--patches', type=int, default=160, help='training patches per photograph (default: 160)')
    parser.add_argument('--epochs', type=int, default=5, help='(default: %(default)s)')
    return parser


def _run_spectra(args: argparse.Namespace) -> None:
    from experiments.spectra.trainings import VARIANTS, report, train_and_measure
    from gmnet_timm.errors import UserError
    from gmnet_timm.frequency.reports import read_csv, write_csv

    variants = args.variants or list(VARIANTS)
    if unknown := set(variants) - VARIANTS.keys():
        raise UserError(f'There is no variant {", ".join(sorted(unknown))}. Variants: {", ".join(VARIANTS)}.')
    for seed in args.seeds:
        for variant in variants:
            path: Path = args.output / f'{list(VARIANTS).index(variant)}-seed{seed}.csv'
            if path.exists():  # a finished training is a file, and is not repeated
                continue
            rows = train_and_measure(variant, seed, args.output / 'data', args.patches, args.epochs)
            write_csv(rows, path)
            mean = sum(row['log_ratio'] for row in rows) / len(rows)
            print(f'{variant}, seed {seed}: top-1 {rows[0]["top1"]:.1f} %, high × {math.exp(mean):.3f}', flush=True)
    rows = [row for path in sorted(args.output.glob('?-seed*.csv')) for row in read_csv(path)]
    write_csv(rows, args.output / 'spectra.csv')
    print(report(rows))


if __name__ == '__main__':
    sys.exit(run_command(parser()))
