"""What a run folder of timm's train.py says about the training: how it deviates, how far it is, whether it is well.

Any file of the folder may be missing, empty or half written, because the folder of a killed run is when one asks.
"""
import csv
import dataclasses
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, TypeGuard, Union

import yaml

from gmnet_timm.checkpoint.reading import holds_ema, read_metadata
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.files import replacing
from gmnet_timm.training.recipe import RECIPES, Layout, load_recipe

__all__ = ['Epoch', 'RunCheckpoint', 'TrainingRun', 'deviations', 'format_run', 'plot_run', 'read_run', 'symptoms']

# In the recipes, but no part of what was published
_FREE = {
    'model', 'pretrained_path', 'batch_size', 'grad_accum_steps', 'workers', 'pin_mem', 'eval_metric',
    'checkpoint_hist', 'log_interval',
}
_FREE_WITHOUT_AMP = {'amp_dtype'}
_LEARNING_RATES = {'lr', 'warmup_lr', 'min_lr'}

_FLAT_EPOCHS = 5  # this many epochs without movement
_FLAT_LOSS = 1e-3  # relative to the loss
_FLAT_TOP1 = .05  # points: 25 of ImageNet's 50,000 validation images


@dataclasses.dataclass(frozen=True)
class Epoch:
    """A line of summary.csv. Top-1 in percent; None for what was not recorded."""

    epoch: int
    train_loss: Optional[float]
    eval_loss: Optional[float]
    top1: Optional[float]
    lr: Optional[float]


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """A readable checkpoint file, without its tensors."""

    path: Path
    epoch: Optional[int]
    metric: Optional[float]  # what the run calls its eval_metric, None in recovery checkpoints
    processes: Optional[int]
    ema: bool  # it also holds averaged weights


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What could be read of a run folder, and in `notes` what could not."""

    path: Path
    args: Dict[str, Any]
    epochs: Tuple[Epoch, ...]
    checkpoints: Tuple[RunCheckpoint, ...]
    notes: Tuple[str, ...]

    @property
    def processes(self) -> Optional[int]:
        """GPUs that train, as the latest checkpoint says: args.yaml is written before train.py knows."""
        known = [c for c in self.checkpoints if c.processes]
        return max(known, key=lambda c: c.epoch or 0).processes if known else None

    @property
    def epochs_planned(self) -> Optional[int]:
        """Epochs in all, cool-down included."""
        args = self.args
        if args.get('epochs') is None:
            return None
        cooldown = args.get('cooldown_epochs') if args.get('sched', 'cosine') in ('cosine', 'tanh', 'poly') else 0
        warmup = args.get('warmup_epochs') if args.get('warmup_prefix') else 0
        return args.get('stop_epoch') or args['epochs'] + (cooldown or 0) + (warmup or 0)

    @property
    def best_epoch(self) -> Optional[Epoch]:
        """The epoch with the highest top-1, the earliest of equals."""
        ranked = [e for e in self.epochs if _finite(e.top1)]
        return max(ranked, key=lambda e: (_number(e.top1), -e.epoch), default=None)

    @property
    def best_checkpoint(self) -> Optional[RunCheckpoint]:
        """The checkpoint with the best metric; of equals model_best, whose name says what it is."""
        sign = -1 if self.args.get('eval_metric') == 'loss' else 1
        ranked = [c for c in self.checkpoints if _finite(c.metric)]
        return max(ranked, key=lambda c: (sign * _number(c.metric), c.path.name.startswith('model_best')), default=None)


ARGS_NAME = 'args.yaml'


def read_args(path: Path) -> Dict[str, Any]:
    """TEMPORARY"""
    notes: List[str] = []
    args = _read_args(path, notes)
    if notes:
        raise UserError(notes[0])
    return args


def epoch_checkpoints(run: Path) -> Dict[int, Path]:
    """TEMPORARY"""
    import re
    found = {}
    for path in run.glob('checkpoint-*.pth.tar'):
        match = re.fullmatch(r'checkpoint-(\d+)\.pth\.tar', path.name)
        if match:
            found[int(match.group(1))] = path
    if not found:
        raise UserError(f'{run} holds no checkpoint-EPOCH.pth.tar.')
    return dict(sorted(found.items()))


def read_run(path: Union[str, Path]) -> TrainingRun:
    """Read a run folder of train.py.

    Args:
        path: The folder, which has args.yaml, summary.csv and checkpoints.

    Raises:
        UserError: It is no folder, or has none of these files.
    """
    path = Path(path)
    checkpoint_paths = [p for p in sorted(path.glob('*.pth.tar')) if 'tmp' not in p.name]
    if not (checkpoint_paths or (path / 'args.yaml').exists() or (path / 'summary.csv').exists()):
        raise UserError(
            f'{path} is no run folder of train.py: it has no args.yaml, summary.csv or *.pth.tar. '
            'Give the folder below --output that --experiment named.')
    notes: List[str] = []
    args = _read_args(path / 'args.yaml', notes)
    epochs = _read_summary(path / 'summary.csv', notes)
    checkpoints = [_read_checkpoint(p, notes) for p in checkpoint_paths]
    return TrainingRun(path, args, epochs, tuple(c for c in checkpoints if c is not None), tuple(notes))


def deviations(run: TrainingRun, recipe: str = 'imagenet', processes: Optional[int] = None) -> List[str]:
    """What the run's arguments have other than a recipe, one entry an argument.

    Learning rates that were scaled with the images a step are as in the recipe.

    Args:
        run: From `read_run`.
        recipe: Name of the recipe.
        processes: Number of GPUs, if no checkpoint says it.
    """
    layout = _layout(run, processes)
    scale = layout.total / RECIPES[recipe] if layout else 1
    found = []
    for key, wanted in load_recipe(recipe).items():
        if key in _FREE or key not in run.args or (key in _FREE_WITHOUT_AMP and not run.args.get('amp')):
            continue
        if key == 'num_classes' and wanted is None:  # finetune leaves it to the user
            continue
        value = run.args[key]
        scaled = key in _LEARNING_RATES and _same(value, wanted * scale)
        if not scaled and not _same(value, wanted):
            found.append(f'{key} {value} instead of {wanted}')
    return found


def symptoms(run: TrainingRun) -> List[str]:
    """What is wrong with the course of the training: not a number, at chance, flat, or fallen."""
    found = []
    broken = next((e for e in run.epochs if _broken(e.train_loss) or _broken(e.eval_loss)), None)
    if broken is not None:
        found.append(f'the loss is not finite from epoch {broken.epoch} on')
    best = run.best_epoch
    if best is not None:
        best_top1, last_top1 = _number(best.top1), _number(run.epochs[-1].top1)
        chance = 100 / (run.args.get('num_classes') or 1000)
        past_warmup = run.epochs[-1].epoch >= (run.args.get('warmup_epochs') or 0) + 3
        if past_warmup and best_top1 <= 1.5 * chance:
            found.append(f'top-1 never left chance ({chance:.4g} %)')
        if last_top1 < best_top1 / 2:
            found.append(f'top-1 fell from {best_top1:.2f} to {last_top1:.2f}')
    if _is_flat(run):
        found.append(f'flat: neither loss nor top-1 moved over {_FLAT_EPOCHS} epochs')
    return found


def format_run(run: TrainingRun, recipe: str = 'imagenet', processes: Optional[int] = None) -> str:
    """The report that `gmnet-timm check-run` prints, a line a fact."""
    rows = [
        ('run', f'{run.path} ({run.args.get("model", "model unknown")})'),
        ('recipe', _describe_deviations(run, recipe, processes)),
        ('images a step', _describe_total(run, recipe, processes)),
        ('epochs', _describe_epochs(run)),
        ('top-1', _describe_top1(run)),
        ('health', _describe_health(run)),
        ('publish', _describe_checkpoint(run)),
        *(('note', note) for note in run.notes),
    ]
    return '\n'.join(f'{key + ":":<15}{value}' for key, value in rows)


def plot_run(run: TrainingRun, path: Union[str, Path]) -> None:
    """Draw loss, top-1 and learning rate by epoch.

    Args:
        run: From `read_run`.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UserError: There is no epoch to draw, or the file cannot be written.
    """
    if not run.epochs:
        raise UserError(f'{run.path} has no complete epoch in summary.csv, there is nothing to draw.')
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingExtraError('matplotlib', 'plot') from e
    figure = Figure(figsize=(6, 8), layout='constrained')
    loss, top1, lr = figure.subplots(3, sharex=True)
    epochs = [e.epoch for e in run.epochs]
    loss.plot(epochs, [_number(e.train_loss) for e in run.epochs], label='training')
    loss.plot(epochs, [_number(e.eval_loss) for e in run.epochs], label='validation')
    top1.plot(epochs, [_number(e.top1) for e in run.epochs])
    lr.plot(epochs, [_number(e.lr) for e in run.epochs])
    loss.set(title=run.path.name, ylabel='loss')
    loss.legend()
    top1.set(ylabel='top-1 (%)')
    lr.set(ylabel='learning rate', xlabel='epoch')
    lr.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')


def _read_args(path: Path, notes: List[str]) -> Dict[str, Any]:
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        notes.append(f'{path.name} cannot be read: {_first_line(e)}')
        return {}
    if not isinstance(args, dict):
        notes.append(f'{path.name} is empty' if args is None else f'{path.name} holds no arguments')
        return {}
    return args


def _read_summary(path: Path, notes: List[str]) -> Tuple[Epoch, ...]:
    try:
        # NUL bytes are what a file system leaves of a line that a power cut caught.
        text = path.read_text(encoding='utf-8', errors='replace').replace('\0', '')
    except OSError as e:
        notes.append(f'{path.name} cannot be read: {_first_line(e)}')
        return ()
    lines = text.splitlines()
    if not lines:
        notes.append(f'{path.name} is empty')
        return ()
    if not text.endswith('\n'):
        notes.append(f'{path.name}: its last line is incomplete and left out')
        lines.pop()
    epochs: Dict[int, Epoch] = {}
    header: List[str] = []
    for number, cells in enumerate(csv.reader(lines), start=1):
        if cells[:1] == ['epoch']:  # repeated where a run was resumed into its folder
            header = cells
            continue
        row = _parse_row(dict(zip(header, cells, strict=True))) if len(cells) == len(header) else None
        if row is None:
            notes.append(f'{path.name}: line {number} is damaged and left out')
        else:
            epochs[row.epoch] = row  # a resumed run repeats the epoch that it was killed in
    return tuple(epochs[epoch] for epoch in sorted(epochs))


def _parse_row(row: Dict[str, str]) -> Optional[Epoch]:
    try:
        values = {key: float(row[key]) if row.get(key) else None for key in
                  ('train_loss', 'eval_loss', 'eval_top1', 'lr')}
        return Epoch(int(row['epoch']), values['train_loss'], values['eval_loss'], values['eval_top1'], values['lr'])
    except (KeyError, ValueError):
        return None


def _read_checkpoint(path: Path, notes: List[str]) -> Optional[RunCheckpoint]:
    try:
        metadata, ema = read_metadata(path), holds_ema(path)
    except UserError as e:
        notes.append(f'{path.name} cannot be read and is no checkpoint to go on from: {_first_line(e)}')
        return None
    if 'epoch' not in metadata:
        notes.append(f'{path.name} is no checkpoint of train.py')
        return None
    return RunCheckpoint(
        path,
        epoch=metadata['epoch'],
        metric=metadata.get('metric'),
        processes=getattr(metadata.get('args'), 'world_size', None),
        ema=ema,
    )


def _layout(run: TrainingRun, processes: Optional[int]) -> Optional[Layout]:
    processes = run.processes or processes
    batch_size = run.args.get('batch_size')
    if not (processes and batch_size):
        return None
    return Layout(processes, batch_size, run.args.get('grad_accum_steps') or 1)


def _is_flat(run: TrainingRun) -> bool:
    # The cool-down runs at a constant, tiny learning rate: there it is meant to be flat.
    tail = [e for e in run.epochs if e.epoch < (run.args.get('epochs') or math.inf)][-_FLAT_EPOCHS:]
    losses = [e.train_loss for e in tail if _finite(e.train_loss)]
    top1 = [e.top1 for e in tail if _finite(e.top1)]
    if len(losses) < _FLAT_EPOCHS or tail[0].epoch < (run.args.get('warmup_epochs') or 0):
        return False
    still = max(losses) - min(losses) <= _FLAT_LOSS * abs(max(losses))
    return still and (not top1 or max(top1) - min(top1) <= _FLAT_TOP1)


def _describe_deviations(run: TrainingRun, recipe: str, processes: Optional[int]) -> str:
    if not run.args:
        return 'unknown without args.yaml'
    found = deviations(run, recipe, processes)
    return '; '.join(found) if found else f'as in {recipe}.yaml'


def _describe_total(run: TrainingRun, recipe: str, processes: Optional[int]) -> str:
    layout = _layout(run, processes)
    if layout is not None:
        return f'{layout}, {"as in the recipe" if layout.total == RECIPES[recipe] else f"instead of {RECIPES[recipe]}"}'
    if not run.args.get('batch_size'):
        return 'unknown without args.yaml'
    accumulation = run.args.get('grad_accum_steps') or 1
    known = f'batch {run.args["batch_size"]} x accumulation {accumulation}'
    return f'{known} x GPUs: a checkpoint says how many, or --gpus'


def _describe_epochs(run: TrainingRun) -> str:
    done = run.epochs[-1].epoch + 1 if run.epochs else 0
    planned = run.epochs_planned
    return f'{done} done' + ('' if planned is None else f', {max(0, planned - done)} left of {planned}')


def _describe_top1(run: TrainingRun) -> str:
    best = run.best_epoch
    if best is None:
        return 'none recorded'
    last = run.epochs[-1]
    return f'best {best.top1:.2f} (epoch {best.epoch}), last {_number(last.top1):.2f} (epoch {last.epoch})'


def _describe_health(run: TrainingRun) -> str:
    if not run.epochs:
        return 'no complete epoch yet'
    return '; '.join(symptoms(run)) or 'losses are finite, and it is not flat'


def _describe_checkpoint(run: TrainingRun) -> str:
    best = run.best_checkpoint
    if best is None:
        return 'no readable checkpoint with a result'
    ema = ', averaged weights' if best.ema else ''
    what = f'{best.path} (epoch {best.epoch}, {run.args.get("eval_metric", "top1")} {best.metric:.2f}{ema})'
    try:
        from gmnet_timm.source import read_source
        return f'{what}, {read_source(best.path).description}'
    except UserError as e:
        return f'not {what}: {e}'


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(value, (int, float)) and isinstance(wanted, (int, float)):
        return math.isclose(value, wanted, rel_tol=1e-5)
    return value == wanted


def _finite(value: Optional[float]) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _broken(value: Optional[float]) -> bool:
    return value is not None and not math.isfinite(value)


def _number(value: Optional[float]) -> float:
    return math.nan if value is None else value


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
