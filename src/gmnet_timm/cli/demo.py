"""`gmnet-timm demo`."""
import argparse


def add_commands(commands) -> None:
    """Declare the command on the sub-parsers of `gmnet-timm`."""
    parser = commands.add_parser(
        'demo',
        help='train on photographs for a minute or two and show what happened',
        description=_run_demo.__doc__,
        argument_default=argparse.SUPPRESS,  # a resumed run keeps its own settings, so only those given are passed on
    )
    parser.add_argument('--output', default='output/demo', help='folder for everything written, default: output/demo')
    parser.add_argument('--resume', action='store_true', help='continue the run in the output folder')
    parser.add_argument('--model', help='default: gmnet_s1')
    parser.add_argument('--epochs', type=int, help='default: 5')
    parser.add_argument('--batch-size', type=int, help='default: 32')
    parser.add_argument('--lr', type=float, help='default: 3e-3')
    parser.add_argument('--patches', type=int, help='training patches per class, default: 320')
    parser.add_argument('--seed', type=int, help='default: 42')
    parser.add_argument('--device', help='default: a GPU if there is one')
    parser.add_argument('--workers', type=int, help='processes that load patches, default: 0')
    parser.set_defaults(run=_run_demo)


def _run_demo(args: argparse.Namespace) -> None:
    """Train a GmNet to tell patches of eight photographs apart, in at most three minutes on two CPU cores.

    The photographs come with scikit-image. Validation patches are from rows of them that training does not see. This
    shows that training, resuming, saving and loading work; it does not measure how well new photographs are recognised,
    nor anything about ImageNet.
    """
    from gmnet_timm.demo.train import run_demo
    print(run_demo(**{name: value for name, value in vars(args).items() if name != 'run'}))
