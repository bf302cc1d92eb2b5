"""Tables, the figure and comparisons, from result files alone."""
import dataclasses
import random
import statistics
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.files import replacing, write_text

from .measure import Case, Row
from .models import MODELS, find
from .results import Results, quantile

__all__ = ['compare', 'report']

START, END = '<!-- benchmarks: start -->', '<!-- benchmarks: end -->'
SMOKE = 'SMOKE RUN: small images, a call or two. It shows that everything runs; its times say nothing.'


def report(
        results: Sequence[Results],
        figure: Optional[Path] = None,
        document: Optional[Path] = None,
) -> str:
    """Markdown tables, one a result file.

    Args:
        results: What was measured.
        figure: Where to draw top-1 against latency.
        document: A Markdown file that has the two markers, between which the tables are put.

    Raises:
        UserError: The results are of smoke runs and would be published, or the document has no markers.
    """
    text = '\n\n'.join(f'{table(r)}\n\n{conditions(r)}' for r in results)
    if (figure or document) and any(r.settings.smoke for r in results):
        raise UserError('A smoke run measures nothing: make the figure and the table from a full run.')
    if figure:
        draw([r for r in results if r.settings.mode == 'latency'], figure)
    if document:
        before, start, rest = document.read_text(encoding='utf-8').partition(START)
        _, end, after = rest.partition(END)
        if not (start and end):
            raise UserError(f'{document} has no markers: add the lines {START} and {END} where the tables belong.')
        write_text(document, f'{before}{START}\n{text}\n{END}{after}')
    return text


def table(results: Results) -> str:
    """A row a model, a column a way to run it, in the faster of the layouts that were tried."""
    columns = {column(row.case, results): None for row in results.rows if row.samples_ms}
    limited = results.settings.mode != 'training'
    header = ['model', 'top-1 %', 'params', *(['MACs'] if limited else []), *columns, *(['limit'] if limited else [])]
    lines = []
    for name in {row.case.model: None for row in results.rows}:
        rows = [row for row in results.rows if row.case.model == name]
        cells = [f'`{name}`', accuracy(name), f'{rows[0].params / 1e6:.1f} M']
        if limited:
            cells.append(f'{rows[0].work.macs / 1e9:.2f} G' if rows[0].work else '')
        cells += [value([row for row in rows if column(row.case, results) == c], results) for c in columns]
        if limited:
            cells.append(limit(rows, results))
        lines.append(cells)
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    divider = ['-' * width if i == 0 else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return '\n'.join(
        '| ' + ' | '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        + ' |' for line in [header, divider, *lines])


def column(case: Case, results: Results) -> str:
    """What tells the ways to run a model apart, in this run."""
    parts = [case.runtime]
    if len(results.settings.precisions) > 1 or case.precision != 'float32':
        parts.append(case.precision)
    if len(results.settings.folded) > 1 and not case.folded:
        parts.append('not folded')
    return ', '.join(parts)


def value(rows: List[Row], results: Results) -> str:
    """A cell: the least milliseconds, or for throughput the most images per second and their batch."""
    timed = [row for row in rows if row.samples_ms]
    if not timed:
        return rows[0].status.split(':')[0] if rows else ''
    best = max(timed, key=images_per_s)
    if results.settings.mode == 'throughput':
        return f'{images_per_s(best):,.0f} ({best.case.batch})'
    ms = statistics.median(best.samples_ms)
    text = f'{ms:,.0f}' if ms >= 100 else f'{ms:.3g}'
    return text if best.memory_mb is None else f'{text} ({best.memory_mb:,.0f} MB)'


def limit(rows: List[Row], results: Results) -> str:
    """The roofline in float32, or in the only precision there is, and how near the fastest case comes to it."""
    rows = [row for row in rows if row.samples_ms]
    precision = 'float32' if any(row.case.precision == 'float32' for row in rows) else results.settings.precisions[0]
    rows = [row for row in rows if row.case.precision == precision]
    if not rows:
        return ''
    best = min(rows, key=lambda row: statistics.median(row.samples_ms) / row.case.batch)
    floor = best.roofline_ms or 0
    ratio = statistics.median(best.samples_ms) / floor
    if results.settings.mode == 'throughput':
        return f'{1e3 * best.case.batch / floor:,.0f} ({1 / ratio:.0%})'
    return f'{floor:.3g} (x {ratio:.2f})'


def images_per_s(row: Row) -> float:
    return 1e3 * row.case.batch / statistics.median(row.samples_ms)


def accuracy(name: str) -> str:
    model = find(name)
    plain = f'{model.top1:.1f}' if model.top1 else ''
    distilled = f'{model.top1_distilled:.1f} (d)' if model.top1_distilled else ''
    return ', '.join(filter(None, [plain, distilled]))


def conditions(results: Results) -> str:
    """What the numbers are, and what they were taken on."""
    machine, settings, ceilings = results.machine, results.settings, results.ceilings
    what = {
        'latency': f'Milliseconds for a batch of {settings.batch}',
        'throughput': 'Images per second at the best batch size (in brackets)',
        'training': f'Milliseconds for a training step of {settings.batch} images (and the most memory it uses)',
    }[settings.mode]
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    products = ', '.join(f'{rate / 1e9:,.0f} GMAC/s in {p}' for p, rate in ceilings.macs_per_s.items())
    lines = [
        f'{what}, medians of {settings.rounds * settings.calls} calls in {settings.rounds} interleaved rounds.',
        f'{machine.get("gpu", machine["cpu"])}, {settings.threads} CPU thread{"s" * (settings.threads > 1)}'
        f'{"" if settings.device == "cpu" else ", on " + settings.device}, allocator: {machine["allocator"]}; '
        f'{versions}, Python {machine["python"]}; commit {machine.get("commit", "unknown")}, {machine["date"]}.',
        f'The machine\'s ceilings in the same run: matrix product {products}; '
        f'copy {ceilings.bytes_per_s / 1e9:,.0f} GB/s.',
        f'`{results.command}`',
    ]
    missing = {column(row.case, results) for row in results.rows} - {
        column(row.case, results) for row in results.rows if row.samples_ms}
    if missing:
        lines.append(f'Tried, but not available here: {"; ".join(sorted(missing))}.')
    if settings.smoke:
        lines.insert(0, f'**{SMOKE}**')
    return '\n'.join(lines)


def draw(results: Sequence[Results], path: Path) -> None:
    """Published top-1 against measured latency, a panel a runtime, each model folded and in the faster layout."""
    try:
        import matplotlib
    except ModuleNotFoundError as e:
        raise MissingExtraError('matplotlib', 'bench') from e
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    panels: Dict[Tuple[str, str, str], Dict[str, float]] = {}
    for r in results:
        machine = f'{r.machine.get("gpu", r.machine["cpu"])}, batch {r.settings.batch}'
        if r.settings.device == 'cpu':
            machine += f', {r.settings.threads} thread{"s" * (r.settings.threads > 1)}'
        for row in r.rows:
            if row.samples_ms and row.case.folded:
                points = panels.setdefault((machine, row.case.runtime, row.case.precision), {})
                ms = statistics.median(row.samples_ms)
                points[row.case.model] = min(ms, points.get(row.case.model, ms))
    if not panels:
        raise UserError('The figure needs latencies of folded models: python -m benchmarks run latency')

    rows = (len(panels) + 1) // 2
    figure, axes = plt.subplots(rows, 2, figsize=(13, 5.2 * rows), squeeze=False, layout='constrained')
    for ax in list(axes.flat)[len(panels):]:
        ax.remove()
    for ax, ((machine, runtime, precision), points) in zip(axes.flat, panels.items()):
        draw_panel(ax, points)
        ax.set_title(f'{runtime}, {precision}\n{machine}', fontsize=10)
        ax.set_xlabel('milliseconds (log scale)')
        ax.set_ylabel('published ImageNet-1k top-1, %')
    handles = [
        plt.Line2D([], [], color='tab:red', marker='o', label='GmNet'),
        plt.Line2D([], [], color='tab:blue', marker='o', ls='', label='others, trained without a teacher'),
        plt.Line2D([], [], color='tab:blue', marker='o', ls='', mfc='white', label='others, distilled'),
        plt.Line2D([], [], color='0.6', ls='--', label='best of those trained without a teacher'),
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or 'png', dpi=110, metadata={'Date': None}
                       if path.suffix == '.svg' else None)
    plt.close(figure)


def draw_panel(ax, points: Dict[str, float]) -> None:
    family = [(ms, MODELS[name].top1) for name, ms in points.items() if name.startswith('gmnet') and name in MODELS]
    ax.plot(*zip(*sorted(family)), color='tab:red', marker='o', zorder=3)
    known = [(ms, MODELS[name].top1 or 0) for name, ms in points.items() if name in MODELS]
    best = frontier([(ms, top1) for ms, top1 in known if top1])
    ax.plot(*best, color='0.6', ls='--', lw=1, zorder=1)
    for name, ms in points.items():
        model = find(name)
        top1s = [top1 for top1 in (model.top1, model.top1_distilled) if top1]
        if not top1s:
            continue
        ours = name.startswith('gmnet')
        colour = 'tab:red' if ours else 'tab:blue'
        ax.plot([ms] * len(top1s), top1s, color=colour, lw=0.6, zorder=2)
        if model.top1:
            ax.plot(ms, model.top1, 'o', color=colour, zorder=3)
        if model.top1_distilled:
            ax.plot(ms, model.top1_distilled, 'o', color=colour, mfc='white', zorder=3)
        left = not ours and ms in best[0]  # names keep clear of each other where most models are
        above = left or model.top1_distilled
        ax.annotate(
            name, (ms, max(top1s)), xytext=(-5 if left else 5, 3 if above else -10), ha='right' if left else 'left',
            textcoords='offset points', fontsize=7.5, color=colour)
    ax.set_xscale('log')
    ax.xaxis.set_major_formatter(lambda v, _: f'{v:g}')
    ax.xaxis.set_minor_formatter(lambda v, _: f'{v:g}' if f'{v:e}'[0] in '235' else '')
    ax.tick_params(axis='x', which='both', labelsize=8)
    ax.margins(x=0.17, y=0.08)
    ax.grid(alpha=0.3)


def frontier(points: List[Tuple[float, float]]) -> Tuple[List[float], List[float]]:
    """The models that no other beats in both, from fast to accurate."""
    best: List[Tuple[float, float]] = []
    for ms, top1 in sorted(points):
        if not best or top1 > best[-1][1]:
            best.append((ms, top1))
    return [ms for ms, _ in best], [top1 for _, top1 in best]


def compare(before: Results, after: Results) -> str:
    """Ratios of median times, after / before, for the cases that both have; below 1 is faster.

    The 95 % intervals come from drawing rounds anew (bootstrap), as the calls of one round are alike. What the machine
    itself did in the two runs is shown by the ratios of its ceilings.

    Raises:
        UserError: The runs have no case in common.
    """
    old = {row.case: row for row in before.rows if row.samples_ms}
    pairs = [(old[row.case], row) for row in after.rows if row.samples_ms and row.case in old]
    if before.settings.mode != after.settings.mode or not pairs:
        raise UserError('The files have no measurement in common: compare runs of the same mode, models and runtimes.')
    lines = [SMOKE] if before.settings.smoke or after.settings.smoke else []
    differences = [
        f'{key}: {before.machine.get(key)} -> {after.machine.get(key)}'
        for key in ('cpu', 'gpu', 'threads', 'versions', 'allocator', 'commit')
        if before.machine.get(key) != after.machine.get(key)
    ]
    lines += differences
    for precision in before.ceilings.macs_per_s.keys() & after.ceilings.macs_per_s.keys():
        ratio = before.ceilings.macs_per_s[precision] / after.ceilings.macs_per_s[precision]
        lines.append(f'{ratio:.3f}  the machine\'s matrix product, {precision}')
    lines.append(f'{before.ceilings.bytes_per_s / after.ceilings.bytes_per_s:.3f}  the machine\'s copy')
    for a, b in pairs:
        ratio, low, high = ratio_with_interval(
            per_round(a, before.settings.calls), per_round(b, after.settings.calls))
        case = dataclasses.astuple(b.case)
        name, size, runtime, folded, precision, layout, batch = case
        lines.append(f'{ratio:.3f} ({low:.3f} to {high:.3f})  {name} {runtime} {"folded" if folded else "plain"} '
                     f'{precision} {layout} batch {batch} {size}x{size}')
    return '\n'.join(lines)


def per_round(row: Row, calls: int) -> List[float]:
    samples = row.samples_ms
    return [statistics.median(samples[i:i + calls]) for i in range(0, len(samples), calls)]


def ratio_with_interval(before: List[float], after: List[float], draws: int = 2000) -> Tuple[float, float, float]:
    """Ratio of the medians, and its 95 % interval."""
    rng = random.Random(0)
    median: Callable[[List[float]], float] = statistics.median
    ratios = [
        median(rng.choices(after, k=len(after))) / median(rng.choices(before, k=len(before))) for _ in range(draws)
    ]
    return median(after) / median(before), quantile(ratios, 0.025), quantile(ratios, 0.975)
