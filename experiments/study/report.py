"""What came out of the study, from its CSV files.

The outcome of a run is the mean of its accuracies over all radii, so that no radius is picked afterwards. Of the
outcomes, `high` decides; the others are there to understand it.
"""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparisons import Comparison, compare_pairs, detectable_effect
from experiments.study.models import COMPARISONS
from gmnet_timm.frequency.reports import read_csv, write_csv

__all__ = ['OUTCOMES', 'compare', 'outcomes', 'power_rows', 'test_rows', 'write_report']

Rows = Sequence[Mapping[str, str]]
# (body, variant) -> seed -> percent
Values = dict[tuple[str, str], dict[int, float]]

OUTCOMES = ('high', 'high-shifted', 'high-faint', 'low', 'raw', 'high-low')  # the last is high minus low


def outcomes(rows: Rows) -> dict[str, Values]:
    """Outcomes of each run in percent.

    Args:
        rows: Of `accuracy.csv` or `tuning.csv`, with one learning rate per body and variant.
    """
    cells: dict[tuple[str, tuple[str, str], int], list[float]] = {}
    for row in rows:
        key = row['band'], (row['body'], row['variant']), int(row['seed'])
        cells.setdefault(key, []).append(100 * int(row['correct']) / int(row['count']))
    found: dict[str, Values] = {outcome: {} for outcome in OUTCOMES}
    for (band, pair, seed), values in cells.items():
        found[band].setdefault(pair, {})[seed] = sum(values) / len(values)
    for pair, by_seed in found['high'].items():
        found['high-low'][pair] = {seed: value - found['low'][pair][seed] for seed, value in by_seed.items()}
    return found


def compare(values: Values) -> list[Comparison]:
    """All planned comparisons of both bodies as one family, without variants that were not trained."""
    bodies = dict.fromkeys(body for body, _ in values)
    pairs = [((body, first), (body, second)) for body in bodies for first, second, _ in COMPARISONS]
    return compare_pairs(values, [pair for pair in pairs if pair[0] in values and pair[1] in values])


def power_rows(tuning: Rows, seeds: int) -> list[dict[str, Any]]:
    """Smallest true difference that a number of seeds finds with a power of 80 %, by body, for the outcome `high`.

    The standard deviation of a paired difference is pooled over the planned comparisons, from the tuning runs at the
    learning rates that were chosen. The significance level is that of the first step of Holm's correction.

    Args:
        tuning: Rows of `tuning.csv`.
        seeds: Number of seeds to come.
    """
    values = outcomes([row for row in tuning if row['chosen'] == '1'])['high']
    if min(map(len, values.values())) < 2 or seeds < 2:
        return []  # a standard deviation and a test need two
    compared = compare(values)
    if not compared:
        return []
    rows = []
    for body in dict.fromkeys(_names(c)[0] for c in compared):
        stds = [c.std for c in compared if _names(c)[0] == body]
        std = math.sqrt(sum(s ** 2 for s in stds) / len(stds))
        alpha = .05 / len(compared)
        rows.append(dict(
            body=body, comparisons=len(compared), std=round(std, 2), seeds=seeds, alpha=round(alpha, 5),
            detectable=round(detectable_effect(std, seeds, alpha), 2) if std else 0.))
    return rows


def test_rows(accuracy: Rows) -> list[dict[str, Any]]:
    """Every comparison of every outcome, corrected within its outcome, with four digits."""
    rows = []
    for outcome, values in outcomes(accuracy).items():
        for comparison in compare(values):
            names = dict(zip(('body', 'first', 'second'), _names(comparison)))
            rows.append(dict(outcome=outcome, **names, count=comparison.count, **{
                key: float(f'{value:.4g}') for key, value in vars(comparison).items() if isinstance(value, float)}))
    return rows


def write_report(folder: Path) -> str:
    """Write `tests.csv` from `accuracy.csv` in a folder, and return the comparisons that decide as lines."""
    rows = test_rows(read_csv(folder / 'accuracy.csv'))
    write_csv(rows, folder / 'tests.csv')
    lines = [f'{row["body"]}: {row["first"]} − {row["second"]}  {row["mean"]:+.1f} [{row["low"]:+.1f}, '
             f'{row["high"]:+.1f}], corrected p {row["p_holm"]:.2g}' for row in rows if row['outcome'] == 'high']
    return '\n'.join(['high-pass images, points of top-1 with 95 % intervals:', *lines])


def _names(comparison: Comparison) -> tuple[str, str, str]:
    """Body, and the two variants."""
    first: Any = comparison.first
    second: Any = comparison.second
    return *first, second[1]
