"""Black patches: the corruption of masked autoencoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.grids import check_grid, check_share, patches

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@DEGRADATIONS.register("zero-mask")
@dataclass(frozen=True)
class ZeroMask(Degradation):
    """A fixed share of the patches of a grid becomes 0, chosen at random.

    K. He et al., *Masked Autoencoders Are Scalable Vision Learners*, arXiv:2111.06377: three quarters of 14 x 14
    patches, which a ViT does not get to see at all. A convolution sees a patch that is not there as a black one; 16 x
    16 patches are ours, so that the corruptions of pre-trainings share a grid.

    :param share: of the patches that become 0, rounded to whole patches.
    :param grid: patches along each side; where it does not divide the side, patches differ by a pixel.
    :raises ValueError: an argument is out of range.
    """

    share: float = 0.75
    grid: int = 16

    name = "zero-mask"

    def __post_init__(self) -> None:
        check_share(share=self.share)
        check_grid(self.grid)
        object.__setattr__(self, "share", float(self.share))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        patch = patches(image.shape[1], image.shape[2], self.grid)
        number = int(patch.max()) + 1
        kept = torch.ones(number, dtype=torch.bool)
        kept[torch.randperm(number, generator=generator)[: round(self.share * number)]] = False
        return torch.where(kept[patch].to(image.device), image, 0.0)
