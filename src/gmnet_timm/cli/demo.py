"""`gmnet-timm demo`."""
import argparse


def add_commands(commands) -> None:
    """Declare the command on the sub-parsers of `gmnet-timm`."""
    parser = commands.add_parser(
        'demo', help='train on photographs for a few minutes and show what happened', description=_run_demo.__doc__)
    parser.add_argument('--output', default='output/demo', help='folder for everything written (default: %(default)s)')
    parser.add_argument('--model', default='gmnet_s1', help='(default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=32, help='(default: %(default)s)')
    parser.add_argument('--lr', type=float, default=3e-3, help='(default: %(default)s)')
    parser.add_argument('--patches', type=int, default=320, help='training patches per class (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=42, help='(default: %(default)s)')
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')
    parser.add_argument('--workers', type=int, default=0, help='processes that load patches (default: %(default)s)')
    parser.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> None:
    """Train a GmNet to tell patches of eight photographs apart, in a few minutes on two CPU cores.

    The photographs come with scikit-image. Validation patches are from rows of them that training does not see. This
    shows that training, saving and loading work; it does not measure how well new photographs are recognised, nor
    anything about ImageNet.
    """
    from gmnet_timm.demo import run_demo

    print(run_demo(**{name: value for name, value in vars(args).items() if name != 'run'}))
