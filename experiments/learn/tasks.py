"""Tasks in which every frequency carries equally much: what is learned late is the network's doing.

Sinusoids: regression of a sum of sinusoids of equal amplitude and random phase on a circle. The network sees
(cos t, sin t), so that no point of the interval is special and frequencies are those of the Fourier series.

Band images: each radial band of the image carries one bit, and the best possible observer reads every band equally
well. The background is Gaussian, white or pink (amplitude 1 / radius). Of a `pattern`, the bit is the sign: the best
observer is linear. Of a `texture`, the bit is which of two orientations of the band has more power: the mean of an
image says nothing, and the best observer is quadratic. One band in the middle carries nothing, its bit is a coin.

The best possible accuracy, in closed form. Let the band hold n independent complex frequencies whose background has
unit power after whitening (each n counts a frequency and its conjugate once).

    pattern  added with whitened amplitudes w: the statistic Re sum conj(w) x is normal with mean +-|w|^2 and variance
             |w|^2 / 2, so that the accuracy is Phi(sqrt(2) |w|).
    texture  n frequencies of each orientation, with powers in the ratio q: the bit is which sum of squares is larger.
             Their ratio is q times a variable of the F distribution with (2n, 2n) degrees of freedom, so that the
             accuracy is F(q).

Both are solved for the strength at which the accuracy is `IDEAL`.
"""
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy import special, stats

from gmnet_timm.errors import UserError

__all__ = ['IDEAL', 'TASKS', 'BandImages', 'Sinusoids', 'create_task']

IDEAL = .95  # accuracy of the best observer in every band
EDGES = (1., 2.4, 3.8, 5.2, 6.6, 8.)  # radii between bands, in cycles per image of SIZE
EMPTY = 2  # the band that carries nothing
SIZE, PATCH = 16, 2
GRID = SIZE // PATCH
TASKS = ('regression', 'pattern-white', 'pattern-pink', 'texture-white', 'texture-pink')


def create_task(name: str, seeds: Sequence[int]) -> 'Sinusoids | BandImages':
    """A task with the data of these seeds, one of `TASKS`.

    Raises:
        UserError: There is no such task.
    """
    if name not in TASKS:
        raise UserError(f'The tasks are {", ".join(TASKS)}, got {name}.')
    kind, _, background = name.partition('-')
    return BandImages(kind, background, seeds) if background else Sinusoids(seeds)


@dataclasses.dataclass(frozen=True)
class Sinusoids:
    """Regression of a sum of sinusoids of equal amplitude and random phases, scaled to variance 1."""

    seeds: Sequence[int]
    frequencies: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    points: int = 128

    @property
    def bands(self) -> tuple[str, ...]:
        return tuple(map(str, self.frequencies))

    @property
    def high(self) -> list[bool]:
        return [i >= len(self.frequencies) // 2 for i in range(len(self.frequencies))]

    @property
    def network(self) -> dict[str, Any]:
        return dict(inputs=2, outputs=1, width=24, blocks=3)

    @functools.cached_property
    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, (R, 2, points) and (R, 1, points)."""
        return self.at(0.)

    def at(self, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        """As `data`, at points that are shifted by a part of their distance: .5 for those furthest from training."""
        t = 2 * math.pi * (torch.arange(self.points, dtype=torch.float64) + shift) / self.points
        k = torch.tensor(self.frequencies, dtype=torch.float64)
        phases = 2 * math.pi * torch.stack([
            torch.rand(len(k), generator=_generator(seed, 1), dtype=torch.float64) for seed in self.seeds])
        y = (k[:, None] * t + phases[:, :, None]).sin().sum(1, keepdim=True) * math.sqrt(2 / len(k))
        return torch.stack([t.cos(), t.sin()]).float().expand(len(y), -1, -1), y.float()

    @property
    def evaluation(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.data

    @staticmethod
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean squared error of each replica, (R,). 1 is the error of the constant 0."""
        return (output - target).square().mean((1, 2))

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Relative squared error of each frequency, (R, bands): 0 is learned, 1 is untouched, or that it diverged."""
        error, wanted = (
            torch.fft.rfft(x.double())[:, 0, list(self.frequencies)].abs().square() for x in (output - target, target))
        return (error / wanted).nan_to_num(1., 1.)


@dataclasses.dataclass(frozen=True)
class BandImages:
    """Images (1 channel, 16x16) of which each radial band carries one bit.

    Attributes:
        kind: 'pattern' or 'texture'.
        background: 'white' or 'pink'.
        seeds: Of each replica: its patterns, its images for training and for evaluation.
        batch_size: Images per replica.
        eval_size: Images of the evaluation per replica.
    """

    kind: str
    background: str
    seeds: Sequence[int]
    batch_size: int = 8
    eval_size: int = 512

    @property
    def bands(self) -> tuple[str, ...]:
        """Middle radius of each band."""
        return tuple(f'{(a + b) / 2:g}' for a, b in zip(EDGES, EDGES[1:]))

    @property
    def high(self) -> list[bool]:
        return [i > EMPTY for i in range(len(self.bands))]

    @property
    def network(self) -> dict[str, Any]:
        return dict(
            inputs=PATCH ** 2, outputs=len(self.bands), width=16, blocks=2, grid=GRID, pooled=self.kind == 'texture')

    @functools.cached_property
    def _generators(self) -> list[torch.Generator]:
        return [_generator(seed, 2) for seed in self.seeds]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """New images as the network takes them, (R, 4, images * 64), and their bits, (R, bands, images)."""
        images, bits = self.images(self.batch_size, self._generators)
        return patches(images), bits

    @functools.cached_property
    def evaluation(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, bits = self.images(self.eval_size, [_generator(seed, 3) for seed in self.seeds])
        return patches(images), bits

    def images(self, count: int, generators: Sequence[torch.Generator]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (R, count, 16, 16) of unit variance, and bits (R, bands, count), 0 or 1."""
        noise = torch.stack([torch.randn(count, SIZE, SIZE, generator=g) for g in generators])
        bits = torch.stack([torch.randint(2, (len(self.bands), count), generator=g) for g in generators]).float()
        spectrum = torch.fft.rfft2(noise, norm='ortho')
        signs = 2 * bits - 1
        if self.kind == 'pattern':
            spectrum = spectrum + torch.einsum('rbn,rbvu->rnvu', signs.to(spectrum.dtype), self._patterns)
        else:
            spectrum = spectrum * (1 + torch.einsum('rbn,bvu->rnvu', signs, self._contrasts)).sqrt()
        return torch.fft.irfft2(spectrum * amplitudes(self.background), s=(SIZE, SIZE), norm='ortho'), bits

    @functools.cached_property
    def _patterns(self) -> torch.Tensor:
        """Whitened spectrum of each band's pattern, (R, bands, 16, 9): random phases, equal amplitudes."""
        phases = torch.stack([
            torch.fft.rfft2(torch.randn(len(self.bands), SIZE, SIZE, generator=_generator(seed, 4)))
            for seed in self.seeds])
        strengths = torch.tensor(pattern_strengths())[:, None, None]
        return phases / phases.abs().clamp(min=1e-12) * band_masks() * strengths

    @functools.cached_property
    def _contrasts(self) -> torch.Tensor:
        """Share by which a bit moves power from one orientation to the other, (bands, 16, 9), signed."""
        q = torch.tensor(texture_ratios())[:, None, None]
        return band_masks() * orientation() * (q - 1) / (q + 1)

    @staticmethod
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the bits of each replica, (R,)."""
        return F.binary_cross_entropy_with_logits(output, target, reduction='none').mean((1, 2))

    def score(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Accuracy of each band, (R, bands)."""
        return ((output > 0) == (target > .5)).double().mean(-1)


def patches(images: torch.Tensor) -> torch.Tensor:
    """Images (R, N, 16, 16) as 2x2 patches: pixels as channels, (R, 4, N * 64)."""
    x = images.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # (R, N, rows, 2, columns, 2)
    return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 2).flatten(2)


@functools.lru_cache
def radii() -> torch.Tensor:
    """Radius of each frequency of `rfft2`, (16, 9)."""
    return (torch.fft.fftfreq(SIZE, 1 / SIZE)[:, None] ** 2 + torch.fft.rfftfreq(SIZE, 1 / SIZE) ** 2).sqrt()


@functools.lru_cache
def band_masks() -> torch.Tensor:
    """1 where a frequency belongs to a band, (bands, 16, 9)."""
    return torch.stack([((radii() >= a) & (radii() < b)).float() for a, b in zip(EDGES, EDGES[1:])])


@functools.lru_cache
def orientation() -> torch.Tensor:
    """1 for frequencies of more cycles over the width than over the height, -1 for the others, 0 for diagonals."""
    v, u = torch.fft.fftfreq(SIZE, 1 / SIZE)[:, None].abs(), torch.fft.rfftfreq(SIZE, 1 / SIZE)
    return torch.sign(u - v)


@functools.lru_cache
def independent_modes() -> torch.Tensor:
    """1 for one of each two conjugate frequencies of `rfft2`, (16, 9): its first column holds both."""
    half = torch.ones(SIZE, SIZE // 2 + 1)
    half[SIZE // 2 + 1:, 0] = 0
    return half


@functools.lru_cache
def amplitudes(background: str) -> torch.Tensor:
    """Amplitude of the background by frequency, (16, 9), for pixels of unit variance."""
    amplitude = torch.ones_like(radii()) if background == 'white' else 1 / radii().clamp(min=1)
    both = torch.full((SIZE // 2 + 1,), 2.)
    both[[0, -1]] = 1
    return amplitude / ((amplitude.square() * both).sum() / SIZE ** 2).sqrt()


def pattern_strengths() -> list[float]:
    """Whitened amplitude of each frequency of a pattern, by band."""
    wanted = float(special.ndtri(IDEAL)) / math.sqrt(2)
    counts = (band_masks() * independent_modes()).sum((1, 2)).tolist()
    return [0. if i == EMPTY else wanted / math.sqrt(n) for i, n in enumerate(counts)]


def texture_ratios() -> list[float]:
    """Power of one orientation over the other, by band."""
    counts = (band_masks() * independent_modes() * (orientation() > 0)).sum((1, 2)).tolist()
    f = stats.f
    return [1. if i == EMPTY else float(f.ppf(IDEAL, 2 * n, 2 * n)) for i, n in enumerate(counts)]


def _generator(seed: int, stream: int) -> torch.Generator:
    """Random numbers of a replica for one purpose, apart from those of its weights."""
    return torch.Generator().manual_seed(1_000_003 * stream + seed)
