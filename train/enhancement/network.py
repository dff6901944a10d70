"""A finished run's network, applied to the pixels of a person's file: in its own values, and of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from train.data.base import DataError
from train.data.window import Window
from train.enhancement.finished import FinishedRun, digest_of
from train.errors import RunError
from train.inference import Tiling, bands, enlarged, reach
from train.scans import Scan
from train.settings.sections import NETWORKS
from train.strategies.base import IP
from train.training.weights import load_weights

Color = Literal["refuse", "luma"]

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue: ITU-R BT.601, as in JPEG
SIDE, BLEND = 384, 16
EVERYWHERE = Tiling(512, 192, 128)
"""For networks that normalize by the whole image: no tile is as the whole would be, and a wide fade hides the seams."""
AT_ONCE = {"cpu": 1, "cuda": 8}  # tiles: what bounds the memory
FEW = 5  # frames that stand for all of a file
MANY = 2**20  # values that stand for all of a frame
SMALLEST = 8  # pixels along a side that every network takes; smaller images are continued by their border


@dataclass(frozen=True)
class Options:
    """What decides the pixels that are written, besides the run.

    :param strength: 1: all that the network changes; 0: nothing.
    :param window: which values the network sees as black and white; ``None``: as the file says.
    :param color: what becomes of a color image where the network is for gray ones.
    """

    strength: float = 1.0
    window: Window | None = None
    color: Color = "refuse"


class Enhancer:
    """A network with its weights.

    :param run: whose network it is.
    :param options: how it is applied.
    :param device: where it computes.
    :raises RunError: the weights are damaged, or not those of this network.
    """

    def __init__(self, run: FinishedRun, options: Options, device: torch.device) -> None:
        network = run.settings.network
        self.channels, self.scale = run.channels, run.scale
        try:
            ip = NETWORKS[IP.key].build(network.ip, network.ip_options, channels=self.channels, scale=self.scale)
        except ValueError as error:
            raise RunError(f"--run {run.folder}: --ip {network.ip}: {error}") from error
        weights = run.weights
        load_weights(weights, {IP.key: ip}, flag="--run")
        if digest_of(weights) != run.digest:
            raise RunError(
                f"--run {weights} was written anew meanwhile, by the training that it belongs to; give the command "
                "again when that is over, or a copy of the run's folder"
            )
        if not all(bool(value.isfinite().all()) for value in ip.state_dict().values()):
            raise RunError(
                f"--run {run.folder}: {weights.name} holds weights that are no numbers; the training diverged"
            )
        ip = ip.eval().requires_grad_(False).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.multiple: int = getattr(ip, "multiple", 1)
        self.options, self.device = options, device
        self._enhance = run.settings.method.kind.of_trained(ip).enhance

    @cached_property
    def tiling(self) -> Tiling:
        """How large images are cut: the tiles share what the network sees to either side, and what one fades in."""
        found = reach(self._enhance, self.channels, device=self.device, multiple=self.multiple)
        if found is None:
            return EVERYWHERE
        overlap = _up(2 * found + BLEND, self.multiple)
        return Tiling(_up(max(SIDE, 2 * overlap), self.multiple), overlap, BLEND)

    def needs_tiles(self, size: Sequence[int]) -> bool:
        """Whether an image of this height and width is not done whole."""
        return max(size) > SIDE and max(size) > self.tiling.side

    @property
    def sees_all(self) -> bool:
        """Whether an answer depends on the whole image, so that tiles differ from it."""
        return self.tiling == EVERYWHERE

    def frame(
        self, image: np.ndarray, window: tuple[float, float], pause: Callable[[], None] = lambda: None
    ) -> np.ndarray:
        """One frame, enhanced.

        Values keep their meaning, and nothing outside of the window is lost: what is added to the image is what the
        network changes of it within the window, times ``strength``. NaN stays NaN, and spreads nothing: the network
        sees black there.

        :param image: ``float32 [H, W, C]``, C 1 or 3, in the values of the file. It is written over.
        :param window: the values that are black and white.
        :param pause: called between tiles; it may raise.
        :returns: ``float32 [H * scale, W * scale, C]``; the same array where ``scale`` is 1.
        :raises DataError: a color image for a gray network.
        """
        height, width, channels = image.shape
        alike = channels == 3 and bool((image[..., :1] == image[..., 1:]).all())  # gray, stored as color
        if channels == 3 and self.channels == 1 and not alike and self.options.color == "refuse":
            raise DataError(
                "a color image, and the network is for gray ones; --color luma enhances its brightness and leaves its "
                "colors, or give a run with --channels 3"
            )
        low, span = window[0], window[1] - window[0]
        if self.options.strength == 0 and self.scale == 1:
            return image
        if not span > 0:
            if self.scale == 1:
                return image  # one value all over: there is nothing to see
            span = 1.0
        used = image[..., :1] if alike else image
        size = [_up(max(side, SMALLEST, 2 * self.multiple), self.multiple) for side in (height, width)]

        def rows(top: int, end: int) -> Tensor:
            pause()
            part = used[np.clip(np.arange(top, end), 0, height - 1)]
            part = np.pad(part, ((0, 0), (0, size[1] - width), (0, 0)), mode="edge")
            part = (part - np.float32(low)) / np.float32(span)
            np.nan_to_num(part, copy=False, nan=0.0, posinf=1.0, neginf=0.0)
            return torch.from_numpy(part.transpose(2, 0, 1)[None])

        tiling = Tiling(_up(SIDE, self.multiple), 0, 0) if max(size) <= SIDE else self.tiling
        parts = bands(
            self._changed, rows, (size[0], size[1]), device=self.device, tiling=tiling,
            at_once=AT_ONCE.get(self.device.type, 1),
        )  # fmt: skip
        if self.scale == 1:
            top = 0
            for part in parts:
                change = part[0, :, : height - top, :width].permute(1, 2, 0).numpy()
                image[top : top + len(change)] += np.float32(span) * change
                top += part.shape[2]
            return image
        result = np.empty((height * self.scale, width * self.scale, channels), np.float32)
        top = 0
        for part in parts:
            values = part[0, :, : len(result) - top, : width * self.scale].permute(1, 2, 0).numpy()
            result[top : top + len(values)] = np.float32(low) + np.float32(span) * values
            top += part.shape[2]
        holes = np.isnan(image)
        if holes.any():
            result[holes.repeat(self.scale, 0).repeat(self.scale, 1)] = np.nan
        return result

    def seen(self, image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
        """What the network sees of an image, as one channel: ``float32 [H, W, C] -> float32 [H, W]`` in [0, 1]."""
        low, span = window[0], window[1] - window[0]
        if image.shape[2] == 3:
            weights = LUMA if self.channels == 1 else (1.0, 0.0, 0.0)
            gray = image @ np.asarray(weights, np.float32)
        else:
            gray = image[..., 0]
        gray = np.clip((gray - np.float32(low)) / np.float32(span if span > 0 else 1.0), 0, 1)
        return np.nan_to_num(gray, copy=False, nan=0.0)

    def _changed(self, images: Tensor) -> Tensor:
        """What is added to images (of scale 1), or the enlarged images.

        :param images: ``float [n, c, h, w]`` in units of the window, not clipped; c may differ from the network's.
        """
        seen = images.clamp(0, 1)
        count = images.shape[1]
        if self.channels < count:
            seen = (seen * seen.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
        elif self.channels > count:
            seen = seen.expand(-1, self.channels, -1, -1)
        change = self._enhance(seen).clamp(0, 1) - enlarged(seen, self.scale)
        if self.channels > count:
            change = change.mean(1, keepdim=True)
        change = self.options.strength * change
        return change if self.scale == 1 else enlarged(images, self.scale) + change


def window_of(chosen: Window | None, scan: Scan) -> tuple[float, float]:
    """The values of a file that are black and white: as was asked for, or as the file says.

    :raises DataError: the file says nothing that can be used.
    """
    if chosen is None:
        low, high = scan.value_range
    elif chosen.percentiles:
        frames = (scan.read(frame) for frame in spread(scan.frames))
        low, high = chosen.limits(np.concatenate([frame.ravel()[:: frame.size // MANY + 1] for frame in frames]))
    else:
        low, high = chosen.low, chosen.high
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise DataError(f"its values reach from {low} to {high}; give --window CENTER/WIDTH")
    return float(low), float(high)


def spread(frames: int) -> list[int]:
    """The frames that stand for all of a file: a few, evenly spread."""
    return np.linspace(0, frames - 1, min(frames, FEW)).round().astype(int).tolist()  # type: ignore[no-any-return]


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
