"""The `gmnet-timm freq …` commands."""
import argparse
import importlib.util
from pathlib import Path
from typing import Any

from gmnet_timm.cli.frequency_inside import add_amplitude, add_heatmap, add_layers, add_sensitivity
from gmnet_timm.cli.frequency_options import (
    Machine,
    add_bands,
    add_command,
    add_data,
    add_figures,
    add_groups,
    add_machine,
    add_model,
    add_split,
    chance_level,
    check_groups,
    check_output,
    eval_settings,
    labels_of,
    load,
    names_of_classes,
    save_figures,
    split_options,
)
from gmnet_timm.cli.options import add_class_names, starting, stated_words
from gmnet_timm.errors import MissingExtraError, UserError, require


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
    add_layers(commands)
    add_amplitude(commands)
    add_heatmap(commands)
    add_sensitivity(commands)
    _add_explore(commands)


def _add_eval(commands) -> None:
    parser = add_command(commands, 'eval', 'accuracy of models on raw, low-pass and high-pass images', _run_eval)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    add_split(parser, [12., 24., 36.])
    add_bands(parser)
    parser.add_argument('--baseline', metavar='MODEL', help='model that the others are compared with (default: first)')
    add_groups(parser)
    add_machine(parser)
    add_figures(parser)


def _run_eval(args: argparse.Namespace) -> None:
    """Evaluate models on images with only some of their frequencies.

    Writes eval.csv, eval.json, a figure, and each image's answer to eval-answers.npz. Several models are compared with
    the first one, or with --baseline, on the same images: eval-paired.csv. With --groups, eval-groups.csv has the mean
    over the trainings of each label.
    """
    from gmnet_timm.frequency.evaluation import evaluate_model, group_rows, report_rows
    from gmnet_timm.frequency.figures import draw_band_accuracy
    from gmnet_timm.frequency.reports import (
        format_paired,
        format_table,
        paired_rows,
        save_results,
        write_csv,
        write_json,
    )

    settings = eval_settings(args)
    if args.baseline is not None and args.baseline not in args.models:
        raise UserError(f'--baseline {args.baseline} is not among the models.')
    check_groups(args, len(args.models))
    if len(args.models) > 1:  # are compared
        require('scipy.stats', 'freq')
    check_output(
        args, 'eval.csv', 'eval.json', 'eval-answers.npz', 'eval-paired.csv', 'eval-groups.csv', figures=['eval'])
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
    save_results(accuracies, args.output / 'eval-answers.npz')
    if len(models) > 1:
        baseline = labels[args.models.index(args.baseline or args.models[0])]
        rows = paired_rows(accuracies, baseline)
        write_csv(rows, args.output / 'eval-paired.csv')
        print(f'\n{format_paired(rows)}')
    print(f'\n{args.output / "eval.csv"}, {args.output / "eval.json"}')
    rows_by_label: dict[str, list[dict[str, Any]]] = {
        label: report['results'] for label, report in zip(labels, reports, strict=True)}
    over = 'images'
    if args.groups:
        grouped = group_rows(args.groups, [report['results'] for report in reports])
        write_csv(grouped, args.output / 'eval-groups.csv')
        rows_by_label = {label: [row for row in grouped if row['label'] == label] for label in args.groups}
        over = 'trainings'
    title = f'{reports[0]["results"][0]["count"]} images, bars: 95 % intervals over {over}'
    level = chance_level([report['num_classes'] for report in reports])
    save_figures(args, 'eval', lambda: draw_band_accuracy(rows_by_label, title, level))


def _add_curves(commands) -> None:
    parser = add_command(
        commands, 'curves', 'band accuracy of the checkpoints of training runs by epoch', _run_curves, force=False)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_DIR', help='run folders of train.py or of the demo')
    add_data(parser, own=True)
    add_split(parser, [10.])
    add_bands(parser)
    add_groups(parser)
    add_machine(parser)
    add_figures(parser)


def _run_curves(args: argparse.Namespace) -> None:
    """Evaluate the checkpoints of training runs, epoch by epoch, and draw them. Goes on where an earlier call stopped.

    train.py and the demo keep only some checkpoints; with --checkpoint-hist 1000, train.py keeps all.
    """
    from gmnet_timm.frequency.evaluation import evaluate_runs, group_rows
    from gmnet_timm.frequency.figures import draw_band_curves
    from gmnet_timm.frequency.reports import write_csv

    check_groups(args, len(args.runs))
    check_output(args, figures=['curves'])
    table = args.output / 'curves.csv'
    with Machine(args) as machine:
        rows = evaluate_runs(args.runs, eval_settings(args), table, use_ema=not args.no_ema, **machine.kwargs)
        if machine.rank:
            return
    print(table)
    models = {row['run']: row['model'] for row in rows}
    names = list(models.values())
    labels = [name if names.count(name) == 1 else f'{name} {Path(run).name}' for run, name in models.items()]
    of_runs = [[row for row in rows if row['run'] == run] for run in models]
    over = 'images'
    if args.groups:
        grouped = group_rows(args.groups, of_runs)
        write_csv(grouped, args.output / 'curves-groups.csv')
        labels = list(dict.fromkeys(args.groups))
        of_runs = [[row for row in grouped if row['label'] == label] for label in labels]
        over = 'trainings'
    curves: dict[str, Any] = {}
    for label, found in zip(labels, of_runs, strict=True):
        for row in found:
            radius = '-'.join(filter(None, [row['inner_radius'], row['radius']]))
            points = curves.setdefault(label, {}).setdefault((row['band'], radius), [])
            points.append((int(row['epoch']), *(float(row[name]) for name in ('top1', 'top1_low', 'top1_high'))))
    level = chance_level([int(row['num_classes']) if row['num_classes'] else None for row in rows])
    title = f'Accuracy by epoch, bars: 95 % intervals over {over}'
    save_figures(args, 'curves', lambda: draw_band_curves(curves, title, level), force=True)


def _add_image(commands) -> None:
    parser = add_command(commands, 'image', 'a picture, its bands, and what a model says of each', _run_image)
    parser.add_argument('file', type=Path, help='an image file, or an array (.npy) of height, width and channels')
    add_model(parser, '--model', required=True)
    add_split(parser, [12., 24., 36.])
    add_bands(parser)
    parser.add_argument('--top', type=int, default=3, metavar='K', help='print the K likeliest classes (default: 3)')
    add_class_names(parser)
    add_figures(parser, optional=False)


def _run_image(args: argparse.Namespace) -> None:
    """Draw a picture, its low-pass and high-pass images, and what a model says of each with its confidence."""
    from gmnet_timm.frequency.answers import confidences, top_classes
    from gmnet_timm.frequency.bands import BandSplit, list_bands
    from gmnet_timm.frequency.data import prepare_picture, read_picture, to_pixels
    from gmnet_timm.frequency.figures import draw_image_panel
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


def _add_explore(commands) -> None:
    parser = add_command(
        commands, 'explore', 'a page in the browser to move the radius and watch', _run_explore, output=False)
    add_model(parser, 'models', nargs='+')
    add_data(parser)
    add_class_names(parser)
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen on (default: %(default)s, this machine only); whoever '
        'reaches it can use the page')
    parser.add_argument('--port', type=int, help='(default: the first free one from 7860 on)')
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

    if importlib.util.find_spec('gradio') is None:  # before models are loaded; importing it takes seconds
        raise MissingExtraError('gradio', 'explore')
    require('matplotlib', 'freq')
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
