"""Images that are of low quality by themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import Degradation

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Untouched(Degradation):
    """Nothing is done to the images (``--task none``): they are degraded as they are, and nobody has seen them clean.

    It is not registered, as it is no part of a chain.
    """

    name = "none"
    has_truth = False

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return image
