"""The training that the demo and the study share: loaders, schedule and one epoch over the patches of photographs."""
from collections.abc import Callable
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

__all__ = ['create_patch_loader', 'create_schedule', 'train_epoch']


def create_patch_loader(
        data_dir: str,
        split: str,
        data_config: dict[str, Any],
        batch_size: int,
        device: torch.device,
        scale: tuple[float, float] = (.9, 1.),
        workers: int = 0,
):
    """timm's loader of the patches in a split, with augmentation where the split is `train`.

    Args:
        data_dir: Folder that `prepare_photo_patches` wrote.
        split: `train` or `validation`.
        data_config: `input_size`, `mean`, `std`, `interpolation` and `crop_pct` of the images.
        batch_size: Images per batch.
        device: Where the batches go.
        scale: Area of the random crops, as fractions of the patch.
        workers: Processes that load images, 0 for none.
    """
    return create_loader(
        create_dataset('', data_dir, split=split, input_img_mode='L'),
        batch_size=batch_size,
        is_training=split == 'train',
        scale=scale,
        color_jitter=None,  # type: ignore[arg-type]  # timm's own way to turn it off
        num_workers=workers,
        persistent_workers=False,  # new ones each epoch are seeded each epoch
        device=device,
        **data_config,
    )


def create_schedule(optimizer: torch.optim.Optimizer, epochs: int, warmup_epochs: int, updates_per_epoch: int):
    """Cosine schedule with warm-up, stepped at each update."""
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=epochs, warmup_epochs=warmup_epochs, warmup_lr=1e-5, min_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=updates_per_epoch)
    return scheduler


def train_epoch(
        model: nn.Module,
        loader,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler,
        epoch: int,
        watch: Callable[[int, float, float], None] | None = None,
) -> dict[str, float]:
    """Train one epoch, in channels_last.

    Args:
        model: The classifier, put into training mode.
        loader: From `create_patch_loader`.
        criterion: Loss of logits and labels.
        optimizer: Of the model's parameters.
        scheduler: From `create_schedule`.
        epoch: Number of the epoch, from 0.
        watch: Called after each batch with its size, and with loss and top-1 so far.

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
            watch(len(images), loss_m.avg, top1_m.avg)
    return {'loss': loss_m.avg, 'top1': top1_m.avg}
