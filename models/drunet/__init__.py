"""A small DRUNet by name, and its options; the layers are in :mod:`models.drunet.network`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import IP
from models.registry import at_least

if TYPE_CHECKING:
    from models.drunet.network import DRUNet


@dataclass(frozen=True)
class DRUNetOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    features: int = 64
    """Width of the first level; it doubles at each further one."""
    levels: int = 4
    """How often the network looks at the image, each time at half the resolution."""
    blocks: int = 4
    """Residual blocks of each level, on the way down and on the way up."""
    unshuffle: int = 1
    """Side of the squares of pixels that become channels before the first level. 2: a quarter of the work."""

    def __post_init__(self) -> None:
        at_least(self, 1)


@IP.register("drunet", DRUNetOptions)
def drunet(options: DRUNetOptions, *, channels: int, scale: int = 1) -> DRUNet:
    """DRUNet with these options."""
    from models.drunet.network import DRUNet

    return DRUNet(options, channels=channels, scale=scale)
