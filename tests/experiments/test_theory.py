"""What functions do to the spectrum of Gaussian maps, against limits, a convolution and a simulation."""
import csv
from pathlib import Path

import pytest
import torch

from experiments.command import run_command
from experiments.theory.__main__ import FUNCTIONS, parser, predict_maps
from gmnet_timm.frequency.gaussian import power_law
from gmnet_timm.frequency.split import high_frequency_energy

RESULTS = Path(__file__).parents[2] / 'experiments' / 'theory' / 'results'


def high(name, scale, mean=0.):
    row, = predict_maps([name], [scale], [mean])
    return row['high_after']


def test_limits_of_gates_at_small_and_large_scales():
    """GELU(x)x is x^2 / 2 for small x, ReLU(x)x for large; ReLU6(x)x is ReLU(x)x for small x, 6 ReLU(x) for large."""
    assert high('gelu*x', .01) == pytest.approx(high('identity*x', 1.), rel=.02)
    assert high('gelu*x', 200) == pytest.approx(high('relu*x', 1.), rel=.005)
    assert high('relu6*x', .5) == pytest.approx(high('relu*x', 1.), rel=1e-4)
    assert high('relu6*x', 800) == pytest.approx(high('relu', 1.), rel=.02)
    assert high('relu*x', 1.) == pytest.approx(high('relu*x', 7.), rel=1e-6)


@pytest.mark.parametrize('mean', [0., -1.5])
def test_the_square_is_a_convolution(mean):
    """Of (m + z)^2 the autocovariance is 4 m^2 r + 2 r^2, with r that of z: no Hermite polynomial is needed."""
    power = power_law(64, 1.)[0]
    r = torch.fft.irfft2(power.to(torch.complex128), s=(64, 64), norm='forward')
    expected = torch.fft.rfft2(4 * mean ** 2 * r + 2 * r ** 2, norm='forward').real
    assert high('identity*x', 1., mean) == pytest.approx(high_frequency_energy(expected, 64).item(), rel=1e-5)


def test_shifted_maps_by_simulation():
    power = power_law(64, 1.)[0]
    noise = torch.fft.rfft2(torch.randn(400, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    maps = torch.fft.irfft2(noise * power.sqrt() * 64 ** 2 / 64, s=(64, 64)) * .5 - .75
    assert maps.std().item() == pytest.approx(.5, rel=.03)
    for name, function in (('gelu*x', lambda x: torch.nn.functional.gelu(x) * x), ('relu', torch.relu)):
        spectrum = torch.fft.rfft2(function(maps)).abs().square().mean(0)
        assert high(name, .5, -1.5) == pytest.approx(high_frequency_energy(spectrum, 64).item(), rel=.03)


def test_committed_maps_and_errors(tmp_path, capsys):
    with (RESULTS / 'maps.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(FUNCTIONS) * 5 * 3
    fresh = predict_maps(FUNCTIONS, [3.], [-1.5])
    committed = {row['function']: float(row['high_after']) for row in rows
                 if (row['std'], row['mean_in_stds']) == ('3.0', '-1.5')}
    assert committed == pytest.approx({row['function']: row['high_after'] for row in fresh}, rel=1e-6)
    assert run_command(parser(), ['--output', str(tmp_path), '--functions', 'gelu*v']) == 1
    assert 'second map' in capsys.readouterr().err
    assert run_command(parser(), ['--output', str(tmp_path), '--scales', '-1']) == 1
