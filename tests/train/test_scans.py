"""Scans in PNG, JPEG, BMP and TIFF: read by other libraries than those that wrote them, and the other way round."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from train.data.base import DataError
from train.data.limits import VARIABLE
from train.errors import RunError
from train.scans import Derivation, is_scan, open_scan

RNG = np.random.default_rng(0)
SAID = Derivation("Enhanced for a test; not for diagnosis.", "test")
GRAY = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 4096, (13, 17, 3), dtype=np.uint16)
ALPHA = RNG.integers(0, 256, (13, 17, 1), dtype=np.uint8)
PROFILE = b"profile" * 20


def rewritten(path: Path, derivation: Derivation = SAID) -> Path:
    """The scan written with its own pixels, each repeated as often as the scale says."""
    scan = open_scan(path)
    target = path.with_name(f"new-{path.name}")
    before = path.read_bytes()

    def frames() -> list[np.ndarray]:
        scale = derivation.scale
        return [scan.read(i).repeat(scale, 0).repeat(scale, 1) for i in range(scan.frames)]

    scan.write(target, frames(), derivation)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir() if each.name.endswith(".tmp")] == []
    return target


def png(path: Path, width: int, height: int, *, depth: int = 8, color: int = 0, data: bytes = b"") -> Path:
    """A PNG file of any header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


class TestPillow:
    @pytest.mark.parametrize("ending", ["png", "bmp"])
    @pytest.mark.parametrize("pixels", [GRAY, COLOR], ids=["gray", "color"])
    def test_eight_bits(self, tmp_path: Path, ending: str, pixels: np.ndarray) -> None:
        path = tmp_path / f"x.{ending}"
        Image.fromarray(pixels).save(path, dpi=(100, 200))
        scan = open_scan(path)
        assert (scan.format, scan.frames, scan.value_range) == (ending.upper(), 1, (0.0, 255.0))
        assert scan.channels == (1 if pixels.ndim == 2 else 3)
        assert scan.size(0) == (13, 17)
        assert scan.read(0).dtype == np.float32
        assert (scan.read(0).squeeze() == pixels).all()
        with Image.open(rewritten(path)) as new:
            assert (np.asarray(new) == pixels).all()
            assert new.info["dpi"] == pytest.approx((100, 200), abs=0.1)
        with Image.open(rewritten(path, Derivation("", "", scale=2))) as new:
            assert new.size == (34, 26)
            assert new.info["dpi"] == pytest.approx((200, 400), abs=0.1)

    def test_values_are_rounded_and_clipped(self, tmp_path: Path) -> None:
        Image.fromarray(GRAY).save(tmp_path / "x.png")
        values = np.full((13, 17, 1), 99.6, np.float32)
        values[0, 0], values[0, 1] = -5, 300
        open_scan(tmp_path / "x.png").write(tmp_path / "y.png", [values], SAID)
        new = np.asarray(Image.open(tmp_path / "y.png"))
        assert (new[0, 0], new[0, 1], new[1, 1]) == (0, 255, 100)

    @pytest.mark.parametrize("shape", [(13, 17), (13, 17, 3), (13, 17, 4), (13, 17, 2)])
    def test_png_of_sixteen_bits(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        """What Pillow would cut to 8 bits; the brightest of 12 bits is white."""
        pixels = RNG.integers(0, 4096, shape, dtype=np.uint16)
        pixels.flat[:4] = 4095
        path = tmp_path / "x.png"
        path.write_bytes(imagecodecs.png_encode(pixels))
        scan = open_scan(path)
        assert scan.value_range == (0.0, 4095.0)
        assert scan.channels == (1 if shape[2:] in ((), (2,)) else 3)
        three = pixels.reshape(13, 17, -1)
        assert (scan.read(0) == three[..., : scan.channels]).all()
        assert (imagecodecs.png_decode(rewritten(path).read_bytes()) == pixels).all()
        larger = imagecodecs.png_decode(rewritten(path, Derivation("", "", scale=2)).read_bytes())
        assert (larger == pixels.repeat(2, 0).repeat(2, 1)).all()

    def test_a_transparent_color_of_sixteen_bits_is_refused(self, tmp_path: Path) -> None:
        path = png(tmp_path / "x.png", 1, 1, depth=16, data=zlib.compress(b"\0\1\2"))
        assert open_scan(path).read(0).item() == 258
        content = path.read_bytes()
        key = b"tRNS\1\2"
        chunk = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
        path.write_bytes(content[:33] + chunk + content[33:])
        with pytest.raises(DataError, match=r"x\.png has a transparent color in 16 bits"):
            open_scan(path)

    def test_transparency_is_written_as_it_was(self, tmp_path: Path) -> None:
        Image.fromarray(np.concatenate([COLOR, ALPHA], axis=2)).save(tmp_path / "x.png")
        scan = open_scan(tmp_path / "x.png")
        scan.write(tmp_path / "y.png", [np.zeros((13, 17, 3), np.float32)], SAID)
        new = np.asarray(Image.open(tmp_path / "y.png"))
        assert (new[..., :3] == 0).all()
        assert (new[..., 3:] == ALPHA).all()

    def test_a_palette_becomes_colors(self, tmp_path: Path) -> None:
        image = Image.fromarray(GRAY // 64).convert("P")
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
        image.save(tmp_path / "x.png", transparency=1)
        scan = open_scan(tmp_path / "x.png")
        assert scan.channels == 3
        expected = np.asarray(Image.open(tmp_path / "x.png").convert("RGBA"))
        assert (scan.read(0) == expected[..., :3]).all()
        assert (np.asarray(Image.open(rewritten(tmp_path / "x.png"))) == expected).all()
        image.putpalette([10, 10, 10, 40, 40, 40, 70, 70, 70, 100, 100, 100])
        image.save(tmp_path / "gray.png")
        assert open_scan(tmp_path / "gray.png").channels == 1

    def test_few_bits_become_eight(self, tmp_path: Path) -> None:
        data = zlib.compress(b"\0" + bytes([0b00011011]) + b"\0" + bytes([0b11100100]))
        scan = open_scan(png(tmp_path / "x.png", 4, 2, depth=2, data=data))
        assert scan.read(0)[..., 0].tolist() == [[0, 85, 170, 255], [255, 170, 85, 0]]

    def test_what_a_png_says_besides(self, tmp_path: Path) -> None:
        words = PngImagePlugin.PngInfo()
        words.add_text("Patient", "A. Person")
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "of A. Person"
        Image.fromarray(COLOR).save(tmp_path / "x.png", icc_profile=PROFILE, pnginfo=words, exif=exif)
        with Image.open(rewritten(tmp_path / "x.png")) as new:
            assert new.info["icc_profile"] == PROFILE
            assert new.getexif() == exif
            assert new.text == {"Patient": "A. Person", "Description": SAID.description}
            assert new.size == (17, 13)  # as stored: viewers turn it
        with Image.open(rewritten(tmp_path / "x.png", Derivation("d", "", anonymize=True))) as new:
            assert new.info["icc_profile"] == PROFILE
            assert dict(new.getexif()) == {0x0112: 6}
            assert new.text == {"Description": "d"}
        assert b"A. Person" not in (tmp_path / "new-x.png").read_bytes()

    def test_jpeg(self, tmp_path: Path) -> None:
        smooth = np.asarray(Image.fromarray(COLOR).resize((64, 48), Image.Resampling.BICUBIC))
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 8, "of A. Person"
        path = tmp_path / "x.jpg"
        said = {"exif": exif, "comment": b"A. Person"}
        Image.fromarray(smooth).save(path, quality=80, icc_profile=PROFILE, dpi=(90, 90), **said)
        scan = open_scan(path)
        assert (scan.format, scan.channels, scan.size(0)) == ("JPEG", 3, (48, 64))
        with Image.open(rewritten(path)) as new:
            loss = np.abs(np.asarray(new).astype(int) - np.asarray(Image.open(path)))
            assert loss.mean() < 1
            assert new.info["icc_profile"] == PROFILE
            assert new.getexif() == exif
            assert new.info["dpi"] == (90, 90)
            assert new.info["comment"] == b"A. Person; Enhanced for a test; not for diagnosis. JPEG of quality 98."
        with Image.open(rewritten(path, Derivation("d", "", scale=2, anonymize=True))) as new:
            assert dict(new.getexif()) == {0x0112: 8}
            assert new.info["dpi"] == (180, 180)
            assert new.info["comment"] == b"d JPEG of quality 98."
        assert b"A. Person" not in (tmp_path / "new-x.jpg").read_bytes()

    def test_cmyk_is_refused(self, tmp_path: Path) -> None:
        Image.fromarray(COLOR).convert("CMYK").save(tmp_path / "x.jpg")
        with pytest.raises(DataError, match=r"x\.jpg.*CMYK.*convert"):
            open_scan(tmp_path / "x.jpg")

    def test_an_animation_is_refused(self, tmp_path: Path) -> None:
        first, second = Image.fromarray(GRAY), Image.fromarray(255 - GRAY)
        first.save(tmp_path / "x.png", save_all=True, append_images=[second])
        with pytest.raises(DataError, match=r"x\.png is animated"):
            open_scan(tmp_path / "x.png")


class TestTiff:
    @pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "u4", "f2", "f4", "f8"])
    @pytest.mark.parametrize("color", [False, True])
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_pages(self, tmp_path: Path, dtype: str, color: bool, order: str) -> None:
        shape = (3, 13, 17, 3) if color else (3, 13, 17)
        pixels = RNG.integers(0, 250, shape).astype(dtype)
        path = tmp_path / "x.tif"
        photometric = "rgb" if color else "minisblack"
        tifffile.imwrite(path, pixels, photometric=photometric, byteorder=order, resolution=(300, 150), metadata=None)
        scan = open_scan(path)
        assert (scan.format, scan.frames, scan.channels) == ("TIFF", 3, 3 if color else 1)
        assert all((scan.read(i).squeeze() == pixels[i]).all() for i in range(3))
        with tifffile.TiffFile(rewritten(path, Derivation("said", "", scale=2))) as new:
            assert new.byteorder == order
            assert len(new.pages) == 3
            assert new.asarray().dtype == pixels.dtype
            assert (new.asarray() == pixels.repeat(2, 1).repeat(2, 2)).all()
            assert new.pages[2].get_resolution() == (600, 300)
            assert new.pages[1].software == "said"

    def test_values_keep_their_depth(self, tmp_path: Path) -> None:
        pixels = RNG.integers(0, 4096, (13, 17), dtype=np.uint16)
        pixels[0, 0] = 4095
        tifffile.imwrite(tmp_path / "x.tif", pixels)
        assert open_scan(tmp_path / "x.tif").value_range == (0.0, 4095.0)
        tifffile.imwrite(tmp_path / "u.tif", pixels.astype(np.float32) - 1000)
        assert open_scan(tmp_path / "u.tif").value_range == (pixels.min() - 1000.0, 3095.0)
        open_scan(tmp_path / "x.tif").write(tmp_path / "y.tif", [np.full((13, 17, 1), 7e4, np.float32)], SAID)
        assert (tifffile.imread(tmp_path / "y.tif") == 65535).all()

    def test_no_numbers(self, tmp_path: Path) -> None:
        """NaN and infinity stay, and are neither black nor white."""
        pixels = np.array([[np.nan, -5, 2], [np.inf, -np.inf, 9]], np.float32)
        tifffile.imwrite(tmp_path / "x.tif", pixels)
        assert open_scan(tmp_path / "x.tif").value_range == (-5, 9)
        np.testing.assert_array_equal(tifffile.imread(rewritten(tmp_path / "x.tif")), pixels)
        tifffile.imwrite(tmp_path / "y.tif", pixels[:, :1])
        with pytest.raises(DataError, match="nothing but NaN and infinity"):
            _ = open_scan(tmp_path / "y.tif").value_range
        Image.fromarray(GRAY).save(tmp_path / "z.png")
        with pytest.raises(ValueError, match="NaN cannot be stored as uint8"):
            open_scan(tmp_path / "z.png").write(tmp_path / "y.png", [np.full((13, 17, 1), np.nan)], SAID)

    def test_white_is_zero(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "x.tif", GRAY, photometric="miniswhite")
        scan = open_scan(tmp_path / "x.tif")
        assert (scan.read(0)[..., 0] == 255 - GRAY).all()
        with tifffile.TiffFile(rewritten(tmp_path / "x.tif")) as new:
            assert new.pages[0].photometric == tifffile.PHOTOMETRIC.MINISWHITE
            assert (new.asarray() == GRAY).all()

    @pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
    def test_one_bit(self, tmp_path: Path, photometric: str) -> None:
        tifffile.imwrite(tmp_path / "x.tif", GRAY > 99, photometric=photometric)
        black = photometric == "minisblack"
        expected = np.where((GRAY > 99) == black, 255, 0)
        assert (open_scan(tmp_path / "x.tif").read(0)[..., 0] == expected).all()
        new = rewritten(tmp_path / "x.tif")
        assert (np.asarray(Image.open(new).convert("L")) == expected).all()

    def test_a_palette(self, tmp_path: Path) -> None:
        Image.fromarray(COLOR).quantize(16).save(tmp_path / "x.tif")
        expected = np.asarray(Image.open(tmp_path / "x.tif").convert("RGB"))
        assert (open_scan(tmp_path / "x.tif").read(0) == expected).all()
        assert (np.asarray(Image.open(rewritten(tmp_path / "x.tif"))) == expected).all()

    @pytest.mark.parametrize("compression", ["lzw", "deflate", "packbits", "jpeg"])
    def test_compressed(self, tmp_path: Path, compression: str) -> None:
        smooth = np.asarray(Image.fromarray(COLOR).resize((64, 48), Image.Resampling.BICUBIC))
        tifffile.imwrite(tmp_path / "x.tif", smooth, photometric="rgb", compression=compression)
        expected = tifffile.imread(tmp_path / "x.tif")
        assert (open_scan(tmp_path / "x.tif").read(0) == expected).all()
        assert (tifffile.imread(rewritten(tmp_path / "x.tif")) == expected).all()

    def test_planes_and_transparency(self, tmp_path: Path) -> None:
        both = np.concatenate([COLOR, ALPHA], axis=2)
        planes = np.moveaxis(both, 2, 0)
        tifffile.imwrite(tmp_path / "x.tif", planes, photometric="rgb", planarconfig="separate", extrasamples=[2])
        assert (open_scan(tmp_path / "x.tif").read(0) == COLOR).all()
        with tifffile.TiffFile(rewritten(tmp_path / "x.tif")) as new:
            assert (new.asarray() == both).all()
            assert new.pages[0].extrasamples == (2,)

    def test_what_a_tiff_says_besides(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tif"
        own = [(274, "H", 1, 6, True), (315, "s", 0, "A. Person", True), (65000, "I", 3, (1, 2, 3), True)]
        tifffile.imwrite(
            path, GRAY, iccprofile=PROFILE, description="of A. Person", software="old", extratags=own, metadata=None
        )
        with tifffile.TiffFile(rewritten(path)) as new:
            tags = new.pages[0].tags
            assert tags[34675].value == PROFILE
            assert (tags[274].value, tags[315].value, tags[65000].value) == (6, "A. Person", (1, 2, 3))
            assert tags[270].value == "of A. Person"
            assert tags[305].value == f"old; {SAID.description}"
        with tifffile.TiffFile(rewritten(path, Derivation("d", "", anonymize=True))) as new:
            tags = new.pages[0].tags
            assert (tags[274].value, tags[34675].value, tags[305].value) == (6, PROFILE, "d")
        assert b"A. Person" not in (tmp_path / "new-x.tif").read_bytes()

    def test_of_imagej(self, tmp_path: Path) -> None:
        path = tmp_path / "x.tif"
        stack = RNG.integers(0, 9999, (4, 13, 17), dtype=np.uint16)
        tifffile.imwrite(path, stack, imagej=True, metadata={"axes": "ZYX", "spacing": 2.5, "unit": "um"})
        with tifffile.TiffFile(rewritten(path)) as new:
            assert new.imagej_metadata is not None
            assert new.imagej_metadata["spacing"] == 2.5
            assert (new.asarray() == stack).all()

    def test_pages_of_different_sizes(self, tmp_path: Path) -> None:
        with tifffile.TiffWriter(tmp_path / "x.tif") as writer:
            writer.write(GRAY)
            writer.write(GRAY[:5, :6])
            writer.write(GRAY[::2, ::2], subfiletype=1)  # a preview
        scan = open_scan(tmp_path / "x.tif")
        assert [scan.size(i) for i in range(scan.frames)] == [(13, 17), (5, 6)]
        assert [page.shape for page in tifffile.TiffFile(rewritten(tmp_path / "x.tif")).pages] == [(13, 17), (5, 6)]

    @pytest.mark.parametrize(
        "pixels, options, reason",
        [
            (np.zeros((8, 8), np.complex64), {}, "no gray levels"),
            (np.zeros((8, 8, 4), np.uint8), {"photometric": "separated"}, "SEPARATED"),
            (np.zeros((8, 8, 5), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "5 channels"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, pixels: np.ndarray, options: dict, reason: str) -> None:
        tifffile.imwrite(tmp_path / "x.tif", pixels, **options)
        with pytest.raises(DataError, match=rf"x\.tif.*{reason}"):
            open_scan(tmp_path / "x.tif").read(0)


class TestBadFiles:
    @pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif"])
    def test_truncated(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"x.{ending}"
        Image.fromarray(np.tile(COLOR, (5, 5, 1))).save(path)
        whole = path.read_bytes()
        for length in (12, len(whole) // 3, len(whole) - 40):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=rf"x\.{ending}.*copy it again"):
                open_scan(path).read(0)

    def test_ten_billion_pixels(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        png(tmp_path / "x.png", 100_000, 100_000, data=b"x" * 50)
        tifffile.imwrite(tmp_path / "x.tif", GRAY)
        data = bytearray((tmp_path / "x.tif").read_bytes())
        with tifffile.TiffFile(tmp_path / "x.tif") as file:
            for code in (256, 257):
                tag = file.pages[0].tags[code]
                data[tag.offset + 2 : tag.offset + 12] = struct.pack("<HII", 4, 1, 100_000)
        (tmp_path / "x.tif").write_bytes(data)
        for name in ("x.png", "x.tif"):
            with pytest.raises(DataError, match=rf"{name} is 100000 x 100000 = 10,000,000,000.*set \${VARIABLE}"):
                open_scan(tmp_path / name)
        monkeypatch.setenv(VARIABLE, "20000000000")
        for name in ("x.png", "x.tif"):  # the limit is lifted, and the file too short for what it says
            with pytest.raises(DataError, match=rf"{name} has .* bytes for pixels, too few"):
                open_scan(tmp_path / name)
        monkeypatch.setenv(VARIABLE, "many")
        with pytest.raises(RunError, match="many"):
            open_scan(tmp_path / "x.png")

    def test_a_bomb(self, tmp_path: Path) -> None:
        """20 KB that become 20 MB are a blank image; what would become more than there may be is refused unread."""
        blank = zlib.compress(b"\0" * 4501 * 4500, 9)
        assert open_scan(png(tmp_path / "blank.png", 4500, 4500, data=blank)).size(0) == (4500, 4500)
        bomb = zlib.compress(b"\0" * 20_000_000, 9)
        with pytest.raises(DataError, match=r"400,000,000 pixels.*more than 268,435,456"):
            open_scan(png(tmp_path / "bomb.png", 20_000, 20_000, data=bomb))

    def test_no_scan(self, tmp_path: Path) -> None:
        (tmp_path / "x.png").write_bytes(b"")
        (tmp_path / "y.png").write_bytes(b"GIF89a and so on")
        for name, reason in (("x.png", "is empty"), ("y.png", "is none of PNG"), ("z.png", "No such file")):
            with pytest.raises(DataError, match=rf"{name}.*{reason}"):
                open_scan(tmp_path / name)

    def test_names(self, tmp_path: Path) -> None:
        for name in ("a+b +c.png", "Übergröße-日本.png", "no ending", "of another.jpg"):
            Image.fromarray(GRAY).save(tmp_path / name, format="PNG")
            assert (np.asarray(Image.open(rewritten(tmp_path / name))) == GRAY).all()

    def test_a_failure_leaves_what_there_was(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "x.tif", np.stack([GRAY, GRAY]), photometric="minisblack")
        scan = open_scan(tmp_path / "x.tif")
        (tmp_path / "y.tif").write_bytes(b"earlier")
        good = scan.read(0)
        for frames in ([good], [good] * 3, [good, good[1:]]):
            with pytest.raises(ValueError, match=r"x\.tif"):
                scan.write(tmp_path / "y.tif", frames, SAID)
        assert (tmp_path / "y.tif").read_bytes() == b"earlier"
        assert sorted(each.name for each in tmp_path.iterdir()) == ["x.tif", "y.tif"]

    def test_pages_in_a_circle(self, tmp_path: Path) -> None:
        tifffile.imwrite(tmp_path / "x.tif", np.stack([GRAY, GRAY]), photometric="minisblack", metadata=None)
        data = bytearray((tmp_path / "x.tif").read_bytes())
        with tifffile.TiffFile(tmp_path / "x.tif") as file:
            first, second = (page.offset for page in file.pages)
            place = second + 2 + 12 * len(file.pages[1].tags)
        data[place : place + 4] = struct.pack("<I", first)
        (tmp_path / "x.tif").write_bytes(data)
        scan = open_scan(tmp_path / "x.tif")
        assert scan.frames == 2


class TestIsScan:
    def test_by_name(self, tmp_path: Path) -> None:
        for name in ("a.PNG", "b.nii.gz", "c.mha", "d.DCM", "e.tiff"):
            (tmp_path / name).touch()
            assert is_scan(tmp_path / name)
        for name in ("Thumbs.db", "notes.txt", ".DS_Store", "._a.png", "DICOMDIR", "x.gz", "labels.csv"):
            (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" if name == "DICOMDIR" else b"words, words")
            assert not is_scan(tmp_path / name)

    def test_by_content(self, tmp_path: Path) -> None:
        """DICOM files of archives have numbers for names, and those of old devices no magic."""
        headers = {
            "IM0001": b"\0" * 128 + b"DICM",
            "implicit": struct.pack("<HHI", 8, 8, 14) + b"DERIVED\\SECOND",
            "explicit": struct.pack("<HH2sH", 8, 5, b"CS", 10) + b"ISO_IR 100",
            "big": struct.pack(">HH2sH", 8, 5, b"CS", 10) + b"ISO_IR 100",
        }
        for name, header in headers.items():
            (tmp_path / name).write_bytes(header)
            assert is_scan(tmp_path / name), name
        os.mkfifo(tmp_path / "pipe")
        assert not is_scan(tmp_path / "pipe")
        for name, header in {"zeros": b"\0" * 300, "short": b"\x08\0", "text": b"#!/bin/sh\n"}.items():
            (tmp_path / name).write_bytes(header)
            assert not is_scan(tmp_path / name), name


def test_nothing_heavy_is_imported_early() -> None:
    heavy = ["torch", "pydicom", "nibabel", "SimpleITK", "imagecodecs", "tifffile"]
    code = f"import sys, train.scans; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
