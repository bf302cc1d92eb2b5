"""Writes the tables of docs/theory.md from the CSV files beside this one: python -m docs.learn.report

A section is what stands between `<!-- theory: NAME -->` and `<!-- theory: end -->`.
"""
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import markdown
from gmnet_timm.files import write_text
from gmnet_timm.frequency import theory
from gmnet_timm.frequency.learn import TASKS
from gmnet_timm.frequency.learn_tasks import EMPTY, IDEAL
from gmnet_timm.frequency.reports import read_csv
from gmnet_timm.frequency.statistics import paired_difference, seeds_needed
from gmnet_timm.frequency.variants import Variant

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / 'theory.md'
WIDTH = 120
SECTION = re.compile(r'(<!-- theory: ([\w-]+) -->\n).*?(<!-- theory: end -->)', re.DOTALL)
OUTCOMES = {
    'error': 'error', 'error high': 'error, 8 cycles and more', 'high': 'high bands', 'high - low': 'high - low'}


def rendered(text: str) -> str:
    """A document with its sections written anew."""
    return SECTION.sub(lambda match: f'{match[1]}{VIEWS[match[2]]()}\n{match[3]}', text)


def scales() -> str:
    rows = read_csv(HERE / 'maps.csv')
    functions = list(dict.fromkeys(row['function'] for row in rows))
    lines = []
    for std in dict.fromkeys(row['std'] for row in rows):
        found = {row['function']: row for row in rows if row['std'] == std}
        beyond = 100 * float(found[functions[0]]['beyond_6'])
        lines.append([
            f'{float(std):g}', f'{beyond:.2g} %' if beyond > 1e-3 else '0', *(
                f'{float(found[name]["output_high_low"]):.3f}' for name in functions)])
    table = markdown(['std', 'beyond 6', *(Variant(name).label for name in functions)], lines)
    return f'{table}\n\nThe map itself: {float(rows[0]["input_high_low"]):.3f}.'


def kink() -> str:
    one, five = (theory.scale_where('relu6*x', 'relu*x', ratio) for ratio in (.99, .95))
    low, high = (
        {p.function: p.output.high_low_ratio for p in theory.predict_maps(('gelu*x', 'relu6*x'), [scale])}
        for scale in (.8, 3.))
    more = [100 * (found['gelu*x'] / found['relu6*x'] - 1) for found in (low, high)]
    beyond = 50 * math.erfc(6 / one / math.sqrt(2))
    return bullets(
        f'The kink at 6 changes high/low of ReLU(x)·x by 1 % at a standard deviation of {one:.2g}, where {beyond:.1f} '
        f'% of the values are beyond 6, and by 5 % at {five:.2g}. It **lowers** high/low: a gate that clips everything '
        'is 6·ReLU(x), and ReLU(x) widens less than its gate.',
        f'GELU(x)·x has {more[0]:.1f} % more high/low than ReLU6(x)·x at 0.8 and {more[1]:.1f} % more at 3. There is '
        'no scale at which it has less.')


def tones() -> str:
    lines = []
    for name, gate in (('relu', False), ('relu', True), ('relu6', True), ('gelu', True), ('identity', True)):
        cells = []
        for amplitude in (1.4, 12.):
            found = theory.measured_harmonics(name, amplitude, 4000, gate=gate)
            cells.append(' / '.join(f'{100 * theory.energy_share(found, n):.2f}' for n in (3, 5)))
        rate = theory.decay_rate(name, 12., gate=gate)
        lines.append([
            Variant(f'{name}*x' if gate else name).label, *cells,
            'faster than any power' if rate == math.inf else f'n^-{rate:.1f}'])
    return markdown(['function', 'A = 1.4', 'A = 12', 'harmonics fall in the end, A = 12'], lines)


def gates() -> str:
    rows = _gates()
    lines = [
        [row['layer'], row['size'], f'{row["pre_gate_std"]:.2f}', f'{row["value_high_low"]:.3f}',
         f'{row["product_high_low"]:.3f}', f'{row["gain"]:.2f} ({row["gain_low"]:.2f} to {row["gain_high"]:.2f})',
         *(f'{row[f"predicted_{name}"]:.3f}' for name in ('relu6*x', 'gelu*x', 'relu', 'gelu'))]
        for row in rows]
    head = ['gate', 'map', 'std', 'input', 'product', 'product over input',
            *(f'theory {Variant(name).label}' for name in ('relu6*x', 'gelu*x', 'relu', 'gelu'))]
    return markdown(head, lines)


def gates_text() -> str:
    rows = _gates()
    count = len(rows)
    raised, again = (sum(row['gain_low'] > 1 for row in found) for found in (rows, _gates('gates-2.csv')))
    lowered = sum(row['gain_high'] < 1 for row in rows)
    errors = [abs(row['product_high_low'] / row['predicted_high_low'] - 1) for row in rows]
    raised_in_theory = sum(row['predicted_high_low'] > row['value_high_low'] for row in rows)
    relu = sum(row['predicted_relu'] > row['value_high_low'] for row in rows)
    more = sum(row['predicted_relu'] < row['predicted_relu6*x'] for row in rows)
    gelu = sum(row['predicted_gelu*x'] > row['predicted_relu6*x'] for row in rows)
    stds = [row['pre_gate_std'] for row in rows]
    mean = statistics.geometric_mean(row['gain'] for row in rows)
    kink = max(abs(row['predicted_relu*x'] / row['predicted_relu6*x'] - 1) for row in rows)
    worst = max(rows, key=lambda row: abs(math.log(row['product_high_low'] / row['predicted_high_low'])))
    return bullets(
        f'The gate raises high/low in **{raised} of {count}** blocks and lowers it in {lowered}, by intervals over '
        f'images that leave out 1; the geometric mean of product over input is {mean:.2f}. Theory has it rise in '
        f'{raised_in_theory}. In a second training, which reached less accuracy, it is {again} of {count}.',
        f'Theory misses the measured high/low by {100 * statistics.median(errors):.0f} % (median over the blocks), and '
        f'by {100 * max(errors):.0f} % in {worst["layer"]}, the worst.',
        f'ReLU(x) alone in the same places would raise it in {relu} of {count} blocks in theory. ReLU6(x)·x raises it '
        f'more than ReLU(x) in {more} of {count}.',
        f'GELU(x)·x would raise it more than ReLU6(x)·x in {gelu} of {count}. Standard deviations are {min(stds):.2f} '
        f'to {max(stds):.2f}; without the kink at 6 no block would differ by more than {100 * kink:.1f} %.')


def regression() -> str:
    rows = _summary('regression')
    lines = [
        [Variant(name).label, found['error']['parameters'], found['error']['learning_rate'],
         f'{float(found["error"]["pre_gate_std"]):.2f}', f'{100 * float(found["error"]["beyond_6"]):.2g} %',
         _interval(found['error']), _interval(found['error high']), *_last_errors(name, ('8', '16', '32'))]
        for name, found in rows.items()]
    head = ['variant', 'parameters', 'learning rate', 'std', 'beyond 6', 'error', 'error, 8 cycles and more', 'at 8',
            'at 16', 'at 32']
    return markdown(head, lines)


def images() -> str:
    lines = []
    for task in TASKS[1:]:
        for name, found in _summary(task).items():
            lines.append([
                task, Variant(name).label, found['high']['learning_rate'],
                *(_interval(found[key]) for key in ('low', 'high', 'high - low')),
                *(f'{float(found[key]["mean"]):.2f}' for key in (
                    'low at the end', 'high at the end', 'empty at the end'))])
    head = ['task', 'variant', 'learning rate', 'low', 'high', 'high - low', 'low at the end', 'high at the end',
            'empty band at the end']
    return markdown(head, lines)


def comparisons() -> str:
    lines = [
        [row['task'], OUTCOMES[row['outcome']], f'{Variant(row["first"]).label} - {Variant(row["second"]).label}',
         f'{float(row["difference"]):+.3f} ({float(row["low"]):+.3f} to {float(row["high"]):+.3f})',
         f'{float(row["p_holm"]):.2g}', row['family']]
        for row in read_csv(HERE / 'comparisons.csv')]
    return markdown(['task', 'outcome', 'comparison', 'difference', 'p', 'family'], lines)


def verdicts() -> str:
    """What became of the sentences that were written before, each by the rule that was stated with them."""
    regression = [
        _verdict('2. A product speeds up GELU', 'regression', 'error', 'gelu*x', 'gelu', -1),
        _verdict('3. A product slows down ReLU', 'regression', 'error', 'relu*x', 'relu', 1),
        _verdict('4. ReLU6 is not better than GELU in the gate', 'regression', 'error', 'relu6*x', 'gelu*x', 1,
                 none_will_do=True)]
    squares = [
        row for row in read_csv(HERE / 'regression.csv') if row['variant'] == 'identity*x' and row['step'] != '0']
    least = min(float(row[f'band_{k}']) for row in squares for k in (12, 16, 24, 32))
    limit = ['5. x·x learns nothing above frequency 8', f'the smallest error that was seen there is {least:.4g}',
             'holds' if least > .999 else 'contradicted']
    return markdown(['expectation', 'found', 'verdict'], [_growth(), *regression, limit, *_orders(), *_paper()])


def trial() -> str:
    """What the first trial said and what became of it."""
    error = {name: found['error'] for name, found in _summary('regression').items()}
    gelu, relu, kink, two = (_comparison('regression', 'error', *pair) for pair in (
        ('gelu*x', 'gelu'), ('relu*x', 'relu'), ('relu6*x', 'gelu*x'), ('gelu*v', 'gelu')))
    pattern, slower = (
        _comparison('pattern-pink', 'high', 'relu6*x', other) for other in ('gelu*x', 'relu'))
    linear = _summary('pattern-white')['identity']['high - low'], _summary('pattern-pink')['identity']['high - low']
    ahead, ahead_pink = (
        f'{-float(row["mean"]):.3f} ({-float(row["high"]):.3f} to {-float(row["low"]):.3f})' for row in linear)
    return bullets(
        f'*A product speeds up a smooth activation*: **not confirmed**. Errors at the end are {_mean(error["gelu*x"])} '
        f'for GELU(x)·x and {_mean(error["gelu"])} for GELU(x), difference {_text(gelu)}. With two linear maps, '
        f'GELU(x)·v, it is {_mean(error["gelu*v"])}, difference {_text(two)}.',
        f'*A product slows down a kinked one*: **confirmed**. {_mean(error["relu*x"])} for ReLU(x)·x, '
        f'{_mean(error["relu"])} for ReLU(x), difference {_text(relu)}. ReLU(x) is the best variant of all.',
        f'*ReLU6 is not better than GELU in the gate*: **not contradicted** by the regression, difference of errors '
        f'{_text(kink)}, nor by textures. On patterns ReLU6(x)·x is ahead by little, {_text(pattern)} in the high '
        'bands with a pink background.',
        '*For images the order follows the data, not the gate*: **mostly confirmed**. With a pink background every '
        'variant reads low bands first; with a white one no gate changes the order measurably. But it is not the data '
        f'alone: also with a white background low bands are ahead, for the linear network by {ahead}, against '
        f'{ahead_pink} with a pink one. And on pink patterns the gate reads the high bands later than ReLU(x): '
        f'{_text(slower)}.')


def paper() -> str:
    """The paper's claim on textures, what was not planned, and what would be needed to decide."""
    pink = _summary('texture-pink')
    planned = _comparison('texture-pink', 'high', 'relu6*x', 'relu')
    curves = {name: _by_seed('texture-pink', name) for name in ('identity*x', 'relu', 'relu6*x')}
    square, gate = (paired_difference(curves[name], curves['relu']) for name in ('identity*x', 'relu6*x'))
    needed = seeds_needed(gate.mean, gate.std, alpha=.05 / int(planned['family']))
    share = {name: _mean(found['high']) for name, found in pink.items()}
    return bullets(
        'The sign is that of the paper on textures with a pink background, where the high bands are hard: '
        f'{share["relu6*x"]} of what the best observer has for ReLU6(x)·x, {share["gelu*x"]} for GELU(x)·x, '
        f'{share["relu"]} for ReLU(x), {share["gelu"]} for GELU(x). No gate differs from its activation beyond chance. '
        f'If that of ReLU6(x)·x and ReLU(x) is as measured, {needed} seeds find it with a probability of 80 %.',
        f"x·x reads them best, {share['identity*x']}. Its difference from ReLU(x), which is the paper's own "
        f'comparison, was not planned here: {square.mean:+.3f} ({square.low:+.3f} to {square.high:+.3f}), '
        f'p = {square.p:.2g} without correction.',
        'Whether the gate has ReLU6 or GELU makes no difference there: '
        f'{_text(_comparison("texture-pink", "high", "relu6*x", "gelu*x"))}.')


def one_rate() -> str:
    rows: dict[str, dict[str, dict[str, str]]] = {}
    for row in read_csv(HERE / 'one-rate.csv'):
        rows.setdefault(row['variant'], {})[row['outcome']] = row
    rate = next(iter(rows.values()))['high']['learning_rate']
    table = markdown(['texture-white, learning rate ' + rate, 'low', 'high'], [
        [Variant(name).label, _interval(found['low']), _interval(found['high'])] for name, found in rows.items()])
    return table


def conditions() -> str:
    found = json.loads((HERE / 'learn.json').read_text())
    made = found['made_by'][-1]
    settings = found['settings']
    return textwrap.fill(
        f'Conditions: {len(settings["seeds"])} seeds ({settings["seeds"][0]} to {settings["seeds"][-1]}), learning '
        f'rates chosen on seeds {" and ".join(map(str, settings["tuning_seeds"]))}, {settings["steps"]} steps, '
        f'float32, {made["threads"]} thread of an {made["machine"]} CPU, torch {made["torch"]}, timm {made["timm"]}, '
        f'`{" ".join(made["command"][:3])}`.', WIDTH, break_on_hyphens=False)


def bullets(*sentences: str) -> str:
    lines = (
        textwrap.fill(f'- {text}'.replace(' %', '\0%'), WIDTH, subsequent_indent='  ', break_on_hyphens=False)
        for text in sentences)
    return '\n'.join(lines).replace('\0', ' ')  # a line does not begin with %


def _growth() -> list[str]:
    """Error at the end of the high half of the frequencies against all."""
    rows = _summary('regression')
    # 'error' is the mean of both halves
    against = [Variant(name).label for name, found in rows.items()
               if float(found['error high']['mean']) <= float(found['error']['mean'])]
    return ['1. Errors grow with frequency', f'of {len(rows) - len(against)} of {len(rows)} variants, by halves',
            'contradicted by ' + ', '.join(against) if against else 'holds']


def _verdict(
        sentence: str,
        task: str,
        outcome: str,
        first: str,
        second: str,
        sign: int,
        none_will_do: bool = False,
) -> list[str]:
    """Whether first - second has the expected sign after correction; without it, 'open', or what was expected."""
    row = _comparison(task, outcome, first, second)
    difference, p = float(row['difference']), float(row['p_holm'])
    found = _text(row)
    if p >= .05:
        return [sentence, found, 'not contradicted' if none_will_do else 'open']
    return [sentence, found, 'holds' if difference * sign > 0 else 'contradicted']


def _orders() -> list[list[str]]:
    lines = []
    compared = [row for row in read_csv(HERE / 'comparisons.csv')
                if row['outcome'] == 'high - low' and row['second'] in ('relu', 'gelu')]
    for task in TASKS[1:]:
        if 'pink' in task:
            found = {name: float(row['high - low']['high']) for name, row in _summary(task).items()
                     if not (name == 'identity' and 'texture' in task)}  # which is at chance
            below = sum(high < 0 for high in found.values())
            lines.append([f'6. {task}: low bands first', f'by {below} of {len(found)} variants',
                          'holds' if below == len(found) else 'contradicted'])
        else:
            rows = [row for row in compared if row['task'] == task]
            differ = [row for row in rows if float(row['p_holm']) < .05]
            lines.append([f'6. {task}: a gate does not change the order', f'{len(differ)} of {len(rows)} '
                          'comparisons with an activation differ', 'contradicted' if differ else 'not contradicted'])
    return lines


def _paper() -> list[list[str]]:
    lines = []
    rows = [row for row in read_csv(HERE / 'comparisons.csv') if row['outcome'] == 'high' and 'texture' in row['task']]
    for own, sentence in ((True, '7. gates above their activations in high bands'),
                          (False, '7. ReLU6(x)·x above GELU(x)·x in high bands')):
        chosen = [row for row in rows if (row['second'] in ('relu', 'gelu') if own else (
            row['first'], row['second']) == ('relu6*x', 'gelu*x'))]
        for row in chosen:
            p, difference = float(row['p_holm']), float(row['difference'])
            lines.append([
                f'{sentence}: {row["task"]}, {Variant(row["first"]).label} - {Variant(row["second"]).label}',
                _text(row),
                'open' if p >= .05 else 'as the paper' if difference > 0 else 'against the paper'])
    return lines


def _comparison(task: str, outcome: str, first: str, second: str) -> dict[str, str]:
    return next(row for row in read_csv(HERE / 'comparisons.csv') if (
        row['task'], row['outcome'], row['first'], row['second']) == (task, outcome, first, second))


def _text(row: dict[str, str]) -> str:
    return (f'{float(row["difference"]):+.3f} ({float(row["low"]):+.3f} to {float(row["high"]):+.3f}, '
            f'p = {float(row["p_holm"]):.2g})')


def _mean(row: dict[str, str]) -> str:
    return f'{float(row["mean"]):.3f}'


def _by_seed(task: str, variant: str) -> list[float]:
    """The outcome `high` of each seed: share of what the best observer has, mean over training and the high bands."""
    rows = [row for row in read_csv(HERE / f'{task}.csv') if row['variant'] == variant and row['step'] != '0']
    bands = [key for key in rows[0] if key.startswith('band_')][EMPTY + 1:]
    seeds = dict.fromkeys(row['seed'] for row in rows)
    return [statistics.fmean((float(row[band]) - .5) / (IDEAL - .5) for row in rows if row['seed'] == seed
                             for band in bands) for seed in seeds]


def _last_errors(variant: str, bands: tuple[str, ...]) -> list[str]:
    rows = [row for row in read_csv(HERE / 'regression.csv') if row['variant'] == variant]
    last = max(int(row['step']) for row in rows)
    return [
        f'{statistics.fmean(float(row[f"band_{band}"]) for row in rows if int(row["step"]) == last):.3f}'
        for band in bands]


def _summary(task: str) -> dict[str, dict[str, dict[str, str]]]:
    """Rows by variant and outcome."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in read_csv(HERE / 'summary.csv'):
        if row['task'] == task:
            found.setdefault(row['variant'], {})[row['outcome']] = row
    return found


def _gates(name: str = 'gates.csv') -> list[dict]:
    text = ('layer', 'size', 'theory')
    return [{key: value if key in text else float(value) for key, value in row.items()}
            for row in read_csv(HERE / name)]


def _interval(row: dict[str, str]) -> str:
    return f'{float(row["mean"]):.3f} ({float(row["low"]):.3f} to {float(row["high"]):.3f})'



VIEWS: dict[str, Callable[[], str]] = {
    'scales': scales, 'kink': kink, 'tones': tones, 'gates': gates, 'gates-text': gates_text,
    'regression': regression, 'images': images, 'comparisons': comparisons, 'verdicts': verdicts,
    'conditions': conditions, 'trial': trial, 'paper': paper, 'one-rate': one_rate,
}

if __name__ == '__main__':
    write_text(DOCUMENT, rendered(DOCUMENT.read_text(encoding='utf-8')))
