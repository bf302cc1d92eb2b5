"""Progress on standard error: a bar on a terminal, a plain line every so often in a log."""
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from gmnet_timm.frequency.processes import is_first

T = TypeVar('T')

SECONDS = 10.  # between two lines


def progress(items: Iterable[T], title: str, unit: str, *, show: bool = True) -> Iterator[T]:
    """Hand items on, and say how far it is.

    Args:
        items: What is worked through, with or without a length.
        title: What is done, for the start of the line.
        unit: What an item is.
        show: False for silence. Of several processes only the first one says it.
    """
    if not show or sys.stderr is None or not is_first():
        yield from items
    elif sys.stderr.isatty():
        from tqdm import tqdm  # comes with huggingface_hub
        yield from tqdm(items, desc=title, unit=unit, leave=False)
    else:
        yield from _in_lines(items, title, unit)


def _in_lines(items: Iterable[T], title: str, unit: str) -> Iterator[T]:
    try:
        total = f' of {len(items)}'  # type: ignore[arg-type]
    except TypeError:  # a stream
        total = ''
    start = said = time.monotonic()
    for i, item in enumerate(items):
        yield item
        now = time.monotonic()
        if now - said >= SECONDS:
            said = now
            print(f'{title}: {unit} {i + 1}{total}, {now - start:.0f} s', file=sys.stderr, flush=True)
