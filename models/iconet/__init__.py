"""ICONet by name, and its options; the layers are in :mod:`models.iconet.network`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from models import IP
from models.registry import at_least

if TYPE_CHECKING:
    from models.iconet.network import ICONet

REC_WEIGHT = 0.2
"""Of the reconstruction loss, beside 0.8 for the super-resolution loss: the weights of T2Net (MICCAI 2021)."""


@dataclass(frozen=True)
class ICONetOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    blocks: int = 8
    """Blocks of each branch, in each stage of x2."""
    features: int = 64
    """Width of both branches, a multiple of 4."""
    fusion: bool = True
    """Whether the two branches exchange features after every block."""
    loss: Literal["l1", "mse"] = "l1"
    """Distance of both branches from their targets. l1: T2Net's. mse: that of other networks, faster in short runs."""

    def __post_init__(self) -> None:
        at_least(self, 1, "blocks")
        if self.features < 4 or self.features % 4:
            raise ValueError(f"features must be a multiple of 4, not {self.features}")
        if self.loss not in ("l1", "mse"):
            raise ValueError(f"loss must be 'l1' or 'mse', not {self.loss!r}")


@IP.register("iconet", ICONetOptions, terms={"rec": REC_WEIGHT})
def iconet(options: ICONetOptions, *, channels: int, scale: int = 1) -> ICONet:
    """ICONet with these options; for ``scale`` 2 and 4."""
    from models.iconet.network import ICONet

    return ICONet(options, channels=channels, scale=scale)
