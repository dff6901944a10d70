"""Readers of the frames of scans: slices of volumes, pages, and frames of DICOM files (:mod:`train.scans`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.data.formats import files_of
from train.data.parts import stamps
from train.data.readers import arranged, guarded, index_image, whole_numbers

if TYPE_CHECKING:
    from train.scans import Scan

_LIBRARIES = ("pydicom", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "nibabel", "SimpleITK", "imagecodecs")


@dataclass(frozen=True)
class _OfScan:
    """What belongs to one frame of a scan.

    :param path: of the file.
    :param index: which frame.
    """

    path: Path
    index: int

    @property
    def libraries(self) -> tuple[str, ...]:
        return _LIBRARIES

    @property
    def code(self) -> tuple[Path, ...]:
        """What decodes, besides this file."""
        import train.scans

        return tuple(sorted(Path(train.scans.__file__).parent.glob("*.py")))

    @property
    def files(self) -> tuple[Path, ...]:
        return files_of(self.path)


@dataclass(frozen=True)
class ScanFrame(_OfScan):
    """One frame of a scan, in the values that its file means (Hounsfield units, say)."""

    def read(self, channels: int) -> np.ndarray:
        """
        :returns: ``[H, W, channels]``: ``uint8`` or ``uint16`` where the file holds such numbers and gives them no
            other meaning, else ``float32``.
        :raises DataError: the file is missing or damaged, or its library is not installed.
        """

        def read() -> np.ndarray:
            scan = _opened(self.path, None, stamps(self.files))
            return arranged(self.path, scan.read(self.index).astype(scan.dtype), channels)

        return guarded(self.path, read)


@dataclass(frozen=True)
class ScanMask(_OfScan):
    """The class indices that belong to one frame of a scan, in a volume or a TIFF file of several pages.

    :param axis: across which the slices of the images' volume lie, whatever the mask's own header says; ``None``: it
        is no volume.
    """

    axis: int | None = None

    def read(self, channels: int = 1) -> np.ndarray:
        """
        :returns: ``uint8 [H, W]``.
        :raises DataError: the file is missing or damaged, or no index image.
        """

        def read() -> np.ndarray:
            values = _opened(self.path, self.axis, stamps(self.files)).read(self.index)
            return index_image(self.path, whole_numbers(values))

        return guarded(self.path, read)


def opened(path: Path, axis: int | None = None) -> Scan:
    """A scan, whose slices lie across an axis of choice, if it is a volume.

    :raises DataError: as :func:`train.scans.open_scan`.
    """
    from train.scans import open_scan
    from train.scans.volume import Volume

    scan = open_scan(path)
    if axis is not None and isinstance(scan, Volume):
        scan.through = axis
    return scan


@lru_cache(maxsize=4)  # frames are read one after the other
def _opened(path: Path, axis: int | None, stamp: object) -> Scan:
    return opened(path, axis)
