"""The `gmnet-timm freq …` commands that look inside models: layers, amplitude, heatmap, sensitivity."""
import argparse
import math
from pathlib import Path

from gmnet_timm.cli.frequency_options import (
    Machine,
    add_command,
    add_data,
    add_figures,
    add_machine,
    add_maps,
    add_model,
    band_loader,
    chance_level,
    check_output,
    labels_of,
    load,
    number_or_all,
    picture_loader,
    save_figures,
)

__all__ = ['add_amplitude', 'add_heatmap', 'add_layers', 'add_sensitivity']


def add_layers(commands) -> None:
    parser = add_command(commands, 'layers', 'spectra of features before and after gates or modules', _run_layers)
    add_model(parser, 'model')
    add_data(parser)
    parser.add_argument('--image', type=Path, metavar='FILE', help='look at one picture in place of data')
    parser.add_argument(
        '--modules', nargs='+', metavar='PATTERN',
        help='modules to look at, such as layer1.0 or stages.*.0 (default: all gates; the blocks where there are none)')
    parser.add_argument('--gates', nargs='+', metavar='PATTERN', help='gates to look at, by the module that multiplies')
    parser.add_argument(
        '--kinds', nargs='+', default=['gate'], choices=['gate', 'activation'],
        help='what counts as a gate: also activations, x * (f(x) / x) (default: gate)')
    parser.add_argument(
        '--channels', type=number_or_all, default=8, metavar='N',
        help='look at N channels of each map, or at all, which can take longer than the passes (default: 8)')
    add_maps(parser)
    add_machine(parser, num_images=256)
    add_figures(parser)


def _run_layers(args: argparse.Namespace) -> None:
    """Write and draw radial power spectra of operands and products of gates, or of inputs and outputs of modules."""
    from gmnet_timm.frequency.figures import draw_layers
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.spectra import layer_spectra

    check_output(args, 'layers.csv', 'layers-summary.csv', figures=['layers', 'layers-gain'])
    with Machine(args) as machine:
        model = load(args.model, args)
        loader = picture_loader(args, model, machine) if args.image is not None \
            else band_loader(args, model, machine, labels=False)
        with machine.holding(model) as network:
            layers = layer_spectra(
                network, loader, args.modules, gates=args.gates, kinds=args.kinds, layout=args.layout,
                window=args.window, channels=args.channels, show_progress=True)
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
    title = f'{labels_of([model])[0]}, {images} image{"s" * (images != 1)}'
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


def add_amplitude(commands) -> None:
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
    from gmnet_timm.frequency.figures import draw_log_amplitudes
    from gmnet_timm.frequency.reports import write_csv

    check_output(args, 'amplitude.csv', figures=['amplitude'])
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        found = machine.of_each(models, lambda model: log_amplitudes(
            model.model, band_loader(args, model, machine, labels=False), args.modules, layout=args.layout,
            show_progress=True))
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


def add_heatmap(commands) -> None:
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
    from gmnet_timm.frequency.figures import draw_heatmaps
    from gmnet_timm.frequency.heatmap import radial_summary
    from gmnet_timm.frequency.heatmap_run import run_heatmap
    from gmnet_timm.frequency.reports import write_csv

    check_output(args, figures=['heatmap'])
    table = args.output / 'heatmap.csv'
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        found = machine.of_each(models, lambda model: run_heatmap(
            model, band_loader(args, model, machine), args.amplitudes, table, step=args.step, largest=args.largest,
            seed=args.seed, clip=args.clip, batch_size=args.batch_size,
            data=f'{args.dataset} {args.data_dir} {args.split or ""}'))
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


def add_sensitivity(commands) -> None:
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
    from gmnet_timm.frequency.figures import draw_sensitivity
    from gmnet_timm.frequency.reports import write_csv
    from gmnet_timm.frequency.sensitivity import input_sensitivity

    check_output(args, 'sensitivity.csv', figures=['sensitivity'])
    with Machine(args) as machine:
        models = [load(spec, args) for spec in args.models]
        found = machine.of_each(models, lambda model: input_sensitivity(
            model.model, band_loader(args, model, machine), model.data_config['std'], target=args.target,
            window=args.window, show_progress=True))
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
