"""Whether a training run is as in its recipe, how far it is and whether it looks healthy: `gmnet-timm check-run`."""
import math
import shlex
from pathlib import Path
from typing import Any

from gmnet_timm.errors import UserError, listed, printable, shown
from gmnet_timm.training.recipe import RECIPES, Layout, load_recipe
from gmnet_timm.weights.runs import ARGS_NAME, Epoch, TrainingRun, is_finite

__all__ = ['deviations', 'format_run', 'symptoms']

# Of what recipes set: which model, how fast it is trained and what is kept. Accumulation counts through the global
# batch size, which is compared.
_FREE = {
    'model', 'grad_accum_steps', 'workers', 'pin_mem', 'channels_last', 'torchcompile', 'grad_checkpointing',
    'eval_metric', 'checkpoint_hist', 'log_interval',
}
# What finetune.yaml leaves to the user: the classes, the weights to start from with their network and images, and what
# follows from data and memory
_OWN = {'finetune': {
    'num_classes', 'pretrained_path', 'gp', 'model_kwargs', 'class_map', 'interpolation', 'crop_pct', 'mean', 'std',
    'img_size', 'epochs', 'warmup_epochs'}}
# What changes the network or its data, and is set by no recipe
_NETWORK = ('gp', 'in_chans', 'input_size', 'model_kwargs', 'bn_eps', 'split_bn', 'head_init_scale', 'head_init_bias',
            'drop_block', 'train_split', 'val_split', 'class_map', 'opt_kwargs')
# Values that mean what leaving the argument out means
_SAME_AS_UNSET: dict[str, Any] = {
    'opt_eps': 1e-8, 'opt_betas': [.9, .999], 'drop_path': 0., 'in_chans': 3, 'train_split': 'train',
    'val_split': 'validation', 'bn_momentum': .1, 'bn_eps': 1e-5, 'gp': 'avg', 'num_classes': 1000}
# Arguments that train.py only uses where one of these others is set
_USED_WITH = {
    'amp_dtype': ('amp',), 'pretrained_path': ('pretrained',), 'remode': ('reprob',), 'recount': ('reprob',),
    'mixup_prob': ('mixup', 'cutmix'), 'mixup_mode': ('mixup', 'cutmix'), 'mixup_off_epoch': ('mixup', 'cutmix'),
    'mixup_switch_prob': ('mixup', 'cutmix'), 'color_jitter_prob': ('color_jitter',)}
_PREPROCESSING = ('interpolation', 'crop_pct', 'mean', 'std')
_LEARNING_RATES = {'lr', 'warmup_lr', 'min_lr'}
_EMPTY: tuple[Any, ...] = (None, False, 0, '', [], {})

_FLAT_EPOCHS = 5  # this many epochs without movement
_FLAT_LOSS = 1e-3  # relative to the loss
_FLAT_TOP1 = .05  # points: 25 of ImageNet's 50,000 validation images


def deviations(run: TrainingRun, recipe: str = 'imagenet', world_size: int | None = None) -> list[str]:
    """What of a recipe, or of the network, a run has otherwise. What has the same effect counts as the same.

    Learning rates that were scaled with the global batch size are no difference; the global batch size itself is one.

    Args:
        run: From `read_run`.
        recipe: Name of the recipe.
        world_size: Number of processes, one per GPU, if no checkpoint records it.

    Returns:
        One entry per argument, first those of the recipe in its order.
    """
    wanted = {**dict.fromkeys(_NETWORK), **load_recipe(recipe)}
    args, layout = _effective(run.args), _layout(run, world_size)
    wanted_values = _effective({**wanted, 'model': run.args.get('model')})
    scale = layout.global_batch_size / RECIPES[recipe] if layout else 1
    free = _FREE | _OWN.get(recipe, set()) | ({'batch_size'} if layout else set())
    found = []
    for name in dict.fromkeys((*load_recipe(recipe), *_NETWORK)):
        if name in free or name not in run.args or _is_idle(name, args) and _is_idle(name, wanted_values):
            continue
        value, other = args.get(name), wanted_values.get(name)
        scaled = name in _LEARNING_RATES and _same(value, wanted[name] * scale)
        if not (scaled or _same(value, other)):
            found.append(f'{name} {shown(run.args[name])} instead of {wanted[name]}')
    missing = [name for name in load_recipe(recipe) if name not in run.args and name not in free
               and wanted[name] not in _EMPTY and not _is_idle(name, args)]
    if missing:
        found.append(f'not recorded: {listed(missing)}')
    if layout and recipe not in _OWN and layout.global_batch_size != RECIPES[recipe]:
        found.append(f'global batch size {layout.global_batch_size} instead of {RECIPES[recipe]}')
    return found + _describe_other_start(run)


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
        ('run', f'{run.path} ({shown(run.args.get("model", "model unknown"))})'),
        *(('recipe', text) for text in _describe_deviations(run, recipe, world_size)),
        ('global batch size', _describe_batch(run, recipe, world_size)),
        ('epochs', _describe_epochs(run)),
        ('top-1', _describe_top1(run)),
        ('health', _describe_health(run)),
        *_describe_checkpoint(run),
        *(('note', note) for note in run.notes),
    ]
    return '\n'.join(f'{name + ":":<19}{printable(text)}' for name, text in rows)


def _effective(args: dict[str, Any]) -> dict[str, Any]:
    """Arguments with the values that train.py ends up with where one is not set, as far as recipes depend on them."""
    unset = {name: value for name, value in _SAME_AS_UNSET.items() if args.get(name) in (None, '')}
    found = {**args, **unset}
    if any(not found.get(name) for name in _PREPROCESSING):
        from timm.models import get_pretrained_cfg, is_model  # here, because it imports torch
        name = str(args.get('model')).partition('.')[0]
        cfg = get_pretrained_cfg(name) if is_model(name) else None
        known = {} if cfg is None else {name: getattr(cfg, name) for name in _PREPROCESSING}
        found.update({name: value for name, value in known.items() if not found.get(name)})
    return found


def _is_idle(name: str, args: dict[str, Any]) -> bool:
    """Whether train.py does not use an argument, given the others."""
    return name in _USED_WITH and not any(args.get(other) for other in _USED_WITH[name])


def _describe_other_start(run: TrainingRun) -> list[str]:
    """Resuming is not a deviation, unless it starts from another run."""
    value = run.args.get('resume')
    if value in _EMPTY or value == 'auto':
        return []
    folder = Path(str(value)).parent.name
    own = folder and folder in (run.path.resolve().name, run.args.get('experiment'))
    return [] if own else [f'resume {shown(value)}, which is not of this run']


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


def _describe_deviations(run: TrainingRun, recipe: str, world_size: int | None) -> list[str]:
    if not run.args:
        return ['unknown without args.yaml']
    found = deviations(run, recipe, world_size)
    if found:
        return [f'{len(found)} difference{"s" if len(found) > 1 else ""} from {recipe}.yaml', *found]
    known = _layout(run, world_size) is not None
    return [f'as in {recipe}.yaml' + ('' if known else ', as far as can be told without the global batch size')]


def _describe_batch(run: TrainingRun, recipe: str, world_size: int | None) -> str:
    layout = _layout(run, world_size)
    if layout is not None:
        wanted = RECIPES[recipe]
        if recipe in _OWN:  # follows from data and memory
            return str(layout)
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


def _describe_checkpoint(run: TrainingRun) -> list[tuple[str, str]]:
    """What to publish, and the command that validates it."""
    from gmnet_timm.weights.model import read_source  # here, because it imports torch

    best = run.best_checkpoint
    if best is None:
        return [('publish', 'no readable checkpoint with a result')]
    ema = ', EMA weights' if best.ema else ''
    what = f'{best.path} (epoch {best.epoch}, {run.eval_metric} {best.metric:.2f}{ema})'
    if not run.args and (run.path / ARGS_NAME).exists():  # reading it again would fail again, and hostile YAML is slow
        return [('publish', f'not {what}: {ARGS_NAME} cannot be read, see the note')]
    try:
        source = read_source(best.path)
    except UserError as e:
        return [('publish', f'not {what}: {e}')]
    return [('publish', what), ('model', str(source.description)), ('validate', _validate_command(run, best, source))]


def _validate_command(run: TrainingRun, best: Any, source: Any) -> str:
    """The call of timm's validate.py with the network, the classes and the images of the run."""
    description, config = source.description, source.data_config
    words: list[Any] = ['--model', description.name, '--num-classes', description.full_args.get('num_classes', 1000)]
    args = dict(description.distinct_args)
    if config['input_size'][0] != 3:
        words += ['--in-chans', args.pop('in_chans', config['input_size'][0])]
    if args.get('global_pool'):
        words += ['--gp', args.pop('global_pool')]
    words += ['--img-size', config['input_size'][-1], '--crop-pct', config['crop_pct'], '--interpolation',
              config['interpolation'], '--mean', *config['mean'], '--std', *config['std']]
    words += ['--use-ema'] if best.ema else []
    words += ['--class-map', run.args['class_map']] if run.args.get('class_map') else []
    words += ['--checkpoint', best.path]
    words += ['--model-kwargs', *(f'{key}={value}' for key, value in args.items())] if args else []
    data = run.args.get('data_dir') or run.args.get('data')
    where = shlex.quote(str(data)) if data else '"$DATA_DIR"'
    return f'python "$TIMM_SCRIPTS/validate.py" --data-dir {where} {shlex.join(map(str, words))}'


def _same(value: Any, wanted: Any) -> bool:
    if all(x is None or x is False or x in ('', [], {}) for x in (value, wanted)):  # a flag that is not set is False
        return True
    if isinstance(value, (list, tuple)) and isinstance(wanted, list):
        return len(value) == len(wanted) and all(map(_same, value, wanted))
    if isinstance(value, float) and isinstance(wanted, (int, float)):
        return math.isclose(value, wanted, rel_tol=1e-5)
    return value == wanted


def _is_broken(value: float | None) -> bool:
    return value is not None and not math.isfinite(value)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
