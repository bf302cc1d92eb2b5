"""The device that a command runs on."""
import torch

from gmnet_timm.errors import UserError

__all__ = ['resolve_device']


def resolve_device(name: str) -> str:
    """Check that a device can be used.

    Args:
        name: A device of torch, or 'auto' for a GPU if there is one.

    Raises:
        UserError: There is no such device here.
    """
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f'Cannot use device {name}: {e}') from e
    return name
