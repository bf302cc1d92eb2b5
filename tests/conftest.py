import pytest
import timm
import torch

SIZES = ('gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Give norms and layer scales values that matter; fresh ones are the identity or next to nothing."""
    for name, p in model.named_parameters():
        if name.endswith('gamma'):
            torch.nn.init.uniform_(p, 0.1, 0.5)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, std=0.1)
            torch.nn.init.normal_(m.running_mean, std=0.1)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


def create(name: str = 'gmnet_s1', **kwargs) -> torch.nn.Module:
    """A model in evaluation mode with random, non-trivial weights."""
    return randomize(timm.create_model(name, **kwargs)).eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / expected.norm()).item()
