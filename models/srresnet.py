"""SR-ResNet (Ledig et al. 2017) for denoising and for x2 / x4 super-resolution."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from models import IP

SCALES = (1, 2, 4)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)


def _norm(kind: str, features: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(features)] if kind == "batch" else []


class ResidualBlock(nn.Module):
    """``x + conv(prelu(conv(x)))`` at constant width, each convolution followed by the normalisation where there is one."""

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


@IP.register("srresnet")
class SRResNet(nn.Module):
    """SR-ResNet: a wide first convolution, residual blocks under one long skip, sub-pixel upsampling, a wide last one.

    C. Ledig et al., *Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network*, CVPR 2017,
    arXiv:1609.04802, section 2.1 and figure 4. Three things differ from the paper, all of them for the sake of training
    that is short or starts from few images:

    * a *global skip*: the network predicts what to add to its input (``scale=1``) or to the bicubically enlarged input
      (``scale`` 2 and 4), as in VDSR (arXiv:1511.04587) and DnCNN (arXiv:1608.03981);
    * the last convolution starts at zero, so that the untrained network *is* the identity, or bicubic interpolation;
    * no batch normalisation unless asked for (``norm="batch"`` is the paper's form), as in EDSR (arXiv:1707.02921).

    Parameters, three channels, 16 blocks x 64 features: 1,249,924 (``scale=1``), 1,397,637 (x2), 1,545,350 (x4); with
    ``norm="batch"`` 2,176 more at 64 features x 16 blocks.

    :param channels: image channels, in and out.
    :param scale: 1 (denoising), 2 or 4 (sub-pixel upsampling, one x2 stage each).
    :param blocks: residual blocks; 0 leaves the two convolutions around them.
    :param features: width of the trunk.
    :param norm: ``"none"`` or ``"batch"``.
    :raises ValueError: an argument out of range, named in the message.
    """

    def __init__(
        self,
        *,
        channels: int,
        scale: int = 1,
        blocks: int = 16,
        features: int = 64,
        kernel: int = 3,
        norm: Literal["none", "batch"] = "none",
    ) -> None:
        super().__init__()
        for name, value, least in (("channels", channels, 1), ("blocks", blocks, 0), ("features", features, 1)):
            if value < least:
                raise ValueError(f"SR-ResNet: {name} must be at least {least}, got {value}")
        if scale not in SCALES:
            raise ValueError(f"SR-ResNet: scale must be one of {', '.join(map(str, SCALES))}, got {scale}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"SR-ResNet: kernel must be odd and at least 1, got {kernel}")
        if norm not in ("none", "batch"):
            raise ValueError(f"SR-ResNet: norm must be 'none' or 'batch', got {norm!r}")
        self.scale = scale
        self.head = nn.Sequential(_conv(channels, features, kernel), nn.PReLU())
        self.trunk = nn.Sequential(
            *(ResidualBlock(features, norm) for _ in range(blocks)), _conv(features, features), *_norm(norm, features)
        )
        self.upsample = nn.Sequential(
            *(
                layer
                for _ in range(scale.bit_length() - 1)
                for layer in (_conv(features, 4 * features), nn.PixelShuffle(2), nn.PReLU())
            )
        )
        self.tail = _conv(features, channels, kernel)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H * scale, W * scale]``; the values are not clipped."""
        features = self.head(x)
        features = self.upsample(features + self.trunk(features))
        skip = x if self.scale == 1 else F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return skip + self.tail(features)
