"""The reader of a run folder of timm's train.py: args.yaml, summary.csv and what its checkpoints say of themselves.

`read_args` and `read_summary_lines` raise. `read_run` reads the whole folder and turns what is missing, half written or
damaged into notes, since this is mostly run on folders of killed runs.
"""
import csv
import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from gmnet_timm.errors import UserError, listed, shown

__all__ = [
    'ARGS_NAME', 'SUMMARY_NAME', 'Epoch', 'RunCheckpoint', 'TrainingRun', 'epoch_checkpoints', 'is_finite',
    'read_args', 'read_run', 'read_summary_lines', 'read_yaml', 'train_args',
]

ARGS_NAME = 'args.yaml'
SUMMARY_NAME = 'summary.csv'

# Arguments that are whole numbers, of those that this package computes with
_COUNTS = (
    'batch_size', 'cooldown_epochs', 'epochs', 'grad_accum_steps', 'lr_cycle_limit', 'num_classes', 'stop_epoch',
    'warmup_epochs',
)
_MAX_COUNT = 10 ** 9
_MAX_SUMMARY_BYTES = 10_000_000
_MAX_YAML_BYTES = 1_000_000  # two hundred times an args.yaml
_SafeLoader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)  # libyaml's bounds the depth, and takes no seconds
_CYCLIC = ('cosine', 'tanh', 'poly')  # schedules that come in cycles
_WITH_COOLDOWN = (*_CYCLIC, 'wsd', 'rsqrt')


@dataclasses.dataclass(frozen=True)
class Epoch:
    """A line of summary.csv.

    Attributes:
        epoch: Number of the epoch, from 0.
        values: The other columns by their names (`train_loss`, `eval_top1`, `lr`, …), without those left empty.
            Accuracies are in percent. Losses of a diverged training are NaN or infinite.
    """

    epoch: int
    values: dict[str, float]

    @property
    def train_loss(self) -> float | None:
        """Mean training loss, None if it was not recorded; the same holds for the properties below."""
        return self.values.get('train_loss')

    @property
    def eval_loss(self) -> float | None:
        """Validation loss."""
        return self.values.get('eval_loss')

    @property
    def top1(self) -> float | None:
        """Validation accuracy in percent."""
        return self.values.get('eval_top1')

    @property
    def top5(self) -> float | None:
        """Validation accuracy in percent."""
        return self.values.get('eval_top5')


@dataclasses.dataclass(frozen=True)
class RunCheckpoint:
    """What a readable checkpoint says of itself, without its tensors.

    Attributes:
        path: The file.
        epoch: Epoch after which it was written (in which, for recovery checkpoints), from 0.
        metric: What the run calls its `eval_metric`, None in recovery checkpoints.
        world_size: Number of processes that trained, one per GPU.
        ema: Whether it also holds EMA weights.
    """

    path: Path
    epoch: int | None
    metric: float | None
    world_size: int | None
    ema: bool


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A run folder.

    Attributes:
        path: The folder.
        args: Arguments of train.py as args.yaml has them, of whatever type. {} if that file is missing or damaged.
        epochs: Lines of summary.csv by ascending epoch. Of a repeated epoch the last line counts.
        checkpoints: The readable ones, by file name.
        notes: What could not be read, one sentence for each.
    """

    path: Path
    args: dict[str, Any]
    epochs: tuple[Epoch, ...]
    checkpoints: tuple[RunCheckpoint, ...]
    notes: tuple[str, ...]

    def count(self, name: str) -> int | None:
        """The argument `name` if it is a whole number from 0 on, else None."""
        return _count(self.args.get(name))

    @property
    def eval_metric(self) -> str:
        """The metric that ranks the checkpoints: 'top1', 'top5' or 'loss', which is that of training without a split
        to validate on."""
        return 'loss' if not self.args.get('val_split', 'validation') else shown(self.args.get('eval_metric') or 'top1')

    @property
    def world_size(self) -> int | None:
        """Number of processes, one per GPU, as the latest checkpoint says: args.yaml is written before it is known."""
        known = [c for c in self.checkpoints if c.world_size]
        return max(known, key=_recency).world_size if known else None

    @property
    def epochs_planned(self) -> int | None:
        """Number of epochs in all, with cool-down and warm-up where they are added; None if args.yaml does not tell."""
        epochs, sched = self.count('epochs'), self.args.get('sched', 'cosine')
        if self.count('stop_epoch'):
            return self.count('stop_epoch')
        if epochs is None:
            return None
        cycles = self.count('lr_cycle_limit') or 1
        if sched in _CYCLIC and cycles > 1:
            if self.args.get('lr_cycle_mul', 1) != 1:
                return None
            epochs *= cycles
        cooldown = self.count('cooldown_epochs') if sched in _WITH_COOLDOWN else 0
        warmup = self.count('warmup_epochs') if self.args.get('warmup_prefix') else 0
        return epochs + (cooldown or 0) + (warmup or 0)

    @property
    def best_epoch(self) -> Epoch | None:
        """The epoch with the highest top-1, the earliest of equals; None without any."""
        ranked = [(epoch.top1, -epoch.epoch, epoch) for epoch in self.epochs if is_finite(epoch.top1)]
        return max(ranked, key=lambda r: r[:2])[2] if ranked else None

    @property
    def best_checkpoint(self) -> RunCheckpoint | None:
        """The checkpoint with the best metric, of equals model_best, whose name says what it is; None without any.

        This need not be model_best: older versions of train.py forget the best result when they resume.
        """
        sign = -1 if self.eval_metric == 'loss' else 1
        ranked = [(sign * c.metric, c.path.name.startswith('model_best'), c)
                  for c in self.checkpoints if is_finite(c.metric)]
        return max(ranked, key=lambda r: r[:2])[2] if ranked else None


def read_run(path: str | Path) -> TrainingRun:
    """Read a run folder of train.py, whatever state it is in.

    Args:
        path: The folder that has args.yaml, summary.csv and checkpoints. Some may be missing, not all.

    Raises:
        UserError: It is not a folder, or has none of these files.
    """
    path = Path(path)
    checkpoint_paths = [p for p in sorted(path.glob('*.pth.tar')) if p.name != 'tmp.pth.tar']
    if not (checkpoint_paths or (path / ARGS_NAME).exists() or (path / SUMMARY_NAME).exists()):
        raise UserError(
            f'{path} is not a run folder of train.py: it has no args.yaml, summary.csv or *.pth.tar. '
            'Give the folder below --output that --experiment named.')
    notes: list[str] = []
    args: dict[str, Any] = {}
    epochs: tuple[Epoch, ...] = ()
    try:
        args = read_args(path / ARGS_NAME)
    except UserError as e:
        notes.append(str(e).removeprefix(f'{path}{os.sep}'))
    notes += _type_problems(args)
    try:
        lines, left_out = read_summary_lines(path / SUMMARY_NAME)
        by_number = {epoch.epoch: epoch for epoch in lines}
        epochs = tuple(by_number[number] for number in sorted(by_number))
        notes += left_out
    except UserError as e:
        notes.append(str(e).removeprefix(f'{path}{os.sep}'))
    checkpoints = [_read_checkpoint(p, notes) for p in checkpoint_paths]
    return TrainingRun(path, args, epochs, tuple(c for c in checkpoints if c is not None), tuple(notes))


def read_args(path: str | Path) -> dict[str, Any]:
    """Read the arguments of train.py from an args.yaml.

    Args:
        path: The file.

    Returns:
        Arguments by their names in train.py's namespace. Their types are those of the file: not checked.

    Raises:
        UserError: The file is missing, damaged, empty or not a mapping.
    """
    args = read_yaml(path)
    if not isinstance(args, dict):
        raise UserError(f'{path} is empty' if args is None else f'{path} holds no arguments of train.py')
    return {str(name): value for name, value in args.items()}


def train_args(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments under the names of timm's train.py. DeiT's main.py, and trainers made from it, have other names."""
    if 'nb_classes' not in args:
        return args
    size = args.get('input_size')
    return {
        **args, 'num_classes': args['nb_classes'], 'crop_pct': args.get('eval_crop_ratio'),
        'img_size': size if isinstance(size, int) else None, 'input_size': None if isinstance(size, int) else size,
        # what both have in other units or meanings is not carried over
        'drop': None, 'global_pool': None}


def read_yaml(path: str | Path) -> Any:
    """Read a YAML file by PyYAML's safe loader.

    Raises:
        UserError: It is not a readable file, not YAML, or larger than arguments ever are.
    """
    content = _read_bytes(Path(path), _MAX_YAML_BYTES)
    try:
        return yaml.load(content.decode(), _SafeLoader)
    except (yaml.YAMLError, ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as e:
        # PyYAML's constructors raise almost anything: KeyError for `!!bool x`, for example
        problem, mark = getattr(e, 'problem', None), getattr(e, 'problem_mark', None)
        reason = f'{problem}, line {mark.line + 1}' if problem and mark else (str(e) or repr(e)).splitlines()[0]
        raise UserError(f'{path} cannot be read as YAML: {reason}') from e


def read_summary_lines(path: str | Path) -> tuple[list[Epoch], list[str]]:
    """Read the lines of a summary.csv, leaving out those that are damaged or half written.

    Headers may be repeated and epochs too, as older versions of train.py leave them where a run was resumed.

    Args:
        path: The file.

    Returns:
        The lines in their order, and a sentence about what was left out for each kind of damage.

    Raises:
        UserError: The file cannot be read, or is larger than such a file ever is.
    """
    path = Path(path)
    lines, notes = _read_lines(path)
    epochs: list[Epoch] = []
    header: list[str] = []
    damaged = []
    for number, line in enumerate(lines, start=1):
        cells = _cells(line)
        if cells[:1] == ['epoch']:
            header = cells
            continue
        epoch = _parse_epoch(dict(zip(header, cells, strict=True))) if len(cells) == len(header) else None
        if epoch is None:
            damaged.append(number)
        else:
            epochs.append(epoch)
    if damaged:
        numbers = listed([str(number) for number in damaged])
        what = f'line {numbers} is' if len(damaged) == 1 else f'lines {numbers} are'
        notes.append(f'{path.name}: {what} damaged and left out')
    return epochs, notes


def epoch_checkpoints(path: str | Path) -> dict[int, Path]:
    """The files checkpoint-EPOCH.pth.tar of a run folder by epoch, in order. train.py keeps the best of them.

    Raises:
        UserError: There are none.
    """
    found = {}
    for file in Path(path).glob('checkpoint-*.pth.tar'):
        match = re.fullmatch(r'checkpoint-(\d{1,9})\.pth\.tar', file.name)
        if match:
            found[int(match[1])] = file
    if not found:
        raise UserError(f'{path} holds no checkpoint-EPOCH.pth.tar.')
    return dict(sorted(found.items()))


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether a value was recorded, and is a finite number."""
    return value is not None and math.isfinite(value)


def _count(value: Any) -> int | None:
    valid = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_COUNT
    return value if valid else None


def _number(value: Any) -> float | None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if valid and abs(value) <= _MAX_COUNT else None


def _type_problems(args: dict[str, Any]) -> list[str]:
    found = [
        f'{ARGS_NAME}: {name} is {shown(args[name], 50)!r}, not a whole number from 0 on'
        for name in _COUNTS if args.get(name) is not None and _count(args[name]) is None
    ]
    if not isinstance(args.get('model', ''), str):
        found.append(f'{ARGS_NAME}: model is {shown(args["model"], 50)!r}, not a name')
    return found


def _read_bytes(path: Path, most: int) -> bytes:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise UserError(f'{path} cannot be read: it is not a regular file')
        with path.open('rb') as file:
            content = file.read(most + 1)
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from e
    if len(content) > most:
        raise UserError(f'{path} cannot be read: it is larger than {most:,} bytes')
    return content


def _read_lines(path: Path) -> tuple[list[str], list[str]]:
    """The complete lines of a text file, and what is to be said about the rest."""
    content = _read_bytes(path, _MAX_SUMMARY_BYTES)
    # A file system can leave NUL bytes in place of a line that a power cut caught.
    text = content.decode(errors='replace').replace('\0', '')
    lines = text.splitlines()
    if not lines:
        return [], [f'{path.name} is empty']
    if text.endswith('\n'):
        return lines, []
    return lines[:-1], [f'{path.name}: its last line is incomplete and left out']


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # a field beyond csv's limit, say
        return []


def _parse_epoch(row: dict[str, str]) -> Epoch | None:
    try:
        epoch = _count(int(row.pop('epoch')))
        values = {name: float(text) for name, text in row.items() if text}
    except (KeyError, ValueError):
        return None
    return None if epoch is None else Epoch(epoch, values)


def _read_checkpoint(path: Path, notes: list[str]) -> RunCheckpoint | None:
    from gmnet_timm.weights.files import read_outline  # here, because it imports torch

    try:
        content, ema = read_outline(path)
    except UserError as e:
        notes.append(f'{path.name} cannot be read, so training cannot be resumed from it: {e}')
        return None
    if 'epoch' not in content:
        notes.append(f'{path.name} is not a checkpoint of train.py')
        return None
    args = dict(getattr(content.get('args'), '__dict__', {}))
    epoch, metric, world_size = content.get('epoch'), content.get('metric'), args.get('world_size')
    found = RunCheckpoint(path, _count(epoch), _number(metric), _count(world_size), ema)
    stated = dict(epoch=epoch, metric=metric, world_size=world_size)
    unusable = [name for name, value in stated.items() if value is not None and getattr(found, name) is None]
    notes += [f'{path.name}: its {name} is not a usable number' for name in unusable]
    return found


def _recency(checkpoint: RunCheckpoint) -> tuple[bool, int, bool]:
    name = checkpoint.path.name
    # A recovery checkpoint is from the middle of its epoch.
    return not name.startswith('recovery'), -1 if checkpoint.epoch is None else checkpoint.epoch, name == 'last.pth.tar'
