"""Band accuracies of models and of training runs as tables, with everything needed to repeat them."""
import csv
import io
import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import timm
import torch

from gmnet_timm import __version__
from gmnet_timm.errors import UserError
from gmnet_timm.files import write_text

from .bands import SplitOptions, evaluate_bands
from .data import create_band_loader
from .subjects import Subject, load_subject, read_run_args, run_checkpoints

__all__ = [
    'EvalSettings', 'check_corner', 'evaluate_runs', 'evaluate_subject', 'format_table', 'read_csv', 'report_rows',
    'write_csv', 'write_json',
]


@dataclass(frozen=True)
class EvalSettings:
    """What decides the numbers of an evaluation beside the model. Radii are in cycles per image."""

    data_dir: Optional[str]
    dataset: str = ''
    split: str = 'validation'
    class_map: str = ''
    limit: Optional[int] = None
    radii: Tuple[float, ...] = (12., 24., 36.)
    options: SplitOptions = SplitOptions()
    amp_dtype: Optional[str] = None  # name of a torch type


def evaluate_subject(
        subject: Subject,
        settings: EvalSettings,
        *,
        device: torch.device = torch.device('cpu'),  # noqa: B008, immutable
        batch_size: int = 64,
        workers: int = 2,
        rank: int = 0,
        world_size: int = 1,
) -> Dict[str, Any]:
    """Evaluate a model band by band.

    Args:
        subject: The model.
        settings: Data, radii and options.
        device: Where to run.
        batch_size: Images a batch.
        workers: Processes that load images.
        rank: Part of the data that this process evaluates.
        world_size: Number of processes.

    Returns:
        A report that `json.dump` takes: results by band, and everything needed to repeat them.

    Raises:
        UserError: As by `evaluate_bands` and `create_band_loader`, or a radius beyond the corner of the spectrum.
    """
    config = subject.data_config
    check_corner(settings.radii, config['input_size'])
    loader = create_band_loader(
        settings.data_dir,
        config,
        dataset=settings.dataset,
        split=settings.split,
        class_map=settings.class_map,
        num_classes=getattr(subject.model, 'num_classes', None),
        batch_size=batch_size,
        workers=workers,
        limit=settings.limit,
        rank=rank,
        world_size=world_size,
    )
    results = evaluate_bands(
        subject.model.to(device),
        loader,
        settings.radii,
        options=settings.options,
        mean=config['mean'],
        std=config['std'],
        amp_dtype=getattr(torch, settings.amp_dtype) if settings.amp_dtype else None,
    )
    return dict(
        name=subject.name,
        origin=subject.origin,
        results=[result.as_row() for result in results],
        skipped=loader.skipped,
        settings=asdict(settings),
        data_config=config,
        batch_size=batch_size,
        processes=world_size,
        device=torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine() + ' CPU',
        versions={'gmnet_timm': __version__, 'timm': timm.__version__, 'torch': torch.__version__},
        command=sys.argv,
    )


def report_rows(report: Dict[str, Any], **first: Any) -> List[Dict[str, Any]]:
    """One line a band for a CSV, with the choices that decided it.

    Args:
        report: From `evaluate_subject`.
        **first: Columns to put first.
    """
    return [
        {**first, 'model': report['name'], **result, 'skipped': report['skipped'], **_settings_columns(report)}
        for result in report['results']
    ]


def format_table(reports: Sequence[Dict[str, Any]]) -> str:
    """Top-1 in the layout of the paper's tables, with half of the 95 % interval, and what was chosen below."""
    width = max(len(report['name']) for report in reports)
    heads = [f'{row["band"]} {row["radius"]}'.strip() for row in reports[0]['results']]
    order = sorted(range(len(heads)), key=lambda i: ('raw', 'low', 'high').index(reports[0]['results'][i]['band']))
    lines = [f'{"top-1 %, ± 95 %":<{width}}' + ''.join(f'  {heads[i]:>11}' for i in order)]
    for report in reports:
        cells = []
        for i in order:
            row = report['results'][i]
            cells.append(f'{row["top1"]:.1f} ±{(row["top1_high"] - row["top1_low"]) / 2:.1f}')
        lines.append(f'{report["name"]:<{width}}' + ''.join(f'  {cell:>11}' for cell in cells))
    report = reports[0]
    options = report['settings']['options']
    height, width = report['data_config']['input_size'][1:]
    choices = [f'split on {options["space"]} values']
    choices += ['mean kept in the high part'] if options['keep_mean'] else []
    choices += ['contrast of the high part restored'] if options['restore_contrast'] else []
    lines += [
        '',
        f'{report["results"][0]["count"]} images of {height}x{width}, {report["skipped"]} could not be decoded.',
        f'Radii in cycles per image, {", ".join(choices)}.',
    ]
    return '\n'.join(lines)


def evaluate_runs(
        runs: Sequence[Path],
        settings: EvalSettings,
        path: Path,
        *,
        use_ema: bool = False,
        **kwargs: Any,
) -> List[Dict[str, Any]]:
    """Evaluate the checkpoints of training runs, epoch by epoch, going on where an earlier call stopped.

    Args:
        runs: Run folders of train.py or of the demo.
        settings: Data, radii and options. Without data, each run's own validation data.
        path: CSV file to write after each checkpoint. Lines of other runs and settings in it are kept.
        use_ema: Evaluate averaged weights where a checkpoint has them.
        **kwargs: As for `evaluate_subject`.

    Returns:
        The lines for these runs and settings, in order of runs and epochs.
    """
    rows = read_csv(path) if path.is_file() else []
    wanted = []
    for run in runs:
        args = read_run_args(run)
        own = _with_data_of(settings, args)
        for epoch, checkpoint in run_checkpoints(run).items():
            key = dict(
                run=str(run), epoch=str(epoch), ema=str(use_ema),
                # a run that was trained anew is evaluated anew
                checkpoint_time=str(checkpoint.stat().st_mtime_ns), **_requested(own))
            wanted.append(key)
            if any(key.items() <= row.items() for row in rows):
                continue
            subject = load_subject(str(checkpoint), use_ema=use_ema)
            subject.name = args['model']
            report = evaluate_subject(subject, own, **kwargs)
            new = report_rows(report, **key)
            same = {name: value for name, value in key.items() if name != 'checkpoint_time'}
            rows = [row for row in rows if not same.items() <= row.items()]
            rows += [{name: str(value) for name, value in row.items()} for row in new]
            if kwargs.get('rank', 0) == 0:
                write_csv(rows, path)
    return [row for key in wanted for row in rows if key.items() <= row.items()]


def read_csv(path: Path) -> List[Dict[str, str]]:
    """Lines of a CSV file as dictionaries."""
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_csv(rows: Sequence[Dict[str, Any]], path: Path) -> None:
    """Write lines, the columns of the first one first. The file is complete or the old one at any time."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(data: Any, path: Path) -> None:
    """Write JSON. The file is complete or the old one at any time."""
    write_text(path, json.dumps(data, indent=2) + '\n')


def _settings_columns(report: Dict[str, Any]) -> Dict[str, Any]:
    config = report['data_config']
    return {
        **_requested(EvalSettings(**{**report['settings'], 'options': SplitOptions(**report['settings']['options'])})),
        'input_size': 'x'.join(map(str, config['input_size'])),
        'interpolation': config['interpolation'],
        'crop_pct': config['crop_pct'],
    }


def _requested(settings: EvalSettings) -> Dict[str, str]:
    """The settings as text, for columns and for recognising what has been done."""
    fields = asdict(settings)
    fields.update(fields.pop('options'))
    fields['radii'] = ' '.join(f'{radius:g}' for radius in settings.radii)
    return {name: '' if value is None else str(value) for name, value in fields.items()}


def _with_data_of(settings: EvalSettings, args: Dict[str, Any]) -> EvalSettings:
    if settings.data_dir or settings.dataset:
        return settings
    fields = {name: args[key] for name, key in (
        ('data_dir', 'data_dir'), ('dataset', 'dataset'), ('split', 'val_split'), ('class_map', 'class_map'))
        if args.get(key)}
    if 'data_dir' not in fields and args.get('data'):  # train.py's positional argument
        fields['data_dir'] = args['data']
    return EvalSettings(**{**settings.__dict__, **fields})


def check_corner(radii: Sequence[float], input_size: Sequence[int]) -> None:
    """Raise UserError for radii that would put nothing, or everything, into the low part of an image of this size."""
    height, width = input_size[-2:]
    corner = ((height // 2) ** 2 + (width // 2) ** 2) ** .5
    beyond = [radius for radius in radii if not 0 <= radius < corner]
    if beyond:
        raise UserError(
            f'Radii must be from 0 to below {corner:.1f} cycles per image, the corner of the spectrum of a '
            f'{height}x{width} image, got {", ".join(f"{radius:g}" for radius in beyond)}.')
