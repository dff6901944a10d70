"""What all formats of scans share: limits that a header is held to, and values as a file stores them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from train.data.base import DataError
from train.data.readers import guarded
from train.errors import RunError
from train.scans.base import Scan

VARIABLE = "GRADPROM_MAX_PIXELS"
MOST_PIXELS = 2**28
"""Of what has to be decoded at once: a frame, or a volume whose slices cannot be read one by one. A gray one of so many
takes 1 GiB as ``float32``. ``$GRADPROM_MAX_PIXELS`` is another limit."""
DEFLATED = 1032
"""No byte of Deflate (PNG, gzip, TIFF) becomes more than so many: RFC 1951 encodes 258 bytes in 2 bits at best."""
AT_ONCE = 256  # rows

T = TypeVar("T")


def most_pixels() -> int:
    """
    :raises RunError: the environment variable is no positive number.
    """
    given = os.environ.get(VARIABLE, "")
    if given and not (given.isdecimal() and int(given)):
        raise RunError(f"${VARIABLE} must be a number of pixels, not {given!r}")
    return int(given) if given else MOST_PIXELS


def refuse_large(path: Path, *sides: int) -> None:
    """Before memory is taken for what a header says.

    :param sides: their product is the number of pixels, of all channels, that are decoded at once.
    :raises DataError: a side is not positive, or there are more pixels than :func:`most_pixels`.
    """
    if min(sides) < 1:
        raise DataError(f"{path} is {' x '.join(map(str, sides))} pixels large by its header; it holds no image")
    pixels = 1
    for side in sides:
        pixels *= side  # in Python's integers, which do not overflow
    if pixels > (limit := most_pixels()):
        raise DataError(
            f"{path} is {' x '.join(map(str, sides))} = {pixels:,} pixels large by its header, more than {limit:,}; if "
            f"that is right and the memory suffices, set ${VARIABLE} to at least {pixels}"
        )


def refuse_short(path: Path, needed: int, there: int, *, packed: int = 1) -> None:
    """Before memory is taken for pixels that a file is too short to hold.

    :param needed: bytes that the header speaks of, decoded.
    :param there: bytes in the file.
    :param packed: how many of the first one of the second can become.
    :raises DataError: the file is truncated, or its header lies.
    """
    if needed > there * packed:
        raise DataError(
            f"{path} has {there:,} bytes for pixels, too few for the {needed:,} that its header speaks of: it is "
            "truncated, or the header is wrong; copy it again from where it came from"
        )


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
