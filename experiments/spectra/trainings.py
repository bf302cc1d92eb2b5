"""GmNets with a gate and with plain activations, trained and measured."""
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.layers import get_act_layer
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn

from experiments.comparisons import Difference, mean_interval, paired_difference
from gmnet_timm.demo import PATCH_SIZE, PHOTOS, create_schedule, prepare_photo_patches, train_epoch
from gmnet_timm.frequency.gaussian import predict_pointwise
from gmnet_timm.frequency.signals import LayerSpectrum
from gmnet_timm.frequency.spectra import layer_spectra
from gmnet_timm.frequency.split import high_frequency_energy

__all__ = ['VARIANTS', 'ActivationOver', 'report', 'train_and_measure']

SMALLEST_MAP = 4  # pixels: below it `high` has no more than one frequency


class ActivationOver(nn.Module):
    """f(x) / x, so that GmNet's product with x is f(x), with its gradient too."""

    def __init__(self, activation: str):
        super().__init__()
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.activation == 'relu':
            return (x > 0).to(x.dtype)
        return .5 * (1 + torch.erf(x / math.sqrt(2)))  # GELU(x) = x Φ(x)


# label -> act_layer of GmNet
VARIANTS: dict[str, Any] = {
    'ReLU6(x)·x': 'relu6',
    'ReLU(x)': lambda: ActivationOver('relu'),
    'GELU(x)': lambda: ActivationOver('gelu'),
}


def train_and_measure(variant: str, seed: int, data: Path, patches: int, epochs: int) -> list[dict[str, Any]]:
    """Train GmNet-S1 with the demo's settings but for its batch of 16, and measure its gates.

    Args:
        variant: A key of `VARIANTS`.
        seed: Of the initialisation, the order of images and their crops. The images themselves are the same.
        data: Folder for the demo's patches.
        patches: Training patches per photograph.
        epochs: Number of epochs.

    Returns:
        One row per gate on maps of 4×4 and more: `high` before and after the product, the logarithm of their ratio, and
        `high` in theory, with the network's top-1 in percent.
    """
    images = prepare_photo_patches(data, patches=patches)
    loaders = [create_loader(
        create_dataset('', str(images.root), split=split), input_size=(3, PATCH_SIZE, PATCH_SIZE), batch_size=16,
        is_training=split == 'train', scale=(.9, 1.), color_jitter=None, interpolation='bilinear',  # type: ignore
        mean=(images.mean,) * 3, std=(images.std,) * 3, crop_pct=1., num_workers=0, persistent_workers=False,
        device=torch.device('cpu')) for split in ('train', 'validation')]
    random_seed(seed)
    model = timm.create_model('gmnet_s1', num_classes=len(PHOTOS), act_layer=VARIANTS[variant])
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3, weight_decay=.05)
    scheduler = create_schedule(optimizer, epochs, 1, len(loaders[0]))
    for epoch in range(epochs):
        train_epoch(model, loaders[0], nn.CrossEntropyLoss(), optimizer, scheduler, epoch)
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([(model(x).argmax(-1) == y).float() for x, y in loaders[1]])
    layers = layer_spectra(model, loaders[1], channels=16)
    return [
        dict(variant=variant, seed=seed, top1=100 * answers.mean().item(), layer=layer.name,
             size='x'.join(map(str, layer.after.size)), images=len(layer.after.power), before=layer.before.high,
             after=layer.after.high, log_ratio=math.log(layer.after.high / layer.before.high),
             theory=gaussian_high(layer, variant))
        for layer in layers
        if layer.before is not None and layer.after is not None and min(layer.after.size) >= SMALLEST_MAP]


def gaussian_high(layer: LayerSpectrum, variant: str) -> float:
    """`high` after the function of a variant, for Gaussian maps with the measured mean and spectrum of each channel.

    `LayerSpectrum.predicted_high` takes the operands of a product as independent where it does not know the function.
    """
    statistics = layer.statistics
    assert statistics is not None and layer.after is not None
    act = VARIANTS[variant]() if callable(VARIANTS[variant]) else get_act_layer(VARIANTS[variant])()
    width = layer.after.size[1]
    power = predict_pointwise(lambda x: act(x) * x, statistics.value_mean, statistics.value_power, width)
    return high_frequency_energy(power, width).item()


def report(rows: Iterable[Mapping[str, Any]]) -> str:
    """What the plan asks for, as lines: each training, ratios by variant, and the differences that decide."""
    ratios: dict[str, dict[int, float]] = {}
    misses: dict[str, list[float]] = {}
    trainings: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in rows:
        trainings.setdefault((row['variant'], int(row['seed'])), []).append(row)
    heads = ('function', 'seed', 'top-1, %', 'raised, of', 'high after / before', 'miss of theory')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for (variant, seed), gates in trainings.items():
        mean = statistics.fmean(float(row['log_ratio']) for row in gates)
        miss = statistics.fmean(abs(math.log(float(row['theory']) / float(row['after']))) for row in gates)
        ratios.setdefault(variant, {})[seed] = mean
        misses.setdefault(variant, []).append(miss)
        raised = sum(float(row['log_ratio']) > 0 for row in gates)
        lines.append(f'| {variant} | {seed} | {float(gates[0]["top1"]):.1f} | {raised} of {len(gates)} | '
                     f'{math.exp(mean):.3f} | {100 * miss:.1f} % |')
    lines += ['', '| what | ratio | 95 % interval over trainings |', '|---|---|---|']
    for variant, by_seed in ratios.items():
        lines.append(_ratio_line(f'{variant}: high after / before', mean_interval(list(by_seed.values()))))
    gate, *activations = ratios
    for other in activations:
        seeds = sorted(ratios[gate].keys() & ratios[other].keys())
        found: Difference = paired_difference(
            [ratios[gate][seed] for seed in seeds], [ratios[other][seed] for seed in seeds])
        lines.append(_ratio_line(f'{gate} over {other}', (found.mean, found.low, found.high)))
    for variant, values in misses.items():
        mean, low, high = mean_interval(values)
        lines.append(f'| {variant}: mean miss of theory | {100 * mean:.1f} % | {100 * low:.1f} to {100 * high:.1f} % |')
    return '\n'.join(lines)


def _ratio_line(what: str, values: tuple[float, float, float]) -> str:
    mean, low, high = map(math.exp, values)
    return f'| {what} | {mean:.3f} | {low:.3f} to {high:.3f} |'
