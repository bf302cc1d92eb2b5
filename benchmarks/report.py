"""Tables, from result files alone."""
import re
import statistics
from collections.abc import Sequence

from .measure import Case, Row
from .models import find
from .results import Results

__all__ = ['conditions', 'latencies', 'machine', 'report', 'table']

SMOKE = 'SMOKE RUN: small images, a few iterations. It shows that everything runs; its times say nothing.'


def report(results: Sequence[Results]) -> str:
    """A Markdown table for each result file, with the conditions that it was measured in."""
    return '\n\n'.join(f'{table(r)}\n\n{conditions(r)}' for r in results)


def table(results: Results, against_roofline: bool = True) -> str:
    """One row per model, one column per way to run it, in the faster of the memory formats that were tried."""
    if results.settings.mode == 'memory':
        return memory_table(results)
    columns = {column(row.case, results): None for row in results.rows if row.samples_ms}
    inference = results.settings.mode != 'training'
    header = ['model', 'top-1 %', 'params', *(['MACs'] if inference else []), *columns,
              *(['roofline'] if inference and against_roofline else [])]
    lines = []
    for name in {row.case.model: None for row in results.rows}:
        rows = [row for row in results.rows if row.case.model == name]
        cells = [f'`{name}`', accuracy(name), f'{max(row.params for row in rows) / 1e6:.1f} M']
        if inference:
            cells.append(next((f'{row.work.macs / 1e9:.2f} G' for row in rows if row.work), ''))
        cells += [value([row for row in rows if column(row.case, results) == c], results) for c in columns]
        if inference and against_roofline:
            cells.append(roofline(rows, results))
        lines.append(cells)
    return markdown(header, lines)


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """An aligned table, the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    divider = ['-' * width if i == 0 else '-' * (width - 1) + ':' for i, width in enumerate(widths)]
    return '\n'.join(
        '| ' + ' | '.join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        + ' |' for line in [header, divider, *lines])


def column(case: Case, results: Results) -> str:
    """What tells the ways to run a model apart, in this run."""
    settings = results.settings
    parts = [case.runtime]
    if len(settings.dtypes) > 1 or case.dtype != 'float32':
        parts.append(case.dtype)
    if len(settings.fused) > 1 and not case.fused:
        parts.append('not fused')
    if settings.batch_sizes:
        parts.append(f'batch {case.batch_size}')
    return ', '.join(parts)


def value(rows: list[Row], results: Results) -> str:
    """A cell: the least milliseconds, or for throughput the most images per second and, in a sweep, their batch."""
    timed = [row for row in rows if row.samples_ms]
    if not timed:
        return rows[0].status.split(':')[0] if rows else ''
    best = max(timed, key=images_per_s)
    if results.settings.mode == 'throughput':
        return f'{images_per_s(best):,.0f}' + ('' if results.settings.batch_sizes else f' ({best.case.batch_size})')
    ms = statistics.median(best.samples_ms)
    text = f'{ms:,.0f}' if ms >= 100 else f'{ms:.3g}'
    return text if best.memory_mb is None else f'{text} ({best.memory_mb:,.0f} MB)'


def roofline(rows: list[Row], results: Results) -> str:
    """The roofline in float32, or in the first dtype, and how near the fastest case comes to it."""
    rows = [row for row in rows if row.samples_ms]
    dtype = 'float32' if any(row.case.dtype == 'float32' for row in rows) else results.settings.dtypes[0]
    rows = [row for row in rows if row.case.dtype == dtype]
    if not rows:
        return ''
    best = min(rows, key=lambda row: statistics.median(row.samples_ms) / row.case.batch_size)
    least = best.roofline_ms or 0
    ratio = statistics.median(best.samples_ms) / least
    if results.settings.mode == 'throughput':
        return f'{1e3 * best.case.batch_size / least:,.0f} ({1 / ratio:.0%})'
    return f'{least:.3g} (x {ratio:.2f})'


def images_per_s(row: Row) -> float:
    return 1e3 * row.case.batch_size / statistics.median(row.samples_ms)


def accuracy(name: str) -> str:
    model = find(name)
    plain = f'{model.top1:.1f}' if model.top1 else ''
    distilled = f'{model.top1_distilled:.1f} (d)' if model.top1_distilled else ''
    return ', '.join(filter(None, [plain, distilled]))


def latencies(results: Results) -> dict[str, dict[str, float]]:
    """Milliseconds of the fused models, by column and model, in the faster memory format."""
    times: dict[str, dict[str, float]] = {}
    for row in results.rows:
        if row.samples_ms and row.case.fused:
            models = times.setdefault(column(row.case, results), {})
            ms = statistics.median(row.samples_ms)
            models[row.case.model] = min(ms, models.get(row.case.model, ms))
    return times


def memory_table(results: Results) -> str:
    """What autograd keeps of each image, and the most that a training step had in use, in MiB."""
    columns = {column(row.case, results): None for row in results.rows if row.kept_mb is not None}
    header = ['model', 'params', *columns, *(f'peak, {c}' for c in columns)]
    lines = []
    for name in {row.case.model: None for row in results.rows}:
        rows = {column(row.case, results): row for row in results.rows if row.case.model == name}
        cells = [('{:.1f}', row.kept_mb) for row in map(rows.get, columns) if row]
        cells += [('{:,.0f}', row.memory_mb) for row in map(rows.get, columns) if row]
        lines.append([f'`{name}`', f'{max(row.params for row in rows.values()) / 1e6:.1f} M',
                      *(text.format(number) if number is not None else '' for text, number in cells)])
    return markdown(header, lines)


def machine(results: Results) -> str:
    """Device, threads and batch of a run."""
    settings = results.settings
    name = results.machine.get('gpu', results.machine['cpu'])
    parts = [re.sub(r'\((R|TM)\)', '', name), f'batch {settings.batch_size}']
    if settings.device == 'cpu':
        parts.append(f'{settings.threads} thread{"s" * (settings.threads > 1)}')
    return ', '.join(parts)


def conditions(results: Results) -> str:
    """What the numbers are, and what they were taken on."""
    machine, settings, peak = results.machine, results.settings, results.peak
    batches = 'batches of ' + ', '.join(map(str, settings.batch_sizes))
    what = {
        'latency': f'Milliseconds for a batch of {settings.batch_size}',
        'throughput': f'Images per second at {batches}' if settings.batch_sizes else
                      'Images per second at the best batch size (in brackets)',
        'training': f'Milliseconds for a training step of {settings.batch_size} images (and the most memory it uses)',
        'memory': f'MiB per image that autograd keeps for the backward pass, and MiB that a step of '
                  f'{settings.batch_size} images has in use at its peak',
    }[settings.mode]
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    computes = ', '.join(f'{rate / 1e9:,.0f} GMAC/s in {dtype}' for dtype, rate in peak.compute_macs_per_s.items())
    timed = f', medians of {settings.rounds * settings.iterations} iterations in {settings.rounds} interleaved rounds'
    lines = [
        f'{what}{"" if settings.mode == "memory" else timed}.',
        f'{machine.get("gpu", machine["cpu"])}, {settings.threads} CPU thread{"s" * (settings.threads > 1)}'
        f'{"" if settings.device == "cpu" else ", on " + settings.device}, allocator: {machine["allocator"]}; '
        f'{versions}, Python {machine["python"]}; commit {machine.get("commit", "unknown")}, {machine["date"]}.',
        f'The machine\'s peaks in the same run: compute (matmul) {computes}; '
        f'memory bandwidth {peak.bandwidth_bytes_per_s / 1e9:,.0f} GB/s.',
        f'`{results.command}`',
    ]
    if settings.mode == 'memory':
        del lines[2]
    held = {row.gpu_state['throttle_reasons'] for row in results.rows if row.gpu_state}
    if held:
        lines.append(f'Clocks: {states(results.rows)}; throttle reasons seen: {", ".join(sorted(held))}.')
    missing = {column(row.case, results) for row in results.rows} - {
        column(row.case, results) for row in results.rows if row.samples_ms or row.kept_mb is not None}
    if missing:
        lines.append(f'Tried, but not available here: {"; ".join(sorted(missing))}.')
    if settings.smoke:
        lines.insert(0, f'**{SMOKE}**')
    return '\n'.join(lines)


def states(rows: Sequence[Row]) -> str:
    """The range of clock and power over the models."""
    found = [row.gpu_state for row in rows if row.gpu_state]
    return ', '.join(
        f'{min(float(state[key]) for state in found):.0f} to {max(float(state[key]) for state in found):.0f} {unit}'
        for key, unit in (('sm_mhz', 'MHz'), ('power_w', 'W')))
