"""What activations and gates do to the spectrum of Gaussian maps, exactly: python -m experiments.theory"""
import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch

from experiments.command import parser_for, run_command
from experiments.variants import Variant
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.gaussian import power_law, predict_pointwise
from gmnet_timm.frequency.reports import write_csv
from gmnet_timm.frequency.split import high_frequency_energy

FUNCTIONS = ('relu', 'relu6', 'gelu', 'relu*x', 'relu6*x', 'gelu*x', 'identity*x')


def parser() -> argparse.ArgumentParser:
    parser = parser_for('theory', _run_theory, __doc__)
    parser.add_argument(
        '--functions', nargs='+', default=list(FUNCTIONS), metavar='NAME',
        help='ACTIVATION for f(x), ACTIVATION*x for f(x) * x, of any activation of timm; identity*x is x * x '
             f'(default: {" ".join(FUNCTIONS)})')
    parser.add_argument(
        '--scales', type=float, nargs='+', default=[.5, 1., 3., 6., 12.], metavar='STD',
        help='standard deviations of the maps (default: 0.5 1 3 6 12)')
    parser.add_argument(
        '--means', type=float, nargs='+', default=[0., -1.5, -3.], metavar='STDS',
        help='means of the maps in standard deviations (default: 0 -1.5 -3)')
    parser.add_argument('--size', type=int, default=64, help='of the maps in pixels (default: %(default)s)')
    parser.add_argument(
        '--exponent', type=float, default=1., help='of their amplitude spectrum 1 / radius^EXPONENT (default: 1)')
    return parser


def predict_maps(
        functions: Sequence[str],
        scales: Sequence[float],
        means: Sequence[float],
        size: int = 64,
        exponent: float = 1.,
) -> list[dict[str, Any]]:
    """`high`, before and after each function, of Gaussian maps with the amplitude spectrum 1 / radius^exponent.

    Args:
        functions: Names, as for `Variant`.
        scales: Standard deviations of the maps.
        means: Their means in standard deviations.
        size: Height and width of the maps in pixels.
        exponent: 0 for white maps, 1 for the spectrum of natural images.

    Returns:
        One row per function, scale and mean. `high` is that of `high_frequency_energy`: white noise has 1.

    Raises:
        UserError: A function needs a second map.
    """
    spectrum = power_law(size, exponent)
    before = high_frequency_energy(spectrum.mean(0), size).item()
    rows = []
    for name in functions:
        function = Variant(name)
        if function.branches > 1:
            raise UserError(f'{name} depends on a second map: theory knows ACTIVATION and ACTIVATION*x.')
        for scale in scales:
            for mean in means:
                maps = spectrum * scale ** 2
                maps[:, 0, 0] = (mean * scale) ** 2
                power = predict_pointwise(function, torch.tensor([mean * scale]), maps, size)
                rows.append(dict(function=name, std=scale, mean_in_stds=mean, high_before=before,
                                 high_after=high_frequency_energy(power, size).item()))
    return rows


def _run_theory(args: argparse.Namespace) -> None:
    if not all(1e-3 <= scale <= 1e3 for scale in args.scales) or not 0 <= args.exponent <= 4:
        raise UserError('Scales must be from 0.001 to 1000, the exponent from 0 to 4.')
    rows = predict_maps(args.functions, args.scales, args.means, args.size, args.exponent)
    write_csv(rows, args.output / 'maps.csv')
    print(f'high of f(x), x a Gaussian map with {rows[0]["high_before"]:.3f}; white noise has 1\n')
    print(f'{"std":<6}{"mean/std":>9}' + ''.join(f'{name:>12}' for name in args.functions))
    for scale in args.scales:
        for mean in args.means:
            cells = [row['high_after'] for row in rows if (row['std'], row['mean_in_stds']) == (scale, mean)]
            print(f'{scale:<6g}{mean:>9g}' + ''.join(f'{cell:>12.3f}' for cell in cells))
    print(f'{args.output / "maps.csv"}')


if __name__ == '__main__':
    sys.exit(run_command(parser()))
