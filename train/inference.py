"""A network's answer for images of any size, within bounded memory: large images are done tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from train.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16  # images or tiles at once: bounds the memory of a network's feature maps
FURTHEST = 192  # pixels to every side: networks that see further are taken for such as see the whole image
UNSEEN = 1e-5  # a difference that is none, of values in [0, 1]: a four hundredth of a step of 8 bits


def choose_device(name: str) -> torch.device:
    """
    :raises RunError: a GPU was asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no CUDA GPU here (python -m gradprom_ext.doctor says why)")
    return torch.device(name)


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
    size = image.shape[2], image.shape[3]
    return torch.cat([*bands(network, lambda top, end: image[..., top:end, :], size, device=device, tiling=tiling)], 2)


@torch.no_grad()
def bands(
    network: Callable[[Tensor], Tensor],
    rows: Callable[[int, int], Tensor],
    size: tuple[int, int],
    *,
    device: torch.device,
    tiling: Tiling,
    at_once: int = BATCH,
) -> Iterator[Tensor]:
    """What a network makes of one image, from top to bottom, as soon as it is final: neither the image nor the answer
    is ever whole here.

    :param network: as :func:`forward` takes it.
    :param rows: the rows from the first number up to the second one, ``float32 [1, C, rows, W]``. Those which an answer
        was yielded for are not asked for again: they may have been overwritten.
    :param size: height and width of the image.
    :param at_once: tiles that the network is given together.
    :returns: ``float32 [1, K, rows * scale, W * scale]`` each, on the CPU.
    """
    height, width = size
    tops, lefts = tiling.starts(height), tiling.starts(width)
    high, wide = min(height, tiling.side), min(width, tiling.side)
    total = weight = torch.empty(0)
    for place, top in enumerate(tops):
        strip = rows(top, top + high)
        for first in range(0, len(lefts), at_once):
            chosen = lefts[first : first + at_once]
            outputs = network(_ready(torch.cat([strip[..., left : left + wide] for left in chosen]), device))
            scale = outputs.shape[-1] // wide
            if not total.numel():
                total = torch.zeros(1, outputs.shape[1], high * scale, width * scale)
                weight = torch.zeros(high * scale, width * scale)
            for left, output in zip(chosen, outputs.cpu().float(), strict=True):
                share = _fade(top, tops, high, scale, tiling)[:, None] * _fade(left, lefts, wide, scale, tiling)
                where = slice(left * scale, (left + wide) * scale)
                total[0, :, :, where].addcmul_(output, share)
                weight[:, where] += share
        del strip, outputs
        final = (tops[place + 1] - top if place + 1 < len(tops) else high) * scale
        yield total[:, :, :final] / weight[:final]
        # What is left has more to come: it moves up, and makes room below.
        total = torch.cat([total[:, :, final:], torch.zeros_like(total[:, :, :final])], 2)
        weight = torch.cat([weight[final:], torch.zeros_like(weight[:final])])


@torch.no_grad()
def reach(network: Callable[[Tensor], Tensor], channels: int, *, device: torch.device, multiple: int = 1) -> int | None:
    """How far a network sees, as measured: how many pixels away from a change its answer is still another one. What it
    could see by its layers is more, and much of it changes nothing.

    One half of an image of noise is exchanged for darker noise, which is more than neighboring tiles ever differ in,
    and which changes the mean of the whole.

    :param network: as :func:`forward` takes it.
    :param channels: of its images.
    :param multiple: of which the sides of the trial are.
    :returns: pixels of the input; ``None``: more than can be told, as of a network that normalizes by the whole image.
    """
    half = -(-FURTHEST // multiple) * multiple
    high = max(64, 2 * multiple)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, channels, high, 2 * half, generator=generator)
    changed = image.clone()
    changed[..., half:] = 0.3 * torch.rand(1, channels, high, half, generator=generator)
    first, second = (network(_ready(each, device)).cpu().float() for each in (image, changed))
    scale = first.shape[-1] // (2 * half)
    differing = (first - second).abs().amax((0, 1, 2))[: half * scale].gt(UNSEEN).nonzero()
    if not len(differing):
        return 0
    found = half - int(differing[0]) // scale
    return None if found > 0.9 * half else found


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
