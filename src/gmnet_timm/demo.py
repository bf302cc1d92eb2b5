"""A short training on photographs that an installed package carries: does everything work here, and can it learn?

What it measures: that a GmNet learns, in minutes, to tell patches of eight known photographs apart by texture and
structure, on rows of them that it has not seen. What it does not: how well GmNet recognises new photographs or objects,
and anything about its quality on ImageNet.

Each photograph is one class. Its grey patches are cut from two bands of rows, the upper for training and the lower for
validation, a patch height apart. Photographs and their licences, as scikit-image's documentation of `skimage.data`
states them: brick, grass, gravel (CC0Textures, linolafett: CC0), camera (Lav Varshney: CC0), chelsea (Stefan van der
Walt: CC0), coins and ihc (no known copyright restrictions), hubble (NASA: public domain). Left out: photographs without
a stated licence, with nearly constant patches, or whose upper and lower rows show different things. Camera is of this
last kind too: expect its patches to be most of the errors.
"""
import argparse
import dataclasses
import importlib.util
import json
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import yaml
from PIL import Image, ImageDraw, ImageFont
from timm.data import create_dataset, create_loader, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed, update_summary
from torch import nn

from gmnet_timm.device import resolve_device
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.files import replacing, replacing_folder, write_text, writing
from gmnet_timm.hub.publication import collect_publication
from gmnet_timm.hub.save import save_folder
from gmnet_timm.weights.architecture import SIZES
from gmnet_timm.weights.model import read_source
from gmnet_timm.weights.runs import ARGS_NAME, SUMMARY_NAME

__all__ = [
    'PHOTOS', 'SETTINGS', 'DemoReport', 'PhotoPatches', 'create_schedule', 'photo_pixels', 'prepare_photo_patches',
    'run_demo', 'train_epoch',
]

_logger = logging.getLogger(__name__)

# class -> file in skimage/data, in the order of timm's class indices
PHOTOS = {
    'brick': 'brick.png',
    'camera': 'camera.png',
    'chelsea': 'chelsea.png',
    'coins': 'coins.png',
    'grass': 'grass.png',
    'gravel': 'gravel.png',
    'hubble': 'hubble_deep_field.jpg',
    'ihc': 'ihc.png',
}
PATCH_SIZE = 64
SPLITS = ('train', 'validation')
MANIFEST = 'patches.json'
SETTINGS = {'model': 'gmnet_s1', 'epochs': 5, 'batch_size': 32, 'lr': 3e-3, 'seed': 42, 'patches': 320}


@dataclasses.dataclass(frozen=True)
class PhotoPatches:
    """A folder of grey patches that `timm.data.create_dataset` and train.py's `--data-dir` read.

    Attributes:
        root: Folder with `train/CLASS/*.png`, `validation/CLASS/*.png` and the manifest `patches.json`. A patch is
            named by the row and column of its top left pixel in the photograph.
        mean: Mean of all training pixels, in 0…1.
        std: Standard deviation of all training pixels, in 0…1.
    """

    root: Path
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What a demo reached and where everything is. Accuracies are in percent, as in `summary.csv`."""

    data: Path
    run: Path
    model: Path
    prediction_grid: Path
    top1: float
    best_epoch: int
    seconds: float

    def __str__(self) -> str:
        rows = [
            ('data', self.data),
            ('run folder', self.run),
            ('model folder', self.model),
            ('prediction grid', self.prediction_grid),
            ('best top-1', f'{self.top1:.2f} % (epoch {self.best_epoch}), chance {100 / len(PHOTOS):.2f} %'),
            ('seconds', f'{self.seconds:.1f}'),
        ]
        table = '\n'.join(f'{name:<16} {value}' for name, value in rows)
        return (
            f'{table}\n\n'
            'This is the accuracy on rows of these photographs that training has not seen. It says nothing\n'
            'about other photographs or about ImageNet.\n'
            f"Use the model:   timm.create_model('local-dir:{self.model}', pretrained=True)"
        )


def run_demo(
        output: str | Path = 'output/demo',
        *,
        device: str = 'auto',
        workers: int = 0,
        **settings: Any,
) -> DemoReport:
    """Write the patches, train on them, save the best model, load it back and draw what it says.

    Args:
        output: Folder for everything that is written.
        device: Device to train on, 'auto' for a GPU if there is one.
        workers: Processes that load patches, 0 for none.
        **settings: Any of `SETTINGS`.

    Returns:
        Accuracy, time and places. Printing it gives the table of the command line.

    Raises:
        MissingExtraError: scikit-image, which carries the photographs, is not installed.
        UserError: A setting makes no sense, there is a run in `output` already, or the training diverged.
    """
    start = time.perf_counter()
    settings = _checked({**SETTINGS, **settings})
    output = Path(output)
    run = output / 'run'
    if run.is_dir() and any(run.iterdir()):
        raise UserError(f'{run} holds a run already: choose another folder.')
    device = resolve_device(device)
    data = prepare_photo_patches(output / 'data', patches=settings['patches'], seed=settings['seed'])
    args = _train_args(settings, data, device, workers)
    write_text(run / ARGS_NAME, yaml.safe_dump(vars(args)))
    top1, best_epoch = _train(args, run)
    source = read_source(run, class_names=str(data.root / 'train'))
    save_folder(collect_publication(source), output / 'model', force=True, overwrite_card=True)
    model = timm.create_model(f'local-dir:{output / "model"}', pretrained=True).eval()
    grid = output / 'prediction-grid.png'
    with replacing(grid) as file:
        _draw_prediction_grid(model, data, args.seed).save(file)
    return DemoReport(data.root, run, output / 'model', grid, top1, best_epoch, time.perf_counter() - start)


def photo_pixels(name: str) -> np.ndarray:
    """Read a photograph that scikit-image's wheel carries, never downloading.

    Args:
        name: A key of `PHOTOS`.

    Returns:
        Grey levels (H, W), uint8.

    Raises:
        MissingExtraError: scikit-image is not installed.
        UserError: It does not carry the photograph.
    """
    spec = importlib.util.find_spec('skimage')
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError('scikit-image', 'demo')
    path = Path(next(iter(spec.submodule_search_locations)), 'data', PHOTOS[name])
    if not path.is_file():
        raise UserError(f'The installed scikit-image does not carry {path.name}, looked for {path}')
    with Image.open(path) as image:
        return np.asarray(image.convert('L'))


def prepare_photo_patches(root: str | Path, *, patches: int = 320, seed: int = 42) -> PhotoPatches:
    """Write the patches, or recognise those that an earlier call with the same arguments wrote.

    Args:
        root: Folder to write. One that holds anything else is left alone.
        patches: Training patches per class. For validation there are a quarter as many.
        seed: Seed of the positions.

    Raises:
        UserError: The folder holds something else, or a photograph has too few positions.
    """
    root = Path(root)
    wanted = {'format': 1, 'patches': patches, 'seed': seed, 'size': PATCH_SIZE, 'photos': PHOTOS}
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        manifest = None
    if not isinstance(manifest, dict) or manifest.get('parameters') != wanted:
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f'{root} does not hold these photo patches, so it is left as it is. Choose another folder.')
        with replacing_folder(root) as folder:
            manifest = _write_patches(folder, wanted)
    return PhotoPatches(root, manifest['mean'], manifest['std'])


def create_schedule(optimizer: torch.optim.Optimizer, epochs: int, warmup_epochs: int, updates_per_epoch: int):
    """Cosine schedule with warm-up, stepped at each update."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=1e-5, min_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=updates_per_epoch)
    return scheduler


def train_epoch(
        model: nn.Module,
        loader: Any,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Scheduler,
        epoch: int,
        watch: Callable[[int], Any] | None = None,
) -> dict[str, float]:
    """Train one epoch, in channels_last.

    Args:
        model: The classifier, put into training mode.
        loader: Batches of images and labels.
        criterion: Loss of logits and labels.
        optimizer: Of the model's parameters.
        scheduler: From `create_schedule`.
        epoch: Number of the epoch, from 0.
        watch: Called after each batch with its size.

    Returns:
        Mean `loss` and `top1` (percent) of the epoch.
    """
    loss_m, top1_m = AverageMeter(), AverageMeter()
    model.train()
    for i, (images, targets) in enumerate(loader):
        scheduler.step_update(epoch * len(loader) + i)
        logits = model(images.contiguous(memory_format=torch.channels_last))  # a third faster on CPUs
        loss = criterion(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_m.update(loss.item(), len(images))
        top1_m.update(accuracy(logits, targets)[0].item(), len(images))
        if watch is not None:
            watch(len(images))
    return {'loss': loss_m.avg, 'top1': top1_m.avg}


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        raise TypeError(f'Unknown settings {sorted(unknown)}, there are {sorted(SETTINGS)}')
    if settings['model'] not in SIZES:
        raise UserError(f"The demo trains a GmNet ({', '.join(SIZES)}), not {settings['model']}")
    for name in ('epochs', 'batch_size', 'lr', 'patches'):
        if settings[name] <= 0:
            raise UserError(f'{name} must be positive, got {settings[name]}')
    if settings['batch_size'] > (total := settings['patches'] * len(PHOTOS)):
        raise UserError(f"A batch of {settings['batch_size']} is more than the {total} patches")
    return settings


def _write_patches(root: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Write patches at different random positions of each band, and the manifest."""
    rng = np.random.default_rng(parameters['seed'])
    pixels = []
    bands: dict[str, dict[str, list[int]]] = {split: {} for split in SPLITS}
    for split, count in zip(SPLITS, (parameters['patches'], max(1, parameters['patches'] // 4)), strict=True):
        for name in PHOTOS:
            photo, folder = photo_pixels(name), root / split / name
            folder.mkdir(parents=True)
            first, last = bands[split][name] = _band(len(photo), split)
            rows, cols = last - first - PATCH_SIZE + 1, photo.shape[1] - PATCH_SIZE + 1
            if count > rows * cols:
                raise UserError(f'{name} has only {rows * cols} positions for {count} patches')
            for position in rng.choice(rows * cols, count, replace=False):
                row, col = first + int(position) // cols, int(position) % cols
                patch = photo[row:row + PATCH_SIZE, col:col + PATCH_SIZE]
                Image.fromarray(patch).save(folder / f'r{row:04d}-c{col:04d}.png')
                if split == 'train':
                    pixels.append(patch)
    values = np.stack(pixels) / 255.
    manifest = dict(parameters=parameters, bands=bands, mean=float(values.mean()), std=float(values.std()))
    (root / MANIFEST).write_text(json.dumps(manifest, indent=2))
    return manifest


def _band(height: int, split: str) -> list[int]:
    """Rows of a split: the upper ones train, the lower ones validate, a patch height between them is unused."""
    usable = height - PATCH_SIZE
    val_height = max(PATCH_SIZE, int(.35 * usable))
    return [0, usable - val_height] if split == 'train' else [height - val_height, height]


def _train_args(settings: dict[str, Any], data: PhotoPatches, device: str, workers: int) -> argparse.Namespace:
    """Everything that decides the numbers, under the names of train.py, which can read it with `--config`."""
    return argparse.Namespace(
        **settings,
        data_dir=str(data.root),
        num_classes=len(PHOTOS),
        input_size=[3, PATCH_SIZE, PATCH_SIZE],
        mean=[data.mean] * 3,
        std=[data.std] * 3,
        crop_pct=1.,
        interpolation='bilinear',
        scale=[.9, 1.],
        color_jitter=None,
        smoothing=0.,
        channels_last=True,
        opt='adamw',
        weight_decay=.05,
        sched='cosine',
        sched_on_updates=True,
        warmup_epochs=1,
        warmup_lr=1e-5,
        min_lr=1e-5,
        device=device,
        workers=workers,
    )


def _create_loader(args: argparse.Namespace, split: str):
    return create_loader(
        create_dataset('', args.data_dir, split=split),
        input_size=tuple(args.input_size),
        batch_size=args.batch_size,
        is_training=split == 'train',
        scale=args.scale,
        color_jitter=None,  # type: ignore[arg-type]  # timm's own way to turn it off
        interpolation=args.interpolation,
        mean=tuple(args.mean),
        std=tuple(args.std),
        crop_pct=args.crop_pct,
        num_workers=args.workers,
        persistent_workers=False,  # new ones each epoch are seeded each epoch
        device=torch.device(args.device),
    )


def _train(args: argparse.Namespace, run: Path) -> tuple[float, int]:
    """Train, and return the best validation accuracy in percent and its epoch."""
    from tqdm import tqdm

    loader, val_loader = (_create_loader(args, split) for split in SPLITS)
    random_seed(args.seed)
    model = timm.create_model(args.model, num_classes=args.num_classes)
    model = model.to(torch.device(args.device)).to(memory_format=torch.channels_last)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = create_schedule(optimizer, args.epochs, args.warmup_epochs, len(loader))
    saver = CheckpointSaver(
        model, optimizer, args=args, checkpoint_dir=str(run), recovery_dir=str(run), max_history=2)
    for epoch in range(args.epochs):
        random_seed(args.seed, rank=epoch + 1)
        images = len(loader) * args.batch_size
        with tqdm(total=images, desc=f'epoch {epoch}', unit='img', leave=False, disable=None) as bar:
            train_metrics = train_epoch(model, loader, criterion, optimizer, scheduler, epoch, bar.update)
        metrics = _validate(model, val_loader)
        if not np.isfinite([train_metrics['loss'], metrics['loss']]).all():
            raise UserError(f'The training diverged in epoch {epoch}: its loss is not finite. Use a smaller --lr.')
        with writing(run):
            update_summary(
                epoch, train_metrics, metrics, str(run / SUMMARY_NAME), lr=optimizer.param_groups[0]['lr'],
                write_header=epoch == 0)
            saver.save_checkpoint(epoch, metric=metrics['top1'])
        _logger.info(
            'epoch %d  loss %.3f  top-1: training %.1f %%, validation %.1f %%', epoch, train_metrics['loss'],
            train_metrics['top1'], metrics['top1'])
    return saver.best_metric, saver.best_epoch


def _validate(model: nn.Module, loader) -> dict[str, float]:
    meters = {'loss': AverageMeter(), 'top1': AverageMeter(), 'top5': AverageMeter()}
    model.eval()
    with torch.inference_mode():
        for images, targets in loader:
            logits = model(images.contiguous(memory_format=torch.channels_last))
            values = nn.functional.cross_entropy(logits, targets), *accuracy(logits, targets, topk=(1, 5))
            for meter, value in zip(meters.values(), values, strict=True):
                meter.update(value.item(), len(images))
    return {name: meter.avg for name, meter in meters.items()}


def _draw_prediction_grid(model: nn.Module, data: PhotoPatches, seed: int) -> Image.Image:
    """Some validation patches of each class with what the model says of them.

    Nothing depends on colour: a wrong prediction has a thick frame and white text on black.
    """
    tile, text, pad = 2 * PATCH_SIZE, 54, 12
    files = {name: sorted((data.root / 'validation' / name).glob('*.png')) for name in PHOTOS}
    rows = min(3, *map(len, files.values()))
    cell_w, cell_h, top = tile + 2 * pad, tile + text + 2 * pad, 56
    sheet = Image.new('L', (cell_w * len(PHOTOS) + 2 * pad, cell_h * rows + top), 255)
    draw, font, title = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(17)
    draw.text((2 * pad, 8), 'Validation patches: the photograph, and what the model says', 0, title)
    draw.text((2 * pad, 32), 'Per cent: the confidence. Wrong predictions are on black.', 0, font)
    transform = create_transform(**resolve_model_data_config(model))
    labels = cast(dict[str, Any], model.pretrained_cfg)['label_names']
    rng = random.Random(seed)
    for col, name in enumerate(PHOTOS):
        for row, file in enumerate(rng.sample(files[name], rows)):
            with Image.open(file) as image:
                patch = image.convert('RGB')
            with torch.inference_mode():
                confidence, index = model(transform(patch)[None]).softmax(-1)[0].max(-1)
            said, x, y = labels[index], pad + col * cell_w, top + row * cell_h
            wrong = said != name
            if wrong:
                draw.rectangle((x + 4, y + 4, x + cell_w - 4, y + cell_h - 4), 0)
            sheet.paste(patch.convert('L').resize((tile, tile), Image.Resampling.NEAREST), (x + pad, y + pad))
            caption = f'truth: {name}\nmodel: {said}\n{100 * confidence:.0f} %{"  WRONG" if wrong else ""}'
            draw.text((x + pad, y + pad + tile + 4), caption, 255 if wrong else 0, font)
    return sheet
