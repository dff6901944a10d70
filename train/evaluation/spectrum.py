"""What is left of every frequency of an image: Fourier ring correlation and energy ratio per radial band.

No window is applied: the jump from one border of an image to the opposite one counts as content, in both images alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.frequencies import radius

HIGHEST = 0.5
"""Cycles per pixel, of the last band: Nyquist's frequency along an axis. The corners beyond it are in no band."""


@dataclass(frozen=True)
class Spectrum:
    """How two sets of images compare, band by band; frequency 0 is in none.

    :param frequencies: the middle of each band in cycles per pixel, ``float64 [B]``.
    :param correlation: Fourier ring correlation, ``float64 [N, B]``: the normalized inner product of the two spectra
        over a band (W. O. Saxton, W. Baumeister, J. Microscopy 127, 1982). 1: equal but for a factor. 0: nothing in
        common, or nothing there. NaN where the clean image has nothing in the band.
    :param energy: energy of the band in the image, in units of that in the clean one, ``float64 [N, B]``; NaN likewise.
    """

    frequencies: Tensor
    correlation: Tensor
    energy: Tensor


def spectrum(images: Tensor, clean: Tensor, bands: int = 16) -> Spectrum:
    """Compares the spectra of images with those of the clean ones, channels together.

    :param images: ``float [N, C, H, W]``.
    :param clean: the same shape.
    :param bands: of equal width between frequency 0 and ``HIGHEST``.
    :raises ValueError: the shapes differ, or the images are too small for a band to have a frequency.
    """
    if images.shape != clean.shape or images.ndim != 4:
        raise ValueError(
            f"images and clean images must share a shape [N, C, H, W], not {list(images.shape)}, {list(clean.shape)}"
        )
    height, width = images.shape[2:]
    distance = radius(height, width).double()
    # Of rfft2, a column stands for its opposite too, but for the two that are their own opposites.
    counts = torch.full((width // 2 + 1,), 2.0, dtype=torch.float64)
    counts[0] = 1
    if width % 2 == 0:
        counts[-1] = 1
    band = (distance * bands / HIGHEST).ceil().long() - 1  # (0, 1/bands] is the first
    inside = (band >= 0) & (band < bands)
    if len(band[inside].unique()) < bands:
        raise ValueError(f"images of {height} x {width} px are too small for {bands} bands")
    one, other = (torch.fft.rfft2(each.double().cpu()) for each in (images, clean))
    weight = counts.expand(height, -1)[inside]

    def summed(values: Tensor) -> Tensor:
        own = (values.sum(1)[:, inside] * weight).contiguous()
        return torch.zeros(len(own), bands, dtype=torch.float64).index_add_(1, band[inside], own)

    cross = summed((one * other.conj()).real)
    power, truth = summed(one.abs().square()), summed(other.abs().square())
    # What rounding leaves where there is nothing must not be correlated.
    least = torch.finfo(torch.float32).eps ** 2 * other.abs().square().sum((1, 2, 3))[:, None]
    known, there = truth > least, power > least
    undefined = torch.full_like(truth, torch.nan)
    correlation = torch.where(there, cross / (power * truth).sqrt(), 0.0)
    middles = (torch.arange(bands, dtype=torch.float64) + 0.5) * HIGHEST / bands
    return Spectrum(middles, torch.where(known, correlation, undefined), torch.where(known, power / truth, undefined))
