"""A script per figure of the paper's frequency analysis, for ImageNet: python -m experiments.paper FIGURE | bash"""
import argparse
import sys

from experiments.command import parser_for, run_command


def parser() -> argparse.ArgumentParser:
    parser = parser_for('paper', _run_paper, __doc__, output=False)
    parser.add_argument(
        'figure', help='figure1 (a picture and its bands), resnet18 or mobilenetv2 (learning curves), activations or '
        'gates (tables of GmNet-S3), bands (GmNet-S3 beside others)')
    parser.add_argument('--data-dir', metavar='DIR', help='folder of ImageNet (default: $IMAGENET)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs of this machine (default: 1)')
    parser.add_argument('--batch-size', type=int, default=256, help='images per GPU and forward pass (default: 256)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[], help='trainings of each model (default: one)')
    parser.add_argument('--radii', type=float, nargs='+', default=[], metavar='R', help="(default: the paper's)")
    parser.add_argument(
        '--train-flags', default='', metavar='FLAGS', help="further flags of train.py, as in --train-flags='--amp'")
    return parser


def _run_paper(args: argparse.Namespace) -> None:
    """Print a bash script that trains the models of a figure, evaluates them and draws it: pipe it into bash.

    Run again, it resumes each training after its last finished epoch.
    """
    from experiments.paper.scripts import figure_script
    from gmnet_timm.training.recipe import plan_layout

    layout = plan_layout(args.gpus, args.batch_size)
    print(figure_script(args.figure, layout, args.data_dir, args.train_flags, args.seeds, args.radii), end='')


if __name__ == '__main__':
    sys.exit(run_command(parser()))
