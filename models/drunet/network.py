"""DRUNet (Zhang et al. 2021): a U-Net of residual blocks, for denoising and for super-resolution."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.drunet import DRUNetOptions

FIRST_STEP = 0.1  # of a residual block's second convolution, in units of PyTorch's initialization


class ResidualBlock(nn.Module):
    """``x + conv(relu(conv(x)))`` at constant width; at first it adds little, as in EDSR (arXiv:1707.02921)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, padding=1),
        )
        for parameter in self.body[2].parameters():
            parameter.data.mul_(FIRST_STEP)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _blocks(features: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(features) for _ in range(count)))


class DRUNet(nn.Module):
    """A U-Net whose levels are residual blocks and whose skips are added, not concatenated.

    K. Zhang et al., *Plug-and-Play Image Restoration with Deep Denoiser Prior*, IEEE TPAMI 2021, arXiv:2008.13751,
    section 3.1. What differs, for trainings that are short and of one noise level:

    * no map of the noise level beside the image;
    * a *global skip*: the network predicts what to add to its input, and its last convolution starts at zero, so that
      the untrained network *is* the identity, or bicubic interpolation (``scale`` 2, 3 and 4, where it refines the
      enlarged image);
    * convolutions have biases;
    * squares of pixels may become channels first (``unshuffle``), as in FFDNet (arXiv:1710.04039).

    The activation is ReLU, as in the paper: trainings with PReLU diverged at a learning rate of 2e-3.

    Sides that are no multiples of ``unshuffle * 2 ** (levels - 1)`` are padded by repeating the border, and cut again.

    Parameters at one channel: 564,420 (32 features, 3 levels, 1 block, unshuffle 2); the defaults, which are the
    paper's: 32,650,753.

    :param options: depth, width and layers; :class:`DRUNetOptions` has refused what is out of range.
    :param channels: image channels, in and out.
    :param scale: 1 (denoising), 2, 3 or 4.
    :raises ValueError: an argument out of range, named in the message.
    """

    def __init__(self, options: DRUNetOptions | None = None, *, channels: int, scale: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"DRUNet: channels must be at least 1, not {channels}")
        if scale not in (1, 2, 3, 4):
            raise ValueError(f"DRUNet: scale must be one of 1, 2, 3, 4, not {scale}")
        options = options or DRUNetOptions()
        widths = [options.features * 2**level for level in range(options.levels)]
        self.scale = scale
        self.unshuffle = options.unshuffle
        self.multiple = options.unshuffle * 2 ** (options.levels - 1)
        self.head = nn.Conv2d(channels * options.unshuffle**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(_blocks(width, options.blocks) for width in widths[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in pairwise(widths))
        self.bottom = _blocks(widths[-1], options.blocks)
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_blocks(width, options.blocks) for width in widths[:-1])
        self.tail = nn.Conv2d(widths[0], channels * options.unshuffle**2, 3, padding=1)
        for parameter in self.tail.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H * scale, W * scale]``; the values are not clipped."""
        if self.scale != 1:
            x = F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")
        features = self.head(F.pixel_unshuffle(padded, self.unshuffle))
        skips = []
        for blocks, shrink in zip(self.down, self.shrink, strict=True):
            features = blocks(features)
            skips.append(features)
            features = shrink(features)
        features = self.bottom(features)
        for blocks, grow, skip in zip(reversed(self.up), reversed(self.grow), reversed(skips), strict=True):
            features = blocks(grow(features) + skip)
        correction = F.pixel_shuffle(self.tail(features), self.unshuffle)
        return x + correction[..., :height, :width]
