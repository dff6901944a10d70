"""Formats of medical images that need a library of their own: NIfTI (nibabel) and MetaImage (SimpleITK).

Both store a pixel by its x first: NIfTI's first axis, and MetaImage's fastest one, runs along a row. As an array
``[H, W]`` for everything else here, a NIfTI array is transposed; SimpleITK has its axes the other way around already.
Directions of the axes in space (NIfTI's affine, MetaImage's TransformMatrix) say nothing of what is up in an ultrasound
image, and are not applied: the first row that is stored is the upper one.

The libraries are optional (``pip install -e ".[data]"``), and imported when a file is read.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import DataError
from train.data.readers import arranged, guarded, index_image, whole_numbers

_ENDINGS = {".nii": "nibabel", ".nii.gz": "nibabel", ".mhd": "SimpleITK", ".mha": "SimpleITK"}


@dataclass(frozen=True)
class MedicalImage:
    """A single two-dimensional image in a NIfTI or MetaImage file.

    :param path: its ending (.nii, .nii.gz, .mhd, .mha) decides the format.
    """

    path: Path

    @property
    def libraries(self) -> tuple[str, ...]:
        return (_library(self.path),)

    @property
    def files(self) -> tuple[Path, ...]:
        return files_of(self.path)

    def read(self, channels: int) -> np.ndarray:
        """
        :returns: ``[H, W, channels]``, ``uint8``, ``uint16`` or ``float32``, as :class:`train.data.readers.ImageFile`.
        :raises DataError: the file is missing, damaged, no single image, or its library is not installed.
        """
        return guarded(self.path, lambda: arranged(self.path, _pixels(self.path), channels))


@dataclass(frozen=True)
class MedicalMask:
    """Class indices in a NIfTI or MetaImage file.

    :param path: as of :class:`MedicalImage`.
    :param values: as of :class:`train.data.readers.MaskFile`.
    """

    path: Path
    values: tuple[int, ...] | None = None

    @property
    def libraries(self) -> tuple[str, ...]:
        return (_library(self.path),)

    @property
    def files(self) -> tuple[Path, ...]:
        return files_of(self.path)

    def read(self, channels: int = 1) -> np.ndarray:
        """
        :returns: ``uint8 [H, W]``.
        :raises DataError: the file is missing, damaged, no index image, or its library is not installed; or it holds a
            value that has no meaning.
        """
        return guarded(self.path, lambda: index_image(self.path, whole_numbers(_pixels(self.path)), self.values))


def _library(path: Path) -> str:
    """
    :raises DataError: the file is of another format.
    """
    for ending, library in _ENDINGS.items():
        if path.name.lower().endswith(ending):
            return library
    raise DataError(f"{path} is neither NIfTI (.nii, .nii.gz) nor MetaImage (.mhd, .mha) by its ending")


def files_of(path: Path) -> tuple[Path, ...]:
    """A header (.mhd) has its pixels in another file, which it names."""
    if not path.name.lower().endswith(".mhd"):
        return (path,)
    named = [
        line.partition(b"=")[2].strip().decode(errors="surrogateescape")
        for line in (path.read_bytes().splitlines() if path.is_file() else [])
        if line.partition(b"=")[0].strip() == b"ElementDataFile"
    ]
    # LOCAL: behind the header. LIST and patterns are stacks of images, which are refused when they are read.
    return (path, *(path.parent / name for name in named if name.upper() != "LOCAL" and (path.parent / name).is_file()))


def _pixels(path: Path) -> np.ndarray:
    """The array of a file, ``[H, W]``.

    :raises DataError: it is no single image.
    :raises Exception: whatever the library raises of a damaged file.
    """
    library = imported(_library(path), path)
    if not path.is_file():
        raise DataError(f"{path} is missing; restore it from the data set")
    if library.__name__ == "nibabel":
        # The stored type stays, unless the header scales the values.
        stored = np.asanyarray(library.load(path).dataobj)
        pixels = stored.T
    else:
        image = library.ReadImage(str(path))
        if image.GetNumberOfComponentsPerPixel() > 1:
            raise DataError(f"{path} has colors; only gray images are read from this format")
        pixels = library.GetArrayFromImage(image)
    shape = pixels.shape
    while pixels.ndim > 2 and pixels.shape[0] == 1:  # the third axis of a single slice, and the time of a single frame
        pixels = pixels[0]
    if pixels.ndim != 2:
        raise DataError(f"{path} holds an array of {list(reversed(shape))} (x first), no single image")
    return np.ascontiguousarray(pixels)


def imported(library: str, path: Path) -> Any:
    """
    :raises DataError: it is not installed.
    """
    try:
        return importlib.import_module(library)
    except ImportError:
        raise DataError(
            f"{path} can only be read with {library}, which is not installed: pip install {library}"
        ) from None
