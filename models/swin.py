"""A Swin Transformer (Liu et al. 2021, arXiv:2103.14030) for diagnosis, built from MONAI's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import VR
from models.registry import at_least

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class SwinOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    features: int = 24
    """Width of the first stage; the embedding is 16 times as wide. A multiple of the heads."""
    depth: int = 2
    """Transformer blocks of each of the four stages, an even number: every other one shifts its windows."""
    heads: int = 3
    """Attention heads of the first stage; they double at each stage."""
    window: int = 7
    """Side of the windows of attention, in patches."""

    def __post_init__(self) -> None:
        at_least(self, 1)
        if self.features % self.heads:
            raise ValueError(f"features must be a multiple of heads ({self.heads}), not {self.features}")
        if self.depth % 2:
            raise ValueError(f"depth must be even, not {self.depth}")


@VR.register("swin", SwinOptions)
def swin(options: SwinOptions, *, channels: int, num_classes: int) -> nn.Module:
    """``[N, channels, H, W] -> logits [N, num_classes]`` for any height and width. With the default options, one
    channel and two classes: 1,595,108 parameters; the embedding is 384 wide at a 32nd of the size.

    :raises ValueError: ``channels`` or ``num_classes`` is less than 1.
    """
    for name, value in (("channels", channels), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"Swin: {name} must be at least 1, not {value}")
    from models.trunks import Swin  # takes seconds to import: only when a network is built

    return Swin(**vars(options), channels=channels, num_classes=num_classes)
