"""Results of several processes, as torchrun starts them, each with a part of the images."""
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

__all__ = ['gathered', 'interleaved', 'is_first', 'own_part', 'share']

T = TypeVar('T')


def gathered(value: T) -> list[T]:
    """The values of all processes in their order; of one process, its own. Every process has to call this."""
    if not _in_group():
        return [value]
    values: list[T | None] = [None] * _world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def interleaved(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of tensors of which the i-th holds every n-th row of a whole from the i-th on, in the order of the whole."""
    if len(parts) == 1:
        return parts[0]
    rows = sorted((row, part) for part, x in enumerate(parts) for row in range(len(x)))
    return torch.stack([parts[part][row] for row, part in rows])


def own_part(whole: torch.Tensor) -> torch.Tensor:
    """This process's rows of a whole, every n-th one, as `create_band_loader` shares out images."""
    return whole[_rank()::_world_size()]


def share(count: int) -> int:
    """How many of the first images of the whole this process has."""
    return len(range(_rank(), count, _world_size()))


def is_first() -> bool:
    """True for the process that says how far it is, and writes."""
    return _rank() == 0


def _rank() -> int:
    return dist.get_rank() if _in_group() else 0


def _world_size() -> int:
    return dist.get_world_size() if _in_group() else 1


def _in_group() -> bool:
    return dist.is_available() and dist.is_initialized()
