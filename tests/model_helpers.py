"""Models with weights that matter, and how to compare what they compute."""
import re

import timm
import torch

SIZES = ('gmnet_s1', 'gmnet_s2', 'gmnet_s3', 'gmnet_s4')


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


def as_features(model: torch.nn.Module) -> dict:
    """Weights of a classifier under the names that timm's `features_only` gives them."""
    return {key.replace('stem.', 'stem_').replace('stages.', 'stages_'): value
            for key, value in model.state_dict().items() if key.startswith(('stem.', 'stages.'))}


def overfit(model: torch.nn.Module, loss, steps: int, lr: float = 1e-3) -> float:
    """Train on one batch, returns its last loss relative to its first. The first step has to reach the stem."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        if len(losses) == 1:
            (stem,) = [p for name, p in model.named_parameters() if re.search(r'stem[._]0\.conv\.weight$', name)]
            assert stem.grad.abs().sum() > 0
        optimizer.step()
    return (losses[-1] / losses[0]).item()
