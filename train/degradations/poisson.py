"""The noise of counting photons."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.degradations.base import DEGRADATIONS, Degradation, Remedy
from train.degradations.bm3d import BM3D, bm3d, bm3d_settings
from train.degradations.remedies import anscombe, inverse_anscombe, non_local_means, non_local_means_settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST = 1e6  # beyond, the noise is below that of 10 bits, and float32 soon cannot count singly


@DEGRADATIONS.register("poisson")
@dataclass(frozen=True)
class Poisson(Degradation):
    """Poisson noise: ``k / peak`` with ``k`` counts of the mean ``peak * x``.

    Not clipped: where the image is 1, half of the pixels count more than ``peak``. Where it is below 0 (an earlier part
    of a chain may have left it there) nothing is counted.

    :param peak: how many photons a pixel of value 1 counts on average; the fewer, the more noise.
    :raises ValueError: ``peak`` is not above 0 and at most 10^6.
    """

    peak: float = 30.0

    name = "poisson"
    remedy = "Anscombe + non-local means"

    def __post_init__(self) -> None:
        if not 0 < self.peak <= _MOST:
            raise ValueError(f"peak must be a number of photons above 0 and at most {_MOST:,.0f}, not {self.peak!r}")
        # Poisson(1) and Poisson(1.0) are equal, so they have to be one in the seeds of the test images, too.
        object.__setattr__(self, "peak", float(self.peak))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import torch

        counts = torch.poisson(image.clamp(min=0).cpu() * self.peak, generator=generator)
        return (counts / self.peak).to(image.device)

    def restore(self, degraded: Tensor) -> Tensor:
        """The Anscombe transform makes the noise alike everywhere, non-local means removes it, and the exact unbiased
        inverse goes back."""
        return self._restored(degraded, non_local_means)

    def _restored(self, degraded: Tensor, denoise: Callable[[Tensor, float], Tensor]) -> Tensor:
        """:meth:`restore` of an image or of several, with any means against white noise."""
        import torch

        stabilized = anscombe(degraded.cpu().double().numpy() * self.peak)
        # In units of the transformed range: what removes white noise then sees an image in about [0, 1].
        unit = 2 * math.sqrt(self.peak + 3 / 8)
        denoised = denoise(torch.from_numpy(stabilized / unit).float(), 1 / unit)
        return torch.from_numpy(inverse_anscombe(denoised.double().numpy() * unit) / self.peak).float()

    @property
    def remedies(self) -> dict[str, Remedy]:
        settings = {"peak": self.peak} | dict(bm3d_settings())
        return super().remedies | {
            BM3D: Remedy("Anscombe + BM3D", lambda images: self._restored(images, bm3d), settings)
        }

    @property
    def remedy_settings(self) -> Mapping[str, Any]:
        return {"peak": self.peak} | non_local_means_settings()
