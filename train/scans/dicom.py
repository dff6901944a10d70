"""DICOM (pydicom, and pylibjpeg for compressed pixels): one image or many frames in a file.

Values are those after the rescale slope and intercept, of the frame where the frames have their own: Hounsfield units
in CT. MONOCHROME1, which stores what is bright as small numbers, is turned over within the range of its bits, and back
when it is written. Colors are RGB, whatever is stored; a palette gives 8 bits. A modality lookup table cannot be
undone: its file is taken by the stored numbers, to which the table still applies when they are written.

What is written is uncompressed (explicit VR, little endian): every reader of DICOM reads it, and no enhanced pixel is
lost to a second compression. Bits, sign, rescale and window stay; :mod:`train.scans.derived` has the header. Pixels
that were padding (PixelPaddingValue), like the corners around the circle of a CT, stay that.

Refused, as no images: segmentations, radiotherapy doses, parametric maps in floating point, slides in tiles, and what
has no pixels at all.
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

from train.data.base import DataError
from train.data.formats import imported
from train.data.limits import DEFLATED, most_pixels, refuse_large, refuse_short
from train.files import atomic_file
from train.scans.base import Derivation, Scan
from train.scans.pixels import checked, narrow, read_guarded, stored

# Headers of real devices break the rules in small things, about which pydicom warns each time, twice.
warnings.filterwarnings("ignore", module="pydicom")
_LOG = logging.getLogger("pydicom")
_LOG.propagate = False  # a level would not last: pydicom sets its own when it is imported
_LOG.addHandler(logging.NullHandler())

_PIXEL_DATA = (0x7FE0, 0x0010)
_LONGEST = 2**32 - 2  # bytes in an element
_NO_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation: its pixels are classes",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation: its pixels are classes",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose, which must not change",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a slide in tiles, which would show their seams",
}
_NOBODY = {"anonymized", "anonymised", "anonymous", "anon", "unknown", "none", "0"}
_COLORS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "PALETTE COLOR"}


class Dicom(Scan):
    """A DICOM file with pixels.

    :raises DataError: as :func:`train.scans.open_scan`.
    """

    format = "DICOM"

    def __init__(self, path: Path) -> None:
        self.path = path
        imported("pydicom", path)
        read_guarded(path, self._look)

    def _look(self) -> None:
        path = self.path
        header, start, length = _header(path)
        if reason := _NO_IMAGES.get(str(header.get("SOPClassUID", ""))):
            raise DataError(f"{path} is {reason}; leave it out")
        if length is None:
            kind = header.SOPClassUID.name if "SOPClassUID" in header else "no image"
            raise DataError(f"{path} has no pixels ({kind}); leave it out")
        if missing := [name for name in ("Rows", "Columns", "BitsAllocated", "BitsStored") if header.get(name) is None]:
            raise DataError(f"{path} is damaged: its header has no {missing[0]}; copy it again from where it came from")
        self._syntax = header.file_meta.TransferSyntaxUID
        self._start = start
        self._size = (int(header.Rows), int(header.Columns))
        self.frames = int(header.get("NumberOfFrames") or 1)
        samples = int(header.get("SamplesPerPixel") or 1)
        photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
        if photometric not in _COLORS | {"MONOCHROME1", "MONOCHROME2"} or samples not in (1, 3):
            raise DataError(f"{path} is {photometric} of {samples} samples, neither gray nor RGB; convert it first")
        self._palette, self._inverted = photometric == "PALETTE COLOR", photometric == "MONOCHROME1"
        self.channels = 3 if photometric in _COLORS else 1
        self._bits, self._allocated = int(header.BitsStored), int(header.BitsAllocated)
        self._high_bit = int(header.get("HighBit", self._bits - 1))
        if self._allocated not in (8, 16, 32) or not self._bits - 1 <= self._high_bit < self._allocated:
            raise DataError(
                f"{path} has {self._bits} bits in {self._allocated}, up to bit {self._high_bit}; convert it"
            )
        self._signed = int(header.get("PixelRepresentation") or 0) == 1
        if self.frames < 1:
            raise DataError(f"{path} has {self.frames} frames by its header; copy it again from where it came from")
        refuse_large(path, *self._size)
        pixels = self._size[0] * self._size[1] * self.frames
        if self._syntax.is_encapsulated:
            _refuse_cut(path, start, self.frames)
        else:
            half = 2 if photometric == "YBR_FULL_422" else samples
            refuse_short(path, pixels * half * self._allocated // 8, length)
        self._rescale = [_rescale(header, frame) for frame in range(self.frames if _per_frame(header) else 1)]
        if any(not np.isfinite(each).all() or each[0] == 0 for each in self._rescale):
            raise DataError(f"{path} has the rescale slope {self._rescale[0][0]:g}; no value can be made of its pixels")
        if set(self._rescale) == {(1.0, 0.0)}:
            self.dtype = narrow(self._dtype)
        self._window = _window(header, self.frames)
        self._padding = _padding(header) if self.channels == 1 else None
        self.patient = _patient(header)

    @property
    def _dtype(self) -> np.dtype:
        """Of a pixel that is written."""
        return (
            np.dtype(np.uint8) if self._palette else np.dtype(f"<{'i' if self._signed else 'u'}{self._allocated // 8}")
        )

    @property
    def _limits(self) -> tuple[float, float]:
        """Of stored numbers."""
        if self._palette:
            return 0.0, 255.0
        half = 2.0 ** (self._bits - 1)
        return (-half, half - 1) if self._signed else (0.0, 2 * half - 1)

    def _scaling(self, frame: int) -> tuple[float, float]:
        """Slope and intercept."""
        return self._rescale[min(frame, len(self._rescale) - 1)]

    def _extremes(self, frame: int) -> tuple[float, float]:
        """Of the values that a frame may have."""
        slope, intercept = self._scaling(frame)
        low, high = sorted(slope * limit + intercept for limit in self._limits)
        return low, high

    @cached_property
    def value_range(self) -> tuple[float, float]:  # type: ignore[override]
        if self._window is None:
            low, high = self._used()
            every = [sorted((slope * low + intercept, slope * high + intercept)) for slope, intercept in self._rescale]
            dark, bright = min(low for low, _ in every), max(high for _, high in every)
        else:
            dark, bright = self._window
        turned = sum(self._extremes(0))
        return (turned - bright, turned - dark) if self._inverted else (dark, bright)

    def _used(self) -> tuple[float, float]:
        """The limits of stored numbers, of no more bits than are used of those in which they are said to be stored.

        Detectors and Hounsfield units have 12 bits, which many files have in 16. That is taken for what is used where
        no pixel needs more, so that all images of a series are equally bright.
        """
        if self._palette or self._bits <= 12:
            return self._limits
        low, high = 0, 0
        for frame in range(self.frames):
            pixels = self._stored(frame)
            if self._padding is not None:
                pixels = pixels[(pixels < self._padding[0]) | (pixels > self._padding[1])]
            if pixels.size:
                low, high = min(low, int(pixels.min())), max(high, int(pixels.max()))
        if low < 0:
            half = 2.0 ** max(11, high.bit_length(), (-low - 1).bit_length())
            return -half, half - 1
        return 0.0, 2.0 ** max(12, high.bit_length()) - 1

    def size(self, frame: int) -> tuple[int, int]:
        return self._size

    def read(self, frame: int) -> np.ndarray:
        slope, intercept = self._scaling(frame)
        values = self._stored(frame).astype(np.float64) * slope + intercept
        if self._inverted:
            values = sum(self._extremes(frame)) - values
        return values.astype(np.float32)

    def _stored(self, frame: int) -> np.ndarray:
        """Integers as they are stored ``[H, W, 1]``, or colors ``[H, W, 3]``."""
        if not 0 <= frame < self.frames:
            raise IndexError(f"{self.path} has {self.frames} frames, and no number {frame}")
        return read_guarded(self.path, lambda: self._decoded(frame))

    def _decoded(self, frame: int) -> np.ndarray:
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut, pixel_array

        if self._syntax.is_encapsulated:
            self._refuse_other_size(frame)
        native = not self._syntax.is_encapsulated and self.channels == 1
        source: Any = self.path
        options: dict[str, Any] = {"transfer_syntax_uid": self._syntax}
        if self._syntax.is_deflated:
            source, options = dcmread(self.path), {}
        if native:
            options["correct_unused_bits"] = False  # pydicom takes the highest bit for the last one that is stored
        try:
            pixels = pixel_array(source, index=frame, **options)
        except RuntimeError as error:  # its words are about its plugins, over several lines
            raise DataError(
                f"{self.path}: frame {frame + 1} ({self._syntax.name}) cannot be decoded: it is damaged, or a decoder "
                "is missing (pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg python-gdcm)"
            ) from error
        if native and (self._bits, self._high_bit) != (self._allocated, self._allocated - 1):
            pixels = (pixels << (self._allocated - 1 - self._high_bit)) >> (self._allocated - self._bits)
        if self._palette:
            pixels = apply_color_lut(pixels, _header(self.path)[0])
            pixels = pixels >> 8 * (pixels.dtype.itemsize - 1)
        return pixels.reshape(*self._size, self.channels)

    def _refuse_other_size(self, frame: int) -> None:
        """Decoders take memory for what compressed pixels say of themselves."""
        from pydicom.encaps import get_frame

        with self.path.open("rb") as file:
            file.seek(self._start)
            found = _coded_size(get_frame(file, frame, number_of_frames=self.frames))
        if found is not None and found != self._size:
            raise DataError(
                f"{self.path} has {self._size[0]} x {self._size[1]} pixels by its header, and {found[0]} x {found[1]} "
                "by their compressed form; copy it again from where it came from"
            )

    def write(self, target: Path, frames: Iterable[np.ndarray], derivation: Derivation) -> None:
        from train.scans.derived import derived_header

        height, width = (side * derivation.scale for side in self._size)
        length = height * width * self.channels * self._dtype.itemsize * self.frames
        if length > _LONGEST:
            raise DataError(
                f"{target}: {length:,} bytes of pixels are more than a DICOM file holds; take a smaller scale"
            )
        header = derived_header(self, _header(self.path)[0], derivation, self._overlays())
        with atomic_file(target) as file:
            header.save_as(file, enforce_file_format=True)
            # The last element is written as the frames come.
            kind = b"OB" if self._dtype.itemsize == 1 else b"OW"
            file.write(struct.pack("<HH2sHI", *_PIXEL_DATA, kind, 0, length + length % 2))
            for number, values in enumerate(checked(self, frames, derivation.scale)):
                file.write(self._encoded(number, values, derivation.scale).tobytes())
            file.write(b"\0" * (length % 2))

    def _encoded(self, frame: int, values: np.ndarray, scale: int) -> np.ndarray:
        slope, intercept = self._scaling(frame)
        numbers = values.astype(np.float64)
        if self._inverted:
            numbers = sum(self._extremes(frame)) - numbers
        pixels = stored((numbers - intercept) / slope, self._dtype, self._limits)
        if self._padding is not None:
            before = self._stored(frame).repeat(scale, axis=0).repeat(scale, axis=1)
            padding = (before >= self._padding[0]) & (before <= self._padding[1])
            pixels[padding] = before[padding]
        return pixels

    def _overlays(self) -> dict[int, np.ndarray]:
        """Overlays that lie in unused bits of the pixels, by their group: ``bool [frames, H, W]``."""
        header = _header(self.path)[0]
        hidden = [
            group
            for group in range(0x6000, 0x6020, 2)
            if (group, 0x0102) in header and (group, 0x3000) not in header and header[group, 0x0102].value
        ]
        if not hidden or self._syntax.is_encapsulated or self._syntax.is_deflated or self.channels == 3:
            return {}
        from pydicom.pixels import pixel_array

        def planes() -> np.ndarray:
            raw = pixel_array(self.path, correct_unused_bits=False, transfer_syntax_uid=self._syntax, raw=True)
            return raw.reshape(self.frames, *self._size)

        raw = read_guarded(self.path, planes)
        return {group: (raw >> int(header[group, 0x0102].value)) & 1 == 1 for group in hidden}


def _header(path: Path) -> tuple[Any, int, int | None]:
    """All before the pixels; where their value begins; and how many bytes it has (``None`` without pixels).

    A file without a transfer syntax is taken by the encoding that its first elements have.
    """
    import pydicom
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    if _is_deflated(path):
        _refuse_bomb(path)
        header = pydicom.dcmread(path)
        length = len(header.PixelData) if "PixelData" in header else None
        del header[_PIXEL_DATA[0] : _PIXEL_DATA[0] + 1]
        return header, 0, length
    with path.open("rb") as file:
        header = pydicom.dcmread(file, stop_before_pixels=True, force=True)
        implicit, little = header.original_encoding
        if header.file_meta.get("TransferSyntaxUID") is None:
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        length = _length(file, implicit=bool(implicit), little=bool(little))
        start = file.tell()
    if length is not None:
        length = min(length, path.stat().st_size - start)
    return header, start, length


def _refuse_cut(path: Path, start: int, frames: int) -> None:
    """Walks over the fragments of compressed pixels: decoders make some picture of half a frame.

    :raises DataError: one of them ends behind the file, or there are fewer than frames.
    """
    length, fragments = path.stat().st_size, -1  # the first one is the table of offsets
    with path.open("rb") as file:
        place = start
        while place < length:
            file.seek(place)
            head = file.read(8)
            if head[:4] != b"\xfe\xff\x00\xe0" or len(head) < 8:
                break
            place += 8 + int(struct.unpack("<I", head[4:])[0])
            fragments += 1
    if place > length or fragments < frames:
        raise DataError(
            f"{path} ends within its pixels ({max(fragments, 0)} fragments of {frames} frames): it is truncated, or "
            "its header is wrong; copy it again from where it came from"
        )


def _length(file: IO[bytes], *, implicit: bool, little: bool) -> int | None:
    """Of the pixels, whose element comes next; the file is left where their value begins."""
    order = "<" if little else ">"
    head = file.read(8)
    if len(head) < 8 or struct.unpack(f"{order}HH", head[:4]) != _PIXEL_DATA:
        return None
    length: int = struct.unpack(f"{order}I", head[4:] if implicit else file.read(4))[0]
    return length


def _is_deflated(path: Path) -> bool:
    from pydicom.filereader import read_file_meta_info
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    try:
        return bool(read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian)
    except Exception:  # a file without this part, which is read another way
        return False


def _refuse_bomb(path: Path) -> None:
    """Inflates a file, without keeping it, up to the limit.

    :raises DataError: it becomes larger than any image that is read.
    """
    limit = 8 * most_pixels()  # a header, and pixels of up to 32 bits in color
    if path.stat().st_size * DEFLATED < limit:
        return
    with path.open("rb") as file:
        content = file.read()
    # The data set begins behind the group 2, whose length its first element says.
    inflating, rest, total = zlib.decompressobj(-zlib.MAX_WBITS), content[144 + _group_length(content) :], 0
    while rest and not inflating.eof:
        total += len(inflating.decompress(rest, 2**24))
        rest = inflating.unconsumed_tail
        if total > limit:
            raise DataError(f"{path} becomes larger than {limit:,} bytes when it is inflated; it is no image")


def _group_length(content: bytes) -> int:
    length: int = struct.unpack("<I", content[140:144])[0]
    return length


def _coded_size(code: bytes) -> tuple[int, int] | None:
    """Height and width by a frame of JPEG, JPEG-LS (both in a frame header) or JPEG 2000 (SIZ); ``None``: unknown."""
    start = code.find(b"\xff\x4f\xff\x51", 0, 4096)  # behind the boxes of a JP2 file, which is not allowed, but occurs
    if start >= 0 and len(code) >= start + 24:
        width, height, left, top = struct.unpack(">IIII", code[start + 8 : start + 24])
        return height - top, width - left
    if code[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(code) and code[place] == 0xFF:
        marker = code[place + 1]
        if marker == 0xFF:  # a byte between two segments
            place += 1
            continue
        # SOF0 to SOF15 but DHT, JPG and DAC, and SOF55 of JPEG-LS.
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            height, width = struct.unpack(">HH", code[place + 5 : place + 9])
            return (height, width) if height else None  # 0: told later, in a DNL segment
        place += 2 + struct.unpack(">H", code[place + 2 : place + 4])[0]
    return None


def _patient(header: Any) -> str | None:
    """Whose image it is; where all that is said is a word for nobody, what is of one study is of one patient."""
    for name in ("PatientID", "PatientName"):
        if (said := str(header.get(name) or "").strip("^ ")) and said.lower() not in _NOBODY:
            return said
    study = str(header.get("StudyInstanceUID") or "")
    return f"study {study}" if study else None


def _per_frame(header: Any) -> bool:
    return bool(header.get("PerFrameFunctionalGroupsSequence"))


def _group(header: Any, frame: int, name: str) -> Any:
    """What functional groups say of a frame: its own item of a sequence, else that of all frames, else the header."""
    own = header.get("PerFrameFunctionalGroupsSequence") or ()
    for groups in (*own[frame : frame + 1], *(header.get("SharedFunctionalGroupsSequence") or ())):
        if items := groups.get(name):
            return items[0]
    return header


def _rescale(header: Any, frame: int) -> tuple[float, float]:
    """Slope and intercept."""
    if header.get("ModalityLUTSequence"):
        return 1.0, 0.0
    found = _group(header, frame, "PixelValueTransformationSequence")
    slope, intercept = found.get("RescaleSlope"), found.get("RescaleIntercept")
    return 1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept)


def _window(header: Any, frames: int) -> tuple[float, float] | None:
    """The values that are black and white (PS3.3 C.11.2.1.2), in the first window of all frames together."""
    if header.get("ModalityLUTSequence"):  # a window is one of the values that the table gives
        return None
    found = []
    for frame in range(frames if _per_frame(header) else 1):
        group = _group(header, frame, "FrameVOILUTSequence")
        centers, widths = group.get("WindowCenter"), group.get("WindowWidth")
        if centers in (None, "") or widths in (None, ""):
            return None
        center, width = (float(np.atleast_1d(np.array(each, float))[0]) for each in (centers, widths))
        if str(group.get("VOILUTFunction", "LINEAR") or "LINEAR") == "LINEAR":
            center, width = center - 0.5, width - 1
        found.append((center - width / 2, center + width / 2))
    low, high = min(low for low, _ in found), max(high for _, high in found)
    return (low, high) if low < high else None


def _padding(header: Any) -> tuple[int, int] | None:
    """The least and the largest stored number that is no pixel."""
    values = [header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    found = [value for value in values if isinstance(value, int)]
    return (min(found), max(found)) if found else None
