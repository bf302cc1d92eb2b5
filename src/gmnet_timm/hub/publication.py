"""What there is to publish besides the model itself: accuracies, recipe, licence and card, and where each came from."""
import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

from timm.models import split_model_name_tag

from gmnet_timm.errors import UserError
from gmnet_timm.weights.class_names import imagenet_class_names
from gmnet_timm.weights.config import CARD_NAME, read_text
from gmnet_timm.weights.files import CheckpointError
from gmnet_timm.weights.model import Source
from gmnet_timm.weights.runs import SUMMARY_NAME, is_finite, read_summary_lines

__all__ = ['Metric', 'Publication', 'collect_publication']

_METRIC_NAMES = ('top1', 'top5')


@dataclasses.dataclass(frozen=True)
class Metric:
    """An accuracy that somebody measured."""

    name: str  # 'top1' or 'top5'
    value: float  # percent
    source: str  # what says so: a file, or 'given on the command line'


@dataclasses.dataclass(frozen=True)
class Publication:
    """Everything that goes into a published repository."""

    source: Source
    class_names: list[str] | None
    metrics: list[Metric]
    notes: tuple[str, ...]  # what was chosen, assumed or left out, for the user and for the card
    license: str | None  # of weights that came with a config.json
    card: str | None  # the README.md that came with the weights

    @property
    def recipe(self) -> dict[str, Any]:
        """Arguments of timm's train.py, {} if unknown."""
        return self.source.run_args


def collect_publication(
        source: Source,
        metrics: dict[str, float] | None = None,
        results_file: str | None = None,
) -> Publication:
    """Collect what is to be published with a model.

    Args:
        source: The model.
        metrics: Accuracies in percent, `top1` and `top5`, that replace those found.
        results_file: CSV file of timm's validate.py with the accuracies of these weights.

    Raises:
        UserError: It is not a GmNet with a classifier, or a file cannot be used; the message says what.
    """
    description, path = source.description, source.checkpoint.path
    if not description.is_gmnet:
        raise CheckpointError(f'{path} holds a {description.name}. Only GmNet is published from here.')
    if not description.full_args['num_classes']:
        raise CheckpointError(f'{path} has no classifier: there is nothing to classify images with.')
    found, notes = _find_metrics(source, metrics or {}, results_file)
    if description.full_args['num_classes'] <= 5:  # always 100 %
        found = [metric for metric in found if metric.name != 'top5']
    class_names = source.class_names
    if class_names is None and description.full_args['num_classes'] == 1000:
        notes.append('The class names are those of ImageNet-1k, assumed from the 1000 classes.')
        class_names = imagenet_class_names()
    elif class_names is None:
        notes.append('The class names are unknown: --class-names takes them from the folder of the training images.')
    card = source.folder / CARD_NAME if source.folder is not None else None
    return Publication(
        source=source,
        class_names=class_names,
        metrics=found,
        notes=(*source.notes, *notes),
        license=source.config.pretrained_cfg.get('license') if source.config else None,
        card=read_text(card) if card is not None and card.is_file() else None,
    )


def _find_metrics(source: Source, given: dict[str, float], results_file: str | None) -> tuple[list[Metric], list[str]]:
    """Accuracies by precedence: flags, validate.py's CSV, the run's summary.csv; and why there are none."""
    if given:
        return _metrics(given, 'given on the command line'), []
    if results_file is not None:
        return _metrics(_results_of(source, Path(results_file)), f'validate.py ({Path(results_file).name})'), []
    summary = source.folder / SUMMARY_NAME if source.folder is not None else None
    if summary is None or not summary.is_file():
        return [], []
    # train.py evaluates the EMA weights as soon as there are some, unless they are kept on the CPU
    ranked_by_ema = bool(source.run_args.get('model_ema')) and not source.run_args.get('model_ema_force_cpu')
    if ranked_by_ema != source.checkpoint.ema:
        evaluated = 'the EMA weights' if ranked_by_ema else 'the weights without EMA'
        return [], [f'The accuracies in {SUMMARY_NAME} are of {evaluated}, not of these.']
    if source.data_config != source.recorded_config:
        return [], [f'The accuracies in {SUMMARY_NAME} are of other preprocessing than is published, and left out.']
    number, metric = (source.checkpoint.metadata.get(key) for key in ('epoch', 'metric'))
    lines = [epoch for epoch in read_summary_lines(summary)[0] if epoch.epoch == number]
    if not lines:
        return [], [f"{SUMMARY_NAME} has no row for the checkpoint's epoch."]
    name = f'eval_{source.run_args.get("eval_metric") or "top1"}'
    if isinstance(metric, (int, float)) and all(name in line.values for line in lines):
        lines = [line for line in lines if math.isclose(line.values[name], metric, rel_tol=1e-4, abs_tol=1e-3)]
        if not lines:
            return [], [f"{SUMMARY_NAME} does not have the checkpoint's own {name} of {metric:g} for its epoch."]
    values = {name: value for name in _METRIC_NAMES if is_finite(value := getattr(lines[-1], name))}
    return _metrics(values, f'train.py ({SUMMARY_NAME}, epoch {number})'), []


def _results_of(source: Source, path: Path) -> dict[str, str]:
    """The one line of a results file of validate.py, which is to be of these weights."""
    rows = _read_csv(path)
    if len(rows) != 1:
        raise UserError(f'{path} has {len(rows)} results. It must have one, that of these weights.')
    row = rows[0]
    if not row.get('top1'):
        raise UserError(f'{path} has no column top1: give a CSV file of validate.py, with commas.')
    size, pixels = source.description.size, source.data_config['input_size'][-1]
    name = row.get('model') or size
    if ':' not in name and split_model_name_tag(name)[0] != size:
        raise UserError(f'{path} has the result of {name}, and this is a {size}.')
    if row.get('img_size') and float(row['img_size']) != pixels:
        raise UserError(f'{path} has a result for {row["img_size"]} pixels. These weights are published for {pixels}.')
    return row


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        return list(csv.DictReader(read_text(path).splitlines()))
    except csv.Error as e:
        raise UserError(f'{path} cannot be read as CSV: {e}') from e


def _metrics(values: dict[str, Any], source: str) -> list[Metric]:
    given = [name for name in _METRIC_NAMES if values.get(name) not in (None, '')]
    return [Metric(name, _percentage(name, values[name]), source) for name in given]


def _percentage(name: str, text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError) as e:
        raise UserError(f'{name} {text} is not a number.') from e
    if not 0 <= value <= 100:
        raise UserError(f'{name} {value} is not a percentage.')
    return value
