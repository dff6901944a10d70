"""The networks whose steps are timed, and the shapes of their parameters.

Plain modules of the published architectures, because this package knows nothing of ``models/``. Shapes are read off the
very same modules built on the meta device, where they cost no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = list[tuple[int, ...]]

# ----------------------------------------------------------------------------------------------------------------------
# SR-ResNet


def _conv(cin: int, cout: int, kernel: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=bias)


class _SRBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(width, width, 3), nn.BatchNorm2d(width), nn.PReLU(), _conv(width, width, 3), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class SRResNet(nn.Module):
    """SR-ResNet (`arXiv:1609.04802 <https://arxiv.org/abs/1609.04802>`_) with the paper's layers.

    :param scale: 1 (denoising), 2 or 4; one sub-pixel stage for each doubling.
    :param blocks: residual blocks.
    :param width: features of the trunk.
    :param channels: of the image, in and out.
    """

    def __init__(self, *, scale: int, blocks: int = 16, width: int = 64, channels: int = 3) -> None:
        super().__init__()
        self.head = nn.Sequential(_conv(channels, width, 9), nn.PReLU())
        self.trunk = nn.Sequential(
            *(_SRBlock(width) for _ in range(blocks)), _conv(width, width, 3), nn.BatchNorm2d(width)
        )
        stages = scale.bit_length() - 1
        self.upsample = nn.Sequential(
            *(m for _ in range(stages) for m in (_conv(width, 4 * width, 3), nn.PixelShuffle(2), nn.PReLU()))
        )
        self.tail = _conv(width, channels, 9)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H * scale, W * scale]``."""
        features = self.head(x)
        return self.tail(self.upsample(features + self.trunk(features)))


# ----------------------------------------------------------------------------------------------------------------------
# U-Net


def _double(cin: int, cout: int) -> nn.Sequential:
    return nn.Sequential(_conv(cin, cout, 3), nn.ReLU(), _conv(cout, cout, 3), nn.ReLU())


class UNet(nn.Module):
    """U-Net (`arXiv:1505.04597 <https://arxiv.org/abs/1505.04597>`_), padded, with half its widths by default.

    :param base: features at full resolution; they double at each of the ``levels`` below it.
    """

    def __init__(self, *, base: int = 32, levels: int = 4, channels: int = 1, classes: int = 2) -> None:
        super().__init__()
        widths = [base * 2**i for i in range(levels + 1)]
        ups = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.down = nn.ModuleList(_double(a, b) for a, b in zip([channels, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(high, low, 2, 2) for high, low in ups)
        self.merge = nn.ModuleList(_double(high, low) for high, low in ups)
        self.head = _conv(base, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W] -> [N, classes, H, W]``; H and W are multiples of ``2 ** levels``."""
        skips: list[Tensor] = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


# ----------------------------------------------------------------------------------------------------------------------
# ResNet


def _conv_norm(cin: int, cout: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(cin, cout, kernel, stride=stride, bias=False), nn.BatchNorm2d(cout)]


def _basic(cin: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(cin, width, 3, stride), nn.ReLU(), *_conv_norm(width, width, 3))


def _bottleneck(cin: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        *_conv_norm(cin, width, 1),
        nn.ReLU(),
        *_conv_norm(width, width, 3, stride),
        nn.ReLU(),
        *_conv_norm(width, 4 * width, 1),
    )


class _Residual(nn.Module):
    def __init__(self, body: nn.Module, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.skip = nn.Identity() if (cin, stride) == (cout, 1) else nn.Sequential(*_conv_norm(cin, cout, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.body(x))


#: Depth to the blocks of the four stages.
RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ResNet(nn.Module):
    """ResNet (`arXiv:1512.03385 <https://arxiv.org/abs/1512.03385>`_), a classifier of RGB images.

    :param depth: 18 or 34 (basic blocks), 50 or 101 (bottlenecks).
    :param base: features of the first stage; they double at each of the next three.
    """

    def __init__(self, *, depth: int, base: int = 64, classes: int = 1000) -> None:
        super().__init__()
        make, expansion = (_basic, 1) if depth < 50 else (_bottleneck, 4)
        layers: list[nn.Module] = [*_conv_norm(3, base, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        cin = base
        for stage, blocks in enumerate(RESNETS[depth]):
            width = base * 2**stage
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Residual(make(cin, width, stride), cin, expansion * width, stride))
                cin = expansion * width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W] -> [N, classes]``."""
        return self.head(self.features(x).mean((2, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# Sets of parameters by name

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "srresnet": lambda: SRResNet(scale=4),
    "unet": UNet,
    "resnet50": lambda: ResNet(depth=50),
}
#: Every size that is timed on a GPU, smallest first; the last one is many small tensors.
GPU_SIZES = ("0.1M", "srresnet", "unet", "resnet50", "100M", "1B", "1000x1000")
#: Tensors that a size such as ``100M`` is cut into: about as many as a network of that size has.
TENSORS = 140


def parameter_shapes(name: str) -> Shapes:
    """The shapes of a set of parameters.

    :param name: a network of :data:`NETWORKS`; a number of parameters such as ``0.1M`` or ``1B``, cut into 140 tensors
        of almost the same length; or ``TENSORSxELEMENTS`` such as ``1000x1000``.
    :raises ValueError: none of these.

    >>> sum(n for (n,) in parameter_shapes("0.1M")), parameter_shapes("2x5")
    (100000, [(5,), (5,)])
    """
    if name in NETWORKS:
        with torch.device("meta"):
            return [tuple(p.shape) for p in NETWORKS[name]().parameters()]
    if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        return [(int(match[2]),)] * int(match[1])
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([kMB])", name):
        count = round(float(match[1]) * {"k": 10**3, "M": 10**6, "B": 10**9}[match[2]])
        if count >= TENSORS:
            each, rest = divmod(count, TENSORS)
            return [(each + (i < rest),) for i in range(TENSORS)]
    raise ValueError(
        f"{name!r} is no set of parameters: choose {', '.join(NETWORKS)}, a number of parameters such as 0.1M, 100M or "
        f"1B (at least {TENSORS}), or TENSORSxELEMENTS such as 1000x1000"
    )
