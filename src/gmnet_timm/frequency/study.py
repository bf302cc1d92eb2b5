"""The study: band accuracy by epoch of ResNet18's and GmNet's gates on photographs, over several seeds.

What varies with the seed is everything random in training: initialisation, order and augmentation. The patches are the
same for all, so that the intervals say how far another training on these photographs could lie, and nothing about other
photographs.
"""
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import random_seed

from gmnet_timm import __version__
from gmnet_timm.demo.loop import create_patch_loader, create_schedule, train_epoch
from gmnet_timm.demo.photos import PhotoPatches, prepare_photo_patches
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import SplitOptions, evaluate_bands
from gmnet_timm.frequency.data import create_band_loader
from gmnet_timm.frequency.extras import require_matplotlib, require_scipy
from gmnet_timm.frequency.plots import draw_band_curves, save_figure
from gmnet_timm.frequency.reports import write_csv, write_json

__all__ = ['SUBJECTS', 'StudySettings', 'format_summary', 'run_study', 'summarize']

# family -> label -> model and its arguments
SUBJECTS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    'resnet18': {
        'ReLU(x)': ('resnet18', {}),
        'x·x': ('resnet18_ewp', {}),
        'ReLU6(x)·x': ('resnet18_gate_relu6', {}),
        'GELU(x)·x': ('resnet18_gate_gelu', {}),
    },
    'gmnet_s1': {
        'σ = identity': ('gmnet_s1', dict(act_layer='identity')),
        'σ = ReLU': ('gmnet_s1', dict(act_layer='relu')),
        'σ = ReLU6': ('gmnet_s1', dict(act_layer='relu6')),
        'σ = GELU': ('gmnet_s1', dict(act_layer='gelu')),
    },
}

# after the last epoch, the high part is also shown to the model with what it lacks: its mean, then contrast too
_LAST_EPOCH = {
    'high+m': SplitOptions(keep_dc=True),
    'high+m+c': SplitOptions(keep_dc=True, restore_contrast=True),
}


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """What decides the numbers of a run beside its model and its seed.

    A radius counts cycles over the patch of 64 pixels. 10 is the paper's for its learning curves, the same in cycles
    per image; 3 is the same in cycles per pixel as 10 in the paper's 224 pixels (10 * 64 / 224 = 2.9).
    """

    epochs: int = 10
    patches: int = 128  # training patches of each of the eight photographs, a quarter as many for validation
    radii: tuple[float, ...] = (3., 10.)
    batch_size: int = 32
    lr: float = 3e-3
    weight_decay: float = .05
    warmup_epochs: int = 1
    smoothing: float = .1
    scale: tuple[float, float] = (.6, 1.)  # area of the random crops


def run_study(
        output: Path,
        settings: StudySettings = StudySettings(),
        seeds: Sequence[int] = (0, 1, 2, 3, 4),
        families: Sequence[str] = tuple(SUBJECTS),
        device: torch.device = torch.device('cpu'),  # noqa: B008, immutable
        log=print,
) -> list[dict[str, Any]]:
    """Train each model with each seed, evaluate its bands after each epoch, and draw what came out.

    A finished run is a file in `output`/runs, which a later call does not repeat.

    Args:
        output: Folder for patches, runs, `bands.csv` (each run), `summary.csv` (mean and interval) and figures.
        settings: Settings of all runs.
        seeds: One run of each model for each.
        families: Keys of `SUBJECTS`.
        device: Where to train.
        log: Takes a line for each run.

    Returns:
        The lines of the summary.

    Raises:
        UserError: `output` holds runs of other settings.
    """
    require_matplotlib()
    runs = [
        (family, label, seed, output / 'runs' / f'{_run_name(family, label)}-seed{seed}.json')
        for seed in seeds for family in families for label in SUBJECTS[family]
    ]
    finished = {path: _read_run(path, settings) for *_, path in runs if path.is_file()}
    data = prepare_photo_patches(output / 'data', patches=settings.patches)
    rows: list[dict[str, Any]] = []
    for i, (family, label, seed, path) in enumerate(runs):
        run = finished.get(path)
        if run is None:
            run = _run(*SUBJECTS[family][label], seed, settings, data, device)
            write_json(run, path)
            log(f'{i + 1}/{len(runs)} {path.stem}: {run["seconds"]:.0f} s')
        rows += [dict(family=family, label=label, model=_run_name(family, label), seed=seed, **r) for r in run['bands']]
    write_csv(rows, output / 'bands.csv')
    summary = summarize(rows)
    write_csv(summary, output / 'summary.csv')
    for family in families:
        seeds_text = f'mean of {len(seeds)} seeds and its 95 % interval' if len(seeds) > 1 else 'one seed'
        figure = draw_band_curves(
            _curves(summary, family), f'{family} on patches of photographs, {seeds_text}', 100 / len(data.classes))
        save_figure(figure, output / f'{family}.png')
    return summary


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each model, epoch and band, with its 95 % interval by Student's t.

    One seed has no interval: the columns of it are empty.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    student = require_scipy('stats').t
    columns = ('family', 'label', 'model', 'epoch', 'band', 'radius')
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row['top1'])
    summary = []
    for key, values in groups.items():
        n = len(values)
        mean = sum(values) / n
        variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
        half = student.ppf(.975, n - 1) * math.sqrt(variance / n) if n > 1 else None
        summary.append(dict(
            zip(columns, key, strict=True),
            seeds=n,
            top1=round(mean, 2),
            ci95_half_width='' if half is None else round(half, 2),
            top1_low='' if half is None else round(max(0., mean - half), 2),
            top1_high='' if half is None else round(min(100., mean + half), 2),
        ))
    return summary


def format_summary(summary: Sequence[dict[str, Any]]) -> str:
    """The last epoch of each model as a table."""
    last = max(row['epoch'] for row in summary)
    final = [row for row in summary if row['epoch'] == last]
    bands = list(dict.fromkeys((row['band'], row['radius']) for row in final))
    lines = [f'{"top-1 %, epoch " + str(last):<28}' + ''.join(f'{band + " " + radius:>13}' for band, radius in bands)]
    for family, label in dict.fromkeys((row['family'], row['label']) for row in final):
        cells = [
            f'{row["top1"]:.1f}' + ('' if row['ci95_half_width'] == '' else f' ±{row["ci95_half_width"]:.1f}')
            for band in bands for row in final
            if (row['family'], row['label'], row['band'], row['radius']) == (family, label, *band)
        ]
        lines.append(f'{family + " " + label:<28}' + ''.join(f'{cell:>13}' for cell in cells))
    lines += ['', 'high+m: with the mean of the image, high+m+c: with its contrast too; radii in cycles per patch.']
    return '\n'.join(lines)


def _run_name(family: str, label: str) -> str:
    model, model_args = SUBJECTS[family][label]
    return '-'.join([model, *model_args.values()])


def _as_json(settings: StudySettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))  # lists for tuples


def _read_run(path: Path, settings: StudySettings) -> dict[str, Any]:
    run = json.loads(path.read_text())
    if run['settings'] != _as_json(settings):
        raise UserError(f'{path} is a run of other settings ({run["settings"]}). Choose another folder.')
    return run


def _run(
        model: str,
        model_args: dict[str, Any],
        seed: int,
        settings: StudySettings,
        data: PhotoPatches,
        device: torch.device,
) -> dict[str, Any]:
    """One training with its results and what is needed to repeat it."""
    start = time.perf_counter()
    bands = _train_and_evaluate(model, model_args, seed, settings, data, device)
    return dict(
        model=model,
        model_args=model_args,
        seed=seed,
        settings=_as_json(settings),
        options={
            band: dataclasses.asdict(options) for band, options in {'high': SplitOptions(), **_LAST_EPOCH}.items()},
        seconds=round(time.perf_counter() - start, 1),
        device=str(device),
        threads=torch.get_num_threads(),
        versions=dict(gmnet_timm=__version__, timm=timm.__version__, torch=torch.__version__),
        bands=bands,
    )


def _train_and_evaluate(
        name: str,
        model_args: dict[str, Any],
        seed: int,
        settings: StudySettings,
        data: PhotoPatches,
        device: torch.device,
) -> list[dict[str, Any]]:
    """Lines of `BandAccuracy.as_row` for each epoch."""
    random_seed(seed)
    model = timm.create_model(name, in_chans=1, num_classes=len(data.classes), **model_args)
    model.to(device).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=settings.lr, weight_decay=settings.weight_decay)
    config: dict[str, Any] = dict(
        input_size=(1, 64, 64), mean=(data.mean,), std=(data.std,), interpolation='bilinear', crop_pct=1.)
    loader = create_patch_loader(str(data.root), 'train', config, settings.batch_size, device, settings.scale)
    validation = create_band_loader(str(data.root), config, num_classes=len(data.classes), batch_size=200, workers=0)
    scheduler = create_schedule(optimizer, settings.epochs, settings.warmup_epochs, len(loader))
    criterion = LabelSmoothingCrossEntropy(settings.smoothing)
    rows = []
    for epoch in range(settings.epochs):
        train_epoch(model, loader, criterion, optimizer, scheduler, epoch)
        for result in evaluate_bands(model.eval(), validation, settings.radii, show_progress=False):
            rows.append(dict(epoch=epoch + 1, **result.as_row()))
    for band, options in _LAST_EPOCH.items():
        results = evaluate_bands(model, validation, settings.radii, options=options, show_progress=False)
        rows += [
            {**result.as_row(), 'epoch': epoch + 1, 'band': band} for result in results if result.band.kind == 'high']
    return rows


def _curves(summary: Sequence[dict[str, Any]], family: str) -> Any:
    curves: dict[str, dict[tuple[str, str], list[tuple[float, ...]]]] = {}
    for row in summary:
        if row['family'] == family:
            points = curves.setdefault(row['label'], {}).setdefault((row['band'], row['radius']), [])
            values = (math.nan if row[key] == '' else row[key] for key in ('top1', 'top1_low', 'top1_high'))
            points.append((row['epoch'], *values))
    return curves
