"""The residual block that HQG-Net's encoders and its critic are made of."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


class PreActivation(nn.Module):
    """A residual block of the kind [activation, convolution] twice, as in StarGAN v2 (arXiv:1912.01865).

    ``(shortcut(x) + body(x)) / sqrt(2)``, which keeps the variance. The shortcut is a 1 x 1 convolution without bias
    where the width changes.

    :param inputs: channels.
    :param outputs: channels.
    :param pool: whether height and width are halved, by averaging.
    :param norm: whether there is an affine instance normalization in front of each activation.
    """

    def __init__(self, inputs: int, outputs: int, *, pool: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.pool = pool
        self.norm1: nn.Module = nn.InstanceNorm2d(inputs, affine=True) if norm else nn.Identity()
        self.norm2: nn.Module = nn.InstanceNorm2d(inputs, affine=True) if norm else nn.Identity()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1)
        self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        body = self._halved(self.conv1(F.leaky_relu(self.norm1(x), 0.2)))
        body = self.conv2(F.leaky_relu(self.norm2(body), 0.2))
        return (self._halved(self.shortcut(x)) + body) / math.sqrt(2)

    def _halved(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if self.pool else x


def widths(first: int, levels: int) -> list[int]:
    """The width in front of the first level and after each: doubled, up to eight times the first.

    >>> widths(16, 4)
    [16, 32, 64, 128, 128]
    """
    return [first * min(2**level, 8) for level in range(levels + 1)]
