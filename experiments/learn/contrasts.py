"""The contrasts of plan-2.md from its runs, or from the table of them: python -m experiments.learn.contrasts FOLDER"""
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.comparisons import compare_pairs
from experiments.variants import Variant
from gmnet_timm.frequency.reports import write_csv

__all__ = ['contrast_lines', 'run_rows']

PLANNED = [('relu*x', 'relu'), ('relu6*x', 'relu'), ('gelu*x', 'gelu'), ('gelu*v', 'gelu'), ('relu6*x', 'gelu*x')]


def run_rows(folder: Path) -> list[dict[str, Any]]:
    """One row per variant and seed: the error between the points of training and on them, as shares of the constant 0.
    """
    rows = []
    for path in sorted((folder / 'runs').glob('regression-*.json')):
        run = json.loads(path.read_text())
        for seed, between, curve in zip(run['settings']['seeds'], run['between'], run['values'], strict=True):
            rows.append(dict(
                variant=run['variant'], seed=seed, learning_rate=run['learning_rate'], at_edge=int(run['at_edge']),
                between=between, on_points=sum(curve[-1]) / len(curve[-1])))
    return rows


def contrast_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The planned differences of the error between points, with Holm's correction over the five, and verdicts."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        values.setdefault(row['variant'], {})[int(row['seed'])] = float(row['between'])
    heads = ('difference', 'error between points', '95 % interval', 'corrected p', 'contrast')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for (first, second), found in zip(PLANNED, compare_pairs(values, PLANNED), strict=True):
        verdict = 'open' if found.p_holm >= .05 else 'smaller error' if found.mean < 0 else 'larger error'
        lines.append(f'| {Variant(first).label} − {Variant(second).label} | {found.mean:+.3f} | {found.low:+.3f} to '
                     f'{found.high:+.3f} | {found.p_holm:.2g} | {verdict} |')
    return lines


if __name__ == '__main__':
    table = run_rows(Path(sys.argv[1]))
    write_csv(table, Path(sys.argv[1]) / 'between.csv')
    print('\n'.join(contrast_lines(table)))
