"""SR-ResNet (Ledig et al. 2017) for denoising and for x2, x3 and x4 super-resolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.srresnet import SRResNetOptions

STAGES: dict[int, tuple[int, ...]] = {1: (), 2: (2,), 3: (3,), 4: (2, 2)}
"""The factors of the sub-pixel stages for each scale, as in EDSR: x4 is two stages of 2, x3 a single one of 3."""


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def _norm(kind: str, features: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(features)] if kind == "batch" else []


class ResidualBlock(nn.Module):
    """``x + conv(prelu(conv(x)))`` at constant width; each convolution is followed by the normalization, if any."""

    def __init__(self, features: int, norm: str) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(features, features),
            *_norm(norm, features),
            nn.PReLU(),
            _conv(features, features),
            *_norm(norm, features),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SRResNet(nn.Module):
    """SR-ResNet: a wide first convolution, residual blocks under one long skip, sub-pixel upsampling, a wide last one.

    C. Ledig et al., *Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network*, CVPR 2017,
    arXiv:1609.04802, section 2.1 and figure 4. Four things differ from the paper, all for trainings that are short or
    have few images; PSNR measured on COVID-CT at 128 px and sigma 0.1 after 300 steps, 4 blocks x 32 features:

    * a *global skip*: the network predicts what to add to its input (``scale=1``) or to the bicubically enlarged input
      (``scale`` 2, 3 and 4), as in VDSR (arXiv:1511.04587) and DnCNN (arXiv:1608.03981);
    * the last convolution starts at zero, so that the untrained network *is* the identity, or bicubic interpolation;
    * the first and last convolutions are 3 x 3 and not 9 x 9: 28.0 dB against 26.6 (and 27.6 with 5 x 5);
    * no batch normalization, as in EDSR (arXiv:1707.02921): 28.0 dB against 27.4 with it.

    The options ``kernel=9, norm="batch"`` give the paper's layers.

    Parameters at three channels, 16 blocks x 64 features: 1,222,164 (``scale=1``), 1,369,877 (x2), 1,554,517 (x3),
    1,517,590 (x4); the paper's layers at x4: 1,549,462.

    :param options: depth, width and layers; :class:`SRResNetOptions` has refused what is out of range.
    :param channels: image channels, in and out.
    :param scale: 1 (denoising), 2, 3 or 4 (sub-pixel upsampling; see ``STAGES``).
    :raises ValueError: an argument out of range, named in the message.
    """

    def __init__(self, options: SRResNetOptions | None = None, *, channels: int, scale: int = 1) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"SR-ResNet: channels must be at least 1, not {channels}")
        if scale not in STAGES:
            raise ValueError(f"SR-ResNet: scale must be one of {', '.join(map(str, STAGES))}, not {scale}")
        options = options or SRResNetOptions()
        blocks, features, kernel, norm = options.blocks, options.features, options.kernel, options.norm
        self.scale = scale
        self.head = nn.Sequential(_conv(channels, features, kernel), nn.PReLU())
        self.trunk = nn.Sequential(
            *(ResidualBlock(features, norm) for _ in range(blocks)), _conv(features, features), *_norm(norm, features)
        )
        self.upsample = nn.Sequential(
            *(
                layer
                for factor in STAGES[scale]
                for layer in (_conv(features, factor**2 * features), nn.PixelShuffle(factor), nn.PReLU())
            )
        )
        self.tail = _conv(features, channels, kernel)
        for parameter in self.tail.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H * scale, W * scale]``; the values are not clipped."""
        features = self.head(x)
        features = self.upsample(features + self.trunk(features))
        skip = x if self.scale == 1 else F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return skip + self.tail(features)
