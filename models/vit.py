"""A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) for diagnosis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import VR
from models.registry import at_least

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ViTOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    features: int = 192
    """Width of the tokens, a multiple of the heads."""
    depth: int = 6
    """Transformer blocks."""
    heads: int = 3
    """Attention heads."""
    patch: int = 8
    """Side of a patch in pixels, a power of two."""
    side: int = 16
    """Patches along each side that the position embeddings are made for; of images of another size they are
    interpolated."""

    def __post_init__(self) -> None:
        at_least(self, 1)
        if self.features % self.heads:
            raise ValueError(f"features must be a multiple of heads ({self.heads}), not {self.features}")
        if self.patch & (self.patch - 1):
            raise ValueError(f"patch must be a power of two, not {self.patch}")


@VR.register("vit", ViTOptions)
def vit(options: ViTOptions, *, channels: int, num_classes: int) -> nn.Module:
    """``[N, channels, H, W] -> logits [N, num_classes]`` for any height and width. With the default options, one
    channel and two classes: 2,731,586 parameters; the embedding is 192 wide at an eighth of the size.

    :raises ValueError: ``channels`` or ``num_classes`` is less than 1.
    """
    for name, value in (("channels", channels), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"ViT: {name} must be at least 1, not {value}")
    from models.trunks import ViT  # takes seconds to import: only when a network is built

    return ViT(**vars(options), channels=channels, num_classes=num_classes)
