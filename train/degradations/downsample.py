"""Low resolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation
from train.degradations.remedies import enlarge

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@DEGRADATIONS.register("downsample")
@dataclass(frozen=True)
class Downsample(Degradation):
    """Antialiased bicubic reduction: the usual degradation of super-resolution; there is nothing random in it.

    Keys' kernel with a = -1/2, stretched by ``scale``, as in Pillow, and in MATLAB's ``imresize``, by which most
    published test images were made. Beyond the border these two take no pixel and mirror the image, respectively: this
    one agrees with Pillow everywhere, and with MATLAB but for a border of two small pixels.

    :param scale: 2, 3, 4, ...: the factor by which both sides shrink.
    :raises ValueError: ``scale`` is not an integer > 1; on use: an image's sides are no multiples of it.
    """

    scale: int = 2

    name = "downsample"
    remedy = "bicubic"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int) or self.scale < 2:
            raise ValueError(f"scale must be an integer > 1, not {self.scale!r}")

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        height, width = image.shape[1:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"images of {height} x {width} pixels cannot be reduced by {self.scale} without a rest")
        size = (height // self.scale, width // self.scale)
        # Bicubic overshoots at edges; a stored low-resolution image could not.
        small = torch.nn.functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)
        return small[0].clamp_(0, 1)

    def restore(self, degraded: Tensor) -> Tensor:
        """Bicubic interpolation."""
        return enlarge(degraded.cpu()[None], self.scale)[0]
