"""The model card of a published repository: only what is known, and where it is known from."""
import html
import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gmnet_timm.errors import printable
from gmnet_timm.hub.publication import Metric, Publication
from gmnet_timm.hub.usage import usage
from gmnet_timm.info import BIBTEX, PAPER, count_cost
from gmnet_timm.weights.description import ModelDescription

__all__ = ['model_card']

TAGS = ['image-classification', 'timm', 'transformers', 'gmnet']

_MARKUP = re.compile(r'[\\`*\[\]|]')  # < and > become entities
_MAX_TEXT = 500  # characters of a name or value

_METRIC_TITLES = {'top1': 'Top-1 accuracy (%)', 'top5': 'Top-5 accuracy (%)'}

# Arguments of timm's train.py that make a recipe, as far as a run has set them. Paths and names stay private.
_RECIPE = (
    'epochs', 'batch_size', 'grad_accum_steps', 'world_size', 'opt', 'lr', 'lr_base', 'lr_base_size', 'weight_decay',
    'momentum', 'clip_grad', 'sched', 'min_lr', 'warmup_lr', 'warmup_epochs', 'cooldown_epochs', 'model_ema',
    'model_ema_decay', 'aa', 'mixup', 'cutmix', 'mixup_switch_prob', 'smoothing', 'reprob', 'remode', 'color_jitter',
    'drop', 'drop_path', 'train_interpolation', 'amp', 'amp_dtype', 'seed',
)

# Arguments that have a default but no effect unless one of the others is set.
_EFFECTIVE_WITH = {
    'amp_dtype': ('amp',),
    'remode': ('reprob',),
    'model_ema_decay': ('model_ema',),
    'mixup_switch_prob': ('mixup', 'cutmix'),
}


def model_card(
        publication: Publication,
        model: Any,
        name: str,
        model_id: str,
        license: str | None = None,
        train_datasets: Sequence[str] = (),
        onnx: bool = False,
) -> ModelCard:
    """Write the model card.

    Args:
        publication: What is published.
        model: The model with its weights.
        name: Title of the model.
        model_id: What the usage examples load, `hf-hub:owner/name` or `local-dir:folder`.
        license: Licence of the weights, an identifier of the Hub; None where nobody stated one.
        train_datasets: Identifiers on the Hub of the training data; the accuracies are labelled with the first.
        onnx: Show how to run the ONNX file.
    """
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        tags=list(TAGS),
        datasets=list(train_datasets) or None,
        metrics=['accuracy'] if publication.metrics else None,
        model_name=name if publication.metrics else None,  # alone it would name an empty model-index
        eval_results=[_eval_result(metric, publication, train_datasets) for metric in publication.metrics] or None,
    )
    sections = [
        f'# {_text(name)}\n\n{_description(publication)}',
        f'## Model\n\n{_facts(publication, model)}',
        f'## Use\n\n{usage(publication.source, model, model_id, onnx)}',
        f'## Evaluation\n\n{_evaluation(publication, train_datasets)}',
        f'## Comparison\n\n{_comparison(publication)}',
        f'## Training\n\n{_training(publication, train_datasets)}',
        f'## Limits\n\n{_limits(publication, license is not None)}',
        f'## Citation\n\n```bibtex\n{BIBTEX}\n```',
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n')


def _description(publication: Publication) -> str:
    description = publication.source.description
    what = f'`{description.size}`' if _is_published(description) else 'A model of the GmNet family'
    return (
        f'{what} for image classification with {description.full_args["num_classes"]} classes. GmNet is a '
        'convolutional network whose blocks gate features with themselves '
        '([paper](https://arxiv.org/abs/2503.22841)). This is the implementation of gmnet-timm, a plugin for timm.'
    )


def _facts(publication: Publication, model: Any) -> str:
    source, config = publication.source, publication.source.data_config
    macs, activations = count_cost(model, config['input_size'])
    args = source.description.full_args
    params = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        'Type': 'image classification, backbone for other tasks',
        'Parameters (M)': f'{params / 1e6:.4g}',
        'GMACs': f'{macs / 1e9:.3g} (convolutions and linear layers, one image)',
        'Activations (M)': f'{activations / 1e6:.3g} (outputs of the same layers)',
        'Image size': f'train = {_train_size(publication.recipe)}, test = {_size(config["input_size"])}',
        'Channels': str(config['input_size'][0]),
        'Preprocessing': (
            f'{config["interpolation"]} resize, {config["crop_mode"]} crop of {config["crop_pct"]}, '
            f'mean {_numbers(config["mean"])}, std {_numbers(config["std"])}'
        ),
        'Configuration': _certainty(source.description),
        'Activation, pooling, output stride': f'{args["act_layer"]}, {args["global_pool"]}, {args["output_stride"]}',
    }
    if source.checkpoint.has_ema:
        rows['Weights'] = 'EMA of training' if source.checkpoint.ema else 'of the last step, not their EMA'
    return _table(('', ''), rows)


def _is_published(description: ModelDescription) -> bool:
    """Whether it is a size of the paper as it is there, whatever its classes and channels."""
    return not description.distinct_args.keys() - {'in_chans'}


def _certainty(description: ModelDescription) -> str:
    size = description.size
    if not _is_published(description):
        values = ', '.join(f'{key} {value}' for key, value in description.distinct_args.items() if key != 'in_chans')
        return f'not a model of the paper; {size} with {values}'
    if PAPER[size].configuration == 'released':
        return f'{size} as released by the authors'
    return f"{size}, reconstructed from the paper's parameters and FLOPs: the authors released no code for this size"


def _train_size(recipe: dict[str, Any]) -> str:
    size = recipe.get('input_size') or [recipe.get('img_size') or 0] * 2
    return _size(size) if isinstance(size, (list, tuple)) and any(size) else 'not recorded'


def _size(shape: Sequence[int]) -> str:
    return _text(' x '.join(map(str, shape[-2:])))


def _evaluation(publication: Publication, train_datasets: Sequence[str]) -> str:
    if not publication.metrics:
        return 'No accuracy of these weights is recorded.'
    dataset = _dataset(publication.recipe, train_datasets)
    rows = {_METRIC_TITLES[metric.name]: f'{metric.value:g} | {_text(metric.source)}' for metric in publication.metrics}
    return f'On {_text(dataset["dataset_name"])}:\n\n' + _table(('', 'value | from'), rows)


def _comparison(publication: Publication) -> str:
    size = publication.source.description.size
    rows = {}
    for name, paper in PAPER.items():
        name = f'**{name}**' if name == size else name
        rows[name] = f'{paper.params_m} | {paper.gflops} | {paper.top1} | {paper.configuration}'
    measured = ''.join(
        f' These weights: {metric.value:g} %, by {_text(metric.source)}.' for metric in publication.metrics
        if metric.name == 'top1' and publication.source.description.full_args['num_classes'] == 1000)
    header = ('model', 'parameters (M) | GMACs | ImageNet-1k top-1 (%) | configuration')
    return (
        'The family, with the numbers of [the paper](https://arxiv.org/abs/2503.22841) for images of 224 x 224 pixels. '
        f'They are not those of the weights here.{measured}\n\n{_table(header, rows)}\n\n'
        "released: the configuration of the authors' code. reconstructed: found from the paper's parameters and FLOPs.")


def _training(publication: Publication, train_datasets: Sequence[str]) -> str:
    trained_on = 'The training data are not stated.'
    if train_datasets:
        trained_on = f'Trained on {", ".join(map(_text, train_datasets))}.'
    recipe = {key: _text(publication.recipe[key]) for key in _RECIPE if _is_effective(key, publication.recipe)}
    if not recipe:
        return f'{trained_on} The recipe is not recorded with the weights.'
    return f"{trained_on} With timm's train.py and these arguments:\n\n" + _table(('argument', 'value'), recipe)


def _is_effective(key: str, recipe: dict[str, Any]) -> bool:
    value = recipe.get(key)
    if value is None or value is False or value in ('', []):  # but 0 may differ from a default
        return False
    if key in ('lr_base', 'lr_base_size'):
        return not recipe.get('lr')  # which makes train.py ignore them
    return key not in _EFFECTIVE_WITH or any(recipe.get(other) for other in _EFFECTIVE_WITH[key])


def _limits(publication: Publication, stated_license: bool) -> str:
    limits = [] if stated_license else [
        'Nobody stated a licence of these weights. Ask their publisher before you use them.']
    limits += [
        'Nothing here says how the model does on images unlike those it was evaluated on.',
        'It can be no fairer than its training data, and has not been examined for bias by gmnet-timm.',
        'Any height and width of at least 32 pixels work, but accuracies hold for the input size above.',
        *map(_text, publication.notes),
    ]
    if publication.source.description.full_args['in_chans'] != 3:
        limits.append('transformers gives models three channels, so its pipeline does not take this one: use timm.')
    return '\n'.join(f'- {limit}' for limit in limits)


def _eval_result(metric: Metric, publication: Publication, train_datasets: Sequence[str]) -> EvalResult:
    return EvalResult(
        task_type='image-classification',
        task_name='Image classification',
        metric_type='accuracy',
        metric_name=_METRIC_TITLES[metric.name],
        metric_value=metric.value,
        metric_args={'source': metric.source},
        **_dataset(publication.recipe, train_datasets),
    )


def _dataset(recipe: dict[str, Any], train_datasets: Sequence[str]) -> dict[str, Any]:
    """What was evaluated on: as stated, else as train.py was told, else unknown."""
    kind, _, name = str(recipe.get('dataset') or '').rpartition('/')
    split = recipe.get('val_split')
    if train_datasets:
        return dict(dataset_type=train_datasets[0], dataset_name=train_datasets[0], dataset_split=split)
    if kind in ('hfds', 'hfids') or '/' in kind:
        name = str(recipe['dataset']).split('/', 1)[1]
    if name:
        return dict(dataset_type=name, dataset_name=name, dataset_split=split)
    if recipe.get('data_dir') or recipe.get('data'):
        return dict(dataset_type='imagefolder', dataset_name='a folder of images', dataset_split=split)
    return dict(dataset_type='unknown', dataset_name='an unnamed dataset', dataset_split=split)


def _table(header: Sequence[str], rows: dict[str, str]) -> str:
    columns = ' | '.join(header).count('|') + 1
    lines: list[str] = [f'| {" | ".join(header)} |', '|---' * columns + '|']
    return '\n'.join(lines + [f'| {key} | {value} |' for key, value in rows.items()])


def _text(value: Any) -> str:
    """Text from elsewhere as one line of Markdown that shows it and nothing else, whatever is in it."""
    line = printable(' '.join(str(value).split()))
    return _MARKUP.sub(r'\\\g<0>', html.escape(line[:_MAX_TEXT], quote=False))


def _numbers(values: Sequence[float]) -> str:
    return ', '.join(f'{value:g}' for value in values)
