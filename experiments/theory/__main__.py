"""What activations and gates do to spectra in theory, beside what is measured: python -m experiments.theory"""
import argparse
import math
import sys

from experiments.command import parser_for, run_command
from gmnet_timm.cli.frequency_options import (
    Machine,
    add_data,
    add_figures,
    add_machine,
    add_model,
    band_loader,
    check_output,
    labels_of,
    load,
    save_figures,
)
from gmnet_timm.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = parser_for('theory', _run_theory, __doc__)
    add_model(parser, 'model', nargs='?')
    add_data(parser)
    group = parser.add_argument_group('theory')
    group.add_argument(
        '--functions', nargs='+', metavar='NAME',
        help='ACTIVATION for f(x), ACTIVATION*x for the gate f(x) * x, of any activation of timm; identity*x is x * x '
             '(default: relu relu6 gelu relu*x relu6*x gelu*x identity*x)')
    group.add_argument(
        '--scales', type=float, nargs='+', default=[.8, 1.4, 3., 6., 12.], metavar='STD',
        help='standard deviations of the maps, without a model (default: 0.8 1.4 3 6 12)')
    group.add_argument(
        '--exponent', type=float, default=1.,
        help='of their amplitude spectrum 1 / radius^EXPONENT, without a model (default: %(default)g)')
    group.add_argument(
        '--amplitude', type=float, default=12., help='of the tone A sin t, without a model (default: %(default)g)')
    group.add_argument('--harmonics', type=int, default=10, help='how many to print (default: %(default)s)')
    add_machine(parser, num_images=64)
    add_figures(parser)
    return parser


def _run_theory(args: argparse.Namespace) -> int:
    """Write and draw what theory says that activations and gates do to spectra.

    With a model: for each of its gates, at the measured scale and spectrum of its input, beside what is measured.
    Without: for Gaussian maps of given scales, and for a pure tone, whose measured harmonics are set against their
    closed form.
    """
    from experiments.theory.predictions import FUNCTIONS

    functions = args.functions or list(FUNCTIONS)
    if args.model is not None:
        _theory_of_model(args, functions)
        return 0
    return _theory_of_maps(args, functions)


def _theory_of_model(args: argparse.Namespace, functions: list[str]) -> None:
    from experiments.figures import draw_theory_of_gates
    from experiments.theory.predictions import gate_rows, pointwise
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.spectra import layer_spectra

    check_output(args, 'theory-gates.csv', figures=['theory-gates'])
    for name in functions:
        pointwise(name)
    with Machine(args) as machine:
        model = load(args.model, args)
        loader = band_loader(args, model, machine)
        # more channels than `freq layers` looks at: theory takes each one's spectrum, and has no error of that choice
        layers = layer_spectra(model.model.to(machine.device), loader, channels=16, show_progress=True)
        if machine.rank:
            return
    rows = gate_rows(layers, functions)
    write_csv(rows, args.output / 'theory-gates.csv')
    print('High over low energy of the input and the product of each gate, and of the product in theory\n')
    print(f'{"gate":<28}' + ''.join(f'{head:>11}' for head in ('std', 'input', 'product', 'theory', *functions)))
    for row in rows:
        names = ('pre_gate_std', 'value_high_low', 'product_high_low', 'predicted_high_low')
        cells = [row[name] for name in (*names, *(f'predicted_{f}' for f in functions))]
        print(f'{row["layer"]:<28}' + ''.join(f'{cell:>11.4g}' for cell in cells))
    raised = sum(row['gain_low'] > 1 for row in rows)
    lowered = sum(row['gain_high'] < 1 for row in rows)
    print(f'\nThe product has more high/low than the input in {raised} of {len(rows)} gates, less in {lowered} (95 % '
          f'intervals over {rows[0]["images"]} images).\n{args.output / "theory-gates.csv"}')
    title = f'{labels_of([model])[0]}, {rows[0]["images"]} images'
    save_figures(args, 'theory-gates', lambda: draw_theory_of_gates(rows, title))


def _theory_of_maps(args: argparse.Namespace, functions: list[str]) -> int:
    from experiments.figures import draw_theory
    from experiments.theory.predictions import compare_harmonics, high_low, map_row, predict_maps
    from gmnet_timm.frequency.reports import write_csv

    if not (1e-3 <= args.amplitude <= 1e3 and 3 <= args.harmonics <= 1000):
        raise UserError('The amplitude must be from 0.001 to 1000, the number of harmonics from 3 to 1000.')
    if not all(1e-3 <= scale <= 1e3 for scale in args.scales) or not 0 <= args.exponent <= 4:
        raise UserError('Scales must be from 0.001 to 1000, the exponent from 0 to 4.')
    check_output(args, 'theory.csv', figures=['theory'])
    maps = predict_maps(functions, args.scales, exponent=args.exponent)
    rows = [map_row(prediction) for prediction in maps]
    write_csv(rows, args.output / 'theory.csv')
    print(f'High over low energy of f(x), x a Gaussian map with {high_low(maps[0].input):.3f}, by std of x\n')
    print(f'{"std":<8}{"beyond 6":>10}' + ''.join(f'{name:>12}' for name in functions))
    for scale in args.scales:
        found = [prediction for prediction in maps if prediction.scale == scale]
        print(f'{scale:<8g}{100 * found[0].beyond_6:>8.3g} %'
              + ''.join(f'{high_low(prediction.output):>12.3f}' for prediction in found))
    compared = compare_harmonics(args.amplitude, args.harmonics)
    print(f'\nAmplitudes of the harmonics of act(x) * x, x = {args.amplitude:g} sin t: measured (closed form)\n')
    print('n   ' + ''.join(f'{harmonics.activation:>26}' for harmonics in compared))
    for n in range(args.harmonics):
        cells = (f'{h.measured[n]:.6f} ({h.closed_form[n]:.6f})' for h in compared)
        print(f'{n:<4}' + ''.join(f'{cell:>26}' for cell in cells))
    print('\ndecay of act(x) * x:  ' + ', '.join(f'{h.activation} {_power(h.gate_decay)}' for h in compared))
    print('decay of act(x):      ' + ', '.join(f'{h.activation} {_power(h.activation_decay)}' for h in compared))
    worst = max(h.error for h in compared)
    print(f'largest difference from the closed form: {worst:.1e} of the largest harmonic\n{args.output / "theory.csv"}')
    save_figures(args, 'theory', lambda: draw_theory(maps))
    return 0 if worst < 1e-6 else 1


def _power(rate: float) -> str:
    return 'faster than any power' if rate == math.inf else f'n^-{rate:.2f}'


if __name__ == '__main__':
    sys.exit(run_command(parser()))
