"""PNG, JPEG, BMP (Pillow; imagecodecs for what Pillow would cut to 8 bits) and TIFF (tifffile).

Pixels are taken as they are stored: an image that its EXIF data turn stays turned, and the written one has the same
tag. Transparency is no part of an image that is enhanced: it is written as it was. What the format lets a file say
besides (color profile, resolution, EXIF, text) is kept, unless it would be wrong of other pixels.

=========================  ==========================================================================================
what is read               as what it is written
=========================  ==========================================================================================
8 bits, 16 bits, floats    the same
1, 2 or 4 bits             8 bits: black and white stay what they are
a palette                  RGB of 8 bits, or gray where all of its colors are
JPEG                       JPEG of quality 98 with color at full size, which says so: its loss is about a gray level
TIFF                       the same pages in strips, compressed without loss if they were compressed; without
                           previews, and without EXIF and GPS directories, which tifffile cannot write
=========================  ==========================================================================================
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin

from train.data.base import DataError
from train.data.formats import imported
from train.data.limits import DEFLATED, refuse_large, refuse_short
from train.data.readers import refuse_tiff_page, tiff_pages, value_range
from train.files import atomic_file
from train.scans.base import Derivation, Scan
from train.scans.pixels import checked, extremes, narrow, read_guarded, stored

QUALITY = 98
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Chunks that stay true of other pixels. Those of the second group may say who is in the image.
_PNG_CHUNKS = {b"cHRM", b"cICP", b"gAMA", b"iCCP", b"sRGB", b"pHYs"}
_PNG_WORDS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
_ORIENTATION, _EXIF_DIRECTORY, _WIDTH, _HEIGHT = 0x0112, 0x8769, 0xA002, 0xA003


def opened(path: Path) -> Scan:
    """
    :raises DataError: as :func:`train.scans.open_scan`.
    """
    with path.open("rb") as file:
        header = file.read(8)
    if header[:2] in (b"II", b"MM"):
        return Tiff(path)
    # The classes themselves: Image.open has a limit of its own, for all of the process.
    if header == _SIGNATURE:
        return Raster(path, "PNG", PngImagePlugin.PngImageFile)
    if header[:2] == b"BM":
        return Raster(path, "BMP", BmpImagePlugin.BmpImageFile)
    return Raster(path, "JPEG", JpegImagePlugin.JpegImageFile)


class Raster(Scan):
    """One image in a PNG, JPEG or BMP file.

    :param plugin: Pillow's class for the format.
    :raises DataError: as :func:`train.scans.open_scan`.
    """

    frames = 1

    def __init__(self, path: Path, format: str, plugin: type[ImageFile.ImageFile]) -> None:
        self.path, self.format, self._plugin = path, format, plugin
        read_guarded(path, self._look)

    def _look(self) -> None:
        with self.path.open("rb") as file, self._plugin(file) as image:
            if getattr(image, "is_animated", False) and self.format == "PNG":
                raise DataError(f"{self.path} is animated; save each of its images as a PNG of its own")
            width, height = image.size
            refuse_large(self.path, height, width)
            self._size = (height, width)
            if self.format != "JPEG":
                self._refuse_short(file, image)
            self._deep = self.format == "PNG" and _png_depth(file) == 16
            if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA"} and not image.mode.startswith("I;16"):
                raise DataError(f"{self.path}: mode {image.mode} is neither gray nor RGB; convert it first")
            self._alpha = image.has_transparency_data
            if self._deep:
                gray = _png_color(file) in (0, 4)
                if self._alpha and _png_color(file) in (0, 2):
                    raise DataError(f"{self.path} has a transparent color in 16 bits, which is not kept; give it alpha")
                if not gray or self._alpha:
                    imported("imagecodecs", self.path)  # said now, not after the network has worked
            elif image.mode == "P" and self.format != "BMP":
                palette = np.array(image.getpalette("RGB") or [0, 0, 0]).reshape(-1, 3)
                gray = bool((palette == palette[:, :1]).all())
            else:
                gray = image.mode in ("1", "L", "LA")
            self.channels = 1 if gray else 3
            self.dtype = np.dtype(np.uint16 if self._deep else np.uint8)

    def _refuse_short(self, file: IO[bytes], image: Image.Image) -> None:
        bits = {"1": 1, "L": 1, "P": 1}.get(image.mode, 8 * len(image.getbands()))  # at least
        length = self.path.stat().st_size
        refuse_short(self.path, self._size[0] * self._size[1] * bits // 8, length, packed=DEFLATED)

    @cached_property
    def value_range(self) -> tuple[float, float]:  # type: ignore[override]
        if not self._deep:
            return 0.0, 255.0
        pixels = self.read(0)
        return value_range(np.dtype(np.uint16), pixels.min(), pixels.max())

    def size(self, frame: int) -> tuple[int, int]:
        return self._size

    def read(self, frame: int) -> np.ndarray:
        return self._pixels()[..., : self.channels].astype(np.float32)

    def _pixels(self) -> np.ndarray:
        """``uint8`` or ``uint16 [H, W, channels]``, with one more channel where there is transparency."""
        return read_guarded(self.path, self._decoded)

    def _decoded(self) -> np.ndarray:
        planes = self.channels + self._alpha
        if self._deep and (self.channels == 3 or self._alpha):
            decoded: np.ndarray = imported("imagecodecs", self.path).png_decode(self.path.read_bytes())
            return decoded.reshape(*self._size, planes)
        with self.path.open("rb") as file, self._plugin(file) as image:
            if self._deep:
                return np.asarray(image).reshape(*self._size, 1).astype(np.uint16)
            mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[planes]
            whole = image.convert("RGBA") if image.mode == "P" and self._alpha else image
            return np.asarray(whole.convert(mode)).reshape(*self._size, planes)

    def write(self, target: Path, frames: Iterable[np.ndarray], derivation: Derivation) -> None:
        (values,) = checked(self, frames, derivation.scale)
        pixels = stored(values, np.dtype(np.uint16 if self._deep else np.uint8))
        if self._alpha:
            pixels = np.concatenate([pixels, _enlarged(self._pixels()[..., -1], derivation.scale)[..., None]], axis=2)
        pixels = np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        if self.format == "PNG":
            content = self._png(pixels, derivation)
        else:
            content = self._other(Image.fromarray(pixels), derivation)
        with atomic_file(target) as file:
            file.write(content)

    def _png(self, pixels: np.ndarray, derivation: Derivation) -> bytes:
        if self._deep and pixels.ndim == 3:
            encoded: bytes = imported("imagecodecs", self.path).png_encode(pixels)
        else:
            memory = io.BytesIO()
            Image.fromarray(pixels).save(memory, "PNG")
            encoded = memory.getvalue()
        kept = []
        with self.path.open("rb") as file:
            for kind, data in _png_chunks(file):
                if kind in _PNG_CHUNKS or (kind in _PNG_WORDS and not derivation.anonymize):
                    if kind == b"pHYs" and len(data) == 9:
                        across, down, unit = struct.unpack(">IIB", data)
                        data = struct.pack(">IIB", across * derivation.scale, down * derivation.scale, unit)
                    kept.append(_png_chunk(kind, data))
                if kind == b"eXIf" and derivation.anonymize and (turned := _turned(data)):
                    kept.append(_png_chunk(b"eXIf", turned.removeprefix(b"Exif\0\0")))
        said = b"Description\0\0\0\0\0" + derivation.description.encode()
        after_header = len(_SIGNATURE) + 25
        return encoded[:after_header] + b"".join(kept) + _png_chunk(b"iTXt", said) + encoded[after_header:]

    def _other(self, image: Image.Image, derivation: Derivation) -> bytes:
        memory = io.BytesIO()
        with self.path.open("rb") as file, self._plugin(file) as source:
            info = source.info
            options: dict[str, Any] = {}
            if "dpi" in info:
                options["dpi"] = tuple(float(each) * derivation.scale for each in info["dpi"])
            if self.format == "BMP":
                image.save(memory, "BMP", **options)
                return memory.getvalue()
            exif: bytes = info.get("exif", b"")
            if derivation.anonymize:
                exif = _turned(exif)
            elif derivation.scale != 1 and exif:
                exif = _of_size(source.getexif(), image)
            if exif:
                options["exif"] = exif
            if "xmp" in info and not derivation.anonymize:
                options["xmp"] = info["xmp"]
            said = f"{derivation.description} JPEG of quality {QUALITY}.".encode()
            if (old := info.get("comment", b"")) and not derivation.anonymize:
                said = old.rstrip(b"\0") + b"; " + said
            image.save(
                memory,
                "JPEG",
                quality=QUALITY,
                subsampling="4:4:4",
                optimize=True,
                icc_profile=info.get("icc_profile"),
                comment=said[:65000],
                **options,
            )
        return memory.getvalue()


@dataclass(frozen=True)
class _Page:
    """What is believed of a page: its place in the file and how its pixels become gray levels or colors.

    :param spread: by what levels of fewer than 8 bits are multiplied.
    """

    index: int
    height: int
    width: int
    dtype: np.dtype
    channels: int
    alpha: bool
    inverted: bool
    palette: bool
    spread: int


class Tiff(Scan):
    """The pages of a TIFF file.

    :raises DataError: as :func:`train.scans.open_scan`.
    """

    format = "TIFF"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pages: list[_Page] = read_guarded(path, self._look)
        self.frames, self.channels = len(self._pages), self._pages[0].channels
        self.dtype = narrow(self._pages[0].dtype)

    def _look(self) -> list[_Page]:
        import tifffile

        with tifffile.TiffFile(self.path) as file:
            pages = [self._page(page) for page in tiff_pages(file)]
            if not pages:
                raise DataError(f"{self.path} holds no image but previews; save it again")
            if (said := (file.imagej_metadata or {}).get("images", 1)) > len(pages):
                raise DataError(
                    f"{self.path} is of ImageJ and holds {said} images behind one header; save it as an image sequence"
                )
        if len({(page.channels, page.dtype) for page in pages}) > 1:
            raise DataError(f"{self.path} holds pages of different kinds; save each of them in a file of its own")
        return pages

    def _page(self, page: Any) -> _Page:
        from tifffile import EXTRASAMPLE, PHOTOMETRIC

        where = f"page {page.index + 1} of {self.path}"
        page = page.aspage()
        kinds = PHOTOMETRIC
        photometric, samples = page.photometric, page.samplesperpixel
        color = photometric in (kinds.RGB, kinds.YCBCR, kinds.PALETTE)
        if not color and photometric not in (kinds.MINISBLACK, kinds.MINISWHITE):
            raise DataError(f"{where} is {getattr(photometric, 'name', photometric)}, neither gray nor RGB; convert it")
        base = 3 if color and photometric != kinds.PALETTE else 1
        if page.imagedepth != 1 or samples not in (base, base + 1):
            raise DataError(f"{where} has {samples} channels and {page.imagedepth} layers; save gray or RGB pages")
        dtype = page.dtype
        if dtype is None or dtype.kind not in "buif":
            raise DataError(f"{where} holds pixels of {page.bitspersample} bits that are no gray levels; save 8 or 16")
        refuse_tiff_page(self.path, page)
        if page.compression != 1 and not isinstance(self._decodes(page), bool):
            imported("imagecodecs", self.path)
        few = dtype.itemsize == 1 and photometric != kinds.PALETTE
        alpha = samples > base
        if alpha and page.extrasamples and page.extrasamples[0] == EXTRASAMPLE.ASSOCALPHA and dtype.kind == "f":
            raise DataError(f"{where} has premultiplied alpha in floating point; save it without alpha")
        return _Page(
            page.index,
            page.imagelength,
            page.imagewidth,
            np.dtype(np.uint8) if dtype.kind == "b" or photometric == kinds.PALETTE else dtype.newbyteorder("="),
            3 if color else 1,
            alpha,
            photometric == kinds.MINISWHITE and dtype.kind in "bu",
            photometric == kinds.PALETTE,
            255 // (2**page.bitspersample - 1) if few and page.bitspersample < 8 else 1,
        )

    @staticmethod
    def _decodes(page: Any) -> bool | str:
        """Whether tifffile can decompress on its own; else why not."""
        import tifffile

        try:
            tifffile.TIFF.DECOMPRESSORS[page.compression]
        except (KeyError, ValueError) as error:
            return str(error)
        return True

    @cached_property
    def value_range(self) -> tuple[float, float]:  # type: ignore[override]
        dtype = self._pages[0].dtype
        if dtype == np.uint8:
            return 0.0, 255.0
        low, high = extremes(self.path, map(self.read, range(self.frames)))
        bits = dtype.kind in "iu" and low >= 0 and high < 2**16
        return value_range(np.dtype(np.uint16 if bits else np.float32), low, high)

    def size(self, frame: int) -> tuple[int, int]:
        page = self._pages[frame]
        return page.height, page.width

    def read(self, frame: int) -> np.ndarray:
        values = self._pixels(frame)[..., : self.channels].astype(np.float32)
        page = self._pages[frame]
        if page.inverted:
            values = (255 if page.dtype == np.uint8 else np.iinfo(page.dtype).max) - values
        return values

    def _pixels(self, frame: int) -> np.ndarray:
        """``[H, W, channels]`` as stored (a palette looked up), with one more channel where there is transparency."""
        import tifffile

        def decode() -> np.ndarray:
            with tifffile.TiffFile(self.path) as file:
                page: Any = file.pages[self._pages[frame].index].aspage()  # type: ignore[union-attr]
                pixels = page.asarray()
                if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and page.samplesperpixel > 1:
                    pixels = np.moveaxis(pixels, 0, -1)
                colors = page.colormap
            about = self._pages[frame]
            if about.palette:
                return (np.asarray(colors) >> 8).astype(np.uint8).T[pixels]
            if pixels.dtype.kind == "b":
                pixels = pixels.astype(np.uint8)
            pixels = pixels.reshape(about.height, about.width, about.channels + about.alpha)
            return pixels * about.spread if about.spread > 1 else pixels

        return read_guarded(self.path, decode)

    def write(self, target: Path, frames: Iterable[np.ndarray], derivation: Derivation) -> None:
        import tifffile

        with tifffile.TiffFile(self.path) as source:
            total = sum(page.height * page.width * (page.channels + page.alpha) * page.dtype.itemsize
                        for page in self._pages) * derivation.scale**2  # fmt: skip
            big = source.is_bigtiff or total > 2**32 - 2**26
            order: Any = source.byteorder
            with (
                atomic_file(target) as file,
                tifffile.TiffWriter(file, bigtiff=big, byteorder=order, shaped=False, ome=False) as writer,
            ):
                for number, values in enumerate(checked(self, frames, derivation.scale)):
                    self._write_page(writer, source, number, values, derivation)

    def _write_page(self, writer: Any, source: Any, number: int, values: np.ndarray, derivation: Derivation) -> None:
        from tifffile import COMPRESSION, PHOTOMETRIC

        about = self._pages[number]
        page: Any = source.pages[about.index].aspage()
        if about.inverted:
            values = (255 if about.dtype == np.uint8 else np.iinfo(about.dtype).max) - values
        pixels = stored(values, about.dtype)
        if about.alpha:
            alpha = _enlarged(self._pixels(number)[..., -1], derivation.scale)
            pixels = np.concatenate([pixels, alpha[..., None]], axis=2)
        tags = {code: page.tags[code] for code in _kept_tags(page, derivation)}
        software = b"" if derivation.anonymize or 305 not in page.tags else str(page.tags[305].value).encode() + b"; "
        resolution = None
        if 282 in page.tags and 283 in page.tags:
            resolution = tuple(
                (top * derivation.scale, bottom) for top, bottom in (page.tags[code].value for code in (282, 283))
            )
        photometric = PHOTOMETRIC.MINISBLACK if about.channels == 1 else PHOTOMETRIC.RGB
        writer.write(
            pixels[..., 0] if pixels.shape[2] == 1 else pixels,
            photometric=PHOTOMETRIC.MINISWHITE if page.photometric == PHOTOMETRIC.MINISWHITE else photometric,
            planarconfig="contig" if pixels.shape[2] > 1 else None,
            extrasamples=page.extrasamples[:1] if about.alpha else None,
            compression=None if page.compression == COMPRESSION.NONE else COMPRESSION.ADOBE_DEFLATE,
            resolution=resolution,
            resolutionunit=page.tags[296].value if 296 in page.tags else None,
            software=software + derivation.description.encode(),
            description=_description(page, derivation),
            metadata=None,
            contiguous=False,
            extratags=[(code, tag.dtype, tag.count, _raw(source, tag), False) for code, tag in sorted(tags.items())],
        )


# Where pixels lie and how they are encoded, which is decided anew; directories, which cannot be written; what is an
# argument of the writer; and software, to which the derivation is added.
_STRUCTURE = {
    *range(254, 260), 262, 263, 264, 265, 266, 270, 273, 277, 278, 279, 282, 283, 284, 288, 289, 292, 293, 296, 301,
    305, 317, 320, *range(321, 326), 330, 332, 333, 336, 338, 339, 340, 341, *range(342, 348), *range(512, 522),
    *range(529, 533), 32995, 32996, 32997, 32998, 34665, 34853, 40965,
}  # fmt: skip
_ANONYMOUS = {274, 34675}  # orientation and color profile


def _kept_tags(page: Any, derivation: Derivation) -> list[int]:
    codes = {tag.code for tag in page.tags} - _STRUCTURE
    return sorted(codes & _ANONYMOUS if derivation.anonymize else codes)


def _description(page: Any, derivation: Derivation) -> bytes | None:
    """ImageDescription, which ImageJ and OME read for what the pages are: kept as far as it stays true."""
    if derivation.anonymize or 270 not in page.tags:
        return None
    text = str(page.tags[270].value)
    if derivation.scale != 1 and "<OME" in text:  # it has the size of the pages
        return None
    return text.encode()


def _raw(source: Any, tag: Any) -> bytes:
    """A tag's value as it lies in the file, in the file's byte order."""
    source.filehandle.seek(tag.valueoffset)
    return source.filehandle.read(tag.valuebytecount)


def _enlarged(alpha: np.ndarray, scale: int) -> np.ndarray:
    """Transparency beside an enlarged image: every pixel becomes a square of the same one, so that none is blended."""
    return alpha.repeat(scale, axis=0).repeat(scale, axis=1)


def _png_depth(file: IO[bytes]) -> int:
    file.seek(24)
    return file.read(1)[0]


def _png_color(file: IO[bytes]) -> int:
    file.seek(25)
    return file.read(1)[0]


def _png_chunks(file: IO[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """Kind and content of the chunks but those of pixels."""
    file.seek(len(_SIGNATURE))
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"IDAT", b"IEND"):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        yield kind, file.read(length)
        file.seek(4, io.SEEK_CUR)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _turned(exif: bytes) -> bytes:
    """Of EXIF data the orientation alone, which says nothing of a person; empty where there is none."""
    found = Image.Exif()
    found.load(exif)
    orientation = found.get(_ORIENTATION)
    if not orientation:
        return b""
    alone = Image.Exif()
    alone[_ORIENTATION] = orientation
    return alone.tobytes()


def _of_size(exif: Image.Exif, image: Image.Image) -> bytes:
    """EXIF data with the size of an enlarged image."""
    directory = exif.get_ifd(_EXIF_DIRECTORY)
    for tag, length in ((_WIDTH, image.width), (_HEIGHT, image.height)):
        if tag in directory:
            directory[tag] = length
    return exif.tobytes()
