"""Readers of what another reader gives: a tile of an image, or an image with a part of it blanked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from train.data.base import DataError
from train.data.readers import Reader


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image or a mask.

    The whole is decoded once for the tiles that are read one after the other.

    :param source: reads the whole.
    :param top: the first row.
    :param left: the first column.
    :param height: of the tile in pixels.
    :param width: of the tile in pixels.
    :param whole: height and width that the whole has to have, in pixels; in one of another size the tile of a mask
        would not be where that of its image is. ``None``: any that the tile is inside of.
    """

    source: Reader
    top: int
    left: int
    height: int
    width: int
    whole: tuple[int, int] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    def read(self, channels: int) -> np.ndarray:
        """
        :returns: an image ``[height, width, channels]`` or a mask ``[height, width]``, of the source's dtype.
        :raises DataError: the source cannot be read, or has another size, or the tile is not inside of it.
        """
        whole = _whole(self.source, channels, stamps(self.source.files))
        if self.whole is not None and whole.shape[:2] != self.whole:
            raise DataError(
                f"{self.source.files[0]} has {whole.shape[0]} x {whole.shape[1]} pixels (height x width), and must "
                f"have {self.whole[0]} x {self.whole[1]}, as the image that it belongs to"
            )
        bottom, right = self.top + self.height, self.left + self.width
        if min(self.top, self.left) < 0 or bottom > whole.shape[0] or right > whole.shape[1]:
            raise DataError(
                f"{self.source.files[0]} has {whole.shape[0]} x {whole.shape[1]} pixels (height x width); there is no "
                f"tile of {self.height} x {self.width} at row {self.top}, column {self.left}"
            )
        return whole[self.top : bottom, self.left : right].copy()


@lru_cache(maxsize=8)  # as many as the threads that decode are busy with
def _whole(source: Reader, channels: int, stamps: object) -> np.ndarray:
    pixels = source.read(channels)
    pixels.setflags(write=False)
    return pixels


def stamps(files: Sequence[Path]) -> tuple[tuple[int, ...], ...] | None:
    """What changes when a file is written anew; ``None`` where one is missing, of which the reader has to tell."""
    try:
        found = [file.stat() for file in files]
    except OSError:
        return None
    return tuple((each.st_size, each.st_mtime_ns, each.st_ctime_ns, each.st_ino) for each in found)


@dataclass(frozen=True)
class Blanked:
    """An image with a rectangle of it set to zero: writing that a camera has burnt in, of which a network could learn.

    :param source: reads the image.
    :param rectangle: its first row and column, and those after its last ones, in an image of the size ``frame``; in one
        of another size it is enlarged or reduced with the image.
    :param frame: height and width in pixels.
    """

    source: Reader
    rectangle: tuple[int, int, int, int]
    frame: tuple[int, int]

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    def read(self, channels: int) -> np.ndarray:
        """
        :returns: as the source gives it, ``[H, W, channels]``.
        :raises DataError: the source cannot be read.
        """
        pixels = self.source.read(channels).copy()
        height, width = (side / of for side, of in zip(pixels.shape[:2], self.frame, strict=True))
        top, left, bottom, right = self.rectangle
        # Outwards: a pixel of which a part belongs to the rectangle goes.
        rows = slice(int(top * height), int(np.ceil(bottom * height)))
        columns = slice(int(left * width), int(np.ceil(right * width)))
        pixels[rows, columns] = 0
        return pixels
