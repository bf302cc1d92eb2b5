"""What is learned at which frequency, and when: small networks with different activations and gates, side by side.

The rule for the learning rate is the same for all: the one with the smallest mean loss at the end over
`Settings.tuning_seeds`, which are not used for results. It is chosen from `Settings.learning_rates`; where the first or
the last of them is the best, up to three more are tried beyond it. Variants are compared by seed: the same seed means
the same data and, with the same shapes, the same initial weights.
"""
import dataclasses
import json
import math
import platform
import statistics as stdlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from experiments.comparisons import compare_pairs, mean_interval
from experiments.learn.network import Network, train_step
from experiments.learn.tasks import EMPTY, IDEAL, TASKS, BandImages, Sinusoids, create_task
from experiments.variants import Variant
from gmnet_timm import __version__
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.progress import progress
from gmnet_timm.frequency.reports import write_csv, write_json

__all__ = [
    'TASKS', 'VARIANTS', 'Settings', 'comparison_rows', 'curve_rows', 'format_summary', 'run_learn', 'summary_rows',
    'tuning_rows',
]

VARIANTS = {  # by task; a pattern can be read along the residual path alone, so that gates decide little there
    'regression': ('identity', 'relu', 'relu6', 'gelu', 'identity*x', 'relu*x', 'relu6*x', 'gelu*x', 'gelu*v'),
    'texture': ('identity', 'relu', 'gelu', 'identity*x', 'relu*x', 'relu6*x', 'gelu*x'),
    'pattern': ('identity', 'relu', 'relu6*x', 'gelu*x'),
}
REFERENCE = 'relu6*x'  # the paper's gate, which the other gates are compared with


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the numbers of a run besides its task and its variant.

    Attributes:
        seeds: Seeds of the results.
        tuning_seeds: Seeds that choose the learning rate.
        learning_rates: Where the choice begins. A rate falls to 0 along a cosine after 5 % of warm-up.
        steps: Steps of a training.
        scale: Standard deviation of what enters the activation at the start, about.
    """

    seeds: tuple[int, ...] = tuple(range(10))
    tuning_seeds: tuple[int, ...] = (1000, 1001)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    steps: int = 500
    scale: float = 1.


def run_learn(
        output: Path,
        settings: Settings = Settings(),
        tasks: Sequence[str] = TASKS,
        variants: Sequence[str] | None = None,
        force: bool = False,
) -> list[dict[str, Any]]:
    """Train each variant on each task. A finished one is a file in `output`/runs, which a later call does not repeat.

    Args:
        output: Folder for `runs` and the tables: a file of curves for each task, `tuning.csv`, `summary.csv`,
            `comparisons.csv`, and `learn.json` with what is needed to repeat them.
        settings: Settings of all runs.
        tasks: Some of `TASKS`.
        variants: Names of activations and gates, as for `Variant`, by default those of `VARIANTS` for each task.
        force: Replace runs of other settings; without it they are an error.

    Returns:
        The runs, in order of tasks and variants.

    Raises:
        UserError: A name is unknown, a setting makes no sense, or `output` holds runs of other settings.
    """
    _check(settings, tasks, variants or ())
    paths = {
        (task, variant): output / 'runs' / f'{task}-{variant.replace("*", "-")}.json'
        for task in tasks for variant in variants or VARIANTS[task.partition('-')[0]]
    }
    finished = {path: _read_run(path, settings, force) for path in paths.values()}
    found = []
    for i, ((task, variant), path) in enumerate(paths.items()):
        run = finished[path]
        if run is None:
            run = _run(task, variant, settings)
            write_json(run, path)
            edge = ', the first or last that was tried' if run['at_edge'] else ''
            print(f'{i + 1}/{len(paths)} {task} {variant}: {run["seconds"]:.0f} s, '
                  f'learning rate {run["learning_rate"]:g}{edge}', flush=True)
        found.append(run)
    for task in tasks:
        write_csv(curve_rows(found, task), output / f'{task}.csv')
    write_csv(tuning_rows(found), output / 'tuning.csv')
    write_csv(summary_rows(found), output / 'summary.csv')
    write_csv(comparison_rows(found), output / 'comparisons.csv')
    write_json(_conditions(found, settings), output / 'learn.json')
    return found


def curve_rows(runs: Sequence[dict[str, Any]], task: str) -> list[dict[str, Any]]:
    """One row per variant, seed and evaluated step: loss, and relative error or accuracy by band."""
    return [
        dict(
            variant=run['variant'], seed=seed, learning_rate=run['learning_rate'], step=step, loss=_short(loss),
            **{f'band_{band}': _short(value) for band, value in zip(run['bands'], values)})
        for run in runs if run['task'] == task
        for seed, seed_losses, seed_values in zip(run['settings']['seeds'], run['losses'], run['values'])
        for step, loss, values in zip(run['steps'], seed_losses, seed_values)
    ]


def tuning_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, variant, learning rate and tuning seed."""
    return [
        dict(task=run['task'], variant=run['variant'], learning_rate=lr, seed=seed, loss=_short(loss),
             chosen=int(lr == run['learning_rate']))
        for run in runs for lr, losses in (tuned.values() for tuned in run['tuning'])
        for seed, loss in zip(run['settings']['tuning_seeds'], losses)
    ]


def summary_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, variant and outcome: mean over seeds with its 95 % interval, and what the network was like."""
    rows = []
    for run in runs:
        for outcome, by_seed in _outcomes(run).items():
            mean, low, high = mean_interval(list(by_seed.values()))
            rows.append(dict(
                task=run['task'], variant=run['variant'], outcome=outcome, mean=_short(mean), low=_short(low),
                high=_short(high), seeds=len(by_seed), learning_rate=run['learning_rate'], at_edge=int(run['at_edge']),
                parameters=run['parameters'], pre_gate_std=_short(stdlib.fmean(run['pre_gate_std'])),
                beyond_6=_short(stdlib.fmean(run['beyond_6']))))
    return rows


def comparison_rows(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences between variants of each task, for its two main outcomes.

    Compared are each gate with its own activation, and `REFERENCE` with each other gate and with ReLU, as in the paper.
    Holm's correction is over all comparisons of a task. There are none for one seed.
    """
    rows = []
    for task in dict.fromkeys(run['task'] for run in runs):
        outcomes = {run['variant']: _outcomes(run) for run in runs if run['task'] == task}
        pairs = _pairs(list(outcomes))
        mains = list(next(iter(outcomes.values())))[:2]
        values = {(name, outcome): found[outcome] for name, found in outcomes.items() for outcome in mains}
        if not pairs or min(map(len, values.values())) < 2:
            continue
        keys = [((a, outcome), (b, outcome)) for outcome in mains for a, b in pairs]
        for ((first, outcome), (second, _)), comparison in zip(keys, compare_pairs(values, keys)):
            rows.append(dict(
                task=task, outcome=outcome, first=first, second=second,
                difference=_short(comparison.mean), low=_short(comparison.low), high=_short(comparison.high),
                p=_short(comparison.p), p_holm=_short(comparison.p_holm), seeds=comparison.count, family=len(keys)))
    return rows


def format_summary(runs: Sequence[dict[str, Any]]) -> str:
    """The main outcomes of each task as a table."""
    rows = summary_rows(runs)
    lines = []
    for task in dict.fromkeys(row['task'] for row in rows):
        found = [row for row in rows if row['task'] == task]
        outcomes = list(dict.fromkeys(row['outcome'] for row in found))
        lines += ['', f'{task:<20}' + ''.join(f'{outcome:>28}' for outcome in outcomes)]
        for variant in dict.fromkeys(row['variant'] for row in found):
            cells = (
                f'{row["mean"]:.3f} ({row["low"]:.3f} to {row["high"]:.3f})'
                for row in found if row['variant'] == variant)
            lines.append(f'{variant:<20}' + ''.join(f'{cell:>28}' for cell in cells))
    return '\n'.join([*lines, '', "In brackets: Student's 95 % interval over seeds."]).strip()


def _outcomes(run: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Numbers of a run by seed, the two that are compared first.

    Of the regression, the relative error at the end. Of images, the share of what the best observer has over a coin,
    as its mean over the evaluated steps of training: it counts how soon and how well a band is read.
    """
    bands = range(len(run['bands']))
    high = [i for i in bands if run['high'][i]]
    regression = run['task'] == 'regression'
    low = [i for i in bands if not run['high'][i] and (regression or i != EMPTY)]
    found: dict[str, dict[int, float]] = {}
    for n, (seed, curve) in enumerate(zip(run['settings']['seeds'], run['values'])):
        if regression:
            values = {'error': stdlib.fmean(curve[-1]), 'error high': stdlib.fmean(curve[-1][i] for i in high),
                      'error between points': run['between'][n]}
        else:
            shares = [[(accuracy - .5) / (IDEAL - .5) for accuracy in values] for values in curve[1:]]
            by_band = [stdlib.fmean(values) for values in zip(*shares)]
            highs, lows = (stdlib.fmean(by_band[i] for i in part) for part in (high, low))
            values = {
                'high': highs, 'high - low': highs - lows, 'low': lows,
                'high at the end': stdlib.fmean(shares[-1][i] for i in high),
                'low at the end': stdlib.fmean(shares[-1][i] for i in low), 'empty at the end': shares[-1][EMPTY]}
        for outcome, value in values.items():
            found.setdefault(outcome, {})[seed] = value
    return found


def _pairs(variants: list[str]) -> list[tuple[str, str]]:
    gates = [name for name in variants if '*' in name]
    own = [(gate, gate.partition('*')[0]) for gate in gates]
    others = [(REFERENCE, name) for name in ('relu', *gates) if name != REFERENCE]
    return [(a, b) for a, b in own + others if a in variants and b in variants]


def _short(value: float) -> float:
    """Four digits, which is what a file in a repository needs."""
    return float(f'{value:.4g}')


def _check(settings: Settings, tasks: Sequence[str], variants: Sequence[str]) -> None:
    for task in tasks:
        create_task(task, settings.seeds)
    for variant in variants:
        Variant(variant)
    shared = set(settings.seeds) & set(settings.tuning_seeds)
    if shared:
        raise UserError(f'Seeds {sorted(shared)} choose the learning rate and cannot be used for results too.')
    if not settings.seeds or not settings.learning_rates or not all(lr > 0 for lr in settings.learning_rates):
        raise UserError('At least one seed and one positive learning rate are needed.')
    if settings.steps < 20 or not settings.scale > 0:
        raise UserError('A training needs at least 20 steps, and a positive scale.')


def _as_json(settings: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))  # lists for tuples


def _read_run(path: Path, settings: Settings, force: bool) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    run = json.loads(path.read_text())
    if run['settings'] == _as_json(settings):
        return run
    if not force:
        raise UserError(
            f'{path} is a run of other settings ({run["settings"]}). Choose another folder by --output, or give '
            '--force to replace it.')
    return None


def _run(task: str, variant: str, settings: Settings) -> dict[str, Any]:
    """Choose the learning rate, train with all seeds, and note what is needed to repeat it."""
    start = time.perf_counter()
    tuning, best = _tune(task, variant, settings)
    data = create_task(task, settings.seeds)
    marks = _marks(settings.steps, logarithmic=isinstance(data, Sinusoids))
    found = _train(data, variant, [best], settings.steps, settings.scale, marks)
    return dict(
        task=task,
        variant=variant,
        bands=data.bands,
        high=data.high,
        learning_rate=best,
        at_edge=len(tuning) > 1 and best in (min(tuning), max(tuning)),
        tuning=[dict(learning_rate=rate, losses=losses) for rate, losses in tuning.items()],
        steps=marks,
        **found,
        settings=_as_json(settings),
        seconds=round(time.perf_counter() - start, 1),
        made_by=_made_by(),
    )


def _tune(task: str, variant: str, settings: Settings) -> tuple[dict[float, list[float]], float]:
    """Losses of the tuning seeds by learning rate, in order of the rates, and the best rate."""
    def losses_of(rates: Sequence[float]) -> dict[float, list[float]]:
        data = create_task(task, settings.tuning_seeds)
        found = _train(data, variant, rates, settings.steps, settings.scale, [settings.steps])
        final, count = [losses[-1] for losses in found['losses']], len(data.seeds)
        return {rate: final[i * count:(i + 1) * count] for i, rate in enumerate(rates)}

    def mean(rate: float) -> float:
        value = stdlib.fmean(tuning[rate])
        return value if math.isfinite(value) else math.inf

    tuning = losses_of(sorted(settings.learning_rates))
    for _ in range(3 if len(tuning) > 1 else 0):
        rates, best = list(tuning), min(tuning, key=mean)
        if best not in (rates[0], rates[-1]):
            break
        end, inner = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
        tuning.update(losses_of([_short(end * end / inner)]))
        tuning = dict(sorted(tuning.items()))
    return tuning, min(tuning, key=mean)


def _marks(steps: int, logarithmic: bool) -> list[int]:
    """Steps after which to evaluate: 20 for a regression, evenly on a logarithmic axis, 10 for images, evenly."""
    if logarithmic:
        return sorted({0, *(round(steps ** (i / 20)) for i in range(21))})
    return [round(steps * i / 10) for i in range(11)]


def _train(
        task: Sinusoids | BandImages,
        variant: str,
        rates: Sequence[float],
        steps: int,
        scale: float,
        marks: Sequence[int],
) -> dict[str, Any]:
    """Train one replica per learning rate and seed of the task, and evaluate each after the given steps.

    Returns:
        Losses and values by replica, step and band, replicas in order of rates, then seeds; losses `between` the
        points of a regression; number of parameters; and of the trained networks, standard deviation of what enters
        the activation and the share of it beyond 6.
    """
    network = Network(Variant(variant), scale=scale, **task.network)
    copies = len(rates)
    p = {name: x.repeat(copies, 1, 1).requires_grad_() for name, x in network.initial(task.seeds).items()}
    lr = torch.tensor(rates).repeat_interleave(len(task.seeds))
    state: dict[str, Any] = {}
    losses: list[list[float]] = [[] for _ in lr]
    values: list[list[list[float]]] = [[] for _ in lr]
    title = f'{variant}, {"tuning, " if copies > 1 else ""}{len(lr)} trainings'
    for step in progress(range(steps + 1), title, 'step'):
        if step in marks:
            for i in range(len(lr)):
                output, target, _ = _evaluate(network, task, p, i)
                losses[i].append(task.loss(output, target).item())
                values[i].append(task.score(output, target)[0].tolist())
        if step < steps:
            x, y = (part.repeat(copies, 1, 1) for part in task.batch())
            train_step(task.loss(network(p, x), y), p, state, lr * _schedule(step, steps), step + 1)
    inside = [torch.cat(_evaluate(network, task, p, i)[2], 1) for i in range(len(lr))]
    between: list[float] = []
    if isinstance(task, Sinusoids):
        x, y = (part.repeat(copies, 1, 1) for part in task.at(.5))
        with torch.no_grad():
            between = task.loss(network(p, x), y).tolist()
    return dict(
        between=between, losses=losses, values=values, parameters=network.num_parameters,
        pre_gate_std=[z.std().item() for z in inside], beyond_6=[(z > 6).float().mean().item() for z in inside])


def _evaluate(network: Network, task: Any, p: dict[str, torch.Tensor], i: int) -> tuple[Any, ...]:
    """Output and target of one replica, and what enters its activations."""
    x, y = (part[i % len(task.seeds)][None] for part in task.evaluation)
    inside: list[torch.Tensor] = []
    with torch.no_grad():
        return network({name: value[i:i + 1] for name, value in p.items()}, x, inside), y, inside


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: a linear warm-up over 5 % of the steps, then half a cosine."""
    return min((step + 1) / (.05 * steps), .5 + .5 * math.cos(math.pi * step / steps))


def _made_by() -> dict[str, Any]:
    return dict(
        gmnet_timm=__version__, timm=timm.__version__, torch=torch.__version__, machine=platform.machine(),
        threads=torch.get_num_threads(), command=['python', '-m', 'experiments.learn', *sys.argv[1:]])


def _conditions(runs: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """What is needed to repeat the runs; they can be of several calls, and so of several versions."""
    made_by = [run['made_by'] for run in runs]
    names = ('task', 'variant', 'parameters', 'learning_rate', 'at_edge', 'seconds')
    return dict(
        settings=dataclasses.asdict(settings), ideal_accuracy=IDEAL,
        made_by=[made for i, made in enumerate(made_by) if made not in made_by[:i]],
        runs=[{name: run[name] for name in names} for run in runs])
