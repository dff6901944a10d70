"""Critics: networks that tell images of a domain from made ones."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from models import CRITIC
from models.registry import at_least

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class PatchCriticOptions:
    """
    :raises ValueError: an option is out of range; the message begins with its name.
    """

    width: int = 16
    """Width in front of the first block; each block doubles it, up to eight times."""
    blocks: int = 3
    """Residual blocks, each of which halves height and width."""

    def __post_init__(self) -> None:
        at_least(self, 1)


@CRITIC.register("patch", PatchCriticOptions)
def patch_critic(options: PatchCriticOptions, *, channels: int) -> nn.Module:
    """``[N, channels, H, W] -> logits [N, 1, H / 2^blocks, W / 2^blocks]``: one for each patch, above 0 where it is
    taken for one of the domain. Without a sigmoid: the losses have it.

    Three residual blocks and a 1 x 1 convolution are drawn in the figure of HQG-Net (arXiv:2307.07829). Parameters at
    one channel: 156,529 (width 16), 2,496,961 (width 64).

    :raises ValueError: ``channels`` is less than 1.
    """
    if channels < 1:
        raise ValueError(f"critic: channels must be at least 1, not {channels}")
    from torch import nn

    from models.blocks import PreActivation, widths

    wide = widths(options.width, options.blocks)
    return nn.Sequential(
        nn.Conv2d(channels, wide[0], 3, padding=1),
        *(PreActivation(inputs, outputs, pool=True) for inputs, outputs in pairwise(wide)),
        nn.LeakyReLU(0.2),
        nn.Conv2d(wide[-1], 1, 1),
    )
