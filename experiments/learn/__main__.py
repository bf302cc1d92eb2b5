"""What small networks learn at which frequency, and when: python -m experiments.learn"""
import argparse
import sys

from experiments.command import parser_for, run_command


def parser() -> argparse.ArgumentParser:
    parser = parser_for('learn', _run_learn, __doc__)
    parser.add_argument(
        '--tasks', nargs='+', metavar='TASK',
        help='regression (a sum of sinusoids), pattern-white, pattern-pink, texture-white, texture-pink (images of '
             'which each band of frequencies carries one bit) (default: all)')
    parser.add_argument(
        '--variants', nargs='+', metavar='NAME',
        help='ACTIVATION for f(z), ACTIVATION*x for the gate f(z) * z, ACTIVATION*v for f(z) * v with v from a second '
             'linear map; any activation of timm (default: identity relu relu6 gelu identity*x relu*x relu6*x gelu*x '
             'gelu*v for the regression, some of them for images)')
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(10)), help='(default: 0 to 9)')
    parser.add_argument(
        '--tuning-seeds', type=int, nargs='+', default=[1000, 1001], metavar='SEED',
        help='seeds that choose the learning rate (default: 1000 1001)')
    parser.add_argument(
        '--learning-rates', type=float, nargs='+', default=[1e-3, 3e-3, 1e-2, 3e-2], metavar='LR',
        help='what is tried for each variant with seeds of its own, and beyond if the best is the first or the last '
             '(default: 0.001 0.003 0.01 0.03)')
    parser.add_argument('--steps', type=int, default=500, help='of a training (default: %(default)s)')
    parser.add_argument(
        '--scale', type=float, default=1.,
        help='standard deviation of what enters the activation at the start (default: %(default)g)')
    return parser


def _run_learn(args: argparse.Namespace) -> None:
    """Train small networks with different gates side by side, and compare what they learn at which frequency.

    Writes the curves of each task, the choice of learning rates, and paired comparisons of the gates, corrected for
    their number. A repeated call goes on; --force replaces runs of other settings.
    """
    from experiments.learn.trainings import TASKS, Settings, format_summary, run_learn

    tasks = tuple(args.tasks or TASKS)
    settings = Settings(
        seeds=tuple(args.seeds), tuning_seeds=tuple(args.tuning_seeds), learning_rates=tuple(args.learning_rates),
        steps=args.steps, scale=args.scale)
    runs = run_learn(args.output, settings, tasks, args.variants, args.force)
    print(f'\n{format_summary(runs)}\n\n{args.output / "comparisons.csv"} and other tables beside it')


if __name__ == '__main__':
    sys.exit(run_command(parser()))
