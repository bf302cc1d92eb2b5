"""Do gates use high frequencies better than activations? Trainings, tests and power: python -m experiments.study"""
import argparse
import sys

from experiments.command import parser_for, run_command
from gmnet_timm.errors import UserError, listed


def parser() -> argparse.ArgumentParser:
    parser = parser_for('study', _run_study, __doc__)
    parser.add_argument('--img-size', type=int, default=56, metavar='PIXELS', help='(default: %(default)s)')
    parser.add_argument(
        '--radii', type=float, nargs='+', default=[1., 2., 3., 4., 6., 9., 14.], metavar='R',
        help='in cycles per image (default: 1 2 3 4 6 9 14)')
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(10)), help='(default: 0 to 9)')
    parser.add_argument(
        '--tuning-seeds', type=int, default=2, metavar='N',
        help='further seeds to choose each learning rate with (default: %(default)s)')
    parser.add_argument(
        '--learning-rates', type=float, nargs='+', default=[3e-3, 1e-2, 3e-2], metavar='LR',
        help='to choose from (default: 0.003 0.01 0.03)')
    parser.add_argument('--bodies', nargs='+', choices=['ResNet', 'MobileNetV2'], help='(default: both)')
    parser.add_argument(
        '--variants', nargs='+', metavar='VARIANT', help='such as "ReLU(x)" "x·x" (default: those of models.py)')
    parser.add_argument('--epochs', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=32, help='(default: %(default)s)')
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')
    return parser


def _run_study(args: argparse.Namespace) -> None:
    """Train small networks with each activation and gate, and compare them on low-pass and high-pass images.

    A repeated call goes on where the last one stopped. Writes tables.
    """
    import torch

    from experiments.study.data import PhotoData
    from experiments.study.models import STUDIED, VARIANTS
    from experiments.study.report import write_report
    from experiments.study.trainings import StudySettings, run_study
    from gmnet_timm.device import resolve_device

    if args.epochs < 2 or args.batch_size < 2 or len(set(args.seeds)) < 2 or args.tuning_seeds < 1:
        raise UserError('The study needs at least 2 epochs (the first is the warm-up), 2 images per batch, 2 seeds to '
                        'compare and 1 to tune.')
    device = torch.device(resolve_device(args.device))
    data = PhotoData(args.img_size, batch_size=args.batch_size)
    unknown = [variant for variant in args.variants or () if variant not in VARIANTS]
    if unknown:
        raise UserError(f'There is no variant {listed(unknown)}. Variants: {", ".join(VARIANTS)}.')
    pairs = [(body, variant) for body in args.bodies or STUDIED for variant in args.variants or STUDIED[body]]
    run_study(
        args.output, data, StudySettings(tuple(args.radii), args.epochs), pairs, args.learning_rates, args.seeds,
        args.tuning_seeds, device)
    print(f'\n{write_report(args.output)}\n{args.output / "tests.csv"} and other tables beside it')


if __name__ == '__main__':
    sys.exit(run_command(parser()))
