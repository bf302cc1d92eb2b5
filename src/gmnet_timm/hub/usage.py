"""The part of the model card that says how to use the model. Its examples are run by the tests as they are printed."""
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from gmnet_timm.hub.onnx import IMAGES, LOGITS, ONNX_NAME, PREPROCESSOR_NAME, prepare
from gmnet_timm.weights.model import Source

__all__ = ['usage']

_CLASSIFY = '''with torch.no_grad():
    probabilities = model(images).{function}[0]
names = model.pretrained_cfg.get('label_names') or range(model.num_classes)
for i in probabilities.argsort(descending=True)[:5].tolist():
    print(f'{{100 * probabilities[i]:.2f}} %  {{names[i]}}')'''

_MAPS = '''with torch.no_grad():
    for features in model(images):
        print(tuple(features.shape))'''

_EMBED = '''with torch.no_grad():
    print(tuple(model(images).shape))'''

_TRANSFORMERS = '''### transformers

After `pip install gmnet-timm transformers`:

```python
from transformers import pipeline

classify = pipeline('image-classification', model={name!r})
print(classify('photo.jpg'))
```'''

_ONNX_RUNTIME = '''### ONNX Runtime

`{file}` is the same network with its norms fused. It takes batches of any size, and needs neither timm nor torch:
`pip install onnxruntime huggingface_hub pillow`.

```python
import json
from pathlib import Path

import numpy as np
import onnxruntime
{imports}from PIL import Image, ImageOps


{prepare}

folder = Path({folder})
config = json.loads((folder / '{preprocessor}').read_text())
names = json.loads((folder / 'config.json').read_text()).get('label_names')
session = onnxruntime.InferenceSession(folder / '{file}')
photo = ImageOps.exif_transpose(Image.open('photo.jpg'))  # upright
pixels = prepare(photo.convert('RGB'), config)
logits = session.run(['{logits}'], {{'{images}': pixels}})[0][0]
{probabilities}
for i in probabilities.argsort()[::-1][:5]:
    print(f'{{100 * probabilities[i]:.2f}} %  {{names[i] if names else i}}')
```'''

_SOFTMAX = 'probabilities = np.exp(logits - logits.max())\nprobabilities /= probabilities.sum()'
_SIGMOID = 'probabilities = 1 / (1 + np.exp(-logits))'

_BROWSER = '''### In a browser

A module script with transformers.js (in Node: `npm install @huggingface/transformers`, imported by that name):

```js
import {{ AutoImageProcessor, AutoModel, load_image, softmax }}
    from 'https://cdn.jsdelivr.net/npm/@huggingface/transformers@4';

const processor = await AutoImageProcessor.from_pretrained({name!r});
const model = await AutoModel.from_pretrained({name!r}, {{ dtype: 'fp32' }});
const {{ {logits} }} = await model(await processor(await load_image('photo.jpg')));
const names = model.config.label_names;
const ranked = softmax(logits.tolist()[0]).map((p, i) => [p, names ? names[i] : i]).sort((a, b) => b[0] - a[0]);
console.log(ranked.slice(0, 5));
```

transformers.js warns that it does not know the class of the model, and runs the file. It resizes images by other rules
than timm, so its probabilities differ a little.'''


def usage(source: Source, model: Any, model_id: str, onnx: bool) -> str:
    """Markdown with an example per kind of use.

    Args:
        source: The model.
        model: The same with its weights.
        model_id: What the examples load, `hf-hub:owner/name` or `local-dir:folder`.
        onnx: Whether there is an ONNX file.
    """
    scheme, _, name = model_id.partition(':')
    input_size = source.data_config['input_size']
    sections = [_install(source.description.size, input_size), *_with_timm(source, model, model_id)]
    if input_size[0] == 3:
        sections.append(_TRANSFORMERS.format(name=name))
    if onnx:
        local = scheme == 'local-dir'
        sections.append(_ONNX_RUNTIME.format(
            file=ONNX_NAME, preprocessor=PREPROCESSOR_NAME, images=IMAGES, logits=LOGITS,
            prepare=inspect.getsource(prepare),
            probabilities=_SIGMOID if model.num_classes == 1 else _SOFTMAX,
            imports='' if local else 'from huggingface_hub import snapshot_download\n',
            folder=repr(name) if local else f"snapshot_download({name!r}, allow_patterns=['*.json', 'onnx/*'])",
        ))
        sections.append(_BROWSER.format(name=name, logits=LOGITS))
    return '\n\n'.join(sections)


def _install(size: str, input_size: Sequence[int]) -> str:
    photo = ' `photo.jpg` stands for an image of yours.' if input_size[0] in (1, 3) else ''
    return (
        '```\npip install gmnet-timm\n```\n\nInstalling it is enough: nothing of it has to be imported. Without it, '
        f'timm says `RuntimeError: Unknown model ({size})`.{photo}')


def _with_timm(source: Source, model: Any, model_id: str) -> list[str]:
    input_size = source.data_config['input_size']
    with torch.no_grad():
        maps = model.forward_intermediates(torch.zeros(1, *input_size), intermediates_only=True)
    classify = _CLASSIFY.format(function='sigmoid()' if model.num_classes == 1 else 'softmax(-1)')
    shapes = ''.join(f'\n# {tuple(features.shape)}' for features in maps)
    return [
        _timm_example('Image classification', model_id, '', input_size, classify),
        _timm_example('Feature maps', model_id, ', features_only=True', input_size, _MAPS + shapes),
        _timm_example(
            'Image embeddings', model_id, ', num_classes=0', input_size, f'{_EMBED}\n# {(1, model.head_hidden_size)}'),
    ]


def _timm_example(title: str, model_id: str, args: str, input_size: Sequence[int], code: str) -> str:
    mode = {1: 'L', 3: 'RGB'}.get(input_size[0])
    imports = 'import timm\nimport torch\n' + ('from PIL import Image, ImageOps\n' if mode else '')
    images = f'images = torch.randn(1, {", ".join(map(str, input_size))})  # in place of yours, normalised'
    if mode:
        images = (
            'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)\n'
            "photo = ImageOps.exif_transpose(Image.open('photo.jpg'))  # upright\n"
            f"images = transform(photo.convert('{mode}')).unsqueeze(0)")
    create = f'model = timm.create_model({model_id!r}, pretrained=True{args}).eval()'
    return f'### {title}\n\n```python\n{imports}\n{create}\n{images}\n{code}\n```'
