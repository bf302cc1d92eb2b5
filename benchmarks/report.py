"""Result files and tables: what a run has measured, on what, and how."""
import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmnet_timm.errors import UserError
from gmnet_timm.files import write_text

from .measure import Case, Row
from .models import find
from .roofline import Peak, Work

__all__ = ['Results', 'conditions', 'latencies', 'report', 'table']

SMOKE = 'SMOKE RUN: small images, a few iterations. It shows that everything runs; its times say nothing.'


@dataclasses.dataclass
class Results:
    machine: dict[str, Any]
    settings: dict[str, Any]
    command: str
    peak: Peak
    rows: list[Row]

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        entries = dataclasses.asdict(self)
        for row in entries['rows']:
            row['samples_ms'] = [float(f'{ms:.5g}') for ms in row['samples_ms']]
        head = {key: value for key, value in entries.items() if key != 'rows'}
        lines = ',\n'.join('  ' + json.dumps(row) for row in entries['rows'])  # one per row, for reading and for diffs
        write_text(path, json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n ]\n}}\n')

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
            return cls(entries['machine'], entries['settings'], entries['command'], Peak(**entries['peak']), rows)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f'{path} is not a result file of `python -m benchmarks run`: {type(e).__name__}: {e}') from e

    @property
    def batch_sizes(self) -> list[int]:
        """Those of the run, in their order."""
        return list(dict.fromkeys(row.case.batch_size for row in self.rows))

    def column(self, case: Case) -> str:
        """What tells the ways to run a model apart, in this run."""
        parts = [case.runtime]
        if len(self.settings['dtypes']) > 1 or case.dtype != 'float32':
            parts.append(case.dtype)
        if len(self.settings['fused']) > 1 and not case.fused:
            parts.append('not fused')
        if 1 < len(self.batch_sizes) < 4:
            parts.append(f'batch {case.batch_size}')
        return ', '.join(parts)


def report(results: Sequence[Results]) -> str:
    """A Markdown table for each result file, with the conditions that it was measured in."""
    return '\n\n'.join(f'{table(r)}\n\n{conditions(r)}' for r in results)


def table(results: Results, against_roofline: bool = True) -> str:
    """One row per model, one column per way to run it, in the faster of the memory formats that were tried."""
    measured = [row for row in results.rows if row.samples_ms or row.kept_mb is not None]
    columns = list(dict.fromkeys(results.column(row.case) for row in measured))
    inference = any(row.work for row in results.rows)
    header = ['model', 'top-1 %', 'params', *(['MACs'] if inference else []), *columns,
              *(['roofline'] if inference and against_roofline else [])]
    lines = []
    for name in {row.case.model: None for row in results.rows}:
        rows = [row for row in results.rows if row.case.model == name]
        cells = [f'`{name}`', _accuracy(name), f'{max(row.params for row in rows) / 1e6:.1f} M']
        if inference:
            cells.append(next((f'{row.work.macs / 1e9:.2f} G' for row in rows if row.work), ''))
        cells += [_cell([row for row in rows if results.column(row.case) == c], results) for c in columns]
        if inference and against_roofline:
            cells.append(_roofline(rows, results))
        lines.append(cells)
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    divider = ['-' * width if i == 0 else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return '\n'.join(
        '| ' + ' | '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        + ' |' for line in [header, divider, *lines])


def _cell(rows: list[Row], results: Results) -> str:
    """The least milliseconds, and the memory of a training step; or for throughput the most images per second."""
    measured = [row for row in rows if row.samples_ms or row.kept_mb is not None]
    if not measured:
        return rows[0].status.split(':')[0] if rows else ''
    best = max(measured, key=_images_per_s)
    if results.settings['mode'] == 'throughput':
        return f'{_images_per_s(best):,.0f}' + (f' ({best.case.batch_size})' if len(results.batch_sizes) > 3 else '')
    numbers = [statistics.median(best.samples_ms)] if best.samples_ms else []
    numbers += [mb for mb in (best.memory_mb, best.kept_mb) if mb is not None]
    return ' / '.join(f'{number:,.0f}' if number >= 100 else f'{number:.3g}' for number in numbers)


def _roofline(rows: list[Row], results: Results) -> str:
    """The roofline in float32, or in the first dtype, and how near the fastest case comes to it."""
    rows = [row for row in rows if row.samples_ms]
    dtype = 'float32' if any(row.case.dtype == 'float32' for row in rows) else results.settings['dtypes'][0]
    rows = [row for row in rows if row.case.dtype == dtype]
    if not rows:
        return ''
    best = max(rows, key=_images_per_s)
    least = best.roofline_ms or 0
    ratio = statistics.median(best.samples_ms) / least
    if results.settings['mode'] == 'throughput':
        return f'{1e3 * best.case.batch_size / least:,.0f} ({1 / ratio:.0%})'
    return f'{least:.3g} (x {ratio:.2f})'


def _images_per_s(row: Row) -> float:
    return 1e3 * row.case.batch_size / statistics.median(row.samples_ms) if row.samples_ms else 0


def _accuracy(name: str) -> str:
    model = find(name)
    return ', '.join(f'{top1:.1f}{note}' for top1, note in ((model.top1, ''), (model.top1_distilled, ' (d)')) if top1)


def latencies(results: Results) -> dict[str, dict[str, float]]:
    """Milliseconds of the fused models, by column and model, in the faster memory format."""
    times: dict[str, dict[str, float]] = {}
    for row in results.rows:
        if row.samples_ms and row.case.fused:
            models = times.setdefault(results.column(row.case), {})
            ms = statistics.median(row.samples_ms)
            models[row.case.model] = min(ms, models.get(row.case.model, ms))
    return times


def conditions(results: Results) -> str:
    """What the numbers are, and what they were taken on."""
    machine, settings, peak = results.machine, results.settings, results.peak
    batches = ', '.join(map(str, results.batch_sizes))
    what = {
        'latency': f'Milliseconds for a batch of {batches}',
        'throughput': f'Images per second at batches of {batches}',
    }.get(settings['mode'], f'A training step of {batches} images: milliseconds where it was timed / MiB in use at its '
                            'peak / MiB per image that autograd keeps for the backward pass')
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    computes = ', '.join(f'{rate / 1e9:,.0f} GMAC/s in {dtype}' for dtype, rate in peak.compute_macs_per_s.items())
    lines = [
        f'{what}, medians of {settings["rounds"] * settings["iterations"]} iterations in {settings["rounds"]} '
        'interleaved rounds.',
        f'{machine.get("gpu", machine["cpu"])}, {settings["threads"]} CPU thread{"s" * (settings["threads"] > 1)}'
        f'{"" if settings["device"] == "cpu" else ", on " + settings["device"]}, allocator: {machine["allocator"]}; '
        f'{versions}, Python {machine["python"]}; commit {machine.get("commit", "unknown")}, {machine["date"]}.',
        f'The machine\'s peaks in the same run: compute (matmul) {computes}; '
        f'memory bandwidth {peak.bandwidth_bytes_per_s / 1e9:,.0f} GB/s.',
        f'`{results.command}`',
    ]
    states = [row.gpu_state for row in results.rows if row.gpu_state]
    if states:
        mhz, watts = ([float(state[key]) for state in states] for key in ('sm_mhz', 'power_w'))
        held = ', '.join(sorted({state['throttle_reasons'] for state in states}))
        lines.append(f'Clocks: {min(mhz):.0f} to {max(mhz):.0f} MHz, {min(watts):.0f} to {max(watts):.0f} W; throttle '
                     f'reasons seen: {held}.')
    missing = {results.column(row.case) for row in results.rows} - {
        results.column(row.case) for row in results.rows if row.samples_ms or row.kept_mb is not None}
    if missing:
        lines.append(f'Tried, but not available here: {"; ".join(sorted(missing))}.')
    if settings['smoke']:
        lines.insert(0, f'**{SMOKE}**')
    return '\n'.join(lines)


def machine_name(results: Results) -> str:
    """Device, threads and batch of a run."""
    settings = results.settings
    name = re.sub(r'\((R|TM)\)', '', results.machine.get('gpu', results.machine['cpu']))
    threads = f', {settings["threads"]} thread{"s" * (settings["threads"] > 1)}' if settings['device'] == 'cpu' else ''
    return f'{name}, batch {", ".join(map(str, results.batch_sizes))}{threads}'
