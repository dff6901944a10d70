"""UNet (Ronneberger et al. 2015, arXiv:1505.04597) for segmentation, built from MONAI's layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models import SEG
from models.registry import at_least

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class UNetOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    features: int = 16
    """Width of the first level; it doubles at each of the last three of five."""
    norm: Literal["instance", "batch"] = "instance"
    """Normalization after each convolution."""
    dropout: float = 0.0
    """Share of the features that are left out at random in training."""

    def __post_init__(self) -> None:
        at_least(self, 1, "features")
        if self.norm not in ("instance", "batch"):
            raise ValueError(f"norm must be 'instance' or 'batch', not {self.norm!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")


@SEG.register("unet", UNetOptions)
def unet(options: UNetOptions, *, channels: int, num_classes: int) -> nn.Module:
    """``[N, channels, H, W] -> logits [N, num_classes, H, W]`` for any height and width of at least 32 pixels: what the
    five levels leave over is padded inside.

    :raises ValueError: ``channels`` or ``num_classes`` is less than 1.
    """
    for name, value in (("channels", channels), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"UNet: {name} must be at least 1, not {value}")
    from models.trunks import DenseUNet  # takes seconds to import: only when a network is built

    width = options.features
    return DenseUNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=num_classes,
        features=(width, width, 2 * width, 4 * width, 8 * width, width),
        norm=(options.norm, {"affine": True}),
        dropout=options.dropout,
    )
