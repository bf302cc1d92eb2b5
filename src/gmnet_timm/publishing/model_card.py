"""The model card of a published repository: only what is known, and where it is known from."""
from typing import Any, Dict, List, Sequence

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from gmnet_timm.info import PAPER, count_macs
from gmnet_timm.publishing.source import Metric, Source

__all__ = ['model_card']

TAGS = ['image-classification', 'timm', 'transformers', 'gmnet']

_CITATION = '''@inproceedings{gmnet2026,
  title = {GmNet: Revisiting Gating Mechanisms From A Frequency View},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year = {2026},
  note = {arXiv:2503.22841}
}'''

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
        source: Source,
        name: str,
        model_id: str,
        license: str = 'apache-2.0',
        datasets: Sequence[str] = (),
) -> ModelCard:
    """Write the model card.

    Args:
        source: What is published.
        name: Title of the model.
        model_id: What the usage examples load, `hf-hub:owner/name` or `local-dir:folder`.
        license: Licence of the weights, an identifier of the Hub.
        datasets: Identifiers on the Hub of what the model was trained on; the accuracies are labelled with the first.
    """
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=license,
        tags=list(TAGS),
        datasets=list(datasets) or None,
        metrics=['accuracy'] if source.metrics else None,
        model_name=name,
        eval_results=[_eval_result(metric, source, datasets) for metric in source.metrics] or None,
    )
    if not source.metrics:
        data.model_name = None  # it would only name an empty model-index
    sections = [
        f'# {name}\n\n{_description(source)}',
        f'## Model\n\n{_facts(source)}',
        f'## Use\n\n{_usage(model_id, source.data_config["input_size"])}',
        f'## Evaluation\n\n{_evaluation(source, datasets)}',
        f'## Training\n\n{_training(source, datasets)}',
        f'## Limits\n\n{_limits(source)}',
        f'## Citation\n\n```bibtex\n{_CITATION}\n```',
    ]
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n')


def _description(source: Source) -> str:
    size = source.architecture.model_name
    what = f'`{size}`' if size else 'A model of the GmNet family'
    return (
        f'{what} for image classification with {source.architecture.num_classes} classes. GmNet is a convolutional '
        'network whose blocks gate features with themselves ([paper](https://arxiv.org/abs/2503.22841)); this is the '
        'implementation of gmnet-timm, a plugin for timm.'
    )


def _facts(source: Source) -> str:
    model, config = source.architecture.build(device='meta'), source.data_config
    params = sum(parameter.numel() for parameter in model.parameters())
    rows = {
        'Parameters': f'{params:,}',
        'Multiply-adds': f'{count_macs(model, config["input_size"]):,} (convolutions and linear layers, one image)',
        'Input': f'{" x ".join(map(str, config["input_size"]))} (channels x height x width)',
        'Preprocessing': (
            f'{config["interpolation"]} resize, {config["crop_mode"]} crop of {config["crop_pct"]}, '
            f'mean {_numbers(config["mean"])}, std {_numbers(config["std"])}'
        ),
        'Configuration': _certainty(source),
    }
    if source.use_ema:
        rows['Weights'] = 'averaged over training (EMA)'
    return _table(('', ''), rows)


def _certainty(source: Source) -> str:
    architecture = source.architecture
    size = architecture.model_name
    if size is None:
        nearest = architecture.nearest_model_name
        return f'no size of the paper; {nearest} with {"; ".join(architecture.differences(nearest))}'
    if PAPER[size].configuration == 'released':
        return f'{size} as released by the authors'
    return f"{size}, reconstructed from the paper's parameters and FLOPs: the authors released no code for this size"


def _usage(model_id: str, input_size: Sequence[int]) -> str:
    sections = [f'''```
pip install gmnet-timm
```

Installing is enough, nothing of it has to be imported. With timm:

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{model_id}', pretrained=True).eval()
{_usage_input(input_size)}
with torch.no_grad():
    probabilities = model(images).softmax(-1)
print(probabilities.topk(min(5, model.num_classes)))
```''']
    if input_size[0] == 3:
        sections.append(f'''With transformers (`pip install transformers`):

```python
from PIL import Image
from transformers import pipeline

classify = pipeline('image-classification', model='{model_id.split(':', 1)[1]}')
print(classify(Image.new('RGB', (320, 240))))
```''')
    return '\n\n'.join(sections)


def _usage_input(input_size: Sequence[int]) -> str:
    mode = {1: 'L', 3: 'RGB'}.get(input_size[0])
    if mode is None:
        return f'images = torch.randn(1, {", ".join(map(str, input_size))})  # in place of yours, normalised'
    return f'''transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
image = Image.new('{mode}', (320, 240))  # in place of yours: Image.open('photo.jpg').convert('{mode}')
images = transform(image).unsqueeze(0)'''


def _evaluation(source: Source, datasets: Sequence[str]) -> str:
    if not source.metrics:
        return 'No accuracy of these weights is recorded.'
    dataset = _dataset(source.recipe, datasets)
    rows = {_METRIC_TITLES[metric.name]: f'{metric.value:g} | {metric.source}' for metric in source.metrics}
    return f'On {dataset["dataset_name"]}:\n\n' + _table(('', 'value | from'), rows)


def _training(source: Source, datasets: Sequence[str]) -> str:
    trained_on = f'Trained on {", ".join(datasets)}.' if datasets else 'The training data are not stated.'
    recipe = {key: f'`{source.recipe[key]}`' for key in _RECIPE if _is_effective(key, source.recipe)}
    if not recipe:
        return f'{trained_on} The recipe is not recorded with the weights.'
    return f"{trained_on} With timm's train.py and these arguments:\n\n" + _table(('argument', 'value'), recipe)


def _is_effective(key: str, recipe: Dict[str, Any]) -> bool:
    value = recipe.get(key)
    if value is None or value is False or value in ('', []):  # but 0 may differ from a default
        return False
    if key in ('lr_base', 'lr_base_size'):
        return not recipe.get('lr')  # which makes train.py ignore them
    return key not in _EFFECTIVE_WITH or any(recipe.get(other) for other in _EFFECTIVE_WITH[key])


def _limits(source: Source) -> str:
    limits = [
        'Nothing here says how the model does on images unlike those it was evaluated on.',
        'It can be no fairer than its training data, and has not been examined for bias by gmnet-timm.',
        'Any height and width of at least 32 pixels work, but accuracies hold for the input size above.',
        *source.notes,
    ]
    if source.architecture.in_chans != 3:
        limits.append('transformers gives models three channels, so its pipeline does not take this one: use timm.')
    return '\n'.join(f'- {limit}' for limit in limits)


def _eval_result(metric: Metric, source: Source, datasets: Sequence[str]) -> EvalResult:
    return EvalResult(
        task_type='image-classification',
        task_name='Image classification',
        metric_type='accuracy',
        metric_name=_METRIC_TITLES[metric.name],
        metric_value=metric.value,
        metric_args={'source': metric.source},
        **_dataset(source.recipe, datasets),
    )


def _dataset(recipe: Dict[str, Any], datasets: Sequence[str]) -> Dict[str, Any]:
    """What was evaluated on: as stated, else as train.py was told, else unknown."""
    kind, _, name = str(recipe.get('dataset') or '').rpartition('/')
    split = recipe.get('val_split')
    if datasets:
        return dict(dataset_type=datasets[0], dataset_name=datasets[0], dataset_split=split)
    if kind in ('hfds', 'hfids') or '/' in kind:
        name = str(recipe['dataset']).split('/', 1)[1]
    if name:
        return dict(dataset_type=name, dataset_name=name, dataset_split=split)
    if recipe.get('data_dir') or recipe.get('data'):
        return dict(dataset_type='imagefolder', dataset_name='a folder of images', dataset_split=split)
    return dict(dataset_type='unknown', dataset_name='an unnamed dataset', dataset_split=split)


def _table(header: Sequence[str], rows: Dict[str, str]) -> str:
    columns = ' | '.join(header).count('|') + 1
    lines: List[str] = [f'| {" | ".join(header)} |', '|---' * columns + '|']
    return '\n'.join(lines + [f'| {key} | {value} |' for key, value in rows.items()])


def _numbers(values: Sequence[float]) -> str:
    return ', '.join(f'{value:g}' for value in values)
