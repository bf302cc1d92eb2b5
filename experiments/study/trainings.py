"""The study: do gates use high frequencies better than activations do, in small ResNets and MobileNetV2s?

Mean and contrast of an image carry nothing: every image is standardised by its own, in training and in evaluation, and
again after its frequencies were filtered. Everything random is drawn anew for each seed (initialisation, training
patches, test patches) and is the same for all variants, so that variants are compared in pairs.

First the learning rate of each variant is chosen by one rule: the highest mean accuracy on unfiltered tuning images in
the last epoch, of a few seeds that are used for nothing else; of equal ones, the smallest. The same runs give the
standard deviation from which the power of the comparisons is computed before they are made.
"""
import dataclasses
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import random_seed
from torch import nn

from experiments.study.data import Batches, PhotoData, TrainingBatches, standardize
from experiments.study.models import create_study_model
from experiments.study.report import power_rows
from gmnet_timm import __version__
from gmnet_timm.demo import create_schedule, train_epoch
from gmnet_timm.errors import UserError
from gmnet_timm.frequency.reports import read_csv, write_csv, write_json
from gmnet_timm.frequency.split import check_corner, split_frequencies

__all__ = ['Run', 'StudySettings', 'condition_images', 'control_accuracies', 'run_study']

FIRST_TUNING_SEED = 1000
MOST_CONTROL_BATCHES = 100  # the nearest of ImageNet's million would take hours



@dataclasses.dataclass(frozen=True)
class StudySettings:
    """What decides the numbers of a run besides its variant, learning rate, seed and images.

    Radii are in cycles per image. In patches of 56 pixels, 3, 6 and 9 match in cycles per pixel the 12, 24 and 36 of
    the paper's images of 224 pixels.
    """

    radii: tuple[float, ...] = (1., 2., 3., 4., 6., 9., 14.)
    epochs: int = 5
    warmup_epochs: int = 1
    weight_decay: float = .05
    smoothing: float = .1


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    body: str
    variant: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """For files."""
        plain = self.variant.translate(str.maketrans('·/', '._', '()'))
        return f'{self.body}-{plain}-lr{self.lr:g}-seed{self.seed}'


def run_study(
        output: Path,
        data: PhotoData,
        settings: StudySettings,
        pairs: Sequence[tuple[str, str]],
        learning_rates: Sequence[float],
        seeds: Sequence[int],
        tuning_seeds: int = 2,
        device: torch.device = torch.device('cpu'),  # noqa: B008, immutable
) -> None:
    """Choose learning rates, train and test. A finished run is a file in `output`/runs, later calls do not repeat it.

    Args:
        output: Folder for runs and for tables: `tuning.csv`, `accuracy.csv`, `controls.csv`, `power.csv`, `study.json`.
        data: Images.
        settings: Settings of all runs.
        pairs: Body and variant of each network, keys of `study_models.BODIES` and `study_models.VARIANTS`.
        learning_rates: To choose from.
        seeds: One training of each network for each. They are trained seed by seed, so that what is finished
            can be compared at any time.
        tuning_seeds: Number of further seeds for each learning rate.
        device: Where to train.

    Raises:
        UserError: `output` holds runs of other settings, a radius is beyond the corner of the spectrum, or a seed is
            one of those for tuning.
    """
    check_corner(settings.radii, (data.size, data.size))
    if not all(0 <= seed < FIRST_TUNING_SEED for seed in seeds):
        raise UserError(f'Seeds must be from 0 to {FIRST_TUNING_SEED - 1}, those beyond are for tuning.')
    study = _Study(output, data, settings, device)
    tuning = [
        Run(body, variant, lr, FIRST_TUNING_SEED + i)
        for i in range(tuning_seeds) for body, variant in pairs for lr in learning_rates]
    tuned = {run: study.result(run, 'tune', i, len(tuning)) for i, run in enumerate(tuning)}
    chosen = {pair: _choose(pair, learning_rates, tuned) for pair in pairs}
    write_csv([
        dict(dataclasses.asdict(run), **row, chosen=int(run.lr == chosen[run.body, run.variant]))
        for run, result in tuned.items() for row in result['accuracy']], output / 'tuning.csv')
    power = power_rows(read_csv(output / 'tuning.csv'), len(seeds))
    write_csv(power, output / 'power.csv')
    for row in power:
        print(f'{row["body"]}: {len(seeds)} seeds find a difference of {row["detectable"]} points in high-pass '
              'accuracy in four of five studies', flush=True)
    runs = [Run(body, variant, chosen[body, variant], seed) for seed in seeds for body, variant in pairs]
    results = {run: study.result(run, 'test', i, len(runs)) for i, run in enumerate(runs)}
    write_csv(
        [dict(dataclasses.asdict(run), **row) for run, result in results.items() for row in result['accuracy']],
        output / 'accuracy.csv')
    write_csv([dict(seed=seed, **row) for seed in seeds for row in control_accuracies(data, settings.radii, seed)],
              output / 'controls.csv')
    write_json(dict(
        study.record,
        classes=list(data.classes),
        parameters={run.body: result['parameters'] for run, result in results.items()},
        seeds=list(seeds),
        tuning_seeds=tuning_seeds,
        learning_rates=list(learning_rates),
        seconds=round(sum(result['seconds'] for result in [*tuned.values(), *results.values()])),
        command=['python', '-m', 'experiments.study', *sys.argv[1:]],
        **_machine(device),
    ), output / 'study.json')


def condition_images(
        images: torch.Tensor,
        radii: Sequence[float],
) -> Iterator[tuple[str, float | None, torch.Tensor]]:
    """Band, radius and images as the network sees them: unfiltered ('raw', None), then the bands of each radius.

    Args:
        images: Images (B, C, H, W) in random order, normalised by mean and standard deviation of the whole data.
        radii: In cycles per image.
    """
    x = standardize(images)
    mean_of_another = images.mean((-2, -1), keepdim=True).roll(1, 0)
    yield 'raw', None, x
    for radius in radii:
        low, high = split_frequencies(x, radius)
        yield 'low', radius, standardize(low)
        yield 'high', radius, standardize(high)
        yield 'high-shifted', radius, standardize(high) + mean_of_another
        yield 'high-faint', radius, high


def control_accuracies(data: PhotoData, radii: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """How well mean and contrast alone tell the classes: top-1 of the nearest neighbour, for the images of each band.

    `normalized` are the images without any of the study's standardisation. Numbers are rounded to four decimals: what
    is left is rounding, which no network uses.
    """
    def features(batches: Batches) -> tuple[dict[tuple[str, Any], torch.Tensor], torch.Tensor]:
        found: dict[tuple[str, Any], list[torch.Tensor]] = {}
        labels = []
        for images, targets in batches:
            labels.append(targets)
            for band, radius, x in [('normalized', None, images), *condition_images(images, radii)]:
                values = torch.cat([x.mean((-2, -1)), x.std((-2, -1), correction=0)], 1)
                found.setdefault((band, radius), []).append(values)
        return {key: torch.cat(values).double().round(decimals=4) for key, values in found.items()}, torch.cat(labels)

    known, known_labels = features(itertools.islice(data.training(seed), MOST_CONTROL_BATCHES))
    asked, labels = features(itertools.islice(data.evaluation('test', seed), MOST_CONTROL_BATCHES))
    rows = []
    for (band, radius), x in asked.items():
        nearest = torch.cdist(x, known[band, radius], compute_mode='donot_use_mm_for_euclid_dist').argmin(1)
        rows.append(_row(band, radius, int((known_labels[nearest] == labels).sum()), len(labels)))
    return rows


class _Study:
    """Runs and their files."""

    def __init__(self, output: Path, data: PhotoData, settings: StudySettings, device: torch.device):
        self.folder, self.data, self.settings, self.device = output / 'runs', data, settings, device
        self.record: dict[str, Any] = json.loads(json.dumps(dict(  # lists for tuples
            settings=dataclasses.asdict(settings), data=data.description)))

    def result(self, run: Run, part: str, index: int, total: int) -> dict[str, Any]:
        """Of a run that is finished, or of one that is trained now and tested on a part of the images."""
        path = self.folder / f'{run.name}.json'
        if path.is_file():
            result = json.loads(path.read_text())
            if {key: result[key] for key in self.record} != self.record:
                raise UserError(f'{path} is a run of other settings or images. Choose another folder by --output.')
            return result
        start = time.perf_counter()
        result = self._run(run, part)
        result = dict(
            dataclasses.asdict(run), part=part, seconds=round(time.perf_counter() - start, 2), **result, **self.record,
            **_machine(self.device))
        write_json(result, path)
        raw = result['accuracy'][0]
        print(f'{part} {index + 1}/{total} {run.name}: {100 * raw["correct"] / raw["count"]:.1f} % of unfiltered '
              f'images, {result["seconds"]:.0f} s', flush=True)
        return result

    def _run(self, run: Run, part: str) -> dict[str, Any]:
        random_seed(run.seed)
        model = create_study_model(run.body, run.variant, self.data.size, self.data.channels, len(self.data.classes))
        model.to(self.device).to(memory_format=torch.channels_last)
        _train(model, self.data.training(run.seed), run.lr, self.settings, self.device)
        labels, predicted = _predict(
            model.eval(), self.data.evaluation(part, run.seed), self.settings.radii, self.device)
        return dict(
            parameters=sum(p.numel() for p in model.parameters()),
            accuracy=[_row(band, radius, int((values == labels).sum()), len(labels))
                      for (band, radius), values in predicted.items()])


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU'
    versions = dict(gmnet_timm=__version__, timm=timm.__version__, torch=torch.__version__)
    return dict(device=name, threads=torch.get_num_threads(), versions=versions)


def _row(band: str, radius: float | None, correct: int, count: int) -> dict[str, Any]:
    return dict(band=band, radius='' if radius is None else f'{radius:g}', correct=correct, count=count)


def _choose(pair: tuple[str, str], learning_rates: Sequence[float], tuned: dict[Run, dict[str, Any]]) -> float:
    """The learning rate of a body and variant by the rule of this module."""
    correct = dict.fromkeys(sorted(learning_rates), 0)
    for run, result in tuned.items():
        if (run.body, run.variant) == pair:
            correct[run.lr] += result['accuracy'][0]['correct']
    return max(correct, key=lambda lr: correct[lr])  # the first of equal ones


def _train(
        model: nn.Module,
        batches: TrainingBatches,
        lr: float,
        settings: StudySettings,
        device: torch.device,
) -> None:
    optimizer = create_optimizer_v2(model, opt='adamw', lr=lr, weight_decay=settings.weight_decay)
    scheduler = create_schedule(optimizer, settings.epochs, settings.warmup_epochs, len(batches))
    criterion = LabelSmoothingCrossEntropy(settings.smoothing)
    standardized = _Standardized(batches, device)
    for epoch in range(settings.epochs):
        loss = train_epoch(model, standardized, criterion, optimizer, scheduler, epoch)['loss']
        if not math.isfinite(loss):
            break  # at chance from here on, which the choice of the learning rate sees


@dataclasses.dataclass
class _Standardized:
    """Batches as the network sees them."""

    batches: TrainingBatches
    device: torch.device

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Batches:
        for images, labels in self.batches:
            yield standardize(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def _predict(
        model: nn.Module,
        batches: Batches,
        radii: Sequence[float],
        device: torch.device,
) -> tuple[torch.Tensor, dict[tuple[str, float | None], torch.Tensor]]:
    """Labels, and the predicted class of each image by band and radius."""
    labels: list[torch.Tensor] = []
    predicted: dict[tuple[str, float | None], list[torch.Tensor]] = {}
    for images, targets in batches:
        labels.append(targets)
        with torch.inference_mode():
            for band, radius, x in condition_images(images.to(device), radii):
                logits = model(x.contiguous(memory_format=torch.channels_last))
                predicted.setdefault((band, radius), []).append(logits.argmax(-1).cpu())
    return torch.cat(labels), {key: torch.cat(values) for key, values in predicted.items()}
