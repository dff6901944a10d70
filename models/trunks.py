"""MONAI's networks, with their embeddings within reach: encoders as :class:`models.encoder.Encoder` says."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet, ResNet
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn


class DenseResNet(ResNet):
    """A ResNet whose embedding is what its last stage makes, before the pooling."""

    stride = 32
    head = ("fc",)

    @property
    def width(self) -> int:
        assert self.fc is not None
        return self.fc.in_features

    def features(self, x: Tensor) -> Tensor:
        """``float [N, C, H, W] -> float [N, width, ceil(H / 32), ceil(W / 32)]``."""
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class DenseUNet(BasicUNet):
    """A UNet whose embedding is what its last convolution is given: one of the image's own size."""

    stride = 1
    head = ("final_conv",)

    @property
    def width(self) -> int:
        return self.final_conv.in_channels

    def features(self, x: Tensor) -> Tensor:
        """``float [N, C, H, W] -> float [N, width, H, W]``."""
        x0 = self.conv_0(x)
        x1 = self.down_1(x0)
        x2 = self.down_2(x1)
        x3 = self.down_3(x2)
        x4 = self.down_4(x3)
        return self.upcat_1(self.upcat_2(self.upcat_3(self.upcat_4(x4, x3), x2), x1), x0)


class _Pooled(nn.Module):
    """A diagnosis from the mean of an embedding over all its places."""

    head = ("fc",)
    fc: nn.Linear

    @property
    def width(self) -> int:
        return self.fc.in_features

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``float [N, C, H, W] -> logits [N, num_classes]``."""
        return self.fc(self.features(x).mean((2, 3)))


class Swin(_Pooled):
    """A Swin Transformer: patches of 2 pixels, four stages of which each halves the size and doubles the width."""

    stride = 32

    def __init__(self, *, features: int, depth: int, heads: int, window: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.trunk = SwinTransformer(
            in_chans=channels,
            embed_dim=features,
            window_size=(window, window),
            patch_size=(2, 2),
            depths=(depth,) * 4,
            num_heads=tuple(heads * 2**stage for stage in range(4)),
            patch_norm=True,
            spatial_dims=2,
            downsample="mergingv2",
        )
        self.fc = nn.Linear(16 * features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``float [N, C, H, W] -> float [N, width, ceil(H / 32), ceil(W / 32)]``."""
        return self.trunk(x.contiguous())[-1]


class ViT(_Pooled):
    """A vision transformer with one token per patch and none for the class.

    Position embeddings are those of a square of ``side`` patches; for images of another size they are interpolated
    (A. Dosovitskiy et al., arXiv:2010.11929, section 3.2). The layers are PyTorch's: MONAI's ViT takes images of one
    size alone, and holds normalizations that never learn.
    """

    def __init__(
        self, *, features: int, depth: int, heads: int, patch: int, side: int, channels: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stride = patch
        self.embed = nn.Conv2d(channels, features, patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, features, side, side))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    features, heads, 4 * features, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(features)
        self.fc = nn.Linear(features, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """``float [N, C, H, W] -> float [N, width, ceil(H / patch), ceil(W / patch)]``; what the patches lack at the
        right and at the bottom is 0."""
        height, width = (math.ceil(side / self.stride) for side in x.shape[2:])
        x = F.pad(x, (0, width * self.stride - x.shape[3], 0, height * self.stride - x.shape[2]))
        position: Tensor = self.position
        if position.shape[2:] != (height, width):
            position = F.interpolate(position, size=(height, width), mode="bicubic", align_corners=False)
        tokens = (self.embed(x) + position).flatten(2).transpose(1, 2)
        return self.norm(self.layers(tokens)).transpose(1, 2).unflatten(2, (height, width))
