"""Frepa's corruption: an image mask, or missing high and disturbed low frequencies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.frequency_mask import FrequencyMask
from train.degradations.grids import check_share
from train.degradations.histogram_mask import HistogramMask
from train.degradations.low_frequency_noise import LowFrequencyNoise

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@DEGRADATIONS.register("frepa")
@dataclass(frozen=True)
class Frepa(Degradation):
    """Either an equal-histogram image mask, or a high-frequency mask with a low-frequency perturbation: each half of
    the time in the published code (Frepa, Chu et al., arXiv:2407.14651).

    :param mask: probability of the image mask.
    :param low: least share of the patches, of image or spectrum, that are replaced; drawn for each image.
    :param high: greatest share.
    :param fill: of the image mask.
    :raises ValueError: an argument is out of range.
    """

    mask: float = 0.5
    low: float = 0.5
    high: float = 0.75
    fill: str = "gaussian"

    name = "frepa"

    def __post_init__(self) -> None:
        check_share(mask=self.mask)
        HistogramMask(self.low, self.high, self.fill)
        for name in ("mask", "low", "high"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        if float(torch.rand((), generator=generator)) < self.mask:
            return HistogramMask(self.low, self.high, self.fill).degrade(image, generator)
        masked = FrequencyMask(self.low, self.high).degrade(image, generator)
        return LowFrequencyNoise().degrade(masked, generator)
