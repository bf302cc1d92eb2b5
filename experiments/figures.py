"""Figures of the experiments."""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from experiments.comparisons import mean_interval
from experiments.learn.tasks import IDEAL
from experiments.theory.predictions import MapPrediction, high_low
from experiments.variants import Variant
from gmnet_timm.frequency.plots import LINES, new_figure, with_legend

__all__ = ['draw_comparisons', 'draw_confusion', 'draw_learning', 'draw_theory', 'draw_theory_of_gates']


def draw_theory(maps: Sequence[MapPrediction]) -> Any:
    """High/low of Gaussian maps after each function against their scale, and its spectrum at the scale nearest 1.4."""
    figure, axes = new_figure(1, 2, 4.6, 3.6)
    scales = sorted({prediction.scale for prediction in maps})
    near = min(scales, key=lambda scale: abs(math.log(scale / 1.4)))
    before = maps[0].input
    bins = slice(1, before.size[0] // 2 + 1)
    for i, name in enumerate(dict.fromkeys(prediction.function for prediction in maps)):
        style, label = {'markersize': 4, **LINES[i % len(LINES)]}, Variant(name).label
        found = sorted((p for p in maps if p.function == name), key=lambda p: p.scale)
        axes[0][0].semilogx([p.scale for p in found], [high_low(p.output) for p in found], label=label, **style)
        after = next(p.output for p in found if p.scale == near)
        share, input_share = (x.power[0, bins] / x.power[0, 1:].sum() for x in (after, before))
        axes[0][1].plot(range(1, len(share) + 1), share / input_share, markevery=(i, 7), **style)
    axes[0][0].axhline(high_low(before), color='gray', linewidth=.8)
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_title('energy beyond half of Nyquist over the rest', fontsize=10)
    axes[0][0].set_xlabel('standard deviation of the map; grey: ratio of the map')
    axes[0][0].set_ylabel('high/low')
    axes[0][1].axhline(1, color='gray', linewidth=.8)
    axes[0][1].set_title(f'spectra at standard deviation {near:g}', fontsize=10)
    axes[0][1].set_xlabel('radius (cycles/map)')
    axes[0][1].set_ylabel('share of energy, after over before')
    for axis in axes[0]:
        axis.grid(alpha=.3)
    return with_legend(figure, 'Gaussian maps of {}×{} in theory'.format(*before.size), axes[0][0])


def draw_theory_of_gates(rows: Sequence[Mapping[str, Any]], title: str = '') -> Any:
    """High/low of the input and the product of each gate as measured, and of the product in theory."""
    figure, axes = new_figure(1, 1, max(6.4, .45 * len(rows)), 4.)
    axis = axes[0][0]
    lines = {'value_high_low': 'input', 'product_high_low': 'product', 'predicted_high_low': 'product in theory'}
    for i, (key, label) in enumerate(lines.items()):
        axis.plot([row[key] for row in rows], label=label, markersize=5, **LINES[i])
    functions = [key for key in rows[0] if key.startswith('predicted_') and key not in lines]
    for key in functions:
        label = Variant(key.removeprefix('predicted_')).label
        axis.plot([row[key] for row in rows], label=f'{label} in theory', marker='_', linestyle='', markersize=9)
    axis.set_xticks(range(len(rows)), [f'{row["layer"]}\n{row["size"]}' for row in rows], rotation=90, fontsize=7)
    axis.set_ylabel('high/low')
    axis.set_ylim(bottom=0)
    axis.grid(alpha=.3)
    return with_legend(figure, title, axis)


def draw_learning(runs: Sequence[Mapping[str, Any]]) -> Any:
    """What each variant learned by step: a panel each, a line per band with Student's 95 % interval over seeds."""
    regression = runs[0]['task'] == 'regression'
    columns = min(5, len(runs))
    figure, axes = new_figure(math.ceil(len(runs) / columns), columns, 2.7, 2.4, sharex=True, sharey=True)
    from matplotlib import colormaps
    for axis, run in zip(axes.flat, runs):
        for i, band in enumerate(run['bands']):
            points = [mean_interval([curve[m][i] for curve in run['values']]) for m in range(len(run['steps']))]
            mean, low, high = (torch.tensor(values) for values in zip(*points))
            colour = colormaps['viridis'](.95 * i / max(1, len(run['bands']) - 1))
            label = f'{band} cycle{"" if band == "1" else "s"}'
            axis.plot(run['steps'], mean, color=colour, linewidth=1.2, label=label)
            axis.fill_between(run['steps'], low, high, color=colour, alpha=.15, linewidth=0)
        axis.set_title(f'{Variant(run["variant"]).label}, lr {run["learning_rate"]:g}', fontsize=9)
        axis.grid(alpha=.3)
        axis.tick_params(labelsize=8)
        if regression:
            axis.set_xscale('symlog', linthresh=10)
            axis.set_ylim(0, 1.2)
        else:
            axis.axhline(IDEAL, color='gray', linewidth=.8, linestyle=(0, (2, 2)), label='best observer')
            axis.set_ylim(.4, 1)
    for axis in list(axes.flat)[len(runs):]:
        axis.axis('off')
    for row in axes:
        row[0].set_ylabel('relative error' if regression else 'accuracy', fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel('step', fontsize=9)
    seeds = len(runs[0]['values'])
    title = f'{runs[0]["task"]}, mean of {seeds} seed{"" if seeds == 1 else "s"} and its 95 % interval'
    return with_legend(figure, title, axes[0][0])


def draw_comparisons(
        panels: Mapping[str, Sequence[tuple[str, float, float, float, bool]]],
        title: str = '',
) -> Any:
    """Differences with their intervals, one panel per outcome.

    Args:
        panels: Label, difference, bounds, and whether it is significant (a filled marker), by outcome; the labels of
            the first panel are those of all.
        title: Title of the figure.
    """
    rows = len(next(iter(panels.values())))
    figure, axes = new_figure(1, len(panels), 3.6, .3 * rows, sharey=True)
    for axis, (outcome, lines) in zip(axes[0], panels.items()):
        for i, (_, middle, low, high, significant) in enumerate(lines):
            axis.plot([low, high], [i, i], color='black', linewidth=1)
            axis.plot(middle, i, 'o', color='black', markerfacecolor='black' if significant else 'white')
        axis.axvline(0, color='gray', linewidth=.8)
        axis.set_title(outcome, fontsize=10)
        axis.set_xlabel('points')
        axis.grid(alpha=.3)
    axes[0][0].set_yticks(range(rows), [line[0] for line in next(iter(panels.values()))], fontsize=9)
    axes[0][0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    return figure


def draw_confusion(matrices: Mapping[str, tuple[Sequence[str], Sequence[Sequence[int]]]], title: str = '') -> Any:
    """Confusion matrices by title, as shares of each row: the classes, and counts by label and answer."""
    columns = min(3, len(matrices))
    figure, axes = new_figure(math.ceil(len(matrices) / columns), columns, 3.4, 3.4)
    for axis, (name, (classes, counts)) in zip(axes.flat, matrices.items()):
        table = torch.tensor(counts, dtype=torch.float64)
        table /= table.sum(1, keepdim=True)
        axis.imshow(table.numpy(), vmin=0, vmax=1, cmap='Greys')
        axis.set_title(name, fontsize=10)
        if len(classes) <= 20:
            axis.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
            axis.set_yticks(range(len(classes)), classes, fontsize=8)
            for label, row in enumerate(table.tolist()):
                for answer, share in enumerate(row):
                    if share >= .05:
                        axis.text(answer, label, f'{100 * share:.0f}', ha='center', va='center', fontsize=7,
                                  color='white' if share > .5 else 'black')
        axis.set_xlabel('answer', fontsize=9)
        axis.set_ylabel('label', fontsize=9)
    figure.suptitle(f'{title}; percent of each row', fontsize=11)
    return figure
