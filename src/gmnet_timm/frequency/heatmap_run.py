"""Fourier heat maps of models that go on where an earlier call stopped."""
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gmnet_timm.frequency.heatmap import HeatmapPoint, directions, fourier_heatmap
from gmnet_timm.frequency.processes import gathered, is_first
from gmnet_timm.frequency.reports import read_csv, write_csv
from gmnet_timm.weights.model import LoadedModel

__all__ = ['run_heatmap']


def run_heatmap(
        model: LoadedModel,
        loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
        amplitudes: Sequence[float],
        path: Path,
        *,
        step: int = 8,
        largest: int | None = None,
        seed: int = 0,
        clip: bool = False,
        batch_size: int = 64,
        data: str = '',
) -> dict[float, list[HeatmapPoint]]:
    """Evaluate the frequencies that a table does not have yet, and write each one when it is known.

    With an initialised process group each process gives a part of the images, and the first one writes.

    Args:
        model: The model.
        loader: Batches of normalised images (B, C, H, W) and labels, all of which are held in memory.
        amplitudes: As for `fourier_heatmap`.
        path: CSV file. Rows of other models, data and settings in it are kept.
        step: As for `directions`.
        largest: As for `directions`.
        seed: As for `fourier_heatmap`.
        clip: Clip perturbed images to the range of pixels.
        batch_size: As for `fourier_heatmap`.
        data: What the images are, to tell rows apart.

    Returns:
        Points by amplitude.
    """
    config = model.data_config
    no_image = torch.empty(0, *config['input_size']), torch.empty(0, dtype=torch.long)  # a process may have none
    images, targets = (torch.cat(parts) for parts in zip(no_image, *loader, strict=True))
    frequencies = directions(images.shape[-2], images.shape[-1], step, largest)
    rows: list[dict[str, Any]] = list(read_csv(path)) if path.is_file() else []
    count = sum(gathered(len(images)))  # every process has read the table before one writes
    key = dict(
        model=str(model.provenance.get('model', model.name)), weights_sha256=model.provenance.get('weights_sha256', ''),
        model_args=json.dumps(model.provenance.get('model_args', {}), sort_keys=True, default=str),
        data=data, classes=' '.join(getattr(loader, 'classes', ())), seed=str(seed), clip=str(clip),
        preprocessing=json.dumps(config, sort_keys=True), count=str(count))
    found: dict[float, list[HeatmapPoint]] = {}
    same = [row for row in rows if key.items() <= row.items()]
    for amplitude in amplitudes:
        known = {
            (int(row['v']), int(row['u'])): HeatmapPoint(
                int(row['v']), int(row['u']), amplitude, int(row['wrong']), int(row['count']))
            for row in same if float(row['amplitude']) == amplitude
        }

        def write(point: HeatmapPoint) -> None:
            rows.append({**key, **point.as_row()})
            if is_first():
                write_csv(rows, path)

        missing = [frequency for frequency in frequencies if frequency not in known]
        new = fourier_heatmap(
            model.model, images, targets, config['std'], missing, amplitude, batch_size=batch_size, seed=seed,
            mean=config['mean'] if clip else None, on_point=write)
        known.update({(point.v, point.u): point for point in new})
        found[amplitude] = [known[frequency] for frequency in frequencies]
    return found
