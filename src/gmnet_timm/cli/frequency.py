"""The `gmnet-timm freq …` commands."""
import argparse
import math
from pathlib import Path
from typing import Any

from gmnet_timm.cli.options import SOURCES, add_description, add_preprocessing, description, preprocessing, print_notes
from gmnet_timm.errors import UserError

DEFAULT_OUTPUT = 'output/freq'


def add_commands(commands) -> None:
    """Declare `freq` and its commands on the sub-parsers of `gmnet-timm`."""
    parser = commands.add_parser(
        'freq',
        help='how well models work on only the low or only the high frequencies of images',
        description='Band accuracies, learning curves, pictures and layer spectra, for any model of timm.',
    )
    commands = parser.add_subparsers(metavar='command', required=True)
    _add_eval(commands)
    _add_curves(commands)
    _add_image(commands)
    _add_layers(commands)
    _add_theory(commands)
    _add_study(commands)


def _add_eval(commands) -> None:
    parser = _command(commands, 'eval', 'accuracy of models on raw, low-pass and high-pass images', _run_eval)
    _add_model(parser, 'models', nargs='+')
    _add_data(parser)
    _add_split(parser, [12., 24., 36.])
    _add_bands(parser)
    _add_machine(parser)


def _run_eval(args: argparse.Namespace) -> None:
    """Evaluate models on images with only some of their frequencies. Writes eval.csv and eval.json."""
    from gmnet_timm.frequency.evaluation import evaluate_model, report_rows
    from gmnet_timm.frequency.reports import format_table, write_csv, write_json

    settings = _settings(args)
    _refuse_existing(args, 'eval.csv', 'eval.json')
    with _Machine(args) as machine:
        reports = [
            evaluate_model(_load(spec, args), settings, **machine.kwargs)
            for spec in args.models
        ]
        if machine.rank == 0:
            write_csv([row for report in reports for row in report_rows(report)], args.output / 'eval.csv')
            write_json(reports, args.output / 'eval.json')
            print(format_table(reports))
            print(f'\n{args.output / "eval.csv"}, {args.output / "eval.json"}')


def _add_curves(commands) -> None:
    parser = _command(
        commands, 'curves', 'band accuracy of the checkpoints of training runs by epoch', _run_curves, force=False)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_DIR', help='run folders of train.py or of the demo')
    _add_data(parser, own=True)
    _add_split(parser, [10.])
    _add_bands(parser)
    _add_machine(parser)
    parser.add_argument('--no-figure', action='store_true', help='write the CSV alone, without matplotlib')


def _run_curves(args: argparse.Namespace) -> None:
    """Evaluate the checkpoints of training runs, epoch by epoch, and draw them. Goes on where an earlier call stopped.

    train.py and the demo keep only some checkpoints; with --checkpoint-hist 1000, train.py keeps all.
    """
    from gmnet_timm.frequency.evaluation import evaluate_runs
    from gmnet_timm.frequency.extras import require_matplotlib
    from gmnet_timm.frequency.plots import plot_band_curves

    if not args.no_figure:
        require_matplotlib()
    table, figure = args.output / 'curves.csv', args.output / 'curves.png'
    with _Machine(args) as machine:
        rows = evaluate_runs(args.runs, _settings(args), table, use_ema=not args.no_ema, **machine.kwargs)
        if machine.rank:
            return
    print(table)
    if not args.no_figure:
        curves: dict[str, Any] = {}
        for row in rows:
            points = curves.setdefault(row['run'], {}).setdefault((row['band'], row['radius']), [])
            points.append((int(row['epoch']), *(float(row[name]) for name in ('top1', 'top1_low', 'top1_high'))))
        plot_band_curves(curves, figure, 'Accuracy by epoch', '95 % intervals over images')
        print(figure)


def _add_image(commands) -> None:
    parser = _command(commands, 'image', 'a picture, its bands, and what a model says of each', _run_image)
    parser.add_argument('file', type=Path, help='an image file')
    _add_model(parser, '--model', required=True)
    _add_split(parser, [12., 24., 36.])
    parser.add_argument(
        '--class-names', metavar='PATH', help='image folder, text file with one name per line, or imagenet-1k')


def _run_image(args: argparse.Namespace) -> None:
    """Draw a picture, its low-pass and high-pass images, and what a model says of each with its confidence."""
    import torch
    from PIL import Image
    from timm.data import create_transform

    from gmnet_timm.frequency.bands import band_images, list_bands
    from gmnet_timm.frequency.data import to_mode
    from gmnet_timm.frequency.extras import require_matplotlib
    from gmnet_timm.frequency.plots import plot_image_panel
    from gmnet_timm.frequency.split import check_corner

    require_matplotlib()
    subject = _load(args.model, args)
    config = subject.data_config
    check_corner(args.radii, config['input_size'])
    _refuse_existing(args, f'{args.file.stem}.png')
    try:
        with Image.open(args.file) as opened:
            picture = to_mode(opened, 'L' if config['input_size'][0] == 1 else 'RGB')
    except (OSError, SyntaxError, ValueError) as e:
        raise UserError(f'{args.file} cannot be read as an image: {e}') from e
    images = create_transform(**config, is_training=False)(picture)[None]
    bands = list_bands(args.radii)
    parts = list(band_images(images, bands, _options(args), config['mean'], config['std']))
    with torch.inference_mode():
        confidences = [subject.model(part).softmax(-1)[0] for part in parts]
    names = _class_names(args, subject)
    answers = []
    for confidence in confidences:
        top = confidence.argsort(descending=True)[:3].tolist()
        answers.append([(names[i] if names else f'class {i}', confidence[i].item()) for i in top])
    mean, std = (images.new_tensor(config[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    pixels = [(band.kind, band.radius, part[0] * std + mean) for band, part in zip(bands, parts, strict=True)]
    path = args.output / f'{args.file.stem}.png'
    plot_image_panel(pixels, answers, path, f'{subject.name}: {args.file.name}, radii in cycles per image')
    for (band, radius, _), lines in zip(pixels, answers, strict=True):
        head = band if radius is None else f'{band} r = {radius:g}'
        print(f'{head:<12} ' + ', '.join(f'{name} {100 * p:.1f} %' for name, p in lines))
    print(path)


def _add_layers(commands) -> None:
    parser = _command(commands, 'layers', 'spectra of features before and after gates', _run_layers)
    _add_model(parser, 'model')
    _add_data(parser)
    parser.add_argument('--modules', nargs='+', metavar='NAME', help='modules to look at (default: all gates)')
    _add_machine(parser, num_images=64)
    parser.add_argument('--no-figure', action='store_true', help='write the CSV alone, without matplotlib')


def _run_layers(args: argparse.Namespace) -> None:
    """Write and draw the radial power spectra of features before and after each gate of a model."""
    from gmnet_timm.frequency.data import create_band_loader
    from gmnet_timm.frequency.extras import require_matplotlib
    from gmnet_timm.frequency.plots import plot_layer_gains, plot_layer_spectra
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.spectra import layer_spectra

    if not args.no_figure:
        require_matplotlib()
    subject = _load(args.model, args)
    with _Machine(args) as machine:
        if machine.world_size > 1:
            raise UserError('freq layers runs in one process.')
        loader = create_band_loader(
            args.data_dir, subject.data_config, dataset=args.dataset, split=args.split, class_map=args.class_map,
            batch_size=args.batch_size, workers=args.workers, num_images=args.num_images)
        layers = layer_spectra(subject.model.to(machine.device), loader, args.modules)
    write_csv([row for layer in layers for row in layer.as_rows()], args.output / 'layers.csv')
    for layer in layers:
        print(
            f'{layer.name:<24} {layer.size[0]:>3}x{layer.size[1]:<3}  high/low energy before '
            f'{layer.high_low_ratio(False):8.4f}  after {layer.high_low_ratio(True):8.4f}')
    print(args.output / 'layers.csv')
    if not args.no_figure:
        title = f'{subject.name}, {len(layers[0].before)} images'
        for name, plot in (('layers.png', plot_layer_spectra), ('layers-gain.png', plot_layer_gains)):
            plot(layers, args.output / name, title)
            print(args.output / name)


def _add_theory(commands) -> None:
    parser = _command(commands, 'theory', 'harmonics of a gated tone against closed forms', _run_theory, output=False)
    parser.add_argument('--amplitude', type=float, default=12., help='of the tone A sin t (default: %(default)s)')
    parser.add_argument('--harmonics', type=int, default=10, help='how many to print (default: %(default)s)')


def _run_theory(args: argparse.Namespace) -> int:
    """Feed a pure tone to each gate, and set the harmonics that come out against the closed form."""
    from gmnet_timm.frequency.theory import compare_harmonics

    if not (1e-3 <= args.amplitude <= 1e3 and 3 <= args.harmonics <= 1000):
        raise UserError('The amplitude must be from 0.001 to 1000, the number of harmonics from 3 to 1000.')
    compared = compare_harmonics(args.amplitude, args.harmonics)
    print(f'Amplitudes of the harmonics of act(x) * x, x = {args.amplitude:g} sin t: measured (closed form)\n')
    print('n   ' + ''.join(f'{harmonics.activation:>26}' for harmonics in compared))
    for n in range(args.harmonics):
        cells = (f'{h.measured[n]:.6f} ({h.closed_form[n]:.6f})' for h in compared)
        print(f'{n:<4}' + ''.join(f'{cell:>26}' for cell in cells))
    print('\ndecay of act(x) * x:  ' + ', '.join(f'{h.activation} {_power(h.gate_decay)}' for h in compared))
    print('decay of act(x):      ' + ', '.join(f'{h.activation} {_power(h.activation_decay)}' for h in compared))
    worst = max(h.error for h in compared)
    print(f'largest difference from the closed form: {worst:.1e} of the largest harmonic')
    return 0 if worst < 1e-6 else 1


def _power(rate: float) -> str:
    return 'faster than any power' if rate == math.inf else f'n^-{rate:.2f}'


def _add_study(commands) -> None:
    parser = _command(
        commands, 'study', "band accuracy by epoch of the paper's models on photographs", _run_study, force=False)
    parser.set_defaults(output=Path('output/freq-study'))
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(5)), help='(default: 0 1 2 3 4)')
    parser.add_argument('--families', nargs='+', choices=['resnet18', 'gmnet_s1'], help='(default: all)')
    parser.add_argument('--epochs', type=int, default=10, help='(default: %(default)s)')
    parser.add_argument('--patches', type=int, default=128, help='per photograph (default: %(default)s)')
    parser.add_argument('--radii', type=float, nargs='+', default=[3., 10.], help='in cycles per patch')
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')


def _run_study(args: argparse.Namespace) -> None:
    """Train the paper's subjects on photographs and draw their band accuracy by epoch. A repeated call goes on."""
    import torch

    from gmnet_timm.device import resolve_device
    from gmnet_timm.frequency.split import check_corner
    from gmnet_timm.frequency.study import SUBJECTS, StudySettings, format_summary, run_study

    check_corner(args.radii, (64, 64))
    if args.epochs < 2 or args.patches < 4:
        raise UserError('The study needs at least 2 epochs (the first is the warm-up) and 4 patches a photograph.')
    device = torch.device(resolve_device(args.device))
    settings = StudySettings(epochs=args.epochs, patches=args.patches, radii=tuple(args.radii))
    summary = run_study(args.output, settings, args.seeds, args.families or tuple(SUBJECTS), device)
    print(f'\n{format_summary(summary)}\n\n{args.output / "summary.csv"} and figures beside it')


def _command(commands, name: str, text: str, run, output: bool = True, force: bool = True) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=run.__doc__)
    parser.set_defaults(run=run)
    if output and force:
        parser.add_argument('--force', action='store_true', help='replace the results of an earlier call')
    if output:
        parser.add_argument(
            '--output',
            type=Path,
            default=Path(DEFAULT_OUTPUT),
            metavar='DIR',
            help='folder to write (default: %(default)s)',
        )
    return parser


def _add_model(parser, name: str, **kwargs: Any) -> None:
    parser.add_argument(
        name, metavar='MODEL', help=f"a name of timm's, local-dir:FOLDER, hf-hub:OWNER/NAME, {SOURCES}", **kwargs)
    add_description(parser)
    add_preprocessing(parser)


def _add_data(parser, own: bool = False) -> None:
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


def _add_split(parser, radii: list[float]) -> None:
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


def _add_bands(parser) -> None:
    parser.add_argument(
        '--bands',
        nargs='+',
        default=['low', 'high'],
        choices=['low', 'high', 'band-pass', 'band-stop'],
        help='low-pass and high-pass images of each radius; band-pass and band-stop between each two radii '
             '(default: low high)',
    )


def _add_machine(parser, num_images: int | None = None) -> None:
    """Options of how a command runs; it evaluates all images and takes --amp unless it has a number of images."""
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')
    parser.add_argument('--batch-size', type=int, default=64, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=2, help='processes that load images (default: %(default)s)')
    parser.add_argument(
        '--num-images', type=int, metavar='N', default=num_images,
        help=f'use N images, evenly spaced (default: {num_images or "all"})')
    if num_images is None:
        parser.add_argument('--amp', choices=['bfloat16', 'float16'], help='autocast to this type')


def _settings(args: argparse.Namespace):
    from gmnet_timm.frequency.evaluation import EvalSettings
    return EvalSettings(
        data_dir=args.data_dir, dataset=args.dataset, split=args.split, class_map=args.class_map,
        num_images=args.num_images, radii=tuple(args.radii), kinds=tuple(args.bands), options=_options(args),
        amp_dtype=args.amp)


def _options(args: argparse.Namespace):
    from gmnet_timm.frequency.bands import SplitOptions
    return SplitOptions(args.keep_dc, args.restore_contrast, args.split_space, args.edge_width)


def _refuse_existing(args: argparse.Namespace, *names: str) -> None:
    """Before the work: do not replace the results of an earlier call."""
    for name in names:
        if (args.output / name).exists() and not args.force:
            raise UserError(
                f'{args.output / name} exists: choose another folder by --output, or give --force to replace it.')


class _Machine:
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

    def __enter__(self) -> '_Machine':
        return self

    def __exit__(self, *_) -> None:
        import torch
        if self.world_size > 1:
            torch.distributed.destroy_process_group()


def _load(spec: str, args: argparse.Namespace):
    """Load a model, and print what had to be chosen or assumed."""
    from gmnet_timm.source import load_model

    loaded = load_model(spec, preprocessing=preprocessing(args), **description(args))
    print_notes(loaded.notes)
    return loaded


def _class_names(args: argparse.Namespace, subject) -> list[str]:
    """Names of a model's classes: given, recorded with it, or ImageNet's for a head of its size; else none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    from gmnet_timm.checkpoint.class_names import read_class_names

    if args.class_names:
        return read_class_names(args.class_names, subject.model.num_classes)
    if subject.class_names:
        return subject.class_names
    subset = infer_imagenet_subset(subject.model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(subject.model.num_classes)]
