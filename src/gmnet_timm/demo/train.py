"""Short training on real photographs, with timm's own parts, that ends in a model folder and a picture to look at.

What it measures: that a GmNet learns, in minutes, to tell patches of eight known photographs apart by texture and
structure, on rows of them that it has not seen. What it does not: how well GmNet recognises new photographs or objects,
and anything about its quality on ImageNet.
"""
import argparse
import dataclasses
import importlib.util
import random
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn as nn
import yaml
from PIL import Image, ImageDraw, ImageFont
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, resume_task_checkpoint
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed, update_summary

from gmnet_timm.checkpoint.architecture import SIZES
from gmnet_timm.demo.loop import create_patch_loader, create_schedule, train_epoch
from gmnet_timm.demo.photos import PATCH_SIZE, PHOTOS, SPLITS, PathLike, PhotoPatches, prepare_photo_patches
from gmnet_timm.device import resolve_device
from gmnet_timm.errors import MissingExtraError, UserError
from gmnet_timm.files import write_text, writing
from gmnet_timm.publishing.folder import save_folder
from gmnet_timm.publishing.publication import collect_publication
from gmnet_timm.source import read_source
from gmnet_timm.training.run import ARGS_NAME, SUMMARY_NAME, read_args, read_summary

__all__ = ['DemoReport', 'run_demo']


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What a demo reached and where everything is. Accuracies are in percent, as in `summary.csv`."""
    data: Path
    run: Path
    summary: Path
    best_checkpoint: Path
    model: Path
    prediction_grid: Path
    top1: float
    best_epoch: int
    chance: float
    seconds: float

    def __str__(self) -> str:
        rows = [
            ('data', self.data),
            ('run folder', self.run),
            ('summary', self.summary),
            ('best checkpoint', self.best_checkpoint),
            ('model folder', self.model),
            ('prediction grid', self.prediction_grid),
            ('best top-1', f'{self.top1:.2f} % (epoch {self.best_epoch}), chance {self.chance:.2f} %'),
            ('seconds', f'{self.seconds:.1f}'),
        ]
        table = '\n'.join(f'{name:<16} {value}' for name, value in rows)
        return (
            f'{table}\n\n'
            'This is the accuracy on rows of these photographs that training has not seen. It says nothing\n'
            'about other photographs or about ImageNet.\n'
            f"Use the model:   timm.create_model('local-dir:{self.model}', pretrained=True)"
        )


# The settings of a run, and their defaults. A resumed run keeps its own.
SETTINGS = {'model': 'gmnet_s1', 'epochs': 5, 'batch_size': 32, 'lr': 3e-3, 'seed': 42, 'patches': 320}

GO_ON = ' Finished epochs are kept. Continue with --resume once that is fixed.'


def run_demo(
        output: PathLike = 'output/demo',
        *,
        resume: bool = False,
        device: str = 'auto',
        workers: int = 0,
        **settings: Any,
) -> DemoReport:
    """Write the patches, train on them, export the best model, load it back and draw what it says.

    Order and augmentation of an epoch depend on the seed and the epoch alone, so a resumed run ends with the numbers of
    an uninterrupted one.

    Args:
        output: Folder for everything that is written.
        resume: Continue the run in `output` after its last finished epoch.
        device: Device to train on, 'auto' for a GPU if there is one.
        workers: Processes that load patches, 0 for none.
        **settings: Any of `SETTINGS`.

    Returns:
        Accuracy, time and places. Printing it gives the table of the command line.
    """
    start = time.perf_counter()
    for module, package in (('skimage', 'scikit-image'), ('tqdm', 'tqdm')):
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(package, 'demo')
    output = Path(output)
    run = output / 'run'
    device = resolve_device(device)
    with writing(output):
        settings = _resumed_settings(run, settings) if resume else _new_settings(run, settings)
        data = prepare_photo_patches(output / 'data', patches=settings['patches'], seed=settings['seed'])
        args = _train_args(settings, data, device, workers)
        run.mkdir(exist_ok=True)
        write_text(run / ARGS_NAME, yaml.safe_dump(vars(args)))
    try:
        top1, best_epoch = _train(args, run)
        model = _export(run, data, output / 'model')
        sheet = _draw_prediction_grid(model, data, output / 'prediction-grid.png', args.seed)
    except KeyboardInterrupt:
        print(f'\nContinue after the last finished epoch: gmnet-timm demo --output {output} --resume', file=sys.stderr)
        raise
    return DemoReport(
        data=data.root,
        run=run,
        summary=run / SUMMARY_NAME,
        best_checkpoint=run / 'model_best.pth.tar',
        model=output / 'model',
        prediction_grid=sheet,
        top1=top1,
        best_epoch=best_epoch,
        chance=100 / len(data.classes),
        seconds=time.perf_counter() - start,
    )


def _new_settings(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        raise TypeError(f'Unknown settings {sorted(unknown)}, there are {sorted(SETTINGS)}')
    settings = {**SETTINGS, **settings}
    if settings['model'] not in SIZES:
        raise UserError(f"The demo trains a GmNet ({', '.join(SIZES)}), not {settings['model']}")
    for name in ('epochs', 'batch_size', 'lr', 'patches'):
        if settings[name] <= 0:
            raise UserError(f'{name} must be positive, got {settings[name]}')
    if settings['batch_size'] > (total := settings['patches'] * len(PHOTOS)):
        raise UserError(f"A batch of {settings['batch_size']} is more than the {total} patches")
    if any(run.glob('[!.]*')):
        raise UserError(f'{run} holds a run already. Continue it with --resume, or choose another --output.')
    return settings


def _resumed_settings(run: Path, given: dict[str, Any]) -> dict[str, Any]:
    try:
        recorded = read_args(run / ARGS_NAME)
    except UserError as e:
        raise UserError(f'There is no run to resume in {run}: {e}') from e
    for name, value in given.items():
        if value != recorded[name]:
            raise UserError(f'The run in {run} has {name} {recorded[name]}, it cannot be resumed with {value}')
    return {name: recorded[name] for name in SETTINGS}


def _train_args(settings: dict[str, Any], data: PhotoPatches, device: str, workers: int) -> argparse.Namespace:
    """Everything that decides the numbers, under the names of train.py, which can read it with `--config`."""
    return argparse.Namespace(
        **settings,
        data_dir=str(data.root),
        num_classes=len(data.classes),
        in_chans=1,
        input_size=[1, PATCH_SIZE, PATCH_SIZE],
        input_img_mode='L',
        mean=[data.mean],
        std=[data.std],
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


def _create_model(args: argparse.Namespace) -> nn.Module:
    overlay = {name: getattr(args, name) for name in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')}
    return timm.create_model(
        args.model,
        in_chans=args.in_chans,
        num_classes=args.num_classes,
        pretrained_cfg_overlay=dict(overlay, tag='photo_patches', pool_size=None),
    )


def _create_loader(args: argparse.Namespace, split: str):
    config = {name: getattr(args, name) for name in ('input_size', 'mean', 'std', 'crop_pct', 'interpolation')}
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    return create_patch_loader(
        args.data_dir, split, config, args.batch_size, torch.device(args.device), tuple(args.scale), args.workers)


def _train(args: argparse.Namespace, run: Path) -> tuple[float, int]:
    """Train or go on, returns the best validation accuracy in percent and its epoch."""
    loader, val_loader = (_create_loader(args, split) for split in SPLITS)
    random_seed(args.seed)
    device = torch.device(args.device)
    model = _create_model(args).to(device).to(memory_format=torch.channels_last)  # a third faster on CPUs
    criterion = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    task = ClassificationTask(model, criterion, device=device, verbose=False)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler = create_schedule(optimizer, args.epochs, args.warmup_epochs, len(loader))
    saver = CheckpointSaver(
        model, optimizer, args=args, task=task, checkpoint_dir=str(run), recovery_dir=str(run), max_history=2)
    for epoch in range(_restore(task, optimizer, saver, run), args.epochs):
        random_seed(args.seed, rank=epoch + 1)
        train_metrics = _train_epoch(model, loader, criterion, optimizer, scheduler, epoch)
        metrics = _validate(model, val_loader)
        with writing(run, GO_ON):
            # in this order: a row without its checkpoint is dropped on resuming, the reverse would lose the row
            update_summary(
                epoch,
                train_metrics,
                metrics,
                run / SUMMARY_NAME,
                lr=optimizer.param_groups[0]['lr'],
                write_header=epoch == 0,
            )
            saver.save_checkpoint(epoch, metric=metrics['top1'])
        print(
            f"epoch {epoch}  loss {train_metrics['loss']:.3f}  top-1: training {train_metrics['top1']:.1f} %, "
            f"validation {metrics['top1']:.1f} %",
            flush=True,
        )
    return saver.best_metric, saver.best_epoch


def _train_epoch(model: nn.Module, loader, criterion, optimizer, scheduler, epoch: int) -> dict[str, float]:
    """`train_epoch` with a progress bar, where the output is a terminal."""
    from tqdm import tqdm

    total = len(loader) * loader.loader.batch_size
    with tqdm(total=total, desc=f'epoch {epoch}', unit='img', leave=False, disable=None) as bar:
        def watch(images: int, loss: float, top1: float) -> None:
            bar.set_postfix_str(f'loss {loss:.3f}, top-1 {top1:.1f} %')
            bar.update(images)

        return train_epoch(model, loader, criterion, optimizer, scheduler, epoch, watch)


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


def _restore(task: ClassificationTask, optimizer, saver: CheckpointSaver, run: Path) -> int:
    """Put model, optimizer, saver and summary back to the end of the last finished epoch, returns the next epoch."""
    last, unfinished = run / 'last.pth.tar', run / 'tmp.pth.tar'
    if not last.exists() and zipfile.is_zipfile(unfinished):
        unfinished.rename(last)  # the saver deletes the old file before it renames the new one, killed in between
    try:
        start = (resume_task_checkpoint(task, str(last), optimizer, log_info=False) if last.exists() else None) or 0
    except (OSError, RuntimeError, EOFError, KeyError) as e:
        raise UserError(f'{last} is damaged. Copy the newest {run}/checkpoint-*.pth.tar over it and continue.') from e
    with writing(run, GO_ON):
        top1 = _trim_summary(run / SUMMARY_NAME, start)
        if start:
            if len(top1) < start:
                raise UserError(f'{run} cannot be resumed, summary.csv lacks some of its {start} finished epochs')
            files = [(str(run / f'checkpoint-{epoch}.pth.tar'), top1[epoch]) for epoch in range(start - 1)]
            saver.checkpoint_files = sorted((f for f in files if Path(f[0]).exists()), key=lambda f: -f[1])
            if start > 1:
                saver.best_epoch = max(range(start - 1), key=lambda epoch: (top1[epoch], -epoch))
                saver.best_metric = top1[saver.best_epoch]
            # once more, for the case that the run was killed before it had written the copies of `last`
            saver.save_checkpoint(start - 1, metric=top1[start - 1])
    return start


def _trim_summary(path: Path, epochs: int) -> dict[int, float]:
    """Drop the lines of epochs that have no checkpoint, returns top-1 (percent) of the others by epoch."""
    if not path.exists():
        return {}
    header, *lines = path.read_text().splitlines(keepends=True) or ['']
    kept = [line for line in lines if line.partition(',')[0].isdigit() and int(line.partition(',')[0]) < epochs]
    write_text(path, ''.join([header, *kept]) if kept else '')
    return {epoch.epoch: epoch.top1 for epoch in read_summary(path)[0] if epoch.top1 is not None}


def _export(run: Path, data: PhotoPatches, folder: Path) -> nn.Module:
    """Publish the best model of the run to a `local-dir:` folder, returns what timm loads from it."""
    names = run.with_name('class-names.txt')
    write_text(names, '\n'.join(data.classes) + '\n')
    publication = collect_publication(read_source(run, class_names=str(names)))
    save_folder(publication, folder, force=True, overwrite_card=True)
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def _draw_prediction_grid(model: nn.Module, data: PhotoPatches, path: Path, seed: int, rows: int = 3) -> Path:
    """Classify some validation patches of each class, and draw them with what the model says.

    Nothing depends on colour: a wrong prediction has a thick frame and white text on black.
    """
    tile, text, pad = 2 * PATCH_SIZE, 54, 12
    rows = min(rows, data.num_val // len(data.classes))
    cell_w, cell_h, top = tile + 2 * pad, tile + text + 2 * pad, 56
    sheet = Image.new('L', (cell_w * len(data.classes) + 2 * pad, cell_h * rows + top), 255)
    draw, font, title = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(17)
    draw.text((2 * pad, 8), 'Validation patches: the photograph, and what the model says', 0, title)
    draw.text((2 * pad, 32), 'Per cent: the confidence. Wrong predictions are on black.', 0, font)
    transform = create_transform(**resolve_model_data_config(model))
    labels = cast(dict[str, Any], model.pretrained_cfg)['label_names']
    rng = random.Random(seed)
    for col, name in enumerate(data.classes):
        files = sorted((data.root / 'validation' / name).glob('*.png'))
        for row, file in enumerate(rng.sample(files, rows)):
            with Image.open(file) as image:
                patch = image.convert('L')
            with torch.inference_mode():
                confidence, index = model(transform(patch)[None]).softmax(-1)[0].max(-1)
            said, x, y = labels[index], pad + col * cell_w, top + row * cell_h
            wrong = said != name
            if wrong:
                draw.rectangle((x + 4, y + 4, x + cell_w - 4, y + cell_h - 4), 0)
            sheet.paste(patch.resize((tile, tile), Image.Resampling.NEAREST), (x + pad, y + pad))
            caption = f'truth: {name}\nmodel: {said}\n{100 * confidence:.0f} %{"  WRONG" if wrong else ""}'
            draw.text((x + pad, y + pad + tile + 4), caption, 255 if wrong else 0, font)
    with writing(path, GO_ON):
        sheet.save(path)
    return path
