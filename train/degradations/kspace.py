"""Low resolution as a scanner makes it, with or without undersampling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.degradations.base import DEGRADATIONS, Degradation, Remedy
from train.degradations.remedies import enlarge

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BICUBIC = "bicubic"
"""The name of the second remedy in metrics."""


@DEGRADATIONS.register("kspace")
@dataclass(frozen=True)
class KSpace(Degradation):
    """The middle of k-space, of which an accelerated scan leaves out columns: the magnitude image, in [0, 1].

    What is measured is :func:`models.kspace.reduced`; which columns, :func:`models.kspace.cartesian_columns`. Each
    image has columns of its own, the same ones in all its channels. Any image is taken for a magnitude image, also one
    that no scanner has made; what is below 0 in it, as noise is, comes out above. A constant image stays as bright as
    it is.

    :param scale: 1, 2, 3, 4, ...: the factor by which both sides shrink; 1 leaves the whole of k-space.
    :param acceleration: how many times fewer columns are measured, at least 1; 1 leaves none out.
    :param center: share of the columns in the middle that is always measured.
    :raises ValueError: an argument is out of range, or the middle alone has more columns than the acceleration leaves;
        on use: an image's sides are no multiples of ``scale``, or it is complex.
    """

    scale: int = 2
    acceleration: float = 1.0
    center: float = 0.08

    name = "kspace"
    remedy = "zero-filling"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int) or self.scale < 1:
            raise ValueError(f"scale must be an integer >= 1, not {self.scale!r}")
        if not (math.isfinite(self.acceleration) and self.acceleration >= 1):
            raise ValueError(f"acceleration must be a finite number >= 1, not {self.acceleration!r}")
        if not 0 < self.center <= 1:
            raise ValueError(f"center must be above 0 and at most 1, not {self.center!r}")
        if self.acceleration > 1 and self.center > 1 / self.acceleration:
            raise ValueError(
                f"an acceleration of {self.acceleration:g} measures {1 / self.acceleration:.3g} of the columns, and "
                f"the center of {self.center:g} alone would be more"
            )
        # KSpace(2, 4) and KSpace(2, 4.0) are equal, so they have to be one in the seeds of the test images, too.
        for name in ("acceleration", "center"):
            object.__setattr__(self, name, float(getattr(self, name)))

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        from models import kspace

        columns = None
        if self.acceleration > 1:
            columns = kspace.cartesian_columns(image.shape[-1] // self.scale, self.acceleration, self.center, generator)
        return kspace.reduced(image, self.scale, columns).clamp_(0, 1)

    def restore(self, degraded: Tensor) -> Tensor:
        """Zero-filling, which is a sinc interpolation. It knows nothing of the columns that were left out."""
        from models import kspace

        return kspace.enlarged(degraded.cpu(), self.scale)

    @property
    def remedies(self) -> dict[str, Remedy]:
        bicubic = Remedy("bicubic", lambda images: enlarge(images.cpu(), self.scale), self.remedy_settings)
        return super().remedies | {BICUBIC: bicubic}

    @property
    def remedy_settings(self) -> Mapping[str, Any]:
        return dict(vars(self))
