"""Band accuracies of models and of training runs, with everything needed to repeat them."""
import dataclasses
import hashlib
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from gmnet_timm import __version__
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.bands import SplitOptions, evaluate_bands
from gmnet_timm.frequency.data import create_band_loader
from gmnet_timm.frequency.intervals import student_interval
from gmnet_timm.frequency.reports import read_csv, write_csv
from gmnet_timm.frequency.split import check_corner
from gmnet_timm.weights.model import LoadedModel, load_model
from gmnet_timm.weights.runs import ARGS_NAME, epoch_checkpoints, read_args

__all__ = [
    'EvalSettings', 'evaluate_model', 'evaluate_runs', 'group_rows', 'report_rows',
]


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    """What decides the numbers of an evaluation besides the model. Radii are in cycles per image."""

    data_dir: str | None
    dataset: str = ''
    split: str | None = None
    class_map: str = ''
    num_images: int | None = None
    radii: tuple[float, ...] = (12., 24., 36.)
    kinds: tuple[str, ...] = ('low', 'high')
    options: SplitOptions = SplitOptions()
    amp_dtype: str | None = None  # name of a torch type


def evaluate_model(
        model: LoadedModel,
        settings: EvalSettings,
        *,
        device: torch.device = torch.device('cpu'),  # noqa: B008, immutable
        batch_size: int = 64,
        workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
        root_from: str = '--data-dir',
) -> dict[str, Any]:
    """Evaluate a model band by band.

    Args:
        model: The model.
        settings: Data, radii and options.
        device: Where to run.
        batch_size: Images per batch.
        workers: Processes that load images.
        rank: Part of the data that this process evaluates.
        world_size: Number of processes.
        root_from: Where the folder of the data was stated, for error messages.

    Returns:
        A report that `json.dump` takes once `accuracies`, those of `evaluate_bands`, are taken out of it: results by
        band, and everything needed to repeat them.

    Raises:
        UserError: As by `evaluate_bands` and `create_band_loader`, or a radius beyond the corner of the spectrum.
    """
    config = model.data_config
    check_corner(settings.radii, config['input_size'])
    loader = create_band_loader(
        settings.data_dir,
        config,
        dataset=settings.dataset,
        split=settings.split,
        class_map=settings.class_map,
        num_classes=getattr(model.model, 'num_classes', None),
        class_names=model.class_names,
        batch_size=batch_size,
        workers=workers,
        num_images=settings.num_images,
        rank=rank,
        world_size=world_size,
        root_from=root_from,
    )
    results = evaluate_bands(
        model.model.to(device),
        loader,
        settings.radii,
        kinds=settings.kinds,
        options=settings.options,
        mean=config['mean'],
        std=config['std'],
        amp_dtype=getattr(torch, settings.amp_dtype) if settings.amp_dtype else None,
    )
    model.model.cpu()  # one model at a time on the device
    return dict(
        name=model.name,
        provenance=model.provenance,
        results=[result.as_row() for result in results],
        accuracies=results,
        num_classes=getattr(model.model, 'num_classes', None),
        class_names=model.class_names,
        skipped=loader.skipped,
        ignored=loader.ignored,
        settings=dataclasses.asdict(settings),
        data_config=config,
        batch_size=batch_size,
        world_size=world_size,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine() + ' CPU',
        versions={'gmnet_timm': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        command=sys.argv,
    )


def report_rows(report: dict[str, Any], **first: Any) -> list[dict[str, Any]]:
    """One row per band for a CSV, with the choices that decided it.

    Args:
        report: From `evaluate_model`.
        **first: Columns to put first.
    """
    return [
        {
            **first, 'model': report['name'], **result,
            **{key: report[key] for key in ('num_classes', 'skipped', 'ignored')},
            **_settings_columns(report),
        }
        for result in report['results']
    ]


def group_rows(labels: Sequence[str], rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Mean top-1 over the trainings of one label with Student's 95 % interval, by band and, of curves, by epoch.

    Args:
        labels: One per model; those of one label are trainings of one model.
        rows: Of each model, its rows by band as `evaluate_model` and `evaluate_runs` give them.

    Raises:
        UserError: The trainings of a label have not the same bands and epochs.
    """
    found: dict[str, dict[tuple[str, ...], list[float]]] = {}
    for label, of_model in zip(labels, rows, strict=True):
        for row in of_model:
            key = row['band'], row['inner_radius'], row['radius'], str(row.get('epoch', ''))
            found.setdefault(label, {}).setdefault(key, []).append(float(row['top1']))
    grouped = []
    for label, by_key in found.items():
        if set(map(len, by_key.values())) != {list(labels).count(label)}:
            raise UserError(f'The trainings of {label} have not the same bands and epochs.')
        for (band, inner_radius, radius, epoch), values in by_key.items():
            top1, low, high = student_interval(values)
            grouped.append(dict(
                label=label, trainings=len(values), epoch=epoch, band=band, inner_radius=inner_radius, radius=radius,
                top1=top1, top1_low=low, top1_high=high))
    return grouped


def evaluate_runs(
        runs: Sequence[Path],
        settings: EvalSettings,
        path: Path,
        *,
        use_ema: bool = True,
        **kwargs: Any,
) -> list[dict[str, Any]]:
    """Evaluate the checkpoints of training runs, epoch by epoch, going on where an earlier call stopped.

    Args:
        runs: Run folders of train.py or of the demo.
        settings: Data, radii and options. Without data, each run's own validation data.
        path: CSV file to write after each checkpoint. Rows of other runs and settings in it are kept.
        use_ema: Evaluate EMA weights where a checkpoint has them.
        **kwargs: As for `evaluate_model`.

    Returns:
        The rows for these runs and settings, in order of runs and epochs.
    """
    rows = read_csv(path) if path.is_file() else []
    wanted = []
    for run in runs:
        args = read_args(run / ARGS_NAME)
        own = _with_data_of(settings, args, run / ARGS_NAME)
        for epoch, checkpoint in epoch_checkpoints(run).items():
            key = dict(
                run=str(run), epoch=str(epoch), ema=str(use_ema),
                # a run that was trained anew, or whose arguments say another network, is evaluated anew
                checkpoint_time=str(checkpoint.stat().st_mtime_ns), args_sha256=_sha256(args, own), **_requested(own))
            wanted.append(key)
            if any(key.items() <= row.items() for row in rows):
                continue
            model = dataclasses.replace(load_model(str(checkpoint), use_ema=use_ema), name=args['model'])
            report = evaluate_model(
                model, own, **kwargs, root_from='--data-dir' if settings.data_dir else str(run / ARGS_NAME))
            new = report_rows(report, **key)
            same = {name: value for name, value in key.items() if name not in ('checkpoint_time', 'args_sha256')}
            rows = [row for row in rows if not same.items() <= row.items()]
            rows += [{name: str(value) for name, value in row.items()} for row in new]
            if kwargs.get('rank', 0) == 0:
                write_csv(rows, path)
    return [row for key in wanted for row in rows if key.items() <= row.items()]


def _sha256(args: dict[str, Any], settings: EvalSettings) -> str:
    """Of the arguments of a run, and of the order of the classes where a file says it."""
    order = Path(settings.class_map).read_bytes() if settings.class_map and Path(settings.class_map).is_file() else b''
    return hashlib.sha256(json.dumps(args, sort_keys=True, default=str).encode() + order).hexdigest()


def _settings_columns(report: dict[str, Any]) -> dict[str, Any]:
    config = report['data_config']
    return {
        **_requested(EvalSettings(**{**report['settings'], 'options': SplitOptions(**report['settings']['options'])})),
        'input_size': 'x'.join(map(str, config['input_size'])),
        'interpolation': config['interpolation'],
        'crop_pct': config['crop_pct'],
        'crop_mode': config.get('crop_mode', 'center'),
        'mean': ' '.join(map(str, config['mean'])),
        'std': ' '.join(map(str, config['std'])),
        'weights_sha256': report['provenance'].get('weights_sha256', ''),
        'model_args': json.dumps(report['provenance'].get('model_args', {}), sort_keys=True, default=str),
        'class_names': ' '.join(report['class_names'] or ()),
    }


def _requested(settings: EvalSettings) -> dict[str, str]:
    """The settings as text, for columns and for recognising what has been done."""
    fields = dataclasses.asdict(settings)
    fields.update(fields.pop('options'))
    fields['radii'] = ' '.join(f'{radius:g}' for radius in settings.radii)
    fields['kinds'] = ' '.join(settings.kinds)
    return {name: '' if value is None else str(value) for name, value in fields.items()}


def _with_data_of(settings: EvalSettings, args: dict[str, Any], where: Path) -> EvalSettings:
    """The settings with the data of a run, where none is stated.

    Somebody else may have written args.yaml, and a name like `wds/…`, a URL like `pipe:…` or a pickled class map can
    make a reader of data run a program.
    """
    if settings.data_dir or settings.dataset:
        return settings
    fields = {name: args[key] for name, key in (
        ('data_dir', 'data_dir'), ('dataset', 'dataset'), ('split', 'val_split'), ('class_map', 'class_map'))
        if args.get(key)}
    if 'data_dir' not in fields and args.get('data'):  # train.py's positional argument
        fields['data_dir'] = args['data']
    for name, value in fields.items():
        unusual = not isinstance(value, str) or re.search(r'^[\w.+-]{2,}:|[|\0\n]', value)
        if unusual or (name == 'dataset' and '/' in value) or (name == 'class_map' and not value.endswith('.txt')):
            raise UserError(
                f'{where} asks for {name} {str(value)[:100]!r}. From such a file only folders, dataset names without a '
                f'prefix and class maps in .txt are taken: if you trust it, state the data by --data-dir, --dataset, '
                '--split and --class-map.')
    if settings.split is not None:
        fields['split'] = settings.split
    return dataclasses.replace(settings, **fields)
