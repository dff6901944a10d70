"""The noise of counting photons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.degradations.base import DEGRADATIONS, Degradation
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
        import torch

        stabilized = anscombe(degraded.cpu().double().numpy() * self.peak)
        # In units of the transformed range: non-local means then sees an image in about [0, 1], as Gaussian's does.
        unit = 2 * math.sqrt(self.peak + 3 / 8)
        denoised = non_local_means(torch.from_numpy(stabilized / unit).float(), 1 / unit)
        return torch.from_numpy(inverse_anscombe(denoised.double().numpy() * unit) / self.peak).float()

    @property
    def remedy_settings(self) -> Mapping[str, Any]:
        return {"peak": self.peak} | non_local_means_settings()
