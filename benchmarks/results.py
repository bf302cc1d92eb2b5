"""Result files: what a run has measured, on what, and how."""
import csv
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from gmnet_timm.errors import UserError
from gmnet_timm.files import replacing, write_text

from .gpu import STATE
from .measure import Case, Row, Settings
from .roofline import Peak, Work

__all__ = ['Results', 'quantile']


@dataclasses.dataclass
class Results:
    machine: dict[str, Any]
    settings: Settings
    command: str
    peak: Peak
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write everything to `path` as JSON, and one line per row to a CSV file beside it."""
        entries = dataclasses.asdict(self)
        for row in entries['rows']:
            for key in ('samples_ms', 'device_ms'):
                row[key] = [float(f'{ms:.5g}') for ms in row[key]]
        head = {key: value for key, value in entries.items() if key != 'rows'}
        lines = ',\n'.join('  ' + json.dumps(row) for row in entries['rows'])  # one per row, for reading and for diffs
        write_text(path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')
        with replacing(path.with_suffix('.csv')) as temporary, open(temporary, 'w', newline='') as f:
            records = [self.record(row) for row in self.rows]
            writer = csv.DictWriter(f, list(records[0]), lineterminator='\n')
            writer.writeheader()
            writer.writerows(records)

    @classmethod
    def load(cls, path: Path) -> 'Results':
        """
        Raises:
            UserError: `path` is not a result file.
        """
        try:
            entries = json.loads(Path(path).read_text())
            rows = [
                Row(**{**row, 'case': Case(**row['case']), 'work': Work(**row['work']) if row['work'] else None})
                for row in entries['rows']
            ]
            settings: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in entries['settings'].items()}
            peak = Peak(**entries['peak'])
            return cls(entries['machine'], Settings(**settings), entries['command'], peak, rows)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f'{path} is not a result file of `python -m benchmarks run`: {type(e).__name__}: {e}') from e

    def record(self, row: Row) -> dict[str, object]:
        """What the CSV file says of a row."""
        samples = row.samples_ms
        median = statistics.median(samples) if samples else None
        return {
            **dataclasses.asdict(row.case),
            'status': row.status,
            'median_ms': rounded(median),
            'p5_ms': rounded(quantile(samples, 0.05)) if samples else None,
            'p95_ms': rounded(quantile(samples, 0.95)) if samples else None,
            'n': len(samples),
            'images_per_s': rounded(1e3 * row.case.batch_size / median) if median else None,
            'roofline_ms': rounded(row.roofline_ms),
            'ratio_to_roofline': rounded(median / row.roofline_ms) if median and row.roofline_ms else None,
            'relative_error': rounded(row.error),
            'memory_mb': rounded(row.memory_mb),
            'kept_mb_per_image': rounded(row.kept_mb),
            'device_ms': rounded(statistics.median(row.device_ms)) if row.device_ms else None,
            **(row.gpu_state or {key: None for key in STATE}),
            'params': row.params,
            'macs': row.work.macs if row.work else None,
        }


def quantile(samples: list[float], q: float) -> float:
    """The sample below which a share of `q` lies."""
    ordered = sorted(samples)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def rounded(value):
    return None if value is None else float(f'{value:.4g}')
