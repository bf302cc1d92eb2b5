"""Published accuracy against measured latency."""
import statistics
from collections.abc import Sequence
from pathlib import Path

from gmnet_timm.errors import UserError, require
from gmnet_timm.files import replacing

from .models import find
from .report import Results, latencies, machine_name

__all__ = ['draw']

OURS, OTHERS = 'tab:red', 'tab:blue'


def draw(results: Sequence[Results], path: Path) -> None:
    """Draw top-1 against latency in the fastest runtime of each machine, to an SVG file or what else matplotlib writes.

    Args:
        results: Of latency runs. Fused models are drawn, in the faster memory format.
        path: The file.

    Raises:
        UserError: There is nothing to draw, or it is of a smoke run.
        MissingExtraError: matplotlib or adjustText is not installed.
    """
    if any(r.settings['smoke'] for r in results):
        raise UserError('A smoke run measures nothing: draw the figure from a full run.')
    plt, adjust_text = require('matplotlib.pyplot', 'bench'), require('adjustText', 'bench').adjust_text
    plt.switch_backend('Agg')
    panels = []
    for r in results:
        times = latencies(r) if r.settings['mode'] == 'latency' else {}
        if times:
            runtime = min(times, key=lambda name: statistics.median(times[name].values()))
            panels.append((f'{runtime}, {machine_name(r)}', times[runtime]))
    if not panels:
        raise UserError('The figure needs latencies of fused models: python -m benchmarks run latency')

    height = 3.8 + 0.08 * max(len(points) for _, points in panels)  # more models need more room for their names
    with plt.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'benchmarks', 'font.size': 8}):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(9, height * len(panels)), squeeze=False, layout='constrained')
        handles = [
            plt.Line2D([], [], color=OURS, marker='o', label='GmNet'),
            plt.Line2D([], [], color=OTHERS, marker='o', ls='', label='others, trained without a teacher'),
            plt.Line2D([], [], color=OTHERS, marker='o', ls='', mfc='white', label='others, distilled'),
            plt.Line2D([], [], color='0.6', ls='--', label='best without a teacher'),
        ]
        figure.legend(handles=handles, loc='outside lower center', ncols=4, frameon=False)
        texts = []
        for ax, (title, points) in zip(axes.flat, panels):
            ax.set_title(title, fontsize=9)
            ax.set_xlabel('milliseconds (log scale)')
            ax.set_ylabel('published ImageNet-1k top-1, %')
            texts.append(draw_panel(ax, points))
        figure.canvas.draw()  # labels are placed on the final size of the axes
        figure.set_layout_engine('none')
        for ax, labels in zip(axes.flat, texts):
            adjust_text(
                labels, ax=ax, x=[v for line in ax.lines for v in line.get_xdata()],
                y=[v for line in ax.lines for v in line.get_ydata()], iter_lim=1500, expand=(1.15, 1.5),
                force_text=(0.3, 0.5), force_static=(0.2, 0.4), max_move=(6, 6),
                arrowprops=dict(arrowstyle='-', color='0.5', lw=0.4))
        with replacing(path) as temporary:
            kind = path.suffix[1:] or 'svg'
            figure.savefig(temporary, format=kind, dpi=150, metadata={'Date': None} if kind == 'svg' else None)
        plt.close(figure)


def draw_panel(ax, points: dict[str, float]) -> list:
    """Points and lines; returns the labels, which are not placed yet."""
    from matplotlib.ticker import LogLocator, NullLocator
    known = {name: (ms, find(name)) for name, ms in points.items()}
    family = sorted((ms, model.top1) for name, (ms, model) in known.items() if name.startswith('gmnet') and model.top1)
    if family:
        ax.plot(*zip(*family), color=OURS, zorder=2)
    ax.plot(*frontier([(ms, model.top1) for ms, model in known.values() if model.top1]), color='0.6', ls='--', lw=1)
    labels = []
    for name, (ms, model) in known.items():
        colour = OURS if name.startswith('gmnet') else OTHERS
        top1s = [top1 for top1 in (model.top1, model.top1_distilled) if top1]
        ax.plot([ms] * len(top1s), top1s, color=colour, lw=0.6, zorder=2)
        for top1 in top1s:
            ax.plot(ms, top1, 'o', ms=4, color=colour, mfc=colour if top1 == model.top1 else 'white', zorder=3)
        if top1s:
            labels.append(ax.text(
                ms, max(top1s), name, color=colour, fontsize=7, zorder=2.5,
                bbox=dict(facecolor='white', edgecolor='none', alpha=0.7, pad=0.3)))
    ax.set_xscale('log')
    ax.margins(x=0.12, y=0.12)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda v, _: f'{v:g}')
    ax.grid(alpha=0.3)
    return labels


def frontier(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The models that no other beats in both, from fast to accurate."""
    best: list[tuple[float, float]] = []
    for ms, top1 in sorted(points):
        if not best or top1 > best[-1][1]:
            best.append((ms, top1))
    return [ms for ms, _ in best], [top1 for _, top1 in best]
