"""The commands end to end, and the figures: shared axes, a line at chance, no label cut off."""
import csv
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from gmnet_timm.cli.main import main
from gmnet_timm.frequency import LayerSpectrum, Signal, figures, plots


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Data of two classes, and weights of a convolutional network and a transformer."""
    root = tmp_path_factory.mktemp('commands')
    rng = np.random.default_rng(0)
    for label in 'ab':
        (root / 'data' / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / 'data' / label / f'{i}.png')
    torch.manual_seed(0)
    for name in ('test_resnet', 'test_vit'):
        torch.save(timm.create_model(name, num_classes=2).state_dict(), root / f'{name}.pth')
    return root


def _rows(path):
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def _run(folder, out, command, *argv, models=('test_resnet', 'test_vit')):
    specs = [f'{name}={folder}/{name}.pth' for name in models]
    return main(['freq', command, *specs, '--data-dir', str(folder / 'data'), '--workers', '0', '--output', str(out),
                 *argv])


@pytest.mark.slow
def test_amplitude_of_two_models(folder, tmp_path, capsys):
    assert _run(folder, tmp_path, 'amplitude', '--figure-formats', 'png', 'pdf', 'svg') == 0
    rows = _rows(tmp_path / 'amplitude.csv')
    assert {row['model'] for row in rows} == {'test_resnet', 'test_vit'} and {row['images'] for row in rows} == {'6'}
    assert (tmp_path / 'amplitude.pdf').read_bytes().startswith(b'%PDF')
    assert 'test_vit' in (tmp_path / 'amplitude.svg').read_text()  # text stays text
    assert _run(folder, tmp_path, 'amplitude') == 1 and '--force' in capsys.readouterr().err


@pytest.mark.slow
def test_heatmap_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, capsys):
    from gmnet_timm.frequency import heatmap_run
    evaluated = []
    run = heatmap_run.fourier_heatmap
    monkeypatch.setattr(
        heatmap_run, 'fourier_heatmap',
        lambda *args, **kwargs: evaluated.append(len(args[4])) or run(*args, **kwargs))
    argv = ['--step', '40', '--amplitudes', '.05', '.5', '--no-figure']
    assert _run(folder, tmp_path, 'heatmap', *argv, models=['test_resnet']) == 0
    first = _rows(tmp_path / 'heatmap.csv')
    count = len(first) // 2
    assert evaluated == [count, count] and count > 4
    (tmp_path / 'heatmap.csv').write_text('\n'.join((tmp_path / 'heatmap.csv').read_text().splitlines()[:-3]) + '\n')
    assert _run(folder, tmp_path, 'heatmap', *argv, models=['test_resnet']) == 0
    assert evaluated[2:] == [0, 3] and _rows(tmp_path / 'heatmap.csv') == first
    assert _run(folder, tmp_path, 'heatmap', '--step', '40', models=['test_resnet', 'test_vit']) == 0
    assert (tmp_path / 'heatmap.png').stat().st_size > 10000
    assert {row['model'] for row in _rows(tmp_path / 'heatmap-radial.csv')} == {'test_resnet', 'test_vit'}


def test_sensitivity(folder, tmp_path, capsys):
    assert _run(folder, tmp_path, 'sensitivity', '--target', 'logit') == 0
    rows = _rows(tmp_path / 'sensitivity.csv')
    share = sum(float(row['share']) for row in rows if row['model'] == 'test_vit' and row['radius'] != '0')
    assert share == pytest.approx(1) and 'mean radius' in capsys.readouterr().out


@pytest.mark.slow
def test_layers_of_a_transformer(folder, tmp_path, capsys):
    assert _run(folder, tmp_path, 'layers', models=['test_vit']) == 0
    assert ', as the model has no gates' in capsys.readouterr().out
    assert {row['layout'] for row in _rows(tmp_path / 'layers.csv')} == {'NLC'}
    argv = ['--kinds', 'activation', '--gates', 'blocks.*']
    assert _run(folder, tmp_path / 'b', 'layers', *argv, models=['test_vit']) == 0
    assert {row['kind'] for row in _rows(tmp_path / 'b' / 'layers.csv')} == {'activation'}


def test_eval_draws_accuracy_by_radius(folder, tmp_path):
    argv = ['--radii', '4', '9', '16', '--bands', 'low', 'high', 'band-pass']
    assert _run(folder, tmp_path, 'eval', *argv) == 0
    assert Image.open(tmp_path / 'eval.png').size[0] > 900


@pytest.mark.parametrize('spec, message', [
    ('r18.pth', 'NAME=FILE'), ('vit_tinny_patch16_224', 'vit_tiny_patch16_224'), ('data', 'neither a model nor a run')])
def test_errors_that_help(folder, tmp_path, monkeypatch, capsys, spec, message):
    monkeypatch.chdir(folder)
    torch.save(timm.create_model('test_resnet').state_dict(), folder / 'r18.pth')
    assert main(['freq', 'eval', spec, '--data-dir', 'data', '--output', str(tmp_path)]) == 1
    assert message in capsys.readouterr().err


def test_progress_is_said_in_plain_lines_when_piped(capsys, monkeypatch):
    from gmnet_timm.frequency import progress
    monkeypatch.setattr(progress, 'SECONDS', 0.)
    assert list(progress.progress([1, 2], 'bands', 'batch')) == [1, 2]
    assert capsys.readouterr().err.splitlines() == ['bands: batch 1 of 2, 0 s', 'bands: batch 2 of 2, 0 s']


def test_the_parser_imports_no_capability():
    # importing gmnet_timm registers its models, and so imports torch; capabilities come with the command that needs it
    code = (
        'import sys; from gmnet_timm.cli.main import build_parser; build_parser(); '
        'print([name for name in sys.modules if name.startswith(("gmnet_timm.frequency", "scipy", "matplotlib"))])')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


# --- figures ---------------------------------------------------------------------------------------------------------


def _layer(name, size=(16, 16), other=None):
    signals = {}
    for side, s in (('input', size), ('output', other or size)):
        from gmnet_timm.frequency import num_radial_bins
        power = torch.rand(3, num_radial_bins(*s), dtype=torch.float64) + .1
        signals[side] = Signal('NCHW', s, power, torch.ones(s[0], s[1] // 2 + 1, dtype=torch.float64))
    return LayerSpectrum(name, 'module', signals)


def _inside(figure):
    """Every text of the figure, legends included, lies within it."""
    figure.canvas.draw()
    box = figure.bbox
    texts = [*figure.texts, figure._suptitle, *(t for legend in figure.legends for t in legend.get_texts())]
    for text in filter(None, texts):
        extent = text.get_window_extent()
        assert extent.x0 >= box.x0 - 1 and extent.x1 <= box.x1 + 1, text.get_text()


@pytest.mark.parametrize('count', [1, 2, 40, 60])
@pytest.mark.slow
def test_panels_of_layers(count):
    figure = figures.draw_layers([_layer(f'stages.{i}') for i in range(count)], 'some_model, 3 images')
    drawn = [axis for axis in figure.axes if axis.lines]
    assert len(drawn) == min(count, 40) and len({axis.get_ylim() for axis in drawn}) == 1  # shared
    assert ('left out: 20 beyond' in figure._suptitle.get_text()) == (count == 60)
    _inside(figure)


def test_what_a_figure_leaves_out_is_said():
    layers = [_layer('a'), _layer('b', (16, 16), (8, 8)), _layer('c', (2, 2))]
    figure = figures.draw_layers(layers, 'm', gain=True)
    assert '1 with maps of a few pixels; 1 that change resolution' in figure._suptitle.get_text()
    assert any(tuple(line.get_ydata()) == (1, 1) for line in figure.axes[0].lines)  # gain 1


@pytest.mark.parametrize('models', [1, 2, 6])
def test_curves_have_a_line_at_chance_and_a_whole_legend(models):
    points = [(epoch, 40., 35., 45.) for epoch in range(5)]
    curves = {
        f'a_model_with_a_rather_long_name_{i}': {key: points for key in [('raw', ''), ('low', '10'), ('high', '10')]}
        for i in range(models)
    }
    figure = figures.draw_band_curves(curves, 'title', chance=12.5)
    assert all(any(set(line.get_ydata()) == {12.5} for line in axis.lines) for axis in figure.axes)
    assert len({axis.get_ylim() for axis in figure.axes}) == 1
    _inside(figure)


def test_plotting_functions_take_and_return_an_axes():
    from matplotlib.figure import Figure

    from gmnet_timm.frequency import HeatmapPoint, LogAmplitude, Sensitivity
    layer = _layer('x')
    heat = [HeatmapPoint(v, u, .1, 3, 10) for v in (0, 1) for u in (0, 1)]
    calls = [
        (plots.plot_accuracy, {'m': [(1, 2, 1, 3)]}), (plots.plot_spectrum, layer), (plots.plot_gain, layer),
        (plots.plot_log_amplitude, {'m': [LogAmplitude('x', 0, (4, 4), torch.rand(2, 3))]}),
        (plots.plot_heatmap, heat), (plots.plot_radial_error, {'m': heat}),
        (plots.plot_sensitivity, {'m': Sensitivity((16, 16), layer.after.power)})]
    for plot, data in calls:
        axis = Figure().subplots()
        assert plot(data, axis) is axis
        assert plot(data).figure is not axis.figure


def test_power_per_mode_is_drawn():
    signal = Signal('NCHW', (16, 16), torch.ones(1, 12, dtype=torch.float64), torch.ones(16, 9))
    axis = plots.plot_spectrum(LayerSpectrum('x', 'module', {'output': signal}))
    drawn = axis.lines[0].get_ydata()
    np.testing.assert_allclose(drawn, (signal.per_mode[1:] / 11).numpy())
