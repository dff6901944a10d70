"""What all formats of scans share: errors that name the file, and values as a file stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from train.data.base import DataError
from train.data.readers import guarded
from train.scans.base import Scan

AT_ONCE = 256  # rows

T = TypeVar("T")


def read_guarded(path: Path, read: Callable[[], T]) -> T:
    """What ``read`` returns; any error of a library becomes one that names the file.

    :raises DataError: it failed.
    """
    return guarded(path, read, remedy="copy it again from where it came from")


def extremes(path: Path, frames: Iterable[np.ndarray]) -> tuple[float, float]:
    """The least and the largest value. NaN, which stands for no value in many maps of brains, and infinity are none.

    :raises DataError: there are no others.
    """
    low, high = np.inf, -np.inf
    for frame in frames:
        if (values := frame[np.isfinite(frame)]).size:
            low, high = min(low, values.min()), max(high, values.max())
    if low > high:
        raise DataError(f"{path} holds nothing but NaN and infinity; there is no image in it")
    return float(low), float(high)


def narrow(dtype: np.dtype) -> np.dtype:
    """Of ``uint8``, ``uint16`` and ``float32`` the one for values of a type.

    >>> narrow(np.dtype(">u2")), narrow(np.dtype(np.int16))
    (dtype('uint16'), dtype('float32'))
    """
    # Signed 16 bits are Hounsfield units and the like, of which one image may happen to have no negative one.
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "u" and dtype.itemsize <= 2 else np.dtype(np.float32)


def stored(values: np.ndarray, dtype: np.dtype, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Values as a file stores them: rounded to whole numbers and clipped, where its type is one of integers.

    :param dtype: of the file.
    :param limits: the least and the largest number; those of the type by default.
    :raises ValueError: one is NaN, for which there is no whole number.

    >>> stored(np.array([-3.0, 1.5, 2.5, 300.0]), np.dtype(np.uint8))
    array([  0,   2,   2, 255], dtype=uint8)
    """
    if dtype.kind == "f":
        return values.astype(dtype)
    if np.isnan(values).any():
        raise ValueError(f"NaN cannot be stored as {dtype}")
    low, high = limits or (np.iinfo(dtype).min, np.iinfo(dtype).max)
    result = np.empty(values.shape, dtype)
    for first in range(0, len(values), AT_ONCE):  # a copy of a large image in float64 is what would take most memory
        some = slice(first, first + AT_ONCE)
        # In float64, in which every number up to 32 bits is exact.
        result[some] = np.clip(np.rint(values[some].astype(np.float64)), low, high)
    return result


def checked(scan: Scan, frames: Iterable[np.ndarray], scale: int) -> Iterator[np.ndarray]:
    """The frames that are to be written, one after the other.

    :raises ValueError: there are more or fewer than in the scan, or one has another shape.
    """
    number = 0
    for number, frame in enumerate(frames, 1):
        if number > scan.frames:
            break
        height, width = scan.size(number - 1)
        if frame.shape != (wanted := (height * scale, width * scale, scan.channels)):
            raise ValueError(f"frame {number - 1} of {scan.path} must be {wanted}, not {frame.shape}")
        yield frame
    if number != scan.frames:
        raise ValueError(f"{scan.path} has {scan.frames} frames; {number} were given, or more")
