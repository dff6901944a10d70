"""HQG-Net by name, and its options; the layers are in :mod:`models.hqgnet.network`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import IP
from models.registry import at_least

if TYPE_CHECKING:
    from models.hqgnet.network import HQGNet


@dataclass(frozen=True)
class HQGNetOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    width: int = 16
    """Width in front of the first level; each level doubles it, up to eight times."""
    levels: int = 4
    """How often height and width are halved."""
    residual: bool = True
    """Whether the output is a correction of the input's logit; else it is made from nothing, as the figure has it."""
    variational: bool = False
    """Whether a guide is described by a distribution that is drawn from in training; else by a vector."""
    guided: bool = True
    """Whether the guide reaches the enhancer; else zeros do, in training and after it: is the cue used at all?"""

    def __post_init__(self) -> None:
        at_least(self, 1, "width")
        if not 1 <= self.levels <= 6:
            raise ValueError(f"levels must be between 1 and 6, not {self.levels}")


@IP.register("hqgnet", HQGNetOptions)
def hqgnet(options: HQGNetOptions, *, channels: int, scale: int = 1) -> HQGNet:
    """HQG-Net with these options."""
    from models.hqgnet.network import HQGNet

    return HQGNet(options, channels=channels, scale=scale)
