"""Formats of medical images that need a library of their own: NIfTI (nibabel) and MetaImage (SimpleITK).

Both store a pixel by its x first: NIfTI's first axis, and MetaImage's fastest one, runs along a row. As an array
``[H, W]`` for everything else here, a NIfTI array is transposed; SimpleITK has its axes the other way around already.
Directions of the axes in space (NIfTI's affine, MetaImage's TransformMatrix) say nothing of what is up in an ultrasound
image, and are not applied: the first row that is stored is the upper one.

The libraries are optional (``pip install -e ".[data]"``), and imported when a file is read.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train.data.base import DataError
from train.data.limits import DEFLATED, refuse_large, refuse_short
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
    """A header (.mhd) has its pixels in another file, which it names.

    :raises DataError: it names none beside it.
    """
    if not path.name.lower().endswith(".mhd") or not path.is_file():
        return (path,)
    return tuple(dict.fromkeys((path, meta_image_pixels(path))))


def meta_image_fields(path: Path) -> dict[str, str]:
    """The header of a MetaImage, up to where its pixels begin. Names are in small letters."""
    fields: dict[str, str] = {}
    with path.open("rb") as file:
        for line in iter(lambda: file.readline(4096), b""):
            key, equals, value = line.decode("utf-8", "surrogateescape").partition("=")
            if not equals or len(fields) > 200:
                break
            fields[key.strip().lower()] = value.strip()
            if key.strip().lower() == "elementdatafile":
                break
    return fields


def meta_image_pixels(path: Path) -> Path:
    """The file that holds the pixels of a MetaImage: itself, or one beside it. No other one is read, whoever wrote the
    header.

    :raises DataError: the header names another one, several, or none.
    """
    named = meta_image_fields(path).get("elementdatafile", "")
    if named.upper() == "LOCAL":
        return path
    if not named or Path(named).name != named or named == ".." or "%" in named or len(named.split()) > 1:
        raise DataError(f"{path} has its pixels in {named or 'no file'}; save it as one file (.mha)")
    beside = path.parent / named
    if not beside.is_file():
        raise DataError(f"{path} has its pixels in {named}, which is missing; copy it to {path.parent}")
    return beside


def refuse_false_nifti(path: Path, image: Any) -> None:
    """Before memory is taken for the pixels of a NIfTI file.

    :param image: as nibabel has opened it.
    :raises DataError: they are too many, or more than the file can hold.
    """
    shape, dtype = image.header.get_data_shape(), image.header.get_data_dtype()
    refuse_large(path, *shape)
    packed = path.name.lower().endswith(".gz")
    refuse_short(
        path, math.prod(map(int, shape)) * dtype.itemsize, path.stat().st_size, packed=DEFLATED if packed else 1
    )


def _pixels(path: Path) -> np.ndarray:
    """The array of a file, ``[H, W]``.

    :raises DataError: it is no single image.
    :raises Exception: whatever the library raises of a damaged file.
    """
    library = imported(_library(path), path)
    if not path.is_file():
        raise DataError(f"{path} is missing; restore it from the data set")
    if library.__name__ == "nibabel":
        image = library.load(path)
        refuse_false_nifti(path, image)
        # The stored type stays, unless the header scales the values.
        pixels = np.asanyarray(image.dataobj).T
    else:
        source = meta_image_pixels(path)
        reader = library.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() > 1:
            raise DataError(f"{path} has colors; only gray images are read from this format")
        refuse_large(path, *reader.GetSize())
        packed = meta_image_fields(path).get("compresseddata", "").lower() == "true"
        # A byte at least for each: which type it is, the library itself compares with the file.
        refuse_short(path, math.prod(reader.GetSize()), source.stat().st_size, packed=DEFLATED if packed else 1)
        pixels = library.GetArrayFromImage(reader.Execute())
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
