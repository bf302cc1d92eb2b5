"""What came out of the study: tests, tables and figures, all from its CSV files.

The outcome of a run is the mean of its accuracies over all radii, so that no radius is picked afterwards. Of the
outcomes, `high` decides; the others are there to understand it.
"""
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.comparisons import Comparison, compare_pairs, detectable_effect, mean_interval
from experiments.figures import draw_comparisons, draw_confusion
from experiments.study.models import COMPARISONS, PAPER
from gmnet_timm.files import write_text
from gmnet_timm.frequency.plots import draw_band_accuracy, save_figure
from gmnet_timm.frequency.reports import read_csv, write_csv

__all__ = ['OUTCOMES', 'compare', 'outcomes', 'power_rows', 'report_blocks', 'write_report']

Rows = Sequence[Mapping[str, str]]
# (body, variant) -> seed -> percent
Values = dict[tuple[str, str], dict[int, float]]

SEEDS_TO_CLAIM = 10
OUTCOMES = {
    'high': 'high-pass images',
    'high-shifted': 'high-pass images with the mean of another',
    'high-faint': 'high-pass images as the paper defines them',
    'low': 'low-pass images',
    'raw': 'unfiltered images',
    'high-low': 'high-pass minus low-pass images',
}


def outcomes(rows: Rows, radius: str | None = None) -> dict[str, Values]:
    """Outcomes of each run in percent.

    Args:
        rows: Of `accuracy.csv` or `tuning.csv`, with one learning rate per body and variant.
        radius: Take this radius alone instead of the mean over all.
    """
    cells: dict[tuple[str, tuple[str, str], int], list[float]] = {}
    for row in rows:
        if radius is None or row['radius'] in ('', radius):
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


def write_report(folder: Path) -> str:
    """Write `tests.csv`, `report.md` and figures from the CSV files in a folder, and return the text of the report."""
    accuracy = read_csv(folder / 'accuracy.csv')
    tests = [
        dict(outcome=outcome, **_test_row(comparison))
        for outcome, values in outcomes(accuracy).items() for comparison in compare(values)]
    write_csv(tests, folder / 'tests.csv')
    blocks = report_blocks(folder)
    text = '\n\n'.join(f'## {name}\n\n{block}' for name, block in blocks.items()) + '\n'
    write_text(folder / 'report.md', text)
    classes = len(json.loads((folder / 'study.json').read_text())['classes'])
    for body in dict.fromkeys(row['body'] for row in accuracy):
        save_figure(draw_band_accuracy(
            _curves(accuracy, body), f'{body}: accuracy against radius, bars: 95 % intervals over seeds',
            100 / classes), folder / f'{body.lower()}.png')
    save_figure(draw_comparisons(
        {outcome: [(_label(c), c.mean, c.low, c.high, c.p_holm < .05) for c in compare(outcomes(accuracy)[outcome])]
         for outcome in ('high', 'low', 'raw')},
        'Paired differences in points, 95 % intervals; filled: significant after Holm\'s correction'),
        folder / 'comparisons.png')
    confusion = draw_confusion(_confusion(folder), 'Confusion matrices over all seeds, ReLU(x)')
    save_figure(confusion, folder / 'confusion.png')
    return text


def report_blocks(folder: Path) -> dict[str, str]:
    """Tables and sentences in Markdown, by name."""
    accuracy = read_csv(folder / 'accuracy.csv')
    found = outcomes(accuracy)
    return {
        'verdict': _verdict(compare(found['high'])),
        'paper': _paper_table(compare(found['high'])),
        'accuracy': _accuracy_table(accuracy, found),
        'radius': _radius_table(accuracy),
        'tests': _tests_table(found),
        'power': _power_text(read_csv(folder / 'power.csv')),
        'gates': _gates_table(read_csv(folder / 'gates.csv')),
        'controls': _controls_table(read_csv(folder / 'controls.csv')),
        'conditions': _conditions(json.loads((folder / 'study.json').read_text()), accuracy),
    }


def _label(comparison: Comparison) -> str:
    return '{}: {} − {}'.format(*_names(comparison))


def _names(comparison: Comparison) -> tuple[str, str, str]:
    """Body, and the two variants."""
    first: Any = comparison.first
    second: Any = comparison.second
    return *first, second[1]


def _test_row(comparison: Comparison) -> dict[str, Any]:
    numbers = {key: float(f'{value:.4g}') for key, value in vars(comparison).items() if isinstance(value, float)}
    return dict(zip(('body', 'first', 'second'), _names(comparison)), count=comparison.count, **numbers)


def _verdict(comparisons: Sequence[Comparison]) -> str:
    seeds = comparisons[0].count
    if seeds < SEEDS_TO_CLAIM:
        return f'Nothing is claimed: {seeds} of the {SEEDS_TO_CLAIM} seeds that a claim takes are finished.'
    lines = []
    for name, chosen in (
            ('Higher', [c for c in comparisons if c.p_holm < .05 and c.mean > 0]),
            ('Lower', [c for c in comparisons if c.p_holm < .05 and c.mean < 0]),
            ('Not told apart', [c for c in comparisons if c.p_holm >= .05])):
        items = '; '.join(f'{_label(c)} {_interval(c)}' for c in chosen)
        lines.append(f'- **{name}** ({len(chosen)} of {len(comparisons)}): {items or "none"}.')
    return '\n'.join(lines)


def _paper_table(comparisons: Sequence[Comparison]) -> str:
    claims: dict[str, list[str]] = {}
    for c in comparisons:
        _, first, second = _names(c)
        if (first, second) in PAPER:
            open_ = c.p_holm >= .05 or c.count < SEEDS_TO_CLAIM
            verdict = 'left open' if open_ else 'agrees' if c.mean > 0 else 'contradicts'
            claims.setdefault(f'{first} above {second}', []).append(f'{_interval(c)}: {verdict}')
    bodies = dict.fromkeys(_names(c)[0] for c in comparisons)
    heads = ["the paper's claim on high-pass images", *bodies]
    return _table(heads, [[claim, *cells] for claim, cells in claims.items()])


def _interval(c: Comparison) -> str:
    return f'{c.mean:+.1f} [{c.low:+.1f}, {c.high:+.1f}]'


def _starred(c: Comparison) -> str:
    return _interval(c) + ('*' if c.p_holm < .05 else '')


def _p(value: float) -> str:
    return '< .001' if value < .001 else f'{value:.3f}'.lstrip('0') if value < 1 else '1'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [heads, ['---'] * len(heads), *rows])


def _accuracy_table(rows: Rows, found: dict[str, Values]) -> str:
    rates = {(row['body'], row['variant']): row['lr'] for row in rows}
    columns = [outcome for outcome in OUTCOMES if outcome != 'high-low']
    body = []
    for pair, rate in rates.items():
        cells = []
        for outcome in columns:
            mean, low, _ = mean_interval(list(found[outcome][pair].values()))
            cells.append(f'{mean:.1f} ± {mean - low:.1f}')
        body.append([*pair, f'{float(rate):g}', *cells])
    return _table(['body', 'variant', 'learning rate', *columns], body)


def _radius_table(rows: Rows) -> str:
    radii = list(dict.fromkeys(row['radius'] for row in rows if row['radius']))
    by_radius = {radius: outcomes(rows, radius)['high'] for radius in radii}
    body = []
    for pair in by_radius[radii[0]]:
        means = [mean_interval(list(by_radius[radius][pair].values())) for radius in radii]
        body.append([*pair, *(f'{mean:.1f} ± {mean - low:.1f}' for mean, low, _ in means)])
    return _table(['body', 'variant', *(f'r = {radius}' for radius in radii)], body)


def _tests_table(found: dict[str, Values]) -> str:
    questions = {(first, second): question for first, second, question in COMPARISONS}
    others = ['high-shifted', 'high-faint', 'low', 'raw', 'high-low']
    compared = {outcome: compare(found[outcome]) for outcome in ['high', *others]}
    body = []
    for i, c in enumerate(compared['high']):
        name, first, second = _names(c)
        body.append([
            name, f'{first} − {second}', questions[first, second], _interval(c), _p(c.p), _p(c.p_holm),
            *(_starred(compared[outcome][i]) for outcome in others)])
    return _table(['body', 'difference', 'question', '**high**', 'p', 'p after Holm', *others], body)


def _power_text(rows: Rows) -> str:
    return _table(
        ['body', 'standard deviation of a difference', 'seeds', 'level of the first step', 'found in 80 % of studies'],
        [[r['body'], f'{float(r["std"]):.1f} points', r['seeds'], f'.05 / {r["comparisons"]}',
          f'{float(r["detectable"]):.1f} points'] for r in rows])


def _gates_table(rows: Rows) -> str:
    groups: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for row in rows:
        groups.setdefault((row['body'], row['variant']), []).append(row)
    body = []
    for pair, gates in groups.items():
        stds = [float(gate['std']) for gate in gates]
        clipped = [100 * float(gate['clipped']) for gate in gates]
        smallest = min((int(gate['height']), int(gate['width'])) for gate in gates)
        body.append([
            *pair, '{}×{}'.format(*smallest), f'{min(stds):.2f} to {max(stds):.2f}',
            f'{sum(clipped) / len(clipped):.2g}' if '6' in pair[1] else ''])
    return _table(['body', 'variant', 'smallest map', 'standard deviation before it', 'clipped, % of all values'], body)


def _controls_table(rows: Rows) -> str:
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row['band'], []).append(100 * int(row['correct']) / int(row['count']))
    return _table(
        ['images', 'top-1 from mean and contrast alone, %', 'lowest', 'highest'],
        [[band, f'{sum(v) / len(v):.1f}', f'{min(v):.1f}', f'{max(v):.1f}'] for band, v in groups.items()])


def _conditions(study: dict[str, Any], rows: Rows) -> str:
    settings, data = study['settings'], study['data']
    versions = study['versions']
    facts = {
        'images': f'{data["size"]} × {data["size"]} pixels, {len(study["classes"])} classes, '
                  f'chance {100 / len(study["classes"]):.1f} %, {rows[0]["count"]} test images per seed',
        'training': f'{settings["epochs"]} epochs, {settings["warmup_epochs"]} of them warm-up, batch size '
                    f'{data["batch_size"]}, AdamW, weight decay {settings["weight_decay"]:g}, cosine schedule, label '
                    f'smoothing {settings["smoothing"]:g}, float32',
        'learning rates': f'{", ".join(f"{lr:g}" for lr in study["learning_rates"])}, each with '
                          f'{study["tuning_seeds"]} tuning seeds',
        'seeds': f'{study["seeds"][0]} to {study["seeds"][-1]}',
        'parameters': ', '.join(f'{body} {count:,}' for body, count in study['parameters'].items()),
        'machine': f'{study["device"]}, threads: {study["threads"]}',
        'versions': ', '.join(f'{name} {version}' for name, version in versions.items()),
        'time': f'{study["seconds"] / 60:.0f} minutes for all runs, other work was going on',
        'command': f'`{" ".join(study["command"])}`',
    }
    return '\n'.join(f'- {name}: {fact}' for name, fact in facts.items())


def _curves(rows: Rows, body: str) -> dict[str, dict[tuple[str, str], list[tuple[float, float, float, float]]]]:
    curves: dict[str, dict[tuple[str, str], list[tuple[float, float, float, float]]]] = {}
    for radius in dict.fromkeys(row['radius'] for row in rows):
        for band, values in outcomes(rows, radius).items():
            for (name, variant), by_seed in values.items():
                if name == body and (band == 'raw') == (radius == '') and band not in ('high-low', 'high-faint'):
                    points = curves.setdefault(variant, {}).setdefault((band, ''), [])
                    points.append((float(radius or 0), *mean_interval(list(by_seed.values()))))
    return curves


def _confusion(folder: Path) -> dict[str, tuple[list[str], list[list[int]]]]:
    """Classes and matrix by title, of ReLU(x) (or the first variant)."""
    rows = read_csv(folder / 'confusion.csv')
    variant = 'ReLU(x)' if any(row['variant'] == 'ReLU(x)' for row in rows) else rows[0]['variant']
    found: dict[str, tuple[list[str], list[list[int]]]] = {}
    for row in rows:
        if row['variant'] == variant:
            classes = [name for name in row if name not in ('body', 'variant', 'band', 'radius', 'label')]
            title = f'{row["body"]}, {row["band"]} {row["radius"]}'.strip()
            found.setdefault(title, (classes, []))[1].append([int(row[name]) for name in classes])
    return found
