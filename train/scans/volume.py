"""Volumes: NIfTI (nibabel) and MetaImage (SimpleITK), of which the frames are slices.

*Which slices*: those that :func:`train.data.volumes.through_plane` tells, as for training; of several times, all slices
of the first one, then those of the next.

Values of NIfTI are those after its slope and intercept, which are kept: so is the stored type, the header with what it
says of space and time, and its extensions, to which a comment with the derivation is added. Of MetaImage the geometry
and the other fields are kept. Where pixels become smaller, the spacing within slices does too, and the center of the
first voxel moves: the corner of the volume stays where it was.

A compressed volume has to be decoded as a whole, and either is written as a whole.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from abc import abstractmethod
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from train.data.base import DataError
from train.data.formats import imported, meta_image_fields, meta_image_pixels
from train.data.limits import DEFLATED, refuse_large, refuse_short
from train.data.readers import value_range
from train.data.volumes import nifti_through_plane, slices_of, through_plane
from train.files import atomic_file
from train.scans.base import Derivation, Scan
from train.scans.pixels import checked, extremes, narrow, read_guarded, stored

_COMMENT = 6  # the code of an extension of text (nifti1_io.h)
_LONGEST_HEADER = 2**28  # bytes, with its extensions


def opened(path: Path) -> Scan:
    """
    :raises DataError: as :func:`train.scans.open_scan`.
    """
    with path.open("rb") as file:
        begin = file.read(4)
    if begin[:2] == b"\x1f\x8b" or begin in _SIZES:
        return Nifti(path)
    return MetaImage(path)


class Volume(Scan):
    """What both formats share: a stored array ``[x, y, z, times, channels]``.

    :ivar through: the axis (0, 1 or 2) across which the slices lie; another one may be chosen before they are read.
    :raises DataError: as :func:`train.scans.open_scan`.
    """

    _shape: tuple[int, int, int, int]
    _dtype: np.dtype
    through: int
    _slope: float = 1.0
    _intercept: float = 0.0

    @abstractmethod
    def _stored(self) -> np.ndarray:
        """``[x, y, z, times, channels]`` as it is stored."""

    @property
    def frames(self) -> int:  # type: ignore[override]
        return self._shape[self.through] * self._shape[3]

    @property
    def _in_plane(self) -> tuple[int, int]:
        across, down = (axis for axis in range(3) if axis != self.through)
        return across, down

    def size(self, frame: int) -> tuple[int, int]:
        across, down = self._in_plane
        return self._shape[down], self._shape[across]

    @cached_property
    def value_range(self) -> tuple[float, float]:  # type: ignore[override]
        if self._dtype == np.uint8 and (self._slope, self._intercept) == (1, 0):
            return 0.0, 255.0
        low, high = extremes(self.path, map(self.read, range(self.frames)))
        bits = self._dtype.kind in "iu" and (self._slope, self._intercept) == (1, 0) and low >= 0
        return value_range(np.dtype(np.uint16 if bits else np.float32), low, high)

    def read(self, frame: int) -> np.ndarray:
        plane = self._slices(read_guarded(self.path, self._stored), frame)
        if (self._slope, self._intercept) != (1, 0):
            plane = plane.astype(np.float64) * self._slope + self._intercept
        return plane.astype(np.float32)

    def _slices(self, volume: np.ndarray, frame: int) -> np.ndarray:
        """A view of one slice, ``[H, W, channels]``."""
        if not 0 <= frame < self.frames:
            raise IndexError(f"{self.path} has {self.frames} frames, and no number {frame}")
        time, place = divmod(frame, self._shape[self.through])
        view: np.ndarray = slices_of(volume[:, :, :, time], self.through)[place]
        return view

    def _filled(self, frames: Iterable[np.ndarray], scale: int) -> np.ndarray:
        """The new volume, in the stored type."""
        shape = [side * (scale if axis in self._in_plane else 1) for axis, side in enumerate(self._shape)]
        volume = np.empty([*shape, self.channels], self._dtype, order="F")
        for number, values in enumerate(checked(self, frames, scale)):
            numbers = values
            if (self._slope, self._intercept) != (1, 0):
                numbers = (values.astype(np.float64) - self._intercept) / self._slope
            self._slices(volume, number)[:] = stored(numbers, self._dtype)
        return volume

    def _refuse_wrong(self, there: int, *, packed: int) -> None:
        refuse_large(self.path, *self._shape, self.channels)
        refuse_short(self.path, int(np.prod(self._shape, dtype=object)) * self.channels * self._dtype.itemsize, there,
                     packed=packed)  # fmt: skip


class Nifti(Volume):
    """A NIfTI file (1 or 2), compressed or not."""

    format = "NIfTI"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._nibabel = imported("nibabel", path)
        with path.open("rb") as file:
            self._packed = file.read(2) == b"\x1f\x8b"
        read_guarded(path, self._look)

    def _look(self) -> None:
        path, header = self.path, self._header()
        shape = list(header.get_data_shape())
        while len(shape) > 4 and shape[-1] == 1:
            shape.pop()
        shape += [1] * (4 - len(shape))
        if len(shape) > 4:
            raise DataError(f"{path} holds an array of {shape} (x first), no volume nor times; save one of its volumes")
        dtype = header.get_data_dtype()
        colors = dtype.fields is not None and len(dtype.fields) == 3
        if (dtype.fields is not None and not colors) or dtype.kind not in "buifV":
            raise DataError(f"{path} holds values of type {dtype}, neither gray levels nor RGB; convert it first")
        self.channels, self._dtype = (3, np.dtype(np.uint8)) if colors else (1, dtype)
        self._shape = (shape[0], shape[1], shape[2], shape[3])
        start, length = int(header["vox_offset"]), path.stat().st_size
        self._refuse_wrong(length if self._packed else length - start, packed=DEFLATED if self._packed else 1)
        self.through = nifti_through_plane(self._nibabel, header, shape[:3])
        slope, intercept = header.get_slope_inter()
        self._slope, self._intercept = 1.0 if slope is None else float(slope), float(intercept or 0)
        if (self._slope, self._intercept) == (1, 0):
            self.dtype = narrow(dtype if not colors else self._dtype)
        low, high = float(header["cal_min"]), float(header["cal_max"])
        if np.isfinite([low, high]).all() and low < high:  # what viewers show as black and white
            self.value_range = (low, high)

    def _stream(self) -> IO[bytes]:
        return gzip.open(self.path) if self._packed else self.path.open("rb")  # type: ignore[return-value]

    def _header(self) -> Any:
        with self._stream() as stream:
            begin = stream.read(4)
            if begin not in _SIZES:
                raise DataError(f"{self.path} is compressed, and no NIfTI inside; unpack it")
            kind = self._nibabel.Nifti1Header if _SIZES[begin] == 348 else self._nibabel.Nifti2Header
            first = kind(begin + stream.read(_SIZES[begin] - 4), check=False)
            if first["magic"].item()[:2] != b"n+":
                raise DataError(f"{self.path} has its pixels in another file (.img); save it as one file (.nii)")
            if not 0 <= int(first["vox_offset"]) <= _LONGEST_HEADER:
                raise DataError(f"{self.path} begins at byte {int(first['vox_offset'])} by its header; copy it again")
            stream.seek(0)
            return kind.from_fileobj(stream)

    def _stored(self) -> np.ndarray:
        return _nifti_array(self)

    def write(self, target: Path, frames: Iterable[np.ndarray], derivation: Derivation) -> None:
        header = read_guarded(self.path, self._header)
        volume = self._filled(frames, derivation.scale)
        if derivation.scale > 1:
            self._finer(header, derivation.scale)
        if derivation.anonymize:
            for name in ("descrip", "aux_file", "db_name", "intent_name"):
                if name in header.keys():  # noqa: SIM118  (a header is no mapping)
                    header[name] = b""
            header.extensions.clear()
        extension = self._nibabel.nifti1.Nifti1Extension
        header.extensions.append(extension(_COMMENT, derivation.description.encode()))
        header["vox_offset"] = header.single_vox_offset + header.extensions.get_sizeondisk()
        order = volume.astype(volume.dtype.newbyteorder(header.endianness), copy=False)
        with atomic_file(target) as file:
            # Without a time and a name in it, what is written twice is the same.
            out: Any = gzip.GzipFile("", "wb", 6, file, mtime=0) if self._packed else file
            header.write_to(out)
            if self.channels == 3:
                out.write(np.moveaxis(order, -1, 0).tobytes(order="F"))
            else:
                for time in range(order.shape[3]):
                    out.write(order[..., time, 0].tobytes(order="F"))
            if self._packed:
                out.close()

    def _finer(self, header: Any, scale: int) -> None:
        codes = int(header["qform_code"]), int(header["sform_code"])
        forms = header.get_qform(), header.get_sform()
        shape, zooms = list(header.get_data_shape()), list(header.get_zooms())
        for axis in self._in_plane:
            if axis < len(shape):
                shape[axis] *= scale
                zooms[axis] /= scale
        header.set_data_shape(shape)
        header.set_zooms(zooms)
        if codes[0]:
            header.set_qform(_finer_affine(forms[0], self._in_plane, scale), codes[0])
        if codes[1]:
            header.set_sform(_finer_affine(forms[1], self._in_plane, scale), codes[1])


_SIZES = {(size).to_bytes(4, order): size for size in (348, 540) for order in ("little", "big")}  # type: ignore[arg-type]


@lru_cache(maxsize=2)  # slices are read one after the other, and scans are kept longer than pixels
def _nifti_array(scan: Nifti) -> np.ndarray:
    header = scan._header()
    with scan._stream() as stream:
        raw = header.raw_data_from_fileobj(stream)
    if scan.channels == 3:
        raw = np.stack([raw[name] for name in raw.dtype.names], axis=-1)
        return raw.reshape(*scan._shape, 3)
    return raw.reshape(*scan._shape, 1)


def _finer_affine(affine: np.ndarray, axes: tuple[int, ...], scale: int) -> np.ndarray:
    """From indices of smaller voxels to space: the corner of the first one stays where it is.

    >>> _finer_affine(np.diag([2.0, 2, 5, 1]), (0, 1), 2).tolist()
    [[1.0, 0.0, 0.0, -0.5], [0.0, 1.0, 0.0, -0.5], [0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
    """
    finer = affine.copy()
    for axis in axes:
        finer[:3, 3] += affine[:3, axis] * (1 / scale - 1) / 2
        finer[:3, axis] /= scale
    return finer


class MetaImage(Volume):
    """A MetaImage file: .mha, or .mhd with its pixels in another file beside it."""

    format = "MetaImage"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = imported("SimpleITK", path)
        if path.suffix.lower() not in (".mha", ".mhd"):
            raise DataError(
                f"{path} is MetaImage by its content; give it the ending .mha, without which it is not read"
            )
        read_guarded(path, self._look)

    def _look(self) -> None:
        path = self.path
        self._packed = meta_image_fields(path).get("compresseddata", "").lower() == "true"
        pixels = meta_image_pixels(path)
        reader = self._reader()
        reader.ReadImageInformation()
        size, components = list(reader.GetSize()), reader.GetNumberOfComponents()
        if components not in (1, 3) or not 2 <= len(size) <= 4:
            raise DataError(f"{path} holds {components} components in {len(size)} dimensions, neither gray nor RGB")
        self.channels = components
        size += [1] * (4 - len(size))
        self._shape = (size[0], size[1], size[2], size[3])
        kind = self._library.GetPixelIDValueAsString(reader.GetPixelID())
        if (found := next((each for word, each in _TYPES.items() if word in kind), None)) is None:
            raise DataError(f"{path} holds values of type {kind}, no gray levels; convert it first")
        self._dtype = np.dtype(found)
        self.dtype = narrow(self._dtype)
        self._refuse_wrong(pixels.stat().st_size, packed=DEFLATED if self._packed else 1)
        spacing = np.array([*reader.GetSpacing(), 1.0][:3])
        self.through = through_plane(size[:3], spacing, None)

    def _reader(self) -> Any:
        reader = self._library.ImageFileReader()
        reader.SetFileName(str(self.path))
        return reader

    def _stored(self) -> np.ndarray:
        return _meta_array(self)

    def write(self, target: Path, frames: Iterable[np.ndarray], derivation: Derivation) -> None:
        library, scale = self._library, derivation.scale
        volume = self._filled(frames, scale)
        reader = self._reader()
        reader.ReadImageInformation()
        dimension = reader.GetDimension()
        image = library.GetImageFromArray(
            volume.reshape(*volume.shape[:dimension], *([3] if self.channels == 3 else [])).transpose(
                [*reversed(range(dimension)), *([dimension] if self.channels == 3 else [])]
            ),
            isVector=self.channels == 3,
        )
        spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin())
        finer = np.array([scale if axis in self._in_plane else 1 for axis in range(dimension)])
        direction = np.array(reader.GetDirection()).reshape(dimension, dimension)
        image.SetSpacing((spacing / finer).tolist())
        image.SetOrigin((origin + direction @ (spacing * (1 / finer - 1) / 2)).tolist())
        image.SetDirection(direction.ravel().tolist())
        if not derivation.anonymize:
            for key in reader.GetMetaDataKeys():
                if not key.startswith("ITK_"):  # what the library itself notes
                    image.SetMetaData(key, reader.GetMetaData(key))
            if comment := meta_image_fields(self.path).get("comment"):  # which ITK writes, and does not read
                image.SetMetaData("Comment", comment)
        image.SetMetaData("Derivation", " ".join(derivation.description.split()))
        with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
            # SimpleITK tells formats by endings, and a header (.mhd) names its other file.
            whole = Path(folder) / target.name
            library.WriteImage(image, str(whole), useCompression=self._packed)
            # The header comes last: until then what is there under its name is what was there.
            for written in sorted(Path(folder).iterdir(), key=lambda each: each == whole):
                os.replace(written, target.parent / written.name)


_TYPES = {
    "8-bit unsigned": "u1", "8-bit signed": "i1", "16-bit unsigned": "u2", "16-bit signed": "i2",
    "32-bit unsigned": "u4", "32-bit signed": "i4", "64-bit unsigned": "u8", "64-bit signed": "i8",
    "32-bit float": "f4", "64-bit float": "f8",
}  # fmt: skip


@lru_cache(maxsize=2)
def _meta_array(scan: MetaImage) -> np.ndarray:
    pixels = scan._library.GetArrayFromImage(scan._reader().Execute())
    axes = [*reversed(range(pixels.ndim - (scan.channels == 3)))]
    pixels = pixels.transpose([*axes, *([pixels.ndim - 1] if scan.channels == 3 else [])])
    return pixels.reshape(*scan._shape, scan.channels)
