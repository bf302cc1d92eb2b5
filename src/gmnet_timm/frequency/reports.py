"""Band accuracies as tables."""
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmnet_timm.files import write_text

__all__ = ['format_table', 'read_csv', 'write_csv', 'write_json']


def format_table(reports: Sequence[dict[str, Any]]) -> str:
    """Top-1 in the layout of the paper's tables, with half of the 95 % interval, and what was chosen below."""
    width = max(len(report['name']) for report in reports)
    heads = [f'{row["band"]} {row["radius"]}'.strip() for row in reports[0]['results']]
    order = sorted(range(len(heads)), key=lambda i: ('raw', 'low', 'high').index(reports[0]['results'][i]['band']))
    lines = [f'{"top-1 %, ± 95 %":<{width}}' + ''.join(f'  {heads[i]:>11}' for i in order)]
    for report in reports:
        cells = []
        for i in order:
            row = report['results'][i]
            cells.append(f'{row["top1"]:.1f} ±{(row["top1_high"] - row["top1_low"]) / 2:.1f}')
        lines.append(f'{report["name"]:<{width}}' + ''.join(f'  {cell:>11}' for cell in cells))
    report = reports[0]
    options = report['settings']['options']
    height, width = report['data_config']['input_size'][1:]
    choices = [f'split on {options["space"]} values']
    choices += ['mean kept in the high part'] if options['keep_mean'] else []
    choices += ['contrast of the high part restored'] if options['restore_contrast'] else []
    lines += [
        '',
        f'{report["results"][0]["count"]} images of {height}x{width}, {report["skipped"]} could not be decoded.',
        f'Radii in cycles per image, {", ".join(choices)}.',
    ]
    return '\n'.join(lines)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Lines of a CSV file as dictionaries."""
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write lines, the columns of the first one first. The file is complete or the old one at any time."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(data: Any, path: Path) -> None:
    """Write JSON. The file is complete or the old one at any time."""
    write_text(path, json.dumps(data, indent=2) + '\n')
