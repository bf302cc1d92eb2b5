"""What the tests of spectra share."""
import numpy as np
import timm
import torch


def tiny_gmnet(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('gmnet_s1', base_dim=8, depths=(1, 1, 2, 1), num_classes=3, **kwargs).eval()


def make_batches(*sizes, side=64, channels=3):
    return [(torch.randn(n, channels, side, side), torch.zeros(n, dtype=torch.long)) for n in sizes]


def count_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def numpy_spectrum(maps):
    """Mean over channels of the whole FFT's power by rounded radius, (B, bins)."""
    height, width = maps.shape[-2:]
    power = (np.abs(np.fft.fft2(maps.detach().double().numpy()) / (height * width)) ** 2).mean(1)
    radius = np.hypot(*np.meshgrid(*(np.fft.fftfreq(n) * n for n in (height, width)), indexing='ij'))
    index = np.floor(radius + .5).astype(int).ravel()
    return torch.from_numpy(np.stack([np.bincount(index, p.ravel()) for p in power]))


def assert_power(signal, maps):
    assert signal.size == tuple(maps.shape[-2:])
    torch.testing.assert_close(signal.power, numpy_spectrum(maps), rtol=1e-3, atol=1e-9)
