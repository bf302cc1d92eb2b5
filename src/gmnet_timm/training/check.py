"""Whether a training run is as in its recipe, how far it is and whether it looks healthy: `gmnet-timm check-run`."""
import math
from pathlib import Path
from typing import Any

from gmnet_timm.errors import MissingExtraError, UserError, listed
from gmnet_timm.files import replacing
from gmnet_timm.training.recipe import RECIPES, Layout, load_recipe
from gmnet_timm.training.run import Epoch, TrainingRun, is_finite

__all__ = ['deviations', 'format_run', 'plot_run', 'symptoms']

# Arguments of train.py that change neither the network nor how it is trained
HARMLESS = {
    # Which model, and where its images are
    'model', 'data', 'data_dir', 'dataset', 'dataset_download', 'dataset_trust_remote_code', 'input_key', 'target_key',
    # What is logged and kept
    'output', 'experiment', 'log_interval', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id',
    'save_images', 'recovery_interval', 'checkpoint_hist', 'save_epochs', 'eval_metric',
    # When and in which batches it validates
    'val_interval', 'validation_batch_size',
    # Where and how fast it runs
    'device', 'device_modules', 'local_rank', 'workers', 'pin_mem', 'use_multi_epochs_loader', 'synchronize_step',
    'fuser',
    # Counts through the global batch size, which is compared
    'grad_accum_steps',
}

# train.py's defaults of the arguments that no recipe sets, as far as they are not empty, or are not the same as 0
DEFAULTS: dict[str, Any] = {
    'train_split': 'train', 'val_split': 'validation',
    'momentum': .9, 'clip_mode': 'norm', 'layer_decay_no_opt_scale': None,
    'lr_base': .1, 'lr_base_size': 256, 'lr_noise_pct': .67, 'lr_noise_std': 1., 'lr_cycle_mul': 1.,
    'lr_cycle_decay': .5, 'decay_milestones': [90, 180, 270], 'decay_epochs': 90, 'decay_rate': .1,
    'patience_epochs': 10, 'start_epoch': None,
    'head_init_scale': None, 'head_init_bias': None, 'bce_target_thresh': None, 'bce_pos_weight': None,
    'model_ema_decay': .9998,
    'train_size_schedule': 'constant', 'train_size_schedule_spread': .65, 'train_size_random_mix': .1,
    'variable_batch_loss_scale': 'none',
    'naflex_train_seq_lens': [128, 256, 576, 784, 1024], 'naflex_max_seq_len': 576, 'naflex_loss_scale': 'linear',
    'kd_distill_type': 'logit', 'kd_loss_type': 'kl', 'kd_temperature': 4., 'kd_token_distill_type': 'soft',
    'distill_loss_weight': None, 'task_loss_weight': None,
}

# Values that mean what leaving the argument out means, the numbers of samples being ImageNet-1k's
_EQUIVALENT = {'in_chans': 3, 'train_num_samples': 1281167, 'val_num_samples': 50000}

# What finetune.yaml leaves to the user: the classes, the data and the weights to start from
_OWN = {'finetune': {'num_classes', 'pretrained_path', 'class_map', 'train_num_samples', 'val_num_samples'}}

# Arguments that train.py only uses where another one is set, by that other one
_USED_WITH = {
    'amp': ('amp_dtype',),
    'bce_loss': ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'),
    'clip_grad': ('clip_mode',),
    'kd_model_name': (
        'kd_distill_type', 'kd_loss_type', 'kd_temperature', 'kd_student_feature_dim', 'kd_teacher_feature_dim',
        'kd_token_distill_type', 'distill_loss_weight', 'task_loss_weight',
    ),
    'layer_decay': ('layer_decay_min_scale', 'layer_decay_no_opt_scale'),
    'lr_noise': ('lr_noise_pct', 'lr_noise_std'),
    'model_ema': ('model_ema_decay', 'model_ema_warmup', 'model_ema_force_cpu'),
    'naflex_loader': (
        'naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes', 'naflex_patch_size_probs',
        'naflex_loss_scale', 'naflex_patchify_channels_first',
    ),
    'pretrained': ('pretrained_path',),
    'resume': ('no_resume_opt',),
    'torchcompile': ('torchcompile_mode',),
    'train_img_sizes': (
        'train_batch_sizes', 'train_size_probs', 'train_size_schedule', 'train_size_schedule_spread',
        'train_size_random_mix', 'variable_batch_loss_scale',
    ),
}
_OWNERS = {name: owner for owner, names in _USED_WITH.items() for name in names}

# Arguments that only some schedules use
_SCHEDULES = {
    'decay_epochs': ('step', 'wsd', 'rsqrt'),
    'decay_milestones': ('multistep',),
    'decay_rate': ('step', 'multistep', 'plateau', 'poly'),
    'lr_decay_fn': ('wsd', 'rsqrt'),
    'lr_stable_timescale': ('wsd', 'rsqrt'),
    'patience_epochs': ('plateau',),
}

_LEARNING_RATES = {'lr', 'warmup_lr', 'min_lr'}
_EMPTY: tuple[Any, ...] = (None, False, 0, '', [], {})

_FLAT_EPOCHS = 5  # this many epochs without movement
_FLAT_LOSS = 1e-3  # relative to the loss
_FLAT_TOP1 = .05  # points: 25 of ImageNet's 50,000 validation images


def deviations(run: TrainingRun, recipe: str = 'imagenet', world_size: int | None = None) -> list[str]:
    """What changes the network or the training, and differs from a recipe.

    An argument that the recipe does not set counts as equal if it has train.py's default or no effect. So do learning
    rates that were scaled with the global batch size; the global batch size itself does not.

    Args:
        run: From `read_run`.
        recipe: Name of the recipe.
        world_size: Number of processes, one per GPU, if no checkpoint records it.

    Returns:
        One entry per argument, first those of the recipe in its order.
    """
    wanted = load_recipe(recipe)
    layout = _layout(run, world_size)
    scale = layout.global_batch_size / RECIPES[recipe] if layout else 1
    compared = [name for name in (*wanted, *run.args) if name not in HARMLESS | _OWN.get(recipe, set())]
    found = []
    for name in dict.fromkeys(name for name in compared if name in run.args):
        value = run.args[name]
        if name == 'resume':
            found += _describe_other_start(run)
        elif name in wanted:
            scaled = name in _LEARNING_RATES and _same(value, wanted[name] * scale)
            if not (scaled or _same(value, wanted[name]) or _is_without_effect(name, run)):
                found.append(f'{name} {_shown(value)} instead of {wanted[name]}')
        elif not (_is_default(name, value) or _is_without_effect(name, run)):
            default = DEFAULTS.get(name)
            wanted_text = f' instead of {default}' if default else f', which {recipe}.yaml does not set'
            found.append(f'{name} {_shown(value)}{wanted_text}')
    missing = [name for name in compared if name in wanted and wanted[name] and name not in run.args]
    if missing := [name for name in missing if not _is_without_effect(name, run)]:
        found.append(f'not recorded: {listed(missing)}')
    if layout and layout.global_batch_size != RECIPES[recipe]:
        found.append(f'global batch size {layout.global_batch_size} instead of {RECIPES[recipe]}')
    return found


def symptoms(run: TrainingRun) -> list[str]:
    """What looks unhealthy in the course of the training: losses that are not finite, top-1 at chance, flat or fallen.
    """
    found = []
    broken = next((e for e in run.epochs if _is_broken(e.train_loss) or _is_broken(e.eval_loss)), None)
    if broken is not None:
        found.append(f'the loss is not finite from epoch {broken.epoch} on')
    best = run.best_epoch
    if best is not None:
        best_top1, last_top1 = _number(best.top1), _number(run.epochs[-1].top1)
        chance = 100 / (run.count('num_classes') or 1000)
        past_warmup = run.epochs[-1].epoch >= (run.count('warmup_epochs') or 0) + 3
        if past_warmup and best_top1 <= min(1.5 * chance, chance + 5):
            found.append(f'top-1 never left chance ({chance:.4g} %)')
        if last_top1 < best_top1 / 2:
            found.append(f'top-1 fell from {best_top1:.2f} to {last_top1:.2f}')
    if _is_flat(run):
        found.append(f'flat: neither loss nor top-1 moved over {_FLAT_EPOCHS} epochs')
    return found


def format_run(run: TrainingRun, recipe: str = 'imagenet', world_size: int | None = None) -> str:
    """The report that `gmnet-timm check-run` prints, one line per fact. Arguments as for `deviations`."""
    rows = [
        ('run', f'{run.path} ({_shown(run.args.get("model", "model unknown"))})'),
        ('recipe', _describe_deviations(run, recipe, world_size)),
        ('global batch size', _describe_batch(run, recipe, world_size)),
        ('epochs', _describe_epochs(run)),
        ('top-1', _describe_top1(run)),
        ('health', _describe_health(run)),
        ('publish', _describe_checkpoint(run)),
        *(('note', note) for note in run.notes),
    ]
    return '\n'.join(f'{name + ":":<19}{_printable(text)}' for name, text in rows)


def plot_run(run: TrainingRun, path: str | Path) -> None:
    """Draw loss, top-1 and learning rate by epoch.

    Args:
        run: From `read_run`.
        path: PNG file to write.

    Raises:
        MissingExtraError: matplotlib is not installed.
        UserError: There is no epoch to draw, or the file cannot be written.
    """
    if not run.epochs:
        raise UserError(f'{run.path} has no complete epoch in summary.csv, so there is nothing to draw.')
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
    loss.set_title(_printable(run.path.name), parse_math=False)  # a dollar sign in a name does not start a formula
    loss.set(ylabel='loss')
    loss.legend()
    top1.set(ylabel='top-1 (%)')
    lr.set(ylabel='learning rate', xlabel='epoch')
    lr.xaxis.get_major_locator().set_params(integer=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')


def _is_default(name: str, value: Any) -> bool:
    """Whether an argument that the recipe does not set has the value that it gets when left out."""
    if name in DEFAULTS:
        return _same(value, DEFAULTS[name])
    return value in _EMPTY or _same(value, _EQUIVALENT.get(name))


def _is_without_effect(name: str, run: TrainingRun) -> bool:
    """Whether train.py ignores an argument, given the others."""
    args = run.args
    if name in _OWNERS:
        return not args.get(_OWNERS[name])
    if name in _SCHEDULES:
        return args.get('sched') not in _SCHEDULES[name]
    if name in ('lr_cycle_mul', 'lr_cycle_decay'):
        return (run.count('lr_cycle_limit') or 1) <= 1
    if name in ('lr_base', 'lr_base_size', 'lr_base_scale'):
        return bool(args.get('lr'))
    return name == 'momentum' and args.get('opt') == 'adamw'


def _describe_other_start(run: TrainingRun) -> list[str]:
    """Resuming is not a deviation, unless it starts from another run."""
    value = run.args['resume']
    if value in _EMPTY or value == 'auto':
        return []
    folder = Path(str(value)).parent.name
    own = folder and folder in (run.path.resolve().name, run.args.get('experiment'))
    return [] if own else [f'resume {_shown(value)}, which is not of this run']


def _layout(run: TrainingRun, world_size: int | None) -> Layout | None:
    world_size, batch_size = run.world_size or world_size, run.count('batch_size')
    if not (world_size and batch_size):
        return None
    return Layout(world_size, batch_size, run.count('grad_accum_steps') or 1)


def _is_flat(run: TrainingRun) -> bool:
    tail = _epochs_to_compare(run)
    losses = [_number(e.train_loss) for e in tail]
    top1 = [e.top1 for e in tail if is_finite(e.top1)]
    if not losses or max(losses) - min(losses) > _FLAT_LOSS * abs(max(losses)):
        return False
    return not top1 or max(top1) - min(top1) <= _FLAT_TOP1


def _epochs_to_compare(run: TrainingRun) -> tuple[Epoch, ...]:
    """The last epochs in which a loss is meant to change, () if there are too few after the warm-up.

    The cool-down runs at a constant, tiny learning rate: there it is meant to be flat.
    """
    end = run.count('epochs') or math.inf
    tail = tuple(e for e in run.epochs if e.epoch < end and is_finite(e.train_loss))[-_FLAT_EPOCHS:]
    long_enough = len(tail) == _FLAT_EPOCHS and tail[0].epoch >= (run.count('warmup_epochs') or 0)
    return tail if long_enough else ()


def _describe_deviations(run: TrainingRun, recipe: str, world_size: int | None) -> str:
    if not run.args:
        return 'unknown without args.yaml'
    found = deviations(run, recipe, world_size)
    if found:
        return '; '.join(found)
    known = _layout(run, world_size) is not None
    return f'as in {recipe}.yaml' + ('' if known else ', as far as can be told without the global batch size')


def _describe_batch(run: TrainingRun, recipe: str, world_size: int | None) -> str:
    layout = _layout(run, world_size)
    if layout is not None:
        wanted = RECIPES[recipe]
        return f'{layout}, {"as in the recipe" if layout.global_batch_size == wanted else f"instead of {wanted}"}'
    if not run.count('batch_size'):
        return 'unknown without a batch size in args.yaml' if run.args else 'unknown without args.yaml'
    known = Layout(1, run.count('batch_size') or 1, run.count('grad_accum_steps') or 1)
    return f'{known.per_process} x a world size that no checkpoint records yet: give --gpus'


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
    if found := symptoms(run):
        return '; '.join(found)
    if not any(is_finite(e.train_loss) for e in run.epochs):
        return 'unknown, no loss is recorded'
    return 'ok: losses are finite' + (' and still changing' if _epochs_to_compare(run) else '')


def _describe_checkpoint(run: TrainingRun) -> str:
    from gmnet_timm.source import read_source  # here, because it imports torch

    best = run.best_checkpoint
    if best is None:
        return 'no readable checkpoint with a result'
    ema = ', EMA weights' if best.ema else ''
    what = f'{best.path} (epoch {best.epoch}, {run.eval_metric} {best.metric:.2f}{ema})'
    try:
        return f'{what}, {read_source(best.path).description}'
    except UserError as e:
        return f'not {what}: {e}'


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(value, float) and isinstance(wanted, (int, float)):
        return math.isclose(value, wanted, rel_tol=1e-5)
    return value == wanted


def _is_broken(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _shown(value: Any) -> str:
    """A value for a message, which somebody else may have made long."""
    text = str(value)
    return text if len(text) <= 100 else f'{text[:99]}…'


def _printable(text: str) -> str:
    """Text without characters that could forge a line or control a terminal."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in text)
