"""Limits that the header of an image is held to before memory is taken for what it says, whoever wrote the file."""

from __future__ import annotations

import os
from pathlib import Path

from train.data.base import DataError
from train.errors import RunError

VARIABLE = "GRADPROM_MAX_PIXELS"
MOST_PIXELS = 2**28
"""Of what has to be decoded at once: a frame, or a volume whose slices cannot be read one by one. A gray one of so many
takes 1 GiB as ``float32``. ``$GRADPROM_MAX_PIXELS`` is another limit."""
DEFLATED = 1032
"""No byte of Deflate (PNG, gzip, TIFF) becomes more than so many: RFC 1951 encodes 258 bytes in 2 bits at best."""


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
    if min(sides, default=0) < 1:
        raise DataError(f"{path} is {' x '.join(map(str, sides))} pixels large by its header; it holds no image")
    pixels = 1
    for side in sides:
        pixels *= int(side)  # in Python's integers, which do not overflow
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
