"""A person's own files of images, whatever their format: opened, read frame by frame, and written alike."""

from __future__ import annotations

import re
from pathlib import Path

from train.data.base import DataError
from train.errors import reason
from train.scans.base import Derivation, Scan

__all__ = ["Derivation", "Scan", "is_scan", "open_scan"]

ENDINGS = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp",
    ".dcm", ".dicom", ".nii", ".nii.gz", ".mha", ".mhd",
)  # fmt: skip
_HEADER = 4096  # bytes that decide
_META_IMAGE = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=", re.IGNORECASE)


def is_scan(path: Path) -> bool:
    """Whether a file found in a folder looks like a scan: by its ending, or, without a known one, as DICOM begins.

    Hidden files and DICOMDIR (an index, of no pixels) are none. The file need not be one that can be opened.
    """
    name = path.name.lower()
    if name.startswith(".") or name == "dicomdir":
        return False
    if name.endswith(ENDINGS):
        return True
    if not path.is_file():  # a pipe would be waited for
        return False
    try:
        with path.open("rb") as file:
            return _begins_as_dicom(file.read(_HEADER))
    except OSError:
        return False


def open_scan(path: Path) -> Scan:
    """Opens a file by what is in it; its ending does not matter.

    The header is read and held against the length of the file; pixels are decoded when they are asked for.

    :raises DataError: it is missing, damaged, no scan, larger than the limit, or of a kind that cannot be read or
        written alike; the message names the file, the reason and a remedy.
    """
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error
    if not header:
        raise DataError(f"{path} is empty; copy it again from where it came from")
    for begins, opened in ((_begins_as_dicom, _dicom), (_begins_as_volume, _volume), (_begins_as_raster, _raster)):
        if begins(header):
            return opened(path)
    raise DataError(
        f"{path} is none of PNG, JPEG, TIFF, BMP, DICOM, NIfTI and MetaImage by its content; convert it to one of these"
    )


def _begins_as_dicom(header: bytes) -> bool:
    """By its magic after 128 bytes, or, in old files and exports without it, by an element of group 2 or 8."""
    if header[128:132] == b"DICM":
        return True
    first = header[:8]
    if first[:2] in (b"\x02\0", b"\x08\0"):
        element, order = first[2:4], "little"
    elif first[:2] in (b"\0\x02", b"\0\x08"):
        element, order = first[3:1:-1], "big"
    else:
        return False
    # Values of the first elements (lengths, character sets, types) are short; the type of a value is two capitals.
    short = int.from_bytes(first[4:8], order) <= 256 and order == "little"  # type: ignore[arg-type]
    return len(first) == 8 and element[1] == 0 and (short or (first[4:6].isalpha() and first[4:6].isupper()))


def _begins_as_volume(header: bytes) -> bool:
    gzip, nifti = header[:2] == b"\x1f\x8b", header[344:348] in (b"n+1\0", b"ni1\0") or header[4:7] in (b"n+2", b"ni2")
    return gzip or nifti or _META_IMAGE.match(header) is not None


def _begins_as_raster(header: bytes) -> bool:
    return header.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def _dicom(path: Path) -> Scan:
    from train.scans.dicom import Dicom

    return Dicom(path)


def _volume(path: Path) -> Scan:
    from train.scans.volume import opened

    return opened(path)


def _raster(path: Path) -> Scan:
    from train.scans.raster import opened

    return opened(path)
