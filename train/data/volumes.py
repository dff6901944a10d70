"""Slices of MR volumes: NIfTI (nibabel), and HDF5 in the layout of fastMRI (h5py).

*Which slices*: those across the direction in which the scanner acquired slice after slice, within which pixels are
finest and alike. In NIfTI that is an axis with one slice, else the one that the header names, else the one with the
widest spacing, else (a volume of cubes) the one that runs along the body. In fastMRI's files it is the first one.
Directions are not applied beyond that: the first row that is stored is the upper one (see :mod:`train.data.formats`).

*How bright*: the numbers of an MR volume have no unit, and each volume has a scale of its own. Its least value, or 0
where none is negative, becomes 0, and its 99.9th percentile 1; what is brighter (a vessel, a spike of noise) is cut
off, since it would darken all else.

The libraries are optional (``pip install -e ".[data]"``), and imported when a file is read.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from train.data.base import DataError
from train.data.formats import imported, refuse_false_nifti
from train.data.limits import refuse_large
from train.data.parts import stamps
from train.data.readers import arranged, guarded

ENDINGS = {".nii": "nibabel", ".nii.gz": "nibabel", ".h5": "h5py", ".hdf5": "h5py"}
WHITE = 99.9
"""The percentile of a volume's values that becomes 1."""
EMPTY = 0.1
"""A slice is empty where fewer than this share of its pixels are brighter than this share of white."""


def library_of(path: Path) -> str | None:
    """What a volume is read with, by its ending; ``None``: it is none."""
    return next((library for ending, library in ENDINGS.items() if path.name.lower().endswith(ending)), None)


def stem_of(path: Path) -> str:
    """The name of a volume without its ending.

    >>> stem_of(Path("IXI002-Guys-0828-T2.nii.gz")), stem_of(Path("file1000001.h5"))
    ('IXI002-Guys-0828-T2', 'file1000001')
    """
    ending = next(each for each in sorted(ENDINGS, key=len, reverse=True) if path.name.lower().endswith(each))
    return path.name[: -len(ending)]


class Facts(NamedTuple):
    """What is known of a volume once it was looked through.

    :param low: the value that becomes 0.
    :param white: the value that becomes 1.
    :param kept: the slices that are not empty.
    :param slices: how many there are in all.
    """

    low: float
    white: float
    kept: tuple[int, ...]
    slices: int


@dataclass(frozen=True)
class VolumeSlice:
    """One slice of a volume. The whole is read once for the slices that are read one after the other.

    :param path: its ending decides the format.
    :param axis: across which the slices lie, of the array as it is stored; ``None``: as the file says.
    :param index: which slice.
    :param low: the value that becomes 0.
    :param white: the value that becomes 1.
    """

    path: Path
    axis: int | None
    index: int
    low: float
    white: float

    @property
    def libraries(self) -> tuple[str, ...]:
        return (library_of(self.path) or "",)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, channels: int) -> np.ndarray:
        """
        :returns: ``float32 [H, W, channels]`` in [0, 1].
        :raises DataError: the file is missing, damaged or no such volume, or its library is not installed.
        """
        return guarded(self.path, lambda: arranged(self.path, self._pixels(), channels))

    def _pixels(self) -> np.ndarray:
        plane = _volume(self.path, self.axis, stamps(self.files))[self.index].astype(np.float64)
        return ((plane - self.low) / (self.white - self.low)).clip(0, 1).astype(np.float32)


def facts(path: Path, axis: int | None = None) -> Facts:
    """Looks through a volume.

    :raises DataError: it cannot be read, or holds no image.
    """
    volume = guarded(path, lambda: _volume(path, axis, stamps((path,))))
    if not np.isfinite(volume).all():
        raise DataError(f"{path} holds NaN or infinity; replace these values")
    low, white = min(0.0, float(volume.min())), float(np.percentile(volume, WHITE))
    if white <= low or volume.min() == volume.max():
        raise DataError(f"{path} holds hardly more than one value ({white:g}): there is no image in it; move it away")
    share = (volume > low + EMPTY * (white - low)).mean((1, 2))
    return Facts(low, white, tuple(np.flatnonzero(share >= EMPTY).tolist()), len(volume))


def patient_of(path: Path) -> str | None:
    """Whose volume it is, where the file itself says so (fastMRI's ``patient_id``).

    :raises DataError: it cannot be read.
    """
    if library_of(path) != "h5py":
        return None
    h5py = imported("h5py", path)
    try:
        with h5py.File(path, "r") as file:
            told = file.attrs.get("patient_id")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}); restore the file from the data set") from error
    return None if told is None else told.decode() if isinstance(told, bytes) else str(told)


@lru_cache(maxsize=4)  # volumes are large, and their slices are read one after the other
def _volume(path: Path, axis: int | None, stamps: object) -> np.ndarray:
    """``[slices, H, W]``, real.

    :raises DataError: it is no such volume.
    :raises Exception: whatever the library raises of a damaged file.
    """
    library = library_of(path)
    if library is None:
        raise DataError(f"{path} is no volume by its ending; there are {', '.join(ENDINGS)}")
    if not path.is_file():
        raise DataError(f"{path} is missing; restore it from the data set")
    module = imported(library, path)
    volume = _nifti(module, path, axis) if library == "nibabel" else _fastmri(module, path)
    if volume.dtype.kind not in "buif":
        what = "complex values" if volume.dtype.kind == "c" else f"values of type {volume.dtype}"
        raise DataError(f"{path} holds {what}, no gray levels; save the magnitude of its image")
    if volume.dtype.kind == "b" or volume.dtype.itemsize > 2:
        volume = volume.astype(np.float32)
    volume.setflags(write=False)
    return volume


def _nifti(nibabel: Any, path: Path, axis: int | None) -> np.ndarray:
    image = nibabel.load(path)
    refuse_false_nifti(path, image)
    stored = np.asanyarray(image.dataobj)
    while stored.ndim > 3 and stored.shape[-1] == 1:  # the time of a single volume
        stored = stored[..., 0]
    if stored.ndim == 2:
        stored = stored[..., None]
    if stored.ndim != 3 or not stored.size:
        raise DataError(
            f"{path} holds an array of {list(stored.shape)} (x first), no single volume; save one of its volumes"
        )
    through = nifti_through_plane(nibabel, image.header, stored.shape) if axis is None else axis
    return np.ascontiguousarray(slices_of(stored, through))


def slices_of(stored: np.ndarray, through: int) -> np.ndarray:
    """The slices of a volume, as a view.

    :param stored: ``[x, y, z, ...]``.
    :param through: the axis (0, 1 or 2) across which they lie.
    :returns: ``[slices, H, W, ...]``: x runs along a row, as in every other image.
    """
    return np.moveaxis(stored, through, 0).swapaxes(1, 2)


def nifti_through_plane(nibabel: Any, header: Any, shape: Sequence[int]) -> int:
    """The axis across which the slices of a NIfTI volume lie.

    :param header: of the file.
    :param shape: of its first three axes.
    """
    affine = header.get_best_affine()

    def along_body() -> int:
        codes = nibabel.aff2axcodes(affine)
        # 2: a header without directions
        return next((axis for axis, code in enumerate(codes) if code in ("S", "I")), 2)

    return through_plane(shape, np.linalg.norm(affine[:3, :3], axis=0), header.get_dim_info()[2], along_body)


def through_plane(
    shape: Sequence[int], zooms: np.ndarray, told: int | None, along_body: Callable[[], int] = lambda: 2
) -> int:
    """The axis across which the slices of a volume lie.

    :param shape: of its three axes.
    :param zooms: how far apart two voxels are along each.
    :param told: what its header says, if anything.
    :param along_body: gives the axis from head to feet, for a volume of cubes.

    >>> through_plane((9, 1, 9), np.ones(3), None), through_plane((9, 9, 9), np.array([1, 1, 3.0]), None)
    (1, 2)
    """
    if 1 in shape:
        return max(axis for axis, length in enumerate(shape) if length == 1)
    if told is not None:
        return int(told)
    widest = int(zooms.argmax())
    return widest if zooms[widest] > 1.01 * np.sort(zooms)[1] else along_body()


def _fastmri(h5py: Any, path: Path) -> np.ndarray:
    with h5py.File(path, "r") as file:
        for name in ("reconstruction_rss", "reconstruction_esc"):
            if _holds(h5py, path, file, name):
                return _stack(path, name, file[name], (3,))
        if not _holds(h5py, path, file, "kspace"):
            raise DataError(
                f"{path} has neither reconstruction_rss nor kspace, as files of fastMRI have (only "
                f"{', '.join(file) or 'nothing'})"
            )
        if _holds(h5py, path, file, "mask"):
            raise DataError(
                f"{path} is undersampled (it has a mask), and no clean image; take files of training or validation"
            )
        kspace = _stack(path, "kspace", file["kspace"], (3, 4))
        header = file["ismrmrd_header"][()] if _holds(h5py, path, file, "ismrmrd_header") else None
    images = root_sum_of_squares(kspace)
    if header is None:
        return images
    # Some scans have fewer columns than the image that the header tells of.
    rows, columns = np.minimum(_recon_size(path, header), images.shape[1:])
    top, left = (images.shape[1] - rows) // 2, (images.shape[2] - columns) // 2
    return images[:, top : top + rows, left : left + columns]


def _holds(h5py: Any, path: Path, file: Any, name: str) -> bool:
    """Whether a file itself holds an array. HDF5 can name others anywhere on this machine, which are not looked into.

    :raises DataError: what has that name lies in another file.
    """
    link = file.get(name, getlink=True) if name in file.keys() else None  # noqa: SIM118  (the other looks into it)
    if link is None:
        return False
    elsewhere = isinstance(link, h5py.ExternalLink)
    if not elsewhere and isinstance(found := file.get(name), h5py.Dataset):
        elsewhere = found.is_virtual or bool(found.external)
    if elsewhere:
        raise DataError(f"{path}: {name} lies in another file, which is not read; save both as one file")
    return True


def _stack(path: Path, name: str, array: Any, ndims: Sequence[int]) -> np.ndarray:
    if not hasattr(array, "ndim") or array.ndim not in ndims or not array.size:
        told = f"{array.dtype} {list(array.shape)}" if hasattr(array, "dtype") else "no array"
        raise DataError(f"{path}: {name} is {told}, no stack of slices")
    refuse_large(path, *array.shape)  # parts that were never written take no space in the file, and all of it here
    return np.asarray(array)


def root_sum_of_squares(kspace: np.ndarray) -> np.ndarray:
    """Magnitude images of fully sampled k-space, the zero frequency in the middle.

    :param kspace: ``complex [slices, H, W]`` or, of several coils, ``[slices, coils, H, W]``.
    :returns: ``float32 [slices, H, W]``.
    """
    axes = (-2, -1)
    images = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=axes), norm="ortho"), axes=axes)
    magnitude = np.abs(images)
    if magnitude.ndim == 4:
        magnitude = np.sqrt((magnitude**2).sum(1))
    return magnitude.astype(np.float32)


def _recon_size(path: Path, header: bytes) -> tuple[int, int]:
    """Rows and columns of the image, without the oversampled borders of the readout."""
    size = ET.fromstring(header).find(".//{*}reconSpace/{*}matrixSize")
    if size is None:
        raise DataError(f"{path}: its ismrmrd_header has no reconSpace; restore the file from the data set")
    rows, columns = (int(size.findtext(f"{{*}}{name}", "0")) for name in ("x", "y"))
    return rows, columns
