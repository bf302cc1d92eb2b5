"""The `gmnet-timm freq …` commands."""
import argparse
import math
import sys
from pathlib import Path
from typing import Any

from gmnet_timm.cli.options import (
    SOURCES,
    add_description,
    add_preprocessing,
    description,
    preprocessing,
    print_notes,
    stated_words,
)
from gmnet_timm.errors import UserError, listed

DEFAULT_OUTPUT = 'output/freq'


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
    _add_theory(commands)
    _add_learn(commands)
    _add_study(commands)
    _add_explore(commands)
    _add_paper(commands)


def _add_eval(commands) -> None:
    parser = _command(commands, 'eval', 'accuracy of models on raw, low-pass and high-pass images', _run_eval)
    _add_model(parser, 'models', nargs='+')
    _add_data(parser)
    _add_split(parser, [12., 24., 36.])
    _add_bands(parser)
    _add_machine(parser)
    _add_figures(parser)


def _run_eval(args: argparse.Namespace) -> None:
    """Evaluate models on images with only some of their frequencies. Writes eval.csv, eval.json and a figure."""
    from gmnet_timm.frequency.evaluation import band_curves, evaluate_model, report_rows
    from gmnet_timm.frequency.plots import draw_band_accuracy
    from gmnet_timm.frequency.reports import format_table, write_csv, write_json

    settings = _settings(args)
    _check_output(args, 'eval.csv', 'eval.json', figures=['eval'])
    with _Machine(args) as machine:
        models = [_load(spec, args) for spec in args.models]
        reports = [evaluate_model(model, settings, **machine.kwargs) for model in models]
        if machine.rank:
            return
    write_csv([row for report in reports for row in report_rows(report)], args.output / 'eval.csv')
    write_json(reports, args.output / 'eval.json')
    print(format_table(reports))
    print(f'\n{args.output / "eval.csv"}, {args.output / "eval.json"}')
    curves = band_curves({label: report['results'] for label, report in zip(_labels(models), reports, strict=True)})
    title = f'{reports[0]["results"][0]["count"]} images, bars: 95 % intervals'
    _save(args, 'eval', lambda: draw_band_accuracy(curves, title, _chance([r['num_classes'] for r in reports])))


def _add_curves(commands) -> None:
    parser = _command(
        commands, 'curves', 'band accuracy of the checkpoints of training runs by epoch', _run_curves, force=False)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN_DIR', help='run folders of train.py or of the demo')
    _add_data(parser, own=True)
    _add_split(parser, [10.])
    _add_bands(parser)
    _add_machine(parser)
    _add_figures(parser)


def _run_curves(args: argparse.Namespace) -> None:
    """Evaluate the checkpoints of training runs, epoch by epoch, and draw them. Goes on where an earlier call stopped.

    train.py and the demo keep only some checkpoints; with --checkpoint-hist 1000, train.py keeps all.
    """
    from gmnet_timm.frequency.evaluation import evaluate_runs
    from gmnet_timm.frequency.plots import draw_band_curves

    _check_output(args, figures=['curves'])
    table = args.output / 'curves.csv'
    with _Machine(args) as machine:
        rows = evaluate_runs(args.runs, _settings(args), table, use_ema=not args.no_ema, **machine.kwargs)
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
    chance = _chance([int(row['num_classes']) if row['num_classes'] else None for row in rows])
    title = 'Accuracy by epoch, bars: 95 % intervals over images'
    _save(args, 'curves', lambda: draw_band_curves(curves, title, chance), force=True)


def _add_image(commands) -> None:
    parser = _command(commands, 'image', 'a picture, its bands, and what a model says of each', _run_image)
    parser.add_argument('file', type=Path, help='an image file, or an array (.npy) of height, width and channels')
    _add_model(parser, '--model', required=True)
    _add_split(parser, [12., 24., 36.])
    _add_bands(parser)
    parser.add_argument('--top', type=int, default=3, metavar='K', help='print the K likeliest classes (default: 3)')
    _add_class_names(parser)
    _add_figures(parser, optional=False)


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
    subject = _load(args.model, args)
    config = subject.data_config
    check_corner(args.radii, config['input_size'])
    _check_output(args, figures=[args.file.stem])
    image = prepare_picture(read_picture(args.file, config['input_size'][0]), config)
    split = BandSplit(image, _options(args), config['mean'], config['std'])
    bands = list_bands(args.radii, args.bands)
    names = _class_names(args, subject)
    answers = [top_classes(p, args.top, names) for p in confidences(subject.model, split, bands)]
    for band, lines in zip(bands, answers, strict=True):
        head = str(band).replace(' ', ' r = ')
        print(f'{head:<12} ' + ', '.join(f'{name} {100 * p:.1f} %' for name, p in lines))
    parts = [(band, to_pixels(split(band)[0], config)) for band in bands]
    title = f'{_labels([subject])[0]}: {args.file.name}, radii in cycles per image'
    _save(args, args.file.stem, lambda: draw_image_panel(parts, answers, title))


def _add_layers(commands) -> None:
    parser = _command(commands, 'layers', 'spectra of features before and after gates or modules', _run_layers)
    _add_model(parser, 'model')
    _add_data(parser)
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
        '--channels', type=_number_or_all, default=8, metavar='N',
        help='look at N channels of each map, or at all, which can take longer than the passes (default: 8)')
    _add_maps(parser)
    _add_machine(parser, num_images=256)
    _add_figures(parser)


def _run_layers(args: argparse.Namespace) -> None:
    """Write and draw radial power spectra of operands and products of gates, or of inputs and outputs of modules."""
    from gmnet_timm.frequency.plots import draw_layers
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.spectra import layer_spectra

    _check_output(args, 'layers.csv', 'layers-summary.csv', figures=['layers', 'layers-gain'])
    with _Machine(args) as machine:
        model = _load(args.model, args)
        layers = layer_spectra(
            model.model.to(machine.device), _picture(args, model) or _loader(args, model, machine), args.modules,
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
    for layer in layers:
        print(_describe_layer(layer))
    if any(math.isnan(signal.high_low_ratio) for layer in layers for signal in layer.signals.values()):
        print('undefined: a map this small has no frequencies beyond half of its Nyquist radius, or is constant')
    print(f'{args.output / "layers.csv"}, {args.output / "layers-summary.csv"}')
    images = len(next(iter(layers[0].signals.values())).power)
    title = f'{_labels([model])[0]}, {images} images'
    if any(signal.channels < signal.all_channels for layer in layers for signal in layer.signals.values()):
        title += f', {args.channels} channels of each map'
    _save(args, 'layers', lambda: draw_layers(layers, title))
    if any(layer.gain() is not None for layer in layers):
        _save(args, 'layers-gain', lambda: draw_layers(layers, title, gain=True))


def _describe_layer(layer) -> str:
    line = f'{layer.name:<28}'
    for name, signal in layer.signals.items():
        line += f'  {name} {signal.size[0]}x{signal.size[1]} high/low {_ratio(signal.high_low_ratio)}'
        if signal.ratio_error and math.isfinite(signal.high_low_ratio):
            line += f' ±{signal.ratio_error:.4f}'
    if layer.statistics is not None:
        row = layer.summary_row()
        line += (
            f'  predicted {_ratio(row["predicted_high_low"])}  aliased {_percent(row["aliased"])}  '
            f'clipped {100 * row["clipped_low"]:.1f} + {100 * row["clipped_high"]:.1f} %  '
            f'pre-gate std {row["pre_gate_std"]:.3g}')
    return line


def _ratio(high_low: float) -> str:
    return f'{high_low:.4f}' if math.isfinite(high_low) else 'undefined'


def _percent(share: float) -> str:
    return f'{100 * share:.1f} %' if math.isfinite(share) else 'undefined'


def _add_amplitude(commands) -> None:
    parser = _command(commands, 'amplitude', 'relative log amplitude of features by depth', _run_amplitude)
    _add_model(parser, 'models', nargs='+')
    _add_data(parser)
    parser.add_argument('--modules', nargs='+', metavar='PATTERN', help='modules to look at (default: the blocks)')
    _add_maps(parser, window=False)
    _add_machine(parser, num_images=64)
    _add_figures(parser)


def _run_amplitude(args: argparse.Namespace) -> None:
    """Write and draw the log amplitude at the corner of the spectrum minus that at zero frequency, by depth.

    As in Park & Kim 2022 (arXiv 2202.06709), for any models side by side.
    """
    from gmnet_timm.frequency.amplitude import log_amplitudes
    from gmnet_timm.frequency.plots import draw_log_amplitudes
    from gmnet_timm.frequency.reports import write_csv

    _check_output(args, 'amplitude.csv', figures=['amplitude'])
    with _Machine(args) as machine:
        models = [_load(spec, args) for spec in args.models]
        found = {}
        for label, model in zip(_labels(models), models, strict=True):
            found[label] = log_amplitudes(
                model.model.to(machine.device), _loader(args, model, machine), args.modules, layout=args.layout,
                show_progress=True)
        if machine.rank:
            return
    rows = [dict(model=label, **row) for label, layers in found.items() for layer in layers for row in layer.as_rows()]
    write_csv(rows, args.output / 'amplitude.csv')
    for label, layers in found.items():
        print(f'{label}: {len(layers)} blocks, first {layers[0].name} {layers[0].high:.2f}, '
              f'last {layers[-1].name} {layers[-1].high:.2f}')
    print(args.output / 'amplitude.csv')
    title = f'Relative log amplitude, {next(iter(found.values()))[0].images} images'
    _save(args, 'amplitude', lambda: draw_log_amplitudes(found, title))


def _add_heatmap(commands) -> None:
    parser = _command(
        commands, 'heatmap', 'error under perturbations of each direction and frequency', _run_heatmap, force=False)
    _add_model(parser, 'models', nargs='+')
    _add_data(parser)
    parser.add_argument(
        '--amplitudes', type=float, nargs='+', default=[.07], metavar='RMS',
        help='root mean square of the perturbation, pixels being 0 to 1 (default: 0.07, the norm 15.7 at 224x224)')
    parser.add_argument(
        '--step', type=int, default=8, help='distance of the frequencies in cycles per image (default: %(default)s)')
    parser.add_argument('--largest', type=int, metavar='R', help='largest frequency in each direction (default: all)')
    parser.add_argument('--seed', type=int, default=0, help='of the random signs (default: %(default)s)')
    _add_machine(parser, num_images=64)
    _add_figures(parser)


def _run_heatmap(args: argparse.Namespace) -> None:
    """Add a Fourier basis image of each frequency to the pixels, and count errors: Yin et al. 2019 (arXiv 1906.08988).

    Every frequency is written when it is known, and a repeated call goes on where the last one stopped. --step 1 takes
    all frequencies, which is a matter of a GPU.
    """
    from gmnet_timm.frequency.heatmap import radial_summary
    from gmnet_timm.frequency.heatmap_run import run_heatmap
    from gmnet_timm.frequency.plots import draw_heatmaps
    from gmnet_timm.frequency.reports import write_csv

    _check_output(args, figures=['heatmap'])
    table = args.output / 'heatmap.csv'
    with _Machine(args) as machine:
        models = [_load(spec, args) for spec in args.models]
        found: dict[str, Any] = {}
        for label, model in zip(_labels(models), models, strict=True):
            model.model.to(machine.device)
            found[label] = run_heatmap(
                model, _loader(args, model, machine), args.amplitudes, table, step=args.step, largest=args.largest,
                seed=args.seed, batch_size=args.batch_size, data=f'{args.dataset} {args.data_dir} {args.split or ""}')
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
    chance = _chance([getattr(model.model, 'num_classes', None) for model in models])
    _save(args, 'heatmap', lambda: draw_heatmaps(
        found, f'Error under Fourier perturbations, {points[0].count} images', chance and 100 - chance), force=True)


def _add_sensitivity(commands) -> None:
    parser = _command(commands, 'sensitivity', 'spectrum of the gradients with respect to images', _run_sensitivity)
    _add_model(parser, 'models', nargs='+')
    _add_data(parser)
    parser.add_argument(
        '--target', choices=['loss', 'logit'], default='loss', help='gradient of the cross-entropy, or of the logit')
    parser.add_argument('--window', choices=['hann'], help='taper gradients to the border')
    _add_machine(parser, num_images=64)
    _add_figures(parser)


def _run_sensitivity(args: argparse.Namespace) -> None:
    """Write and draw to which frequencies of a pixel change the loss of classifiers responds."""
    from gmnet_timm.frequency.plots import draw_sensitivity
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.sensitivity import input_sensitivity

    _check_output(args, 'sensitivity.csv', figures=['sensitivity'])
    with _Machine(args) as machine:
        models = [_load(spec, args) for spec in args.models]
        found = {
            label: input_sensitivity(
                model.model.to(machine.device), _loader(args, model, machine), model.data_config['std'],
                target=args.target, window=args.window, show_progress=True)
            for label, model in zip(_labels(models), models, strict=True)
        }
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
    _save(args, 'sensitivity', lambda: draw_sensitivity(found, title))


def _add_theory(commands) -> None:
    parser = _command(
        commands, 'theory', 'spectra after activations and gates in theory, for a model or for given maps', _run_theory)
    _add_model(parser, 'model', nargs='?')
    _add_data(parser)
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
    _add_machine(parser, num_images=64)
    _add_figures(parser)


def _run_theory(args: argparse.Namespace) -> int:
    """Write and draw what theory says that activations and gates do to spectra.

    With a model: for each of its gates, at the measured scale and spectrum of its input, beside what is measured.
    Without: for Gaussian maps of given scales, and for a pure tone, whose measured harmonics are set against their
    closed form.
    """
    from gmnet_timm.frequency.theory import FUNCTIONS

    functions = args.functions or list(FUNCTIONS)
    if args.model is not None:
        _theory_of_model(args, functions)
        return 0
    return _theory_of_maps(args, functions)


def _theory_of_model(args: argparse.Namespace, functions: list[str]) -> None:
    from gmnet_timm.frequency.plots import draw_theory_of_gates
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.spectra import layer_spectra
    from gmnet_timm.frequency.theory import gate_rows, pointwise

    _check_output(args, 'theory-gates.csv', figures=['theory-gates'])
    for name in functions:
        pointwise(name)
    with _Machine(args) as machine:
        model = _load(args.model, args)
        loader = _loader(args, model, machine)
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
    title = f'{_labels([model])[0]}, {rows[0]["images"]} images'
    _save(args, 'theory-gates', lambda: draw_theory_of_gates(rows, title))


def _theory_of_maps(args: argparse.Namespace, functions: list[str]) -> int:
    from gmnet_timm.frequency.plots import draw_theory
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.theory import compare_harmonics, map_row, predict_maps

    if not (1e-3 <= args.amplitude <= 1e3 and 3 <= args.harmonics <= 1000):
        raise UserError('The amplitude must be from 0.001 to 1000, the number of harmonics from 3 to 1000.')
    if not all(1e-3 <= scale <= 1e3 for scale in args.scales) or not 0 <= args.exponent <= 4:
        raise UserError('Scales must be from 0.001 to 1000, the exponent from 0 to 4.')
    _check_output(args, 'theory.csv', figures=['theory'])
    maps = predict_maps(functions, args.scales, exponent=args.exponent)
    rows = [map_row(prediction) for prediction in maps]
    write_csv(rows, args.output / 'theory.csv')
    print(f'High over low energy of f(x), x a Gaussian map with {maps[0].input.high_low_ratio:.3f}, by std of x\n')
    print(f'{"std":<8}{"beyond 6":>10}' + ''.join(f'{name:>12}' for name in functions))
    for scale in args.scales:
        found = [prediction for prediction in maps if prediction.scale == scale]
        print(f'{scale:<8g}{100 * found[0].beyond_6:>8.3g} %'
              + ''.join(f'{prediction.output.high_low_ratio:>12.3f}' for prediction in found))
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
    _save(args, 'theory', lambda: draw_theory(maps))
    return 0 if worst < 1e-6 else 1


def _power(rate: float) -> str:
    return 'faster than any power' if rate == math.inf else f'n^-{rate:.2f}'


def _add_learn(commands) -> None:
    parser = _command(commands, 'learn', 'what is learned at which frequency, and when, by gate', _run_learn)
    parser.set_defaults(output=Path('output/freq-learn'))
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
        '--learning-rates', type=float, nargs='+', default=[1e-3, 3e-3, 1e-2, 3e-2], metavar='LR',
        help='what is tried for each variant with seeds of its own, and beyond if the best is the first or the last '
             '(default: 0.001 0.003 0.01 0.03)')
    parser.add_argument('--steps', type=int, default=500, help='of a training (default: %(default)s)')
    parser.add_argument(
        '--scale', type=float, default=1.,
        help='standard deviation of what enters the activation at the start (default: %(default)g)')
    _add_figures(parser)


def _run_learn(args: argparse.Namespace) -> None:
    """Train small networks with different gates side by side, and compare what they learn at which frequency.

    Writes the curves of each task, the choice of learning rates, and paired comparisons of the gates, corrected for
    their number. A repeated call goes on; --force replaces runs of other settings.
    """
    from gmnet_timm.frequency.extras import require_matplotlib
    from gmnet_timm.frequency.learn import TASKS, Settings, format_summary, run_learn
    from gmnet_timm.frequency.plots import draw_learning

    tasks = tuple(args.tasks or TASKS)
    if not args.no_figure:
        require_matplotlib()
    settings = Settings(
        seeds=tuple(args.seeds), learning_rates=tuple(args.learning_rates), steps=args.steps, scale=args.scale)
    runs = run_learn(args.output, settings, tasks, args.variants, args.force)
    print(f'\n{format_summary(runs)}\n\n{args.output / "comparisons.csv"} and other tables beside it')
    for task in tasks:
        found = [run for run in runs if run['task'] == task]
        _save(args, f'learn-{task}', lambda found=found: draw_learning(found), force=True)


def _add_study(commands) -> None:
    parser = _command(
        commands, 'study', 'do gates use high frequencies better than activations? trainings, tests and power',
        _run_study, force=False)
    parser.set_defaults(output=Path('output/freq-study'))
    parser.add_argument(
        '--data-dir', type=Path, metavar='DIR',
        help='image folder with train and validation, such as ImageNet (default: patches of the photographs)')
    parser.add_argument(
        '--img-size', type=int, metavar='PIXELS',
        help="side of the images, from 224 on with the paper's networks (default: 56, 224 with --data-dir)")
    parser.add_argument(
        '--radii', type=float, nargs='+', metavar='R',
        help='in cycles per image (default: 1 2 3 4 6 9 14 for 56 pixels, in proportion for other sizes)')
    parser.add_argument('--seeds', type=int, nargs='+', default=list(range(10)), help='(default: 0 to 9)')
    parser.add_argument(
        '--tuning-seeds', type=int, default=2, metavar='N',
        help='further seeds to choose each learning rate with (default: %(default)s)')
    parser.add_argument(
        '--learning-rates', type=float, nargs='+', default=[3e-3, 1e-2, 3e-2], metavar='LR',
        help='to choose from (default: 0.003 0.01 0.03)')
    parser.add_argument('--bodies', nargs='+', choices=['ResNet', 'MobileNetV2'], help='(default: both)')
    parser.add_argument(
        '--variants', nargs='+', metavar='VARIANT', help='such as "ReLU(x)" "x·x" (default: those of docs/study.md)')
    parser.add_argument('--epochs', type=int, default=5, help='(default: %(default)s)')
    parser.add_argument('--batch-size', type=int, default=32, help='(default: %(default)s)')
    parser.add_argument('--workers', type=int, default=8, help='processes that load images (default: %(default)s)')
    parser.add_argument('--device', default='auto', help='(default: a GPU if there is one)')


def _run_study(args: argparse.Namespace) -> None:
    """Train small networks with each activation and gate, and compare them on low-pass and high-pass images.

    A repeated call goes on where the last one stopped. Writes tables, report.md and figures.
    """
    import torch

    from gmnet_timm.device import resolve_device
    from gmnet_timm.frequency.extras import require_matplotlib, require_scipy
    from gmnet_timm.frequency.split import check_corner
    from gmnet_timm.frequency.study import StudySettings, run_study
    from gmnet_timm.frequency.study_data import FolderData, PhotoData
    from gmnet_timm.frequency.study_models import STUDIED, VARIANTS
    from gmnet_timm.frequency.study_report import write_report

    require_matplotlib()
    require_scipy('stats')
    size = args.img_size or (224 if args.data_dir else 56)
    radii = tuple(args.radii or (radius * size / 56 for radius in StudySettings.radii))
    check_corner(radii, (size, size))
    if args.epochs < 2 or args.batch_size < 2 or len(set(args.seeds)) < 2 or args.tuning_seeds < 1:
        raise UserError('The study needs at least 2 epochs (the first is the warm-up), 2 images per batch, 2 seeds to '
                        'compare and 1 to tune.')
    device = torch.device(resolve_device(args.device))
    data = FolderData(args.data_dir, size, args.batch_size, args.workers) if args.data_dir \
        else PhotoData(size, batch_size=args.batch_size)
    unknown = [variant for variant in args.variants or () if variant not in VARIANTS]
    if unknown:
        raise UserError(f'There is no variant {listed(unknown)}. Variants: {", ".join(VARIANTS)}.')
    pairs = [(body, variant) for body in args.bodies or STUDIED for variant in args.variants or STUDIED[body]]
    run_study(
        args.output, data, StudySettings(radii, args.epochs), pairs, args.learning_rates, args.seeds,
        args.tuning_seeds, device)
    print(f'\n{write_report(args.output)}\n{args.output / "report.md"} and figures beside it')


def _add_explore(commands) -> None:
    parser = _command(
        commands, 'explore', 'a page in the browser to move the radius and watch', _run_explore, output=False)
    _add_model(parser, 'models', nargs='+')
    _add_data(parser)
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
    print('Loading the models and the page …', file=sys.stderr, flush=True)
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
    loaded = [_load(spec, args) for spec in args.models]
    models = []
    for label, spec, model in zip(_labels(loaded), args.models, loaded, strict=True):
        # in channels_last, convolutions answer a move of the slider in three quarters of the time
        model.model.to(device, memory_format=torch.channels_last)
        names = _class_names(args, model)
        if not names and images is not None and len(images.class_names) == model.model.num_classes:
            names = images.class_names
        models.append(ShownModel(label, spec, model, names))
    about = Exploration(
        tuple(models), images, device, stated=tuple(stated_words(args)), stated_names=tuple(name_words))
    serve(about, args.host, args.port, args.root_path)


def _add_paper(commands) -> None:
    parser = _command(
        commands, 'paper', "a script that makes a figure of the paper's frequency analysis, for ImageNet", _run_paper,
        output=False)
    parser.add_argument(
        'figure', help="resnet18 or mobilenetv2 (learning curves), activations or gates (tables of GmNet-S3)")
    parser.add_argument('--data-dir', metavar='DIR', help='folder of ImageNet (default: $IMAGENET)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs of this machine (default: 1)')
    parser.add_argument('--batch-size', type=int, default=256, help='images per GPU and forward pass (default: 256)')
    parser.add_argument(
        '--train-flags', default='', metavar='FLAGS', help="further flags of train.py, as in --train-flags='--amp'")


def _run_paper(args: argparse.Namespace) -> None:
    """Print a bash script that trains the models of a figure, evaluates them and draws it: pipe it into bash.

    Run again, it resumes each training after its last finished epoch.
    """
    from gmnet_timm.training.paper import figure_script
    from gmnet_timm.training.recipe import plan_layout

    print(figure_script(args.figure, plan_layout(args.gpus, args.batch_size), args.data_dir, args.train_flags), end='')


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


def _number_or_all(text: str) -> int | None:
    if text != 'all' and not text.isdecimal():
        raise argparse.ArgumentTypeError(f'give a number or all, not {text!r}')
    return None if text == 'all' else int(text)


def _add_maps(parser, window: bool = True) -> None:
    parser.add_argument(
        '--layout', choices=['NCHW', 'NHWC', 'NLC', 'NCL'],
        help='layout of the named modules (default: found by following positions through the model)')
    if window:
        parser.add_argument('--window', choices=['hann'], help='taper maps to the border, against leakage')


def _add_figures(parser, optional: bool = True) -> None:
    parser.add_argument(
        '--figure-formats', nargs='+', default=['png'], choices=['png', 'pdf', 'svg'], help='(default: png)')
    if optional:
        parser.add_argument('--no-figure', action='store_true', help='write no figures, without matplotlib')


def _figure_paths(args: argparse.Namespace, name: str) -> list[Path]:
    return [] if getattr(args, 'no_figure', False) else [args.output / f'{name}.{f}' for f in args.figure_formats]


def _check_output(args: argparse.Namespace, *names: str, figures: list[str]) -> None:
    """Before the work: figures can be drawn, and the results of an earlier call are not replaced."""
    paths = [args.output / name for name in names]
    drawn = [path for name in figures for path in _figure_paths(args, name)]
    if drawn:
        from gmnet_timm.frequency.extras import require_matplotlib
        require_matplotlib()
    for path in [*paths, *drawn]:
        if path.exists() and not getattr(args, 'force', True):  # commands that go on have no --force
            raise UserError(f'{path} exists: choose another folder by --output, or give --force to replace it.')


def _save(args: argparse.Namespace, name: str, draw, force: bool = False) -> None:
    """Draw a figure and write it in each format."""
    from gmnet_timm.frequency.plots import save_figure

    paths = _figure_paths(args, name)
    figure = draw() if paths else None
    for path in paths:
        save_figure(figure, path, force=force or args.force)
        print(path)


def _labels(models) -> list[str]:
    """Names of models for figures: of the architecture, and where two are the same, of the file too."""
    names = [str(model.provenance.get('model', model.name)) for model in models]
    labels = [
        name if names.count(name) == 1 else f'{name} {Path(str(model.provenance.get("checkpoint", i))).parent.name}'
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    ]
    return labels if len(set(labels)) == len(labels) else [f'{label} ({i + 1})' for i, label in enumerate(labels)]


def _chance(num_classes: list[int | None]) -> float | None:
    """Accuracy at chance in percent, None where models have different numbers of classes."""
    only = set(num_classes)
    return 100 / only.pop() if len(only) == 1 and all(only) else None  # type: ignore[operator]


def _loader(args: argparse.Namespace, model, machine):
    """This process's images."""
    from gmnet_timm.frequency.data import create_band_loader

    return create_band_loader(
        args.data_dir, model.data_config, dataset=args.dataset, split=args.split, class_map=args.class_map,
        batch_size=args.batch_size, workers=args.workers, num_images=args.num_images, rank=machine.rank,
        world_size=machine.world_size)


def _picture(args: argparse.Namespace, model):
    """The one picture of --image as a loader, None where there is none."""
    import torch

    from gmnet_timm.frequency.data import prepare_picture, read_picture

    if args.image is None:
        return None
    config = model.data_config
    return [(prepare_picture(read_picture(args.image, config['input_size'][0]), config), torch.zeros(1))]


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

    try:
        loaded = load_model(spec, preprocessing=preprocessing(args), **description(args))
    except UserError as e:
        if not Path(spec).is_dir():
            raise
        raise UserError(f'{e} A folder of timm with config.json and weights is local-dir:FOLDER.') from e
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
