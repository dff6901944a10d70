"""Only low or only high frequencies: the corruption of masked frequency modeling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.grids import check_share
from train.frequencies import filtered, radius

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@DEGRADATIONS.register("frequency-disc")
@dataclass(frozen=True)
class FrequencyDisc(Degradation):
    """A disc around frequency 0 is all that stays, or all that goes, by the toss of a coin.

    J. Xie et al., *Masked Frequency Modeling for Self-Supervised Visual Pre-Training*, ICLR 2023, arXiv:2206.07706: a
    disc of radius 16 at 224 pixels, each half of the time.

    :param radius: of the disc, in cycles per pixel; 16 / 224 by default.
    :param keep: probability that the disc stays.
    :raises ValueError: an argument is out of range.
    """

    radius: float = 16 / 224
    keep: float = 0.5

    name = "frequency-disc"

    def __post_init__(self) -> None:
        if not 0 < self.radius <= 1:
            raise ValueError(f"radius must be above 0 and at most 1 cycle per pixel, not {self.radius!r}")
        check_share(keep=self.keep)
        object.__setattr__(self, "radius", float(self.radius))
        object.__setattr__(self, "keep", float(self.keep))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        disc = radius(*image.shape[1:]) <= self.radius
        keeps = float(torch.rand((), generator=generator)) < self.keep
        return filtered(image, (disc if keeps else ~disc).to(image))
