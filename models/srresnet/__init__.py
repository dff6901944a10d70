"""SR-ResNet by name, and its options; the layers are in :mod:`models.srresnet.network`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models import IP
from models.registry import at_least

if TYPE_CHECKING:
    from models.srresnet.network import SRResNet


@dataclass(frozen=True)
class SRResNetOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    blocks: int = 16
    """Residual blocks; 0 leaves the two convolutions around them."""
    features: int = 64
    """Width of the trunk."""
    kernel: int = 3
    """Side of the first and of the last convolution, odd."""
    norm: Literal["none", "batch"] = "none"
    """Normalization after each convolution of the trunk. kernel 9 with batch: the paper's layers."""

    def __post_init__(self) -> None:
        at_least(self, 0, "blocks")
        at_least(self, 1, "features")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, not {self.kernel}")
        if self.norm not in ("none", "batch"):
            raise ValueError(f"norm must be 'none' or 'batch', not {self.norm!r}")


@IP.register("srresnet", SRResNetOptions)
def srresnet(options: SRResNetOptions, *, channels: int, scale: int = 1) -> SRResNet:
    """SR-ResNet with these options."""
    from models.srresnet.network import SRResNet

    return SRResNet(options, channels=channels, scale=scale)
