"""Band accuracies as tables."""
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmnet_timm.files import replacing, write_text
from gmnet_timm.frequency.bands import Band, BandAccuracy
from gmnet_timm.frequency.paired import compare_bands

__all__ = [
    'format_paired', 'format_table', 'load_results', 'paired_rows', 'read_csv', 'save_results', 'write_csv',
    'write_json',
]


def format_table(reports: Sequence[dict[str, Any]]) -> str:
    """Top-1 in the layout of the paper's tables with the bounds of Wilson's interval, and below it what was chosen."""
    rows = [_sorted_results(report) for report in reports]
    heads = [f'{row["band"]} {"-".join(filter(None, [row["inner_radius"], row["radius"]]))}'.strip() for row in rows[0]]
    width = max(len('top-1 % (95 %)'), *(len(report['name']) for report in reports))
    lines = [f'{"top-1 % (95 %)":<{width}}' + ''.join(f'  {head:>16}' for head in heads)]
    for report, results in zip(reports, rows, strict=True):
        cells = (f'{row["top1"]:.1f} ({row["top1_low"]:.1f}-{row["top1_high"]:.1f})' for row in results)
        lines.append(f'{report["name"]:<{width}}' + ''.join(f'  {cell:>16}' for cell in cells))
    lines += ['', "In brackets: Wilson's interval, 95 % of which contain the accuracy on all images of this kind."]
    notes = {report['name']: _describe_data(report) for report in reports}
    if len(set(notes.values())) == 1:
        lines.append(next(iter(notes.values())))
    else:
        lines += [f'{name}: {note}' for name, note in notes.items()]
    return '\n'.join([*lines, _describe_split(reports[0])])


def paired_rows(accuracies: Mapping[str, Sequence[BandAccuracy]], baseline: str) -> list[dict[str, Any]]:
    """Models against a baseline on the same images, one row per model and band.

    Args:
        accuracies: Results of `evaluate_bands` by the label of the model.
        baseline: One of the labels.

    Raises:
        UserError: The images are not the same.
    """
    return [
        dict(model=label, baseline=baseline, band=str(accuracy.band), **found.as_row())
        for label, results in accuracies.items() if label != baseline
        for accuracy, found in zip(results, compare_bands(results, accuracies[baseline]), strict=True)
    ]


def format_paired(rows: Sequence[dict[str, Any]]) -> str:
    """Differences in percentage points with their intervals and p values, one line per model and band."""
    lines = [f'top-1 minus that of {rows[0]["baseline"]} on the same images, in points (95 %), and p by McNemar, exact']
    lines += [
        f'{row["model"]}  {row["band"]:<16} {row["difference"]:+.1f} ({row["difference_low"]:+.1f} to '
        f'{row["difference_high"]:+.1f})  p {row["p_value"]:.2g}' for row in rows]
    return '\n'.join([*lines, 'The p values are not corrected for the number of comparisons.'])


def save_results(results: Mapping[str, Sequence[BandAccuracy]], path: str | Path) -> None:
    """Save results of `evaluate_bands` by label, with each image's answer, as a compressed .npz: see `load_results`."""
    bands = [found.band for found in next(iter(results.values()))]
    arrays: dict[str, Any] = {
        'kinds': np.array([band.kind for band in bands]),
        'radii': np.array([[band.inner_radius, band.radius] for band in bands], dtype=float)}  # NaN for None
    for label, found in results.items():
        arrays[f'answers {label}'] = np.stack([accuracy.answers.numpy() for accuracy in found])
        arrays[f'correct5 {label}'] = np.array([accuracy.correct5 for accuracy in found])
    with replacing(Path(path)) as temporary:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]


def load_results(path: str | Path) -> dict[str, list[BandAccuracy]]:
    """Load what `save_results` wrote."""
    with np.load(path) as arrays:
        radii = [[None if np.isnan(radius) else float(radius) for radius in pair] for pair in arrays['radii']]
        bands = [Band(str(kind), outer, inner) for kind, (inner, outer) in zip(arrays['kinds'], radii, strict=True)]
        results = {}
        for name in arrays.files:
            if name.startswith('answers '):
                label = name.removeprefix('answers ')
                results[label] = [
                    BandAccuracy(band, int(right.sum()), int(top5), len(right), torch.from_numpy(right))
                    for band, right, top5 in zip(bands, arrays[name], arrays[f'correct5 {label}'], strict=True)]
    return results


def _sorted_results(report: dict[str, Any]) -> list[dict[str, Any]]:
    order = ('raw', 'low', 'high', 'band-pass', 'band-stop')
    return sorted(report['results'], key=lambda row: order.index(row['band']))  # stable: radii stay in their order


def _describe_data(report: dict[str, Any]) -> str:
    config = report['data_config']
    height, width = config['input_size'][1:]
    mean, std = (' '.join(f'{value:.3g}' for value in config[key]) for key in ('mean', 'std'))
    ignored = f', {report["ignored"]} files of types that timm does not read' if report['ignored'] else ''
    return (
        f'{report["results"][0]["count"]} images of {height}x{width}, {report["skipped"]} could not be decoded{ignored}'
        f'; crop {config["crop_pct"]:g} {config.get("crop_mode", "center")}, {config["interpolation"]}, mean {mean}, '
        f'std {std}.')


def _describe_split(report: dict[str, Any]) -> str:
    options = report['settings']['options']
    choices = [f'split on {options["space"]} values']
    choices += ['mean kept in high-pass images'] if options['keep_dc'] else []
    choices += ['contrast of high-pass images restored'] if options['restore_contrast'] else []
    choices += [f'edges {options["edge_width"]:g} wide'] if options['edge_width'] else []
    choices += ['mirrored at the border'] if options.get('border') == 'mirror' else []
    choices += ['clipped to the range of pixels'] if options.get('clip') else []
    return f'Radii in cycles per image, {", ".join(choices)}.'


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as dictionaries."""
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write rows, the columns of the first one first. The file is complete or the old one at any time."""
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(data: Any, path: Path) -> None:
    """Write JSON. The file is complete or the old one at any time."""
    write_text(path, json.dumps(data, indent=2) + '\n')
