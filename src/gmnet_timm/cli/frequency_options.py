"""What the `gmnet-timm freq …` commands share: options, models, data, the machine, and where results go."""
import argparse
import contextlib
import re
from pathlib import Path
from typing import Any

from gmnet_timm.cli.options import (
    SOURCES,
    add_description,
    add_preprocessing,
    description,
    preprocessing,
    print_notes,
)
from gmnet_timm.errors import TargetExistsError, UserError, require


def add_command(
        commands,
        name: str,
        text: str,
        run,
        output: bool = True,
        force: bool = True,
) -> argparse.ArgumentParser:
    """Declare one of the commands."""
    parser = commands.add_parser(name, help=text, description=run.__doc__)
    parser.set_defaults(run=run, command=name)
    if output and force:
        parser.add_argument('--force', action='store_true', help='replace the results of an earlier call')
    if output:
        parser.add_argument(
            '--output', type=Path, metavar='DIR', help=f'folder to write (default: output/freq/{name}-MODEL)')
    return parser


def add_model(parser, name: str, **kwargs: Any) -> None:
    parser.add_argument(
        name, metavar='MODEL', help=f"a name of timm's, local-dir:FOLDER, hf-hub:OWNER/NAME, {SOURCES}", **kwargs)
    add_description(parser)
    add_preprocessing(parser)


def add_data(parser, own: bool = False) -> None:
    parser.add_argument(
        '--data-dir',
        metavar='DIR',
        help='image folder with one sub-folder per class' + (" (default: the run's own data)" if own else ''),
    )
    parser.add_argument('--dataset', default='', help='a dataset name of timm, such as torch/cifar10')
    parser.add_argument(
        '--split', help='sub-folder or split (default: validation; a folder without splits is taken as it is)')
    parser.add_argument('--class-map', default='', metavar='FILE', help='order of the classes, as for train.py')
    if own:
        parser.add_argument('--no-ema', action='store_true', help='ignore EMA weights in checkpoints')


def add_split(parser, radii: list[float]) -> None:
    parser.add_argument(
        '--radii', type=float, nargs='+', default=radii, metavar='R',
        help=f'in cycles per image (default: {" ".join(f"{r:g}" for r in radii)})')
    parser.add_argument('--keep-dc', action='store_true', help='keep the mean of each channel in high-pass images')
    parser.add_argument(
        '--restore-contrast', action='store_true', help="scale high-pass images to the image's standard deviation")
    parser.add_argument(
        '--edge-width', type=float, default=0., metavar='W',
        help='cycles per image over which a band fades out (default: 0, the hard edge of the paper)')
    parser.add_argument(
        '--split-space', choices=['normalized', 'pixels'], default='normalized',
        help='split what enters the model, or pixels before normalisation (default: %(default)s)')
    parser.add_argument(
        '--border', choices=['wrap', 'mirror'], default='wrap',
        help='what continues an image beyond its border: itself, or its mirror image (default: %(default)s)')
    parser.add_argument('--clip', action='store_true', help='clip filtered images to the range of pixels')


def add_bands(parser) -> None:
    parser.add_argument(
        '--bands',
        nargs='+',
        default=['low', 'high'],
        choices=['low', 'high', 'band-pass', 'band-stop'],
        help='low-pass and high-pass images of each radius; band-pass and band-stop between each two radii '
             '(default: low high)',
    )


def add_groups(parser) -> None:
    parser.add_argument(
        '--groups', nargs='+', metavar='LABEL',
        help='one label per model; those of one label are trainings of one model, of which the mean is drawn')


def check_groups(args: argparse.Namespace, count: int) -> None:
    """Before the work: one label per model, and what computes intervals over trainings."""
    if args.groups is not None:
        require('scipy.stats', 'freq')
    if args.groups is not None and len(args.groups) != count:
        raise UserError(f'--groups takes one label per model: {len(args.groups)} are given for {count}.')


def add_machine(parser, num_images: int | None = None) -> None:
    """Options of how a command runs; it evaluates all images and takes --amp unless it has a number of images."""
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')
    parser.add_argument('--batch-size', type=int, default=64, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default: %(default)s)')
    parser.add_argument(
        '--num-images', type=int, metavar='N', default=num_images,
        help=f'use N images, evenly spaced (default: {num_images or "all"})')
    if num_images is None:
        parser.add_argument('--amp', choices=['bfloat16', 'float16'], help='autocast to this type')


def eval_settings(args: argparse.Namespace):
    from gmnet_timm.frequency.evaluation import EvalSettings
    return EvalSettings(
        data_dir=args.data_dir, dataset=args.dataset, split=args.split, class_map=args.class_map,
        num_images=args.num_images, radii=tuple(args.radii), kinds=tuple(args.bands), options=split_options(args),
        amp_dtype=args.amp)


def split_options(args: argparse.Namespace):
    from gmnet_timm.frequency.bands import SplitOptions
    return SplitOptions(
        args.keep_dc, args.restore_contrast, args.split_space, args.edge_width, args.border, args.clip)


def number_or_all(text: str) -> int | None:
    if text != 'all' and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'give a number or all, not {text!r}')
    return None if text == 'all' else int(text)


def add_maps(parser, window: bool = True) -> None:
    parser.add_argument(
        '--layout', choices=['NCHW', 'NHWC', 'NLC', 'NCL'],
        help='layout of the named modules (default: found by following positions through the model)')
    if window:
        parser.add_argument('--window', choices=['hann'], help='taper maps to the border, against leakage')


def add_figures(parser, optional: bool = True) -> None:
    parser.add_argument(
        '--figure-formats', nargs='+', default=['png'], choices=['png', 'pdf', 'svg'], help='(default: png)')
    parser.add_argument(
        '--figure-width', type=float, metavar='INCHES',
        help='of figures, such as that of a column or a page in print (default: what the panels need)')
    if optional:
        parser.add_argument('--no-figure', action='store_true', help='write no figures, without matplotlib')


def figure_paths(args: argparse.Namespace, name: str) -> list[Path]:
    return [] if getattr(args, 'no_figure', False) else [args.output / f'{name}.{f}' for f in args.figure_formats]


def check_output(args: argparse.Namespace, *names: str, figures: list[str]) -> None:
    """Before the work: where results go, that figures can be drawn, and that no earlier results are replaced."""
    if args.output is None:
        specs = getattr(args, 'models', None) or getattr(args, 'runs', None) or [args.model]
        words = '-'.join([args.command, *(_short_name(str(spec)) for spec in specs)])
        args.output = Path('output', 'freq', words[:100])
    paths = [args.output / name for name in names]
    drawn = [path for name in figures for path in figure_paths(args, name)]
    if args.figure_width is not None and not 1 <= args.figure_width <= 40:
        raise UserError(f'--figure-width is from 1 to 40 inches, got {args.figure_width:g}.')
    if drawn:
        require('matplotlib', 'freq')
    for path in [*paths, *drawn]:
        if path.exists() and not getattr(args, 'force', True):  # commands that go on have no --force
            raise TargetExistsError(path)


def _short_name(spec: str) -> str:
    """Of a model or a run, for the name of a folder: that of its file, and where many are called so, of its folder."""
    path = Path(spec.partition('=')[2] or spec.rpartition(':')[2])
    stem = path.name.partition('.')[0]
    generic = stem in ('model_best', 'last', 'model', 'pytorch_model') or stem.startswith('checkpoint-')
    return re.sub(r'[^\w-]+', '-', f'{path.parent.name}-{stem}' if generic else stem).strip('-')


def save_figures(args: argparse.Namespace, name: str, draw, force: bool = False) -> None:
    """Draw a figure and write it in each format."""
    from gmnet_timm.frequency.figures import save_figure

    paths = figure_paths(args, name)
    figure = draw() if paths else None
    for path in paths:
        save_figure(figure, path, force=force or args.force, width=args.figure_width)
        print(path)


def labels_of(models) -> list[str]:
    """Names of models for figures: of the architecture, and where two are the same, of the file too."""
    names = [str(model.provenance.get('model', model.name)) for model in models]
    labels = [
        name if names.count(name) == 1 else f'{name} {Path(str(model.provenance.get("checkpoint", i))).parent.name}'
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    ]
    return labels if len(set(labels)) == len(labels) else [f'{label} ({i + 1})' for i, label in enumerate(labels)]


def chance_level(num_classes: list[int | None]) -> float | None:
    """Accuracy at chance in percent, None where models have different numbers of classes."""
    only = set(num_classes)
    return 100 / only.pop() if len(only) == 1 and all(only) else None  # type: ignore[operator]


def band_loader(args: argparse.Namespace, model, machine, labels: bool = True):
    """This process's images; with `labels`, of the classes of the model in its order."""
    from gmnet_timm.frequency.data import create_band_loader

    return create_band_loader(
        args.data_dir, model.data_config, dataset=args.dataset, split=args.split, class_map=args.class_map,
        num_classes=getattr(model.model, 'num_classes', None) if labels else None,
        class_names=model.class_names if labels else None,
        batch_size=args.batch_size, workers=args.workers, num_images=args.num_images, rank=machine.rank,
        world_size=machine.world_size)


def picture_loader(args: argparse.Namespace, model, machine):
    """The one picture of --image as a loader, which of several processes the first one has."""
    import torch

    from gmnet_timm.frequency.data import prepare_picture, read_picture

    config = model.data_config
    image = prepare_picture(read_picture(args.image, config['input_size'][0]), config)
    return [] if machine.rank else [(image, torch.zeros(1))]


class Machine:
    """The device and, under torchrun, this process's share of the data. Closes the process group at the end."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from timm.utils.distributed import init_distributed_device_so

        from gmnet_timm.device import resolve_device
        if args.batch_size < 1 or args.workers < 0:
            raise UserError('--batch-size must be positive, --workers not negative.')
        if args.num_images is not None and args.num_images < 1:
            raise UserError(f'--num-images must be positive, got {args.num_images}.')
        found = init_distributed_device_so(resolve_device(args.device))
        self.device = torch.device(found['device'])
        self.rank, self.world_size = found['global_rank'], found['world_size']
        self.kwargs = dict(
            device=self.device,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=args.batch_size,
            workers=args.workers,
        )

    @contextlib.contextmanager
    def holding(self, model):
        """The network on the device, which it leaves afterwards: one model at a time."""
        yield model.model.to(self.device)
        model.model.cpu()

    def of_each(self, models, measure) -> dict[str, Any]:
        """What `measure` makes of each model, on the device, by label."""
        found = {}
        for label, model in zip(labels_of(models), models, strict=True):
            with self.holding(model):
                found[label] = measure(model)
        return found

    def __enter__(self) -> 'Machine':
        return self

    def __exit__(self, *_) -> None:
        import torch
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def load(spec: str, args: argparse.Namespace):
    """Load a model, and print what had to be chosen or assumed."""
    from gmnet_timm.weights.model import load_model

    loaded = load_model(spec, preprocessing=preprocessing(args), **description(args))
    print_notes(loaded.notes)
    return loaded


def names_of_classes(args: argparse.Namespace, subject) -> list[str]:
    """Names of a model's classes: given, recorded with it, or ImageNet's for a head of its size; else none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    from gmnet_timm.weights.class_names import read_class_names

    if args.class_names:
        return read_class_names(args.class_names, subject.model.num_classes)
    if subject.class_names:
        return subject.class_names
    subset = infer_imagenet_subset(subject.model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(subject.model.num_classes)]
