"""From files to pixels: whatever the mode, the depth and the file name's ending, the content decides.

A reader gives an image as it is stored, ``uint8``, ``uint16`` or ``float32``, and never fewer bits than it has: what
would lose some on the way is refused. How values become [0, 1] is decided for a data set as a whole
(:func:`value_range`), so that an image stays as bright beside another one as it was.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps

from train.data.base import DataError
from train.data.limits import DEFLATED, refuse_large, refuse_short

_EIGHT_BITS = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
LUMA = np.array([0.299, 0.587, 0.114])
"""Of red, green and blue, what gray images are made of: ITU-R BT.601, as Pillow's."""
_SIGNATURES = {b"\x93NUMPY": "NPY", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"}
_MASK_FORMATS = {"PNG", "TIFF", "BMP", "GIF", "PPM"}  # what keeps every pixel as it was
_SAVE_MASKS = "save class indices (0, 1, 2, ...) in one channel, as PNG or NPY"

T = TypeVar("T")
R = TypeVar("R")


class Reader(Protocol):
    """How an image or a mask is read. One object may also stand for a part of a file, or for several files.

    Two that read the same are equal (frozen dataclasses are). ``libraries`` names what it decodes with besides NumPy,
    Pillow and tifffile, if anything, as it is called on PyPI, and ``code`` files of source besides its own that decide
    what it gives.
    """

    def __hash__(self) -> int: ...

    @property
    def files(self) -> tuple[Path, ...]:
        """What is read: the cache notices when one of them changes."""

    def read(self, channels: int) -> np.ndarray:
        """
        :param channels: 1 (gray) or 3 (RGB); without a meaning for masks.
        :returns: an image, ``uint8``, ``uint16`` or ``float32 [H, W, channels]``, or a mask, ``uint8 [H, W]``.
        :raises DataError: the file is missing, damaged or not what it should be.
        """


@dataclass(frozen=True)
class ImageFile:
    """An image in a file: all that Pillow reads, TIFF of any depth, or an array in NumPy's format.

    Transparent pixels are composited over black, the background of a CT slice. Gray is ITU-R 601 luma. A photograph is
    turned upright as its EXIF data say.

    :param path: of the file; its ending does not matter.
    """

    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, channels: int) -> np.ndarray:
        """
        :returns: ``[H, W, channels]``: ``uint8`` as it is; ``uint16`` where integers from 0 to 65535 are stored in more
            than 8 bits; else ``float32`` (other integers, floating point).
        :raises DataError: the file is missing, damaged, no single image, or of a kind that cannot be read without loss.
        """
        return guarded(self.path, lambda: self._read(channels))

    def _read(self, channels: int) -> np.ndarray:
        kind, header = _kind(self.path)
        pixels = None
        if kind == "NPY":
            pixels = _npy(self.path)
        elif kind == "TIFF":
            pixels = _deep_tiff(self.path)
        if pixels is not None:
            return arranged(self.path, pixels, channels)
        if header[:8] == b"\x89PNG\r\n\x1a\n" and header[24:26] in (b"\x10\2", b"\x10\4", b"\x10\6"):
            raise DataError(
                f"{self.path} has 16 bits per channel and several channels, of which Pillow would keep 8 bits; save it "
                "as TIFF or NPY, or with 8 bits"
            )
        with Image.open(self.path) as file:
            _refuse_several(self.path, file)
            refuse_large(self.path, file.height, file.width)
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode not in _EIGHT_BITS:
                if not (image.mode == "F" or image.mode.startswith("I")):
                    raise DataError(f"{self.path}: mode {image.mode!r} is neither gray nor RGB; convert it first")
                return arranged(self.path, np.asarray(image), channels)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
        return pixels.reshape(*pixels.shape[:2], channels)


@dataclass(frozen=True)
class MaskFile:
    """Class indices in a file: one channel of whole numbers, stored without loss. Colors of a palette do not matter.

    :param path: a PNG, TIFF, BMP, GIF, PGM or NPY file.
    :param values: which values stand for the classes 0, 1, ... where no others may occur; ``None``: any, and what they
        mean is decided for a data set as a whole (:func:`class_indices`).
    """

    path: Path
    values: tuple[int, ...] | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, channels: int = 1) -> np.ndarray:
        """
        :returns: ``uint8 [H, W]``: the values as they are stored, or, where ``values`` are given, class indices.
        :raises DataError: the file is missing, damaged, or no index image, or holds a value that has no meaning.
        """
        return guarded(self.path, lambda: index_image(self.path, self._read(), self.values))

    def _read(self) -> np.ndarray:
        kind, header = _kind(self.path)
        indices: np.ndarray | None = None
        if kind == "NPY":
            indices = _npy(self.path)
        elif kind == "TIFF":
            indices = _deep_tiff(self.path)
        if indices is None:
            with Image.open(self.path) as file:
                _refuse_several(self.path, file)
                if file.format not in _MASK_FORMATS:
                    raise DataError(
                        f"the mask {self.path} is stored as {file.format}, which changes single pixels, and thereby "
                        f"classes; {_SAVE_MASKS}"
                    )
                refuse_large(self.path, file.height, file.width)
                image: Image.Image = ImageOps.exif_transpose(file)
                if image.mode not in {"1", "L", "P"} and not image.mode.startswith("I"):
                    raise DataError(
                        f"the mask {self.path} has colors (mode {image.mode}), no class indices; {_SAVE_MASKS}"
                    )
                indices = np.asarray(image)
                if header[:8] == b"\x89PNG\r\n\x1a\n" and image.mode == "L":
                    # Pillow spreads the levels of 2 and 4 bits over 0 to 255: class 1 would be 85 or 17.
                    indices = indices // {2: 85, 4: 17}.get(header[24], 1)
        return indices


def index_image(path: Path, indices: np.ndarray, values: tuple[int, ...] | None = None) -> np.ndarray:
    """An array from a mask's file as class indices.

    :param path: where it was read from, for the message.
    :param indices: whole numbers, ``[H, W]`` or ``[H, W, 1]``.
    :param values: as in :class:`MaskFile`.
    :returns: ``uint8 [H, W]``.
    :raises DataError: it is no such array, or holds a value that has no meaning.
    """
    if indices.ndim == 3 and indices.shape[2] == 1:
        indices = indices[..., 0]
    if indices.ndim != 2 or indices.dtype.kind not in "biu":
        raise DataError(
            f"the mask {path} is {indices.dtype} {list(indices.shape)}, no image of whole numbers; {_SAVE_MASKS}"
        )
    if indices.size and not 0 <= indices.min() <= indices.max() <= 255:
        raise DataError(
            f"the mask {path} holds values from {indices.min()} to {indices.max()}, more than there can be "
            f"classes (numbers of single objects?); {_SAVE_MASKS}"
        )
    indices = indices.astype(np.uint8)
    if values is None:
        return indices
    if strange := sorted(set(np.unique(indices).tolist()) - set(values)):
        raise DataError(
            f"the mask {path} holds the values {_some(strange)}, and only {', '.join(map(str, values))} have a meaning "
            "here; was it resized smoothly, or saved as JPEG? Restore the file from the data set"
        )
    meaning = np.zeros(256, np.uint8)
    meaning[list(values)] = np.arange(len(values))
    return meaning[indices]


def whole_numbers(values: np.ndarray) -> np.ndarray:
    """Whole numbers that were saved as floating point, as some tools save masks, as whole numbers; others unchanged."""
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == np.round(values)).all():
        return values.astype(np.int64)
    return values


MOST_CLASSES = 64
"""Larger numbers in a mask are taken for gray levels, not for classes."""


def class_indices(values: np.ndarray) -> tuple[int, int]:
    """What the numbers in the masks of a data set mean.

    Indices stay as they are. Masks that hold 0 and 255 and nothing else, as many tools save them, have two classes.

    :param values: ``bool [256]``: which numbers occur in any of the masks.
    :returns: the number of classes, and by what the numbers are divided to become indices (1 or 255).
    :raises ValueError: they are no class indices; the message says which.

    >>> class_indices(np.isin(np.arange(256), [0, 1, 3])), class_indices(np.isin(np.arange(256), [0, 255]))
    ((4, 1), (2, 255))
    """
    found = np.flatnonzero(values).tolist()
    if 255 in found and set(found) <= {0, 255}:
        return 2, 255
    if large := [value for value in found if value >= MOST_CLASSES]:
        hint = (
            "if 255 marks pixels to be left out, give them a class of their own"
            if large == [255]
            else "they look like gray levels, as a mask has that was resized smoothly or saved as JPEG"
        )
        raise ValueError(
            f"values {_some(large)} are no class indices from 0 to {MOST_CLASSES - 1} (255 stands for class 1 where "
            f"the only other value in all masks is 0); {hint}"
        )
    return max(found, default=0) + 1, 1


def value_range(dtype: np.dtype, low: float, high: float) -> tuple[float, float]:
    """The values that become 0 and 1, the same for all images of a data set, of all splits.

    * ``uint8``: 0 and 255.
    * ``uint16``: 0 and the largest number of as many bits as the brightest pixel of the data set needs, at least 8: a
      detector of 12 bits fills the range up to 4095, not to 65535.
    * ``float32``: 0 and 1 where all values lie between them, else the least and the largest value of the data set
      (Hounsfield units, say).

    :param dtype: of the pixels.
    :param low: the least value of the data set.
    :param high: the largest.

    >>> value_range(np.dtype(np.uint8), 3, 200), value_range(np.dtype(np.uint16), 3, 4000)
    ((0.0, 255.0), (0.0, 4095.0))
    >>> value_range(np.dtype(np.float32), 0.25, 0.5), value_range(np.dtype(np.float32), -1000, 3000)
    ((0.0, 1.0), (-1000.0, 3000.0))
    """
    if dtype == np.uint8:
        return 0.0, 255.0
    if dtype == np.uint16:
        return 0.0, float(2 ** max(8, int(high).bit_length()) - 1)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return float(low), float(high) if high > low else float(low) + 1


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """The whole image squeezed into a square, as is usual for these data: cropping would cut off lungs.

    The filter is Pillow's Lanczos: its support grows with the reduction, so it does not alias, it keeps more of the
    fine detail that a denoiser is asked to restore than a box does, and images smaller than ``size`` do not turn into
    blocks.

    :param pixels: ``[H, W, C]``, C 1 or 3.
    :returns: ``[size, size, C]`` of the same dtype; other than with 8 bits, floating-point values may overshoot.
    """

    def squeezed(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((size, size), Image.Resampling.LANCZOS))

    if pixels.dtype == np.uint8:
        return squeezed(pixels[..., 0] if pixels.shape[2] == 1 else pixels).reshape(size, size, pixels.shape[2])
    planes = np.stack([squeezed(plane) for plane in np.moveaxis(pixels.astype(np.float32), 2, 0)], axis=2)
    return planes.round().clip(0, 65535).astype(np.uint16) if pixels.dtype == np.uint16 else planes


def resized_mask(indices: np.ndarray, size: int) -> np.ndarray:
    """Nearest neighbor: between the classes 1 and 3 there is no class 2.

    :param indices: ``uint8 [H, W]``.
    :returns: ``uint8 [size, size]``.
    """
    return np.asarray(Image.fromarray(indices).resize((size, size), Image.Resampling.NEAREST))


@contextlib.contextmanager
def in_parallel(
    work: Callable[[T], R], items: Iterable[T], *, total: int, what: str, progress: bool
) -> Iterator[Iterator[R]]:
    """``work`` on every item, on every core, in order: a block that is given the results, and at whose end no thread is
    left, however it ends.

    A generator would do without a block. One whose reader fails is ended when Python collects it, which may be in the
    middle of the start of another thread, which this would then wait for while it holds what that needs.

    :param what: what the progress bar says is being done.
    :param progress: show a progress bar on stderr.
    """
    from rich.console import Console
    from rich.progress import track

    # Threads suffice: Pillow lets go of the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            results = pool.map(work, items)
            tracked = track(results, what, total, console=Console(stderr=True), disable=not progress)
            with contextlib.closing(tracked):  # type: ignore[type-var]  # it is a generator
                yield iter(tracked)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # a damaged file is reported now, not after all others are read
            raise


def guarded(path: Path, read: Callable[[], T], remedy: str = "restore the file from the data set") -> T:
    """What ``read`` returns; whatever a library raises becomes an error that names the file and the remedy.

    :raises DataError: it failed.
    """
    try:
        return read()
    except DataError:
        raise
    # Readers fail in many ways on damaged files (OSError, SyntaxError, ValueError, struct.error, ...).
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({error}); {remedy}") from error


def _kind(path: Path) -> tuple[str, bytes]:
    """The format that a file begins as, where Pillow does not read it whole (else ``""``), and its first bytes."""
    with path.open("rb") as file:
        header = file.read(32)
    return next((name for start, name in _SIGNATURES.items() if header.startswith(start)), ""), header


def _refuse_several(path: Path, file: Image.Image) -> None:
    # Cameras put a small preview behind the photograph (MPO); that is no second image.
    if (number := getattr(file, "n_frames", 1)) > 1 and file.format != "MPO":
        raise DataError(f"{path} holds {number} images; save each of them in a file of its own")


def _deep_tiff(path: Path) -> np.ndarray | None:
    """The pixels of a TIFF file of more than 8 bits, of which Pillow would drop some; ``None`` for one of 8 bits."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        pages = tiff_pages(file)
        if len(pages) != 1:
            raise DataError(f"{path} holds {len(pages)} images; save each of them in a file of its own")
        page: Any = pages[0].aspage()
        refuse_tiff_page(path, page)
        if page.dtype is not None and page.dtype.itemsize == 1 and page.dtype.kind in "bu":
            return None
        pixels: np.ndarray = page.asarray()
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and pixels.dtype.kind == "u":
            pixels = np.iinfo(pixels.dtype).max - pixels
        if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
            pixels = np.moveaxis(pixels, 0, -1)
        return pixels


def _npy(path: Path) -> np.ndarray:
    """An array in NumPy's format, whose header is not believed beyond the length of the file."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        refuse_large(path, *shape)
        refuse_short(path, math.prod(shape) * dtype.itemsize, path.stat().st_size - file.tell())
    return np.load(path, allow_pickle=False)


def refuse_tiff_page(path: Path, page: Any) -> None:
    """Before memory is taken for the pixels of a page of a TIFF file.

    :raises DataError: they are too many, or more than the file can hold.
    """
    sides = (page.imagelength, page.imagewidth)
    refuse_large(path, *sides if page.imagedepth == 1 else (page.imagedepth, *sides))
    length = path.stat().st_size
    if any(start + count > length for start, count in zip(page.dataoffsets, page.databytecounts, strict=False)):
        raise DataError(
            f"page {page.index + 1} of {path} lies beyond the end of the file, which is truncated; copy it again"
        )
    needed = page.imagedepth * page.imagelength * page.imagewidth * page.samplesperpixel * page.bitspersample // 8
    # LZW, whose codes of 12 bits stand for at most 4096 bytes, packs more tightly than Deflate.
    refuse_short(path, needed, sum(page.databytecounts), packed=1 if page.compression == 1 else 3 * DEFLATED)


def tiff_pages(file: Any) -> list[Any]:
    """The pages of an open TIFF file (tifffile) but previews, each of which has its ``index`` in the file."""
    # Their number is asked for first: where the last page leads back to another one, iterating would not end.
    every = [file.pages[index] for index in range(len(file.pages))]
    return [page for page in every if not getattr(page, "is_reduced", False)]


def arranged(path: Path, pixels: np.ndarray, channels: int) -> np.ndarray:
    """Any array as an image of so many channels, in one of the three dtypes."""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or not pixels.size or pixels.dtype.kind not in "biuf":
        raise DataError(
            f"{path} is {pixels.dtype} {list(pixels.shape)}; an image is an array of numbers [H, W], [H, W, 1] or "
            "[H, W, 3]"
        )
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise DataError(f"{path} holds NaN or infinity; replace these pixels")
    if pixels.shape[2] in (2, 4):
        if (pixels[..., -1] != pixels[..., -1].max()).any():
            raise DataError(f"{path} has transparent pixels; save it without its last channel")
        pixels = pixels[..., :-1]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype.kind in "iu" and pixels.dtype != np.uint8:
        in_16_bits = pixels.min() >= 0 and pixels.max() <= 65535 and pixels.dtype.itemsize > 1
        # Signed 16 bits are Hounsfield units and the like, of which a single image may happen to have no negative one.
        pixels = pixels.astype(np.uint16 if in_16_bits and pixels.dtype != np.int16 else np.float32)
    elif pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32)
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return pixels.repeat(3, axis=2)
    gray = (pixels.astype(np.float64) @ LUMA)[..., None]
    return (gray if pixels.dtype.kind == "f" else gray.round()).astype(pixels.dtype)


def _some(values: list[int]) -> str:
    """A few of many numbers."""
    return ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")
