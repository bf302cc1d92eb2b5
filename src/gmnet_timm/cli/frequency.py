"""The `gmnet-timm freq …` commands."""
import argparse
import math
from pathlib import Path
from typing import Any

from gmnet_timm.cli.frequency_options import (
    Machine,
    add_bands,
    add_command,
    add_data,
    add_figures,
    add_machine,
    add_maps,
    add_model,
    add_split,
    band_loader,
    chance_level,
    check_output,
    eval_settings,
    labels_of,
    load,
    names_of_classes,
    number_or_all,
    picture_loader,
    save_figures,
    split_options,
)
from gmnet_timm.cli.options import starting, stated_words
from gmnet_timm.errors import UserError


def add_commands(commands) -> None:
    """Declare `freq` and its commands on the sub-parsers of `gmnet-timm`."""
    parser = commands.add_parser(
        'freq',
        help='how well models work on only the low or only the high frequencies of images',
        description='What models do with spatial frequencies, for any model of timm.',
    )
    commands = parser.add_subparsers(metavar='command', required=True)
    _add_eval(commands)
    _add_curves(commands)
    _add_image(commands)
    _add_layers(commands)
    _add_amplitude(commands)
    _add_heatmap(commands)
    _add_sensitivity(commands)
    _add_explore(commands)


def _add_eval(commands) -> None:
    parser = add_command(commands, 'eval', 'accuracy of models on raw, low-pass and high-pass images', _run_eval)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    add_split(parser, [12., 24., 36.])
    add_bands(parser)
    parser.add_argument('--baseline', metavar='MODEL', help='model that the others are compared with (default: first)')
    add_machine(parser)
    add_figures(parser)


def _run_eval(args: argparse.Namespace) -> None:
    """Evaluate models on images with only some of their frequencies.

    Writes eval.csv, eval.json, a figure, and each image's answer to eval-answers.npz. Several models are compared with
    the first one, or with --baseline, on the same images: eval-paired.csv.
    """
    from gmnet_timm.frequency.evaluation import band_curves, evaluate_model, report_rows
    from gmnet_timm.frequency.plots import draw_band_accuracy
    from gmnet_timm.frequency.reports import (
        format_paired,
        format_table,
        paired_rows,
        write_answers,
        write_csv,
        write_json,
    )

    settings = eval_settings(args)
    if args.baseline is not None and args.baseline not in args.models:
        raise UserError(f'--baseline {args.baseline} is not among the models.')
    check_output(args, 'eval.csv', 'eval.json', 'eval-answers.npz', 'eval-paired.csv', figures=['eval'])
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        reports = [evaluate_model(model, settings, **machine.kwargs) for model in models]
        if machine.rank:
            return
    write_csv([row for report in reports for row in report_rows(report)], args.output / 'eval.csv')
    labels = labels_of(models)
    accuracies = {label: report.pop('accuracies') for label, report in zip(labels, reports, strict=True)}
    write_json(reports, args.output / 'eval.json')
    print(format_table(reports))
    write_answers(accuracies, args.output / 'eval-answers.npz')
    if len(models) > 1:
        baseline = labels[args.models.index(args.baseline or args.models[0])]
        rows = paired_rows(accuracies, baseline)
        write_csv(rows, args.output / 'eval-paired.csv')
        print(f'\n{format_paired(rows)}')
    print(f'\n{args.output / "eval.csv"}, {args.output / "eval.json"}')
    curves = band_curves({label: report['results'] for label, report in zip(labels, reports, strict=True)})
    title = f'{reports[0]["results"][0]["count"]} images, bars: 95 % intervals'
    level = chance_level([report['num_classes'] for report in reports])
    save_figures(args, 'eval', lambda: draw_band_accuracy(curves, title, level))


def _add_curves(commands) -> None:
    parser = add_command(
        commands, 'curves', 'band accuracy of the checkpoints of training runs by epoch', _run_curves, force=False)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_DIR', help='run folders of train.py or of the demo')
    add_data(parser, own=True)
    add_split(parser, [10.])
    add_bands(parser)
    add_machine(parser)
    add_figures(parser)


def _run_curves(args: argparse.Namespace) -> None:
    """Evaluate the checkpoints of training runs, epoch by epoch, and draw them. Goes on where an earlier call stopped.

    train.py and the demo keep only some checkpoints; with --checkpoint-hist 1000, train.py keeps all.
    """
    from gmnet_timm.frequency.evaluation import evaluate_runs
    from gmnet_timm.frequency.plots import draw_band_curves

    check_output(args, figures=['curves'])
    table = args.output / 'curves.csv'
    with Machine(args) as machine:
        rows = evaluate_runs(args.runs, eval_settings(args), table, use_ema=not args.no_ema, **machine.kwargs)
        if machine.rank:
            return
    print(table)
    curves: dict[str, Any] = {}
    models = {row['run']: row['model'] for row in rows}
    names = list(models.values())
    for row in rows:
        label = row['model'] if names.count(row['model']) == 1 else f'{row["model"]} {Path(row["run"]).name}'
        radius = '-'.join(filter(None, [row['inner_radius'], row['radius']]))
        points = curves.setdefault(label, {}).setdefault((row['band'], radius), [])
        points.append((int(row['epoch']), *(float(row[name]) for name in ('top1', 'top1_low', 'top1_high'))))
    level = chance_level([int(row['num_classes']) if row['num_classes'] else None for row in rows])
    title = 'Accuracy by epoch, bars: 95 % intervals over images'
    save_figures(args, 'curves', lambda: draw_band_curves(curves, title, level), force=True)


def _add_image(commands) -> None:
    parser = add_command(commands, 'image', 'a picture, its bands, and what a model says of each', _run_image)
    parser.add_argument('file', type=Path, help='an image file, or an array (.npy) of height, width and channels')
    add_model(parser, '--model', required=True)
    add_split(parser, [12., 24., 36.])
    add_bands(parser)
    parser.add_argument('--top', type=int, default=3, metavar='K', help='print the K likeliest classes (default: 3)')
    _add_class_names(parser)
    add_figures(parser, optional=False)


def _add_class_names(parser) -> None:
    parser.add_argument(
        '--class-names', metavar='PATH', help='image folder, text file with one name per line, or imagenet-1k')


def _run_image(args: argparse.Namespace) -> None:
    """Draw a picture, its low-pass and high-pass images, and what a model says of each with its confidence."""
    from gmnet_timm.frequency.answers import confidences, top_classes
    from gmnet_timm.frequency.bands import BandSplit, list_bands
    from gmnet_timm.frequency.data import prepare_picture, read_picture, to_pixels
    from gmnet_timm.frequency.plots import draw_image_panel
    from gmnet_timm.frequency.split import check_corner

    if args.top < 1:
        raise UserError(f'--top must be positive, got {args.top}.')
    subject = load(args.model, args)
    config = subject.data_config
    check_corner(args.radii, config['input_size'])
    check_output(args, figures=[args.file.stem])
    image = prepare_picture(read_picture(args.file, config['input_size'][0]), config)
    split = BandSplit(image, split_options(args), config['mean'], config['std'])
    bands = list_bands(args.radii, args.bands)
    names = names_of_classes(args, subject)
    answers = [top_classes(p, args.top, names) for p in confidences(subject.model, split, bands)]
    for band, lines in zip(bands, answers, strict=True):
        head = str(band).replace(' ', ' r = ')
        print(f'{head:<12} ' + ', '.join(f'{name} {100 * p:.1f} %' for name, p in lines))
    parts = [(band, to_pixels(split(band)[0], config)) for band in bands]
    title = f'{labels_of([subject])[0]}: {args.file.name}, radii in cycles per image'
    save_figures(args, args.file.stem, lambda: draw_image_panel(parts, answers, title))


def _add_layers(commands) -> None:
    parser = add_command(commands, 'layers', 'spectra of features before and after gates or modules', _run_layers)
    add_model(parser, 'model')
    add_data(parser)
    parser.add_argument('--image', type=Path, metavar='FILE', help='look at one picture in place of data')
    parser.add_argument(
        '--modules', nargs='+', metavar='PATTERN',
        help='modules to look at, such as layer1.0 or stages.*.0 (default: all gates; the blocks where there are none)')
    parser.add_argument('--gates', nargs='+', metavar='PATTERN', help='gates to look at, by the module that multiplies')
    parser.add_argument(
        '--kinds', nargs='+', default=['gate'], choices=['gate', 'activation', 'attention'],
        help='what counts as a gate: also activations, x * (f(x) / x), and products with channel or spatial weights '
             '(default: gate)')
    parser.add_argument(
        '--channels', type=number_or_all, default=8, metavar='N',
        help='look at N channels of each map, or at all, which can take longer than the passes (default: 8)')
    add_maps(parser)
    add_machine(parser, num_images=256)
    add_figures(parser)


def _run_layers(args: argparse.Namespace) -> None:
    """Write and draw radial power spectra of operands and products of gates, or of inputs and outputs of modules."""
    from gmnet_timm.frequency.plots import draw_layers
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.spectra import layer_spectra

    check_output(args, 'layers.csv', 'layers-summary.csv', figures=['layers', 'layers-gain'])
    with Machine(args) as machine:
        model = load(args.model, args)
        with machine.holding(model) as network:
            layers = layer_spectra(
                network, picture_loader(args, model) or band_loader(args, model, machine, labels=False), args.modules,
                gates=args.gates, kinds=args.kinds, layout=args.layout, window=args.window, channels=args.channels,
                show_progress=True)
        if machine.rank:
            return
    write_csv([row for layer in layers for row in layer.as_rows()], args.output / 'layers.csv')
    write_csv([layer.summary_row() for layer in layers], args.output / 'layers-summary.csv')
    if args.modules is None and args.gates is None:
        plural = '' if len(layers) == 1 else 's'
        print(f'{len(layers)} gate{plural}' if layers[0].kind != 'module'
              else f'{len(layers)} block{plural}, as the model has no gates of this kind')
    print('high: energy beyond a quarter cycle per pixel, relative to white noise of the same map')
    for layer in layers:
        print(_describe_layer(layer))
    if any(math.isnan(signal.high) for layer in layers for signal in layer.signals.values()):
        print('undefined: a map of 3 pixels or fewer on a side has nothing on one side of the quarter, or is constant')
    print(f'{args.output / "layers.csv"}, {args.output / "layers-summary.csv"}')
    images = len(next(iter(layers[0].signals.values())).power)
    title = f'{labels_of([model])[0]}, {images} images'
    if any(signal.channels < signal.all_channels for layer in layers for signal in layer.signals.values()):
        title += f', {args.channels} channels of each map'
    save_figures(args, 'layers', lambda: draw_layers(layers, title))
    if any(layer.gain() is not None for layer in layers):
        save_figures(args, 'layers-gain', lambda: draw_layers(layers, title, gain=True))


def _describe_layer(layer) -> str:
    line = f'{layer.name}'
    for name, signal in layer.signals.items():
        error = f' ±{signal.high_error:.2g}' if signal.high_error and math.isfinite(signal.high_error) else ''
        line += f'\n    {name:<8} {signal.size[0]}x{signal.size[1]}  high {_number(signal.high)}{error}'
    if layer.statistics is not None:
        row = layer.summary_row()
        line += (
            f'  predicted {_number(row["predicted_high"])}  aliased {_percent(row["aliased"])}\n    '
            f'clipped {100 * row["clipped_low"]:.1f} + {100 * row["clipped_high"]:.1f} %  '
            f'pre-gate std {row["pre_gate_std"]:.3g}')
    return line


def _number(value: float) -> str:
    return f'{value:.3f}' if math.isfinite(value) else 'undefined'


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %' if math.isfinite(share) else 'undefined'


def _add_amplitude(commands) -> None:
    parser = add_command(commands, 'amplitude', 'relative log amplitude of features by depth', _run_amplitude)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    parser.add_argument('--modules', nargs='+', metavar='PATTERN', help='modules to look at (default: the blocks)')
    add_maps(parser, window=False)
    add_machine(parser, num_images=64)
    add_figures(parser)


def _run_amplitude(args: argparse.Namespace) -> None:
    """Write and draw the log amplitude at the corner of the spectrum minus that at zero frequency, by depth.

    As in Park & Kim 2022 (arXiv 2202.06709), for any models side by side.
    """
    from gmnet_timm.frequency.amplitude import log_amplitudes
    from gmnet_timm.frequency.plots import draw_log_amplitudes
    from gmnet_timm.frequency.reports import write_csv

    check_output(args, 'amplitude.csv', figures=['amplitude'])
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        found = {}
        for label, model in zip(labels_of(models), models, strict=True):
            with machine.holding(model) as network:
                found[label] = log_amplitudes(
                    network, band_loader(args, model, machine, labels=False), args.modules, layout=args.layout,
                    show_progress=True)
        if machine.rank:
            return
    rows = [dict(model=label, **row) for label, layers in found.items() for layer in layers for row in layer.as_rows()]
    write_csv(rows, args.output / 'amplitude.csv')
    for label, layers in found.items():
        print(f'{label}: {len(layers)} blocks, first {layers[0].name} {_number(layers[0].high)}, '
              f'last {layers[-1].name} {_number(layers[-1].high)}')
    print(args.output / 'amplitude.csv')
    title = f'Relative log amplitude, {next(iter(found.values()))[0].images} images'
    save_figures(args, 'amplitude', lambda: draw_log_amplitudes(found, title))


def _add_heatmap(commands) -> None:
    parser = add_command(
        commands, 'heatmap', 'error under perturbations of each direction and frequency', _run_heatmap, force=False)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    parser.add_argument(
        '--amplitudes', type=float, nargs='+', default=[.07], metavar='RMS',
        help='root mean square of the perturbation, pixels being 0 to 1 (default: 0.07, the norm 15.7 at 224x224)')
    parser.add_argument(
        '--step', type=int, default=8, help='distance of the frequencies in cycles per image (default: %(default)s)')
    parser.add_argument('--largest', type=int, metavar='R', help='largest frequency in each direction (default: all)')
    parser.add_argument('--clip', action='store_true', help='clip perturbed images to the range of pixels')
    parser.add_argument('--seed', type=int, default=0, help='of the random signs (default: %(default)s)')
    add_machine(parser, num_images=64)
    add_figures(parser)


def _run_heatmap(args: argparse.Namespace) -> None:
    """Add a Fourier basis image of each frequency to the pixels, and count errors: Yin et al. 2019 (arXiv 1906.08988).

    Every frequency is written when it is known, and a repeated call goes on where the last one stopped. --step 1 takes
    all frequencies, which is a matter of a GPU.
    """
    from gmnet_timm.frequency.heatmap import radial_summary
    from gmnet_timm.frequency.heatmap_run import run_heatmap
    from gmnet_timm.frequency.plots import draw_heatmaps
    from gmnet_timm.frequency.reports import write_csv

    check_output(args, figures=['heatmap'])
    table = args.output / 'heatmap.csv'
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        found: dict[str, Any] = {}
        for label, model in zip(labels_of(models), models, strict=True):
            with machine.holding(model):
                found[label] = run_heatmap(
                    model, band_loader(args, model, machine), args.amplitudes, table, step=args.step,
                    largest=args.largest, seed=args.seed, clip=args.clip, batch_size=args.batch_size,
                    data=f'{args.dataset} {args.data_dir} {args.split or ""}')
        if machine.rank:
            return
    rows = [
        dict(model=label, **row)
        for label, by_amplitude in found.items() for points in by_amplitude.values() for row in radial_summary(points)
    ]
    write_csv(rows, args.output / 'heatmap-radial.csv')
    for label, by_amplitude in found.items():
        for amplitude, points in by_amplitude.items():
            worst = max(points, key=lambda point: point.error)
            print(f'{label}, amplitude {amplitude:g}: mean error {sum(p.error for p in points) / len(points):.1f} %, '
                  f'largest {worst.error:.1f} % at ({worst.v}, {worst.u})')
    print(f'{table}, {args.output / "heatmap-radial.csv"}')
    level = chance_level([getattr(model.model, 'num_classes', None) for model in models])
    save_figures(args, 'heatmap', lambda: draw_heatmaps(
        found, f'Error under Fourier perturbations, {points[0].count} images', level and 100 - level), force=True)


def _add_sensitivity(commands) -> None:
    parser = add_command(commands, 'sensitivity', 'spectrum of the gradients with respect to images', _run_sensitivity)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    parser.add_argument(
        '--target', choices=['loss', 'logit'], default='loss', help='gradient of the cross-entropy, or of the logit')
    parser.add_argument('--window', choices=['hann'], help='taper gradients to the border')
    add_machine(parser, num_images=64)
    add_figures(parser)


def _run_sensitivity(args: argparse.Namespace) -> None:
    """Write and draw to which frequencies of a pixel change the loss of classifiers responds."""
    from gmnet_timm.frequency.plots import draw_sensitivity
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.sensitivity import input_sensitivity

    check_output(args, 'sensitivity.csv', figures=['sensitivity'])
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        found = {}
        for label, model in zip(labels_of(models), models, strict=True):
            with machine.holding(model) as network:
                found[label] = input_sensitivity(
                    network, band_loader(args, model, machine), model.data_config['std'], target=args.target,
                    window=args.window, show_progress=True)
        if machine.rank:
            return
    write_csv(
        [dict(model=label, target=args.target, **row) for label, s in found.items() for row in s.as_rows()],
        args.output / 'sensitivity.csv')
    for label, sensitivity in found.items():
        share = sensitivity.interval()[0]
        centre = sum(k * share[k].item() for k in range(1, len(share)))
        print(f'{label}: mean radius of the gradient energy {centre:.1f} cycles/image')
    print(args.output / 'sensitivity.csv')
    images = len(next(iter(found.values())).power)
    title = f'Gradient of the {args.target}, {images} images, bands: 95 % intervals'
    save_figures(args, 'sensitivity', lambda: draw_sensitivity(found, title))


def _add_explore(commands) -> None:
    parser = add_command(
        commands, 'explore', 'a page in the browser to move the radius and watch', _run_explore, output=False)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    _add_class_names(parser)
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen on (default: %(default)s, this machine only); whoever '
        'reaches it can use the page')
    parser.add_argument('--port', type=int, help='(default: the first free one from 7860 on)')
    parser.add_argument('--workers', type=int, help=argparse.SUPPRESS)  # of earlier versions, without effect
    parser.add_argument(
        '--root-path', metavar='PATH', help='where a proxy shows the page, such as /user/me/proxy/7860 of a notebook')


def _run_explore(args: argparse.Namespace) -> None:
    """Open a page that shows pictures at each frequency, what models say of them, and where their answers change.

    It needs no network, listens on this machine only unless told otherwise, and writes nothing. Ctrl-C ends it.
    """
    starting('Loading the models and the page')
    import torch

    from gmnet_timm.device import resolve_device
    from gmnet_timm.explore.pictures import Exploration, Images, ShownModel
    from gmnet_timm.explore.server import serve
    from gmnet_timm.frequency.extras import require_gradio, require_matplotlib

    require_gradio()
    require_matplotlib()
    device = torch.device(resolve_device(args.device))
    has_data = args.data_dir or args.dataset
    images = Images(args.data_dir, args.dataset, args.split, args.class_map) if has_data else None
    name_words = ['--class-names', args.class_names] if args.class_names else []
    loaded = [load(spec, args) for spec in args.models]
    models = []
    for label, spec, model in zip(labels_of(loaded), args.models, loaded, strict=True):
        # in channels_last, convolutions answer a move of the slider in three quarters of the time
        model.model.to(device, memory_format=torch.channels_last)
        names = names_of_classes(args, model)
        if not names and images is not None and len(images.class_names) == model.model.num_classes:
            names = images.class_names
        models.append(ShownModel(label, spec, model, names))
    about = Exploration(
        tuple(models), images, device, stated=tuple(stated_words(args)), stated_names=tuple(name_words))
    serve(about, args.host, args.port, args.root_path)
