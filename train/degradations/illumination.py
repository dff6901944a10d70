"""Uneven light, and an exposure that is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DARKEST, BRIGHTEST = 0.4, 1.2  # what the field multiplies with
LEAST_GAMMA, MOST_GAMMA = 0.7, 1.4
GRID = 4  # random numbers along a side of the image
_MOST = 1.5  # beyond, the darkest places would be black


@DEGRADATIONS.register("illumination")
@dataclass(frozen=True)
class Illumination(Degradation):
    """``clip(x * field)^gamma``: a smooth field, the same for all channels, and a camera's curve.

    The field interpolates a grid of 4 x 4 numbers bicubically; these are uniform in [0.4, 1.2], and gamma in
    [0.7, 1.4]. What the field makes brighter than 1 is lost, as on a film. There is no classical remedy: nothing tells
    the light from the scene.

    :param strength: 1: as above; less: all four limits nearer to 1, where the image stays as it is.
    :raises ValueError: ``strength`` is negative or above 1.5.
    """

    strength: float = 1.0

    name = "illumination"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= _MOST:
            raise ValueError(f"strength must be a number from 0 to {_MOST:g}, not {self.strength!r}")
        # Illumination(1) and Illumination(1.0) are equal, so they have to be one in the seeds of the test images, too.
        object.__setattr__(self, "strength", float(self.strength))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        field, gamma = self.drawn(image.shape[1], image.shape[2], generator)
        return (image * field.to(image.device)).clamp(0, 1) ** gamma

    def drawn(self, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, float]:
        """The field, ``float32 [height, width]`` within its limits, and gamma."""
        import torch
        import torch.nn.functional as F

        low, high = (1 + self.strength * (limit - 1) for limit in (DARKEST, BRIGHTEST))
        grid = low + (high - low) * torch.rand(1, 1, GRID, GRID, generator=generator)
        # A cubic overshoots between its points.
        field = F.interpolate(grid, (height, width), mode="bicubic", align_corners=True)[0, 0].clamp(low, high)
        least, most = (1 + self.strength * (limit - 1) for limit in (LEAST_GAMMA, MOST_GAMMA))
        return field, least + (most - least) * float(torch.rand((), generator=generator))
