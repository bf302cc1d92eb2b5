"""The pooled contrast of plan-2.md from the files of its runs: python -m experiments.study.contrast FOLDER FOLDER"""
import statistics
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from experiments.comparisons import Difference, equivalence, paired_difference
from experiments.study.report import outcomes
from gmnet_timm.frequency.reports import read_csv

__all__ = ['contrast_lines', 'contrasts']

RADII = (1., 2., 3., 4., 6.)
GATES, ACTIVATION = ('ReLU6(x)·x', 'GELU(x)·x'), 'ReLU(x)'
BOUND = 3.  # points
OUTCOMES = ('high', 'high-shifted', 'low', 'raw')  # the first decides


def contrasts(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], Difference]:
    """Mean of the gates minus ReLU in points of top-1, paired by seed, by body and outcome."""
    values = outcomes([row for row in rows if row['band'] == 'raw' or float(row['radius']) in RADII])
    found = {}
    for body in dict.fromkeys(body for body, _ in values['raw']):
        for outcome in OUTCOMES:
            of_variant = {variant: accuracy for (b, variant), accuracy in values[outcome].items() if b == body}
            seeds = sorted(of_variant[ACTIVATION])
            gates = [statistics.fmean(of_variant[gate][seed] for gate in GATES) for seed in seeds]
            found[body, outcome] = paired_difference(gates, [of_variant[ACTIVATION][seed] for seed in seeds])
    return found


def contrast_lines(found: Mapping[tuple[str, str], Difference]) -> list[str]:
    """A table, and the verdict of the plan."""
    heads = ('body', 'outcome', 'gates − ReLU, points', '95 % interval', 'p within ±3', 'seeds')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for (body, outcome), d in found.items():
        lines.append(f'| {body} | {outcome} | {d.mean:+.1f} | {d.low:+.1f} to {d.high:+.1f} | '
                     f'{equivalence(d, BOUND):.2g} | {d.count} |')
    deciding = [d for (_, outcome), d in found.items() if outcome == OUTCOMES[0]]
    if all(d.low > 0 for d in deciding):
        verdict = 'confirmed'
    elif all(d.high < 0 for d in deciding) or all(equivalence(d, BOUND) < .05 for d in deciding):
        verdict = 'contradicted'
    else:
        verdict = 'open'
    return [*lines, '', f'Gates are better on high-pass images: **{verdict}**.']


if __name__ == '__main__':
    rows = [row for folder in sys.argv[1:] for row in read_csv(Path(folder, 'accuracy.csv'))]
    print('\n'.join(contrast_lines(contrasts(rows))))
