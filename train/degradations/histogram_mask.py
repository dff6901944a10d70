"""Patches whose structure is gone and whose gray values are not: Frepa's image mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.grids import check_grid, check_range, patches, uniform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FILLS = ("gaussian", "shuffle")


@DEGRADATIONS.register("histogram-mask")
@dataclass(frozen=True)
class HistogramMask(Degradation):
    """The equal-histogram image mask of Frepa (Chu et al., arXiv:2407.14651): each patch of a grid is replaced with a
    probability that is drawn for the image.

    From the published code: the grid, the range of the probability, and the filling with Gaussian noise of the patch's
    own mean and standard deviation in each channel, not clipped. That keeps two moments of the histogram; shuffling,
    which is ours, keeps all of it: the pixels of a patch change places, all channels of a pixel together.

    :param low: least probability that a patch is replaced.
    :param high: greatest probability.
    :param fill: ``gaussian`` or ``shuffle``.
    :param grid: patches along each side; where it does not divide the side, patches differ by a pixel.
    :raises ValueError: an argument is out of range.
    """

    low: float = 0.5
    high: float = 0.75
    fill: str = "gaussian"
    grid: int = 16

    name = "histogram-mask"

    def __post_init__(self) -> None:
        check_range(self.low, self.high)
        check_grid(self.grid)
        if self.fill not in FILLS:
            raise ValueError(f"fill must be {' or '.join(FILLS)}, not {self.fill!r}")
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        patch = patches(image.shape[1], image.shape[2], self.grid)
        share = uniform(self.low, self.high, generator)
        replaced = torch.rand(int(patch.max()) + 1, generator=generator) < share
        fill = self._noise if self.fill == "gaussian" else self._shuffled
        filled = fill(image.flatten(1).cpu(), patch.flatten(), generator).view(image.shape)
        return torch.where(replaced[patch].to(image.device), filled.to(image.device), image)

    @staticmethod
    def _noise(pixels: Tensor, patch: Tensor, generator: torch.Generator) -> Tensor:
        """
        :param pixels: ``float32 [C, P]``.
        :param patch: of each pixel, ``int64 [P]``.
        """
        import torch

        count = torch.bincount(patch)

        def mean(values: Tensor) -> Tensor:
            # In double precision the mean of equal pixels is that pixel, and a constant image stays as it is.
            sums = torch.zeros(len(values), len(count), dtype=torch.float64).index_add_(1, patch, values)
            return (sums / count)[:, patch]

        center = mean(pixels.double())
        spread = mean((pixels - center).square()).sqrt()
        noise = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        return (center + spread * noise).float()

    @staticmethod
    def _shuffled(pixels: Tensor, patch: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        shuffled = torch.empty_like(pixels)
        # Sorted by patch and, within a patch, by chance: where the pixels of a patch stood, others of it now stand.
        lots = torch.rand(len(patch), generator=generator, dtype=torch.float64)
        shuffled[:, patch.argsort(stable=True)] = pixels[:, (patch + lots).argsort(stable=True)]
        return shuffled
