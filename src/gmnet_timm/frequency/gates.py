"""Where does a model multiply features by features? Its gates, found by running it once."""
import torch
from timm.data import resolve_model_data_config
from torch import nn

from gmnet_timm.frequency.tracing import FoundProduct, evaluation_mode, trace, uncompiled

__all__ = ['find_gates', 'find_products']


def find_gates(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, FoundProduct]:
    """The gates of any model: products of two factors that both have an entry per position and channel.

    They are found by what the model computes, not by class: in GmNet, the gated ResNet18 and MobileNetV2, StarNet,
    SwiGLU and gMLP, whoever wrote them, and in feature extractors and torch.fx graphs of these. See `find_products` for
    the arguments, the names, and what is not found.
    """
    return {name: product for name, product in find_products(model, x).items() if product.kind == 'gate'}


def find_products(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, FoundProduct]:
    """Every product of two tensors that depend on the model's input, in the order of one forward pass.

    The pass runs in evaluation mode, and leaves the model as it was. On the meta device it costs next to nothing.
    A square that only goes into a mean and a root, as in RMSNorm, is a statistic and left out. Not found are products
    within one kernel of torch, such as a matrix product, attention or SiLU, and those written as a quotient.

    Args:
        model: Any module that takes one tensor, compiled or not; not what TorchScript or torch.export made of one.
        x: An input. By default an image of zeros, of the size in the model's pretrained_cfg. If it is so small that
            feature maps shrink to one pixel, channel weights there count as gates.

    Returns:
        Products by the name of the module that multiplies, followed by '#2' for its second one, and so on. A torch.fx
        graph multiplies for all its modules: its products are named by what the names of the two modules before them
        share.

    Raises:
        UserError: TorchScript does not tell which module multiplies.
    """
    model = uncompiled(model)
    with evaluation_mode(model):
        return trace(model, _example_input(model) if x is None else x, layouts=False).products


def _example_input(model: nn.Module) -> torch.Tensor:
    p = next(model.parameters(), torch.empty(0))
    channels, height, width = resolve_model_data_config(model)['input_size']
    return torch.zeros(1, getattr(model, 'in_chans', channels), height, width, device=p.device, dtype=p.dtype)
