"""Smooth noise: Frepa's low-frequency perturbation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.grids import uniform
from train.frequencies import filtered, radius

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PUBLISHED_SIDE = 512
"""Of the images that the published numbers are for, in pixels."""


@DEGRADATIONS.register("low-frequency-noise")
@dataclass(frozen=True)
class LowFrequencyNoise(Degradation):
    """Noise whose spectrum falls as ``w = exp(-r^2 / (2 d^2))``, ``r`` in cycles per pixel; the mean of the image stays
    (Frepa, Chu et al., arXiv:2407.14651; its figure says "exponential decay function").

    The published code adds ``w * delta`` to the spectrum of an image of ``N x N`` pixels, ``delta`` real of standard
    deviation ``sigma * F``, ``F`` the largest magnitude of the spectrum (of an image, N^2 times its mean), and takes
    the real part. The noise in the image then has the standard deviation ``sigma * F / N^2 * sqrt(pi) * d * N /
    sqrt(2)``, which grows with N, and as ``delta`` is real each image of noise is its own mirror image. Here it has
    that standard deviation at ``N = 512`` and the same one at every other size (0.0257 for a mean of 0.4 and d = 0.2),
    and no symmetry: it is white noise that was filtered.

    :param low: least ``d``, drawn for each image, in cycles per pixel.
    :param high: greatest ``d``.
    :param sigma: mean of the noise's strength, drawn for each image from a normal distribution, whose sign is dropped.
    :param spread: standard deviation of the strength.
    :raises ValueError: an argument is negative or not finite, or ``low`` is 0 or exceeds ``high``.
    """

    low: float = 0.15
    high: float = 0.25
    sigma: float = 5e-4
    spread: float = 1e-4

    name = "low-frequency-noise"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, not {value!r}")
            object.__setattr__(self, name, float(value))
        if not 0 < self.low <= self.high:
            raise ValueError(f"low must be above 0 and at most high, not {self.low:g} and {self.high:g}")

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        height, width = image.shape[1:]
        decay = uniform(self.low, self.high, generator)
        strength = abs(self.sigma + self.spread * float(torch.randn((), generator=generator)))
        gain = torch.exp(-radius(height, width).square() / (2 * decay**2))
        gain[0, 0] = 0
        white = torch.randn(image.shape, generator=generator)
        largest = torch.fft.rfft2(image).abs().amax((1, 2), keepdim=True) / (height * width)
        # White noise of deviation s has s * sqrt(pi) * d after this filter: s is what makes that the published one.
        deviation = strength * PUBLISHED_SIDE / math.sqrt(2) * largest
        return image + deviation * filtered(white, gain).to(image.device)
