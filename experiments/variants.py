"""Activations and gates by name, as functions of tensors."""
import torch
from timm.layers import get_act_layer

from gmnet_timm.errors import UserError

__all__ = ['Variant']

_WRITTEN = {'relu': 'ReLU', 'relu6': 'ReLU6', 'gelu': 'GELU', 'silu': 'SiLU'}


class Variant:
    """An activation or a gate, by name.

    `relu` is relu(z), `relu*x` is the gate relu(z) * z, `relu*v` is relu(z) * v with v from a second linear map, as in
    SwiGLU. Any activation of timm will do; `identity` is a linear network and `identity*x` is z * z.
    """

    def __init__(self, name: str):
        activation, star, factor = name.partition('*')
        try:
            self.act = get_act_layer(activation)()
        except (KeyError, TypeError):  # TypeError: of an empty name
            raise UserError(f'timm has no activation {activation!r}, of {name!r}.') from None
        if star and factor not in ('x', 'v'):
            raise UserError(f'A gate is ACTIVATION*x or ACTIVATION*v, got {name!r}.')
        if any(True for _ in self.act.parameters()):
            raise UserError(f'{activation} has parameters of its own, which would be shared by all seeds.')
        self.activation = activation
        self.factor = factor
        self.branches = 2 if factor == 'v' else 1

    @property
    def label(self) -> str:
        """Name for texts and pictures, such as ReLU6(x)·x."""
        act = 'x' if self.activation == 'identity' else f'{_WRITTEN.get(self.activation, self.activation)}(x)'
        return f'{act}·{self.factor}' if self.factor else act

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """(R, branches * hidden, N) to (R, hidden, N)."""
        if self.factor == 'v':
            z, v = z.chunk(2, 1)
            return self.act(z) * v
        return self.act(z) * z if self.factor == 'x' else self.act(z)
