"""White Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from train.degradations.base import DEGRADATIONS, Degradation, Remedy
from train.degradations.bm3d import BM3D, bm3d, bm3d_settings
from train.degradations.remedies import non_local_means, non_local_means_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@DEGRADATIONS.register("gaussian")
@dataclass(frozen=True)
class Gaussian(Degradation):
    """White Gaussian noise: ``x + sigma * n``, not clipped, as the noise of a detector is not.

    :param sigma: standard deviation, in units of the image range [0, 1].
    :raises ValueError: ``sigma`` is negative or not finite.
    """

    sigma: float = 0.1

    name = "gaussian"
    remedy = "non-local means"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma must be a finite number >= 0, not {self.sigma!r}")
        # Gaussian(1) and Gaussian(1.0) are equal, so they have to be one in the seeds of the test images, too.
        object.__setattr__(self, "sigma", float(self.sigma))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        noise = torch.randn(image.shape, generator=generator)
        return image + self.sigma * noise.to(image.device)

    def restore(self, degraded: Tensor) -> Tensor:
        """Non-local means, told ``sigma`` as IP has learned it."""
        return non_local_means(degraded.cpu(), self.sigma)

    @property
    def remedy_settings(self) -> Mapping[str, Any]:
        return {"sigma": self.sigma} | non_local_means_settings()

    @property
    def remedies(self) -> dict[str, Remedy]:
        with_bm3d = Remedy("BM3D", partial(bm3d, sigma=self.sigma), {"sigma": self.sigma} | dict(bm3d_settings()))
        return super().remedies | {BM3D: with_bm3d}

    @property
    def noise_level(self) -> float:
        return self.sigma
