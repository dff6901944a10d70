"""A network's answer for images of any size, within bounded memory: large images are done tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16  # images or tiles at once: bounds the memory of a network's feature maps


@dataclass(frozen=True)
class Tiling:
    """How large images are cut.

    Neighboring tiles share ``overlap`` pixels; in the ``blend`` pixels in the middle of what they share one fades into
    the other, and what lies nearer to a tile's border is left out. A pixel of a network that sees ``radius`` pixels to
    every side is therefore that of the whole image wherever ``overlap - blend >= 2 * radius``, which is one less than
    its receptive field; where the network sees further, the fade hides the seam.

    :param side: of the tiles, in pixels of the input; images that are no larger are done whole.
    :raises ValueError: the three do not fit each other.
    """

    side: int = 512
    overlap: int = 96
    blend: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.blend <= self.overlap < self.side:
            raise ValueError(
                f"tiles need 0 <= blend <= overlap < side, not {self.blend}, {self.overlap} and {self.side}"
            )

    def starts(self, length: int) -> list[int]:
        """Where the tiles begin along a side of the image; the last one ends with it, and shares more."""
        if length <= self.side:
            return [0]
        return [*range(0, length - self.side, self.side - self.overlap), length - self.side]


@torch.no_grad()
def forward(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    device: torch.device,
    tiling: Tiling | None = None,
) -> Tensor:
    """What a network makes of images.

    :param network: ``float32 [n, C, H, W] -> float32 [n, K, H * scale, W * scale]`` for any scale, in evaluation mode;
        without ``tiling`` the output may have any shape ``[n, ...]``.
    :param images: ``float32 [N, C, H, W]``, on any device.
    :param device: where the network is.
    :param tiling: how larger images are cut; ``None``: never.
    :returns: ``[N, ...]``, contiguous, on the CPU.
    """
    if tiling is None or max(images.shape[2:]) <= tiling.side:
        parts = [network(_ready(part, device)).cpu() for part in images.split(BATCH)]
        return torch.cat(parts).contiguous()
    return torch.cat([_tiled(network, image, device, tiling) for image in images.split(1)])


def _ready(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device, memory_format=torch.channels_last)


def _tiled(network: Callable[[Tensor], Tensor], image: Tensor, device: torch.device, tiling: Tiling) -> Tensor:
    """One image ``[1, C, H, W]``. Only the sum of the tiles, on the CPU, is as large as the image."""
    height, width = image.shape[2:]
    tops, lefts = tiling.starts(height), tiling.starts(width)
    rows, columns = min(height, tiling.side), min(width, tiling.side)
    places = [(top, left) for top in tops for left in lefts]
    total = weight = torch.empty(0)
    for first in range(0, len(places), BATCH):
        chosen = places[first : first + BATCH]
        tiles = torch.cat([image[..., top : top + rows, left : left + columns] for top, left in chosen])
        outputs = network(_ready(tiles, device)).cpu().float()
        scale = outputs.shape[-1] // columns
        if not total.numel():
            total = torch.zeros(1, outputs.shape[1], height * scale, width * scale)
            weight = torch.zeros(height * scale, width * scale)
        for (top, left), output in zip(chosen, outputs, strict=True):
            share = _fade(top, tops, rows, scale, tiling)[:, None] * _fade(left, lefts, columns, scale, tiling)
            where = (
                slice(top * scale, (top + rows) * scale),
                slice(left * scale, (left + columns) * scale),
            )
            total[0][(slice(None), *where)].addcmul_(output, share)
            weight[where] += share
    return total / weight


def _fade(start: int, starts: list[int], length: int, scale: int, tiling: Tiling) -> Tensor:
    """The weights of a tile's pixels along one side, ``float32 [length * scale]``: at the image's own border 1 up to
    the end; towards a neighbor 1, then a fall over ``blend`` pixels, then 0."""
    weights = torch.ones(length * scale)
    place = starts.index(start)
    for neighbor, backwards in ((place - 1, False), (place + 1, True)):
        if not 0 <= neighbor < len(starts):
            continue
        shared = (length - abs(starts[neighbor] - start)) * scale  # more than the overlap at the last tile
        # Widened to the parity of what is shared, so that both tiles cut at the same pixels.
        fall = min(shared, tiling.blend * scale + (shared - tiling.blend * scale) % 2)
        margin = (shared - fall) // 2
        ramp = (torch.arange(fall) + 0.5) / max(fall, 1)
        edge = torch.cat([torch.zeros(margin), ramp])
        if backwards:
            weights[len(weights) - len(edge) :] *= edge.flip(0)
        else:
            weights[: len(edge)] *= edge
    return weights


def enlarged(images: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation, which is what a person sees of a smaller image.

    :param images: ``float [N, C, h, w]``.
    :returns: ``[N, C, h * scale, w * scale]``, not clamped; the images themselves where ``scale`` is 1.
    """
    if scale == 1:
        return images
    return torch.nn.functional.interpolate(images, scale_factor=scale, mode="bicubic")
