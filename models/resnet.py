"""ResNet-18/50/101 (He et al. 2016, arXiv:1512.03385) for diagnosis, built from MONAI's layers.

All three: ``[N, channels, H, W] -> logits [N, num_classes]`` for any height and width (global average pooling). The
parameter counts below are those of three channels and 1000 classes; one channel has ``2 * 49 * 64 = 6,272`` fewer, and
each class less as many as the last layer is wide, plus one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from models import VR

if TYPE_CHECKING:
    from torch import nn


def _resnet(block: Literal["basic", "bottleneck"], layers: list[int], channels: int, num_classes: int) -> nn.Module:
    for name, value in (("channels", channels), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"ResNet: {name} must be at least 1, got {value}")
    from models.trunks import DenseResNet  # takes seconds to import: only when a network is built

    # The arguments after n_input_channels undo MONAI's 3-D defaults (stem of stride 1, biases in the shortcuts).
    return DenseResNet(
        block,
        layers,
        block_inplanes=[64, 128, 256, 512],
        spatial_dims=2,
        n_input_channels=channels,
        conv1_t_size=7,
        conv1_t_stride=2,
        bias_downsample=False,
        num_classes=num_classes,
    )


@VR.register("resnet18")
def resnet18(*, channels: int, num_classes: int) -> nn.Module:
    """ResNet-18: 11,689,512 parameters; last layer 512 wide."""
    return _resnet("basic", [2, 2, 2, 2], channels, num_classes)


@VR.register("resnet50")
def resnet50(*, channels: int, num_classes: int) -> nn.Module:
    """ResNet-50: 25,557,032 parameters; last layer 2048 wide."""
    return _resnet("bottleneck", [3, 4, 6, 3], channels, num_classes)


@VR.register("resnet101")
def resnet101(*, channels: int, num_classes: int) -> nn.Module:
    """ResNet-101: 44,549,160 parameters; last layer 2048 wide."""
    return _resnet("bottleneck", [3, 4, 23, 3], channels, num_classes)
