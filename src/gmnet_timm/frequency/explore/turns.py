"""Who computes next, and work in the background that says how far it is and can be stopped."""
import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from gmnet_timm.errors import UserError

__all__ = ['Job', 'Polite', 'Turns']

_QUIET = .3  # seconds after a visitor's move in which the background waits for the next one


class Turns:
    """One computation at a time: on two cores, two at once take longer than one after the other.

    What a visitor waits for goes before what runs in the background, which asks for a turn per forward pass.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._busy = False
        self._waiting = 0
        self._last = 0.

    @contextlib.contextmanager
    def visitor(self) -> Iterator[None]:
        """Compute what a visitor waits for."""
        with self._condition:
            self._waiting += 1
            self._condition.wait_for(lambda: not self._busy)
            self._waiting -= 1
            self._busy = True
        try:
            yield
        finally:
            self._last = time.monotonic()
            self._done()

    @contextlib.contextmanager
    def background(self) -> Iterator[None]:
        """Compute while no visitor waits or has just moved something."""
        with self._condition:
            while self._busy or self._waiting or time.monotonic() - self._last < _QUIET:
                self._condition.wait(_QUIET)
            self._busy = True
        try:
            yield
        finally:
            self._done()

    def _done(self) -> None:
        with self._condition:
            self._busy = False
            self._condition.notify_all()


class Polite(nn.Module):
    """A model that waits for its turn before each forward pass."""

    def __init__(self, model: nn.Module, turns: Turns):
        super().__init__()
        self.model = model
        self.num_classes = getattr(model, 'num_classes', None)
        self.turns = turns

    def forward(self, x):
        with self.turns.background():
            return self.model(x)


class _Cancelled(Exception):
    """Somebody has stopped the job."""


class Job:
    """Work in a thread of its own, one at a time.

    Attributes:
        state: '' (never started), 'running', 'done', 'stopped' or 'failed'.
        done: Batches that were worked through.
        total: Batches in all.
        error: Why it failed.
    """

    def __init__(self) -> None:
        self.state = ''
        self.done = self.total = 0
        self.error = ''
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[Callable[[Any], Iterable[Any]]], None], total: Callable[[int], int]) -> bool:
        """Start work unless some is running.

        Args:
            work: Is called with a function that it hands its loader through, as `evaluate_model` does with `watch`.
            total: Number of batches in all, from that of one loader.

        Returns:
            True if it was started.
        """
        with self._lock:
            if self.state == 'running':
                return False
            self.state, self.done, self.total, self.error = 'running', 0, 0, ''
            self._stop.clear()
            self._thread = threading.Thread(target=self._run, args=(work, total), daemon=True)
            self._thread.start()
            return True

    def cancel(self) -> None:
        """Stop it after the batch that it is at."""
        self._stop.set()

    def wait(self) -> None:
        """Wait until it has ended."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, work, total) -> None:
        def watch(loader):
            self.total = total(len(loader))
            for batch in loader:
                yield batch
                self.done += 1
                if self._stop.is_set():
                    raise _Cancelled

        try:
            work(watch)
            self.state = 'done'
        except _Cancelled:
            self.state = 'stopped'
        except UserError as e:
            self.error, self.state = str(e), 'failed'
        except Exception as e:
            self.error, self.state = f'{type(e).__name__}: {e}', 'failed'
            raise
