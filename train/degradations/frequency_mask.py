"""High frequencies that are missing: Frepa's frequency mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.grids import cells, check_grid, check_range, uniform
from train.frequencies import filtered

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@DEGRADATIONS.register("frequency-mask")
@dataclass(frozen=True)
class FrequencyMask(Degradation):
    """Each patch of a grid over the spectrum, but for the four in its center, becomes 0 with a probability that is
    drawn for the image (Frepa, Chu et al., arXiv:2407.14651).

    From the published code: the grid, its four central patches, the range of the probability. Two things differ. The
    code draws noise in the place of what it removes, with the mean and spread of the *image*'s patch, which beside a
    spectrum is nothing: here it is zero. And the code masks a frequency without its opposite, so that taking the real
    part gives back half of what was removed; here both go together. The patches are drawn on the half plane that
    ``rfft2`` has (columns 0 to N/2); in the two columns that are their own opposites (0, and N/2 of an even width),
    rows above 0 decide for those below.

    With 128 pixels a patch has 4 x 4 frequencies, and those of rows -4 to 3 and columns 0 to 3 always stay.

    :param low: least probability that a patch is removed.
    :param high: greatest probability.
    :param grid: patches along each side of the whole spectrum.
    :raises ValueError: an argument is out of range.
    """

    low: float = 0.5
    high: float = 0.75
    grid: int = 32

    name = "frequency-mask"

    def __post_init__(self) -> None:
        check_range(self.low, self.high)
        check_grid(self.grid)
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return filtered(image, self._kept(image.shape[1], image.shape[2], generator).to(image))

    def _kept(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Which frequencies stay, ``bool [height, width // 2 + 1]``, in the order of ``rfft2``."""
        import torch

        # Counted from frequency 0, the patches of an even grid are those of the spectrum with 0 in its middle.
        rows, columns = cells(height, self.grid), cells(width, self.grid)
        share = uniform(self.low, self.high, generator)
        kept = torch.rand(int(rows.max()) + 1, int(columns.max()) + 1, generator=generator) >= share
        kept[rows[[0, -1]][:, None], columns[[0, -1]]] = True  # of frequency 0 and of -1
        half = kept[rows[:, None], columns[: width // 2 + 1]]
        for column in {0, *([width // 2] if width % 2 == 0 else [])}:
            above = torch.arange(1, (height + 1) // 2)
            half[-above, column] = half[above, column]
        return half
