"""Readers: what is in a file, not what it is called; and never fewer bits than there are."""

from __future__ import annotations

import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from train.data import DataError
from train.data.readers import ImageFile, MaskFile, class_indices, in_parallel, resized, resized_mask, value_range


class TestEightBits:
    """The content decides, not the name; the oracle is arithmetic on known pixels."""

    GREY = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601

    def decode(self, tmp_path: Path, image: Image.Image, channels: int = 1, **options: object) -> np.ndarray:
        path = tmp_path / "image.png"
        image.save(path, **options)
        return resized(ImageFile(path).read(channels), 16)

    def test_rgb_to_grey_is_luma(self, tmp_path: Path) -> None:
        pixels = self.decode(tmp_path, Image.new("RGB", (40, 30), (200, 100, 50)))
        assert pixels.shape == (16, 16, 1)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(pixels, self.GREY @ [200, 100, 50], atol=1)

    def test_grey_to_rgb_repeats(self, tmp_path: Path) -> None:
        pixels = self.decode(tmp_path, Image.new("L", (40, 30), 77), channels=3)
        assert pixels.shape == (16, 16, 3)
        assert (pixels == 77).all()

    def test_transparency_shows_black(self, tmp_path: Path) -> None:
        pixels = self.decode(tmp_path, Image.new("RGBA", (40, 30), (200, 100, 50, 128)), channels=3)
        np.testing.assert_allclose(pixels[5, 5], np.array([200, 100, 50]) * 128 / 255, atol=1)
        assert (self.decode(tmp_path, Image.new("RGBA", (40, 30), (200, 100, 50, 0))) == 0).all()

    def test_transparent_palette_entry_shows_black(self, tmp_path: Path) -> None:
        image = Image.new("P", (40, 30), 1)
        image.putpalette([255, 0, 0, 0, 0, 255])
        assert (self.decode(tmp_path, image, channels=3) == [0, 0, 255]).all()
        assert (self.decode(tmp_path, image, channels=3, transparency=1) == 0).all()

    def test_jpeg_by_another_name(self, tmp_path: Path) -> None:
        pixels = self.decode(tmp_path, Image.new("RGB", (40, 30), (90, 90, 90)), format="JPEG")
        np.testing.assert_allclose(pixels, 90, atol=2)

    def test_shrinking_does_not_alias(self, tmp_path: Path) -> None:
        board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
        np.testing.assert_allclose(self.decode(tmp_path, Image.fromarray(board)), 127.5, atol=3)

    @pytest.mark.parametrize("shape", [(61, 115), (1225, 90), (6, 8), (16, 16)])
    def test_whole_image_of_any_size(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        halves = np.zeros(shape, np.uint8)
        halves[:, shape[1] // 2 + shape[1] % 2 :] = 255
        pixels = self.decode(tmp_path, Image.fromarray(halves))[..., 0]
        assert (pixels[:, :4] < 5).all()
        assert (pixels[:, -3:] > 250).all()

    def test_upright_as_a_camera_says(self, tmp_path: Path) -> None:
        """EXIF orientation 6: the first row of the file is the right side of the picture."""
        pixels = np.zeros((20, 30), np.uint8)
        pixels[:10] = 255
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
        upright = ImageFile(tmp_path / "photo.png").read(1)[..., 0]
        assert (upright == np.rot90(pixels, -1)).all()

    def test_one_bit(self, tmp_path: Path) -> None:
        Image.fromarray(np.eye(20, dtype=bool)).save(tmp_path / "x.png")
        assert (ImageFile(tmp_path / "x.png").read(1)[..., 0] == 255 * np.eye(20)).all()

    @pytest.mark.parametrize("ending", ["gif", "tif"])
    def test_several_images_in_one_file_are_refused(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"stack.{ending}"
        frames = [Image.new("L", (20, 20), level) for level in (10, 200)]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        for reader in (ImageFile(path), MaskFile(path)):
            with pytest.raises(DataError, match=r"stack\.(gif|tif) holds 2 images"):
                reader.read(1)


def png(path: Path, pixels: np.ndarray, *, depth: int, color: int) -> Path:
    """A PNG file byte by byte, of any depth: Pillow writes few of them."""
    rows = pixels.astype(">u2" if depth == 16 else np.uint8)
    if depth < 8:
        bits = np.unpackbits(rows[..., None], axis=-1)[..., 8 - depth :].reshape(len(rows), -1)
        rows = np.packbits(bits, axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, color, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )
    return path


class TestDeepImages:
    DEEP = (np.arange(20 * 30).reshape(20, 30) * 109 % 65536).astype(np.uint16)

    def test_png(self, tmp_path: Path) -> None:
        found = ImageFile(png(tmp_path / "x.png", self.DEEP, depth=16, color=0)).read(1)
        assert found.dtype == np.uint16
        assert (found[..., 0] == self.DEEP).all()

    @pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
    def test_png_that_pillow_would_cut_to_eight_bits(self, tmp_path: Path, color: int, channels: int) -> None:
        path = png(tmp_path / "x.png", np.repeat(self.DEEP, channels, 1), depth=16, color=color)
        with pytest.raises(DataError, match=r"x\.png has 16 bits per channel .* save it as TIFF or NPY"):
            ImageFile(path).read(3)

    @pytest.mark.parametrize(
        "options",
        [{}, {"compression": "zlib"}, {"byteorder": ">"}, {"bigtiff": True}, {"photometric": "miniswhite"}],
        ids=str,
    )
    def test_tiff(self, tmp_path: Path, options: dict) -> None:
        tifffile.imwrite(tmp_path / "x.tif", self.DEEP, **options)
        found = ImageFile(tmp_path / "x.tif").read(1)[..., 0]
        assert found.dtype == np.uint16
        assert (found == (65535 - self.DEEP if "photometric" in options else self.DEEP)).all()

    @pytest.mark.parametrize("planar", ["contig", "separate"])
    def test_color_tiff(self, tmp_path: Path, planar: str) -> None:
        color = np.stack([self.DEEP, self.DEEP[::-1], self.DEEP // 2], axis=2)
        stored = color if planar == "contig" else np.moveaxis(color, 2, 0)
        tifffile.imwrite(tmp_path / "x.tif", stored, photometric="rgb", planarconfig=planar)
        assert (ImageFile(tmp_path / "x.tif").read(3) == color).all()
        gray = ImageFile(tmp_path / "x.tif").read(1)[..., 0]
        np.testing.assert_allclose(gray, color @ [0.299, 0.587, 0.114], atol=0.51)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
    @pytest.mark.parametrize("ending", ["tif", "npy"])
    def test_other_numbers_are_floating_point(self, tmp_path: Path, dtype: type, ending: str) -> None:
        values = (self.DEEP.astype(np.float64) - 1000).clip(-1000, 3000).astype(dtype)
        path = tmp_path / f"x.{ending}"
        (np.save if ending == "npy" else tifffile.imwrite)(path, values)
        found = ImageFile(path).read(1)[..., 0]
        assert found.dtype == np.float32
        assert (found == values).all()

    def test_eight_bit_tiff_is_left_to_pillow(self, tmp_path: Path) -> None:
        pixels = (self.DEEP % 256).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "x.tif", compression="tiff_lzw")
        found = ImageFile(tmp_path / "x.tif").read(1)
        assert found.dtype == np.uint8
        assert (found[..., 0] == pixels).all()

    @pytest.mark.parametrize("shape", [(20, 30), (20, 30, 1), (20, 30, 3)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_arrays(self, tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
        np.save(tmp_path / "x.npy", np.full(shape, 7000, np.uint16))
        found = ImageFile(tmp_path / "x.npy").read(channels)
        assert found.shape == (20, 30, channels)
        assert (found == 7000).all()

    @pytest.mark.parametrize(
        ("array", "culprit"),
        [
            (np.zeros((3, 20, 30)), r"float64 \[3, 20, 30\]"),
            (np.zeros(20), r"\[20\]"),
            (np.zeros((0, 5)), "0 x 5 pixels large by its header; it holds no image"),
            (np.full((20, 30), np.nan), "NaN or infinity"),
            (np.array([["a", "b"]]), "<U1"),
            (np.array([[None]]), "cannot be read as an image"),
            (np.dstack([np.zeros((4, 4, 3), np.uint16), np.eye(4, dtype=np.uint16)]), "transparent pixels"),
        ],
        ids=["channels first", "a line", "empty", "NaN", "text", "objects", "alpha"],
    )
    def test_arrays_that_are_no_images(self, tmp_path: Path, array: np.ndarray, culprit: str) -> None:
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=culprit):
            ImageFile(tmp_path / "x.npy").read(1)

    def test_resizing_keeps_the_values(self) -> None:
        """The mean of a large area stays, in the units of the file; nothing is rounded to 8 bits."""
        deep = np.full((64, 64, 1), 40_001, np.uint16)
        assert (resized(deep, 16) == 40_001).all()
        hounsfield = np.full((64, 48, 3), -987.5, np.float32)
        np.testing.assert_allclose(resized(hounsfield, 16), -987.5, atol=1e-2)
        edge = np.repeat(np.array([[0], [65535]], np.uint16), 32, 0).repeat(64, 1)[..., None]
        found = resized(edge, 17).astype(int)  # an overshoot does not wrap around to black, or white
        assert (found[:8] < 7000).all()
        assert (found[9:] > 58000).all()


class TestMasks:
    INDICES = np.random.default_rng(0).integers(0, 4, (20, 30), dtype=np.uint8)

    @pytest.mark.parametrize("ending", ["png", "tif", "bmp", "gif", "pgm", "npy"])
    def test_formats(self, tmp_path: Path, ending: str) -> None:
        path = tmp_path / f"x.{ending}"
        if ending == "npy":
            np.save(path, self.INDICES.astype(np.int64))
        else:
            Image.fromarray(self.INDICES).save(path)
        found = MaskFile(path).read()
        assert found.dtype == np.uint8
        assert (found == self.INDICES).all()

    def test_a_palette_colors_the_classes(self, tmp_path: Path) -> None:
        """VOC, ADE20K and many tools save indices with a palette; the colors are not the classes."""
        image = Image.fromarray(self.INDICES).convert("P")
        image.putdata(self.INDICES.ravel())
        image.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 90, 90, 90])
        image.save(tmp_path / "x.png")
        assert Image.open(tmp_path / "x.png").mode == "P"
        assert (MaskFile(tmp_path / "x.png").read() == self.INDICES).all()

    @pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
    def test_any_depth(self, tmp_path: Path, depth: int) -> None:
        """Pillow shows level 1 of 2 bits as 85, and of 4 bits as 17."""
        indices = self.INDICES % 2 if depth == 1 else self.INDICES
        assert (MaskFile(png(tmp_path / "x.png", indices, depth=depth, color=0)).read() == indices).all()

    @pytest.mark.parametrize(
        ("image", "options", "culprit"),
        [
            (Image.new("L", (30, 20), 1), {"format": "JPEG"}, "stored as JPEG"),
            (Image.new("L", (30, 20), 1), {"format": "WEBP", "lossless": True}, "stored as WEBP"),
            (Image.new("RGB", (30, 20), (1, 0, 0)), {}, r"has colors \(mode RGB\)"),
            (Image.new("RGBA", (30, 20), (1, 1, 1, 255)), {}, r"has colors \(mode RGBA\)"),
            (Image.new("LA", (30, 20), (1, 255)), {}, r"has colors \(mode LA\)"),
            (Image.fromarray(np.full((20, 30), 1294, np.uint16)), {}, "from 1294 to 1294.*single objects"),
        ],
        ids=["jpeg", "webp", "rgb", "rgba", "la", "instances"],
    )
    def test_refused(self, tmp_path: Path, image: Image.Image, options: dict, culprit: str) -> None:
        image.save(tmp_path / "x.png", **options)
        with pytest.raises(DataError, match=rf"x\.png .*{culprit}") as caught:
            MaskFile(tmp_path / "x.png").read()
        assert "save class indices (0, 1, 2, ...) in one channel, as PNG or NPY" in str(caught.value)

    @pytest.mark.parametrize("array", [np.zeros((20, 30)), np.zeros((20, 30, 3), int), np.full((5, 5), -1)])
    def test_arrays_refused(self, tmp_path: Path, array: np.ndarray) -> None:
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match=r"the mask .*x\.npy"):
            MaskFile(tmp_path / "x.npy").read()

    @pytest.mark.parametrize("size", [7, 20, 64])
    def test_resizing_invents_no_class(self, size: int) -> None:
        """The oracle: the pixel in the middle of each cell."""
        indices = self.INDICES * 3 % 7
        rows, columns = ((np.arange(size) + 0.5) * side / size for side in indices.shape)
        expected = indices[rows.astype(int)[:, None], columns.astype(int)]
        assert (resized_mask(indices, size) == expected).all()

    @pytest.mark.parametrize(
        ("values", "meaning"),
        [
            ([0, 1], (2, 1)),
            ([0], (1, 1)),
            ([0, 2, 5], (6, 1)),
            ([0, 255], (2, 255)),
            ([255], (2, 255)),
            ([63], (64, 1)),
        ],
    )
    def test_meaning_of_values(self, values: list[int], meaning: tuple[int, int]) -> None:
        assert class_indices(np.isin(np.arange(256), values)) == meaning

    @pytest.mark.parametrize(
        ("values", "culprit"),
        [
            ([0, 1, 255], "255 marks pixels to be left out"),
            ([0, 253, 254, 255], "253, 254, 255 .* look like gray levels"),
            (list(range(256)), "64, 65, 66, ... .* look like gray levels"),
            ([0, 128], "128"),
        ],
    )
    def test_values_without_a_meaning(self, values: list[int], culprit: str) -> None:
        with pytest.raises(ValueError, match=culprit):
            class_indices(np.isin(np.arange(256), values))


@pytest.mark.parametrize(
    ("dtype", "low", "high", "expected"),
    [
        (np.uint8, 7, 9, (0, 255)),
        (np.uint16, 0, 200, (0, 255)),
        (np.uint16, 0, 256, (0, 511)),
        (np.uint16, 90, 4095, (0, 4095)),
        (np.uint16, 0, 4096, (0, 8191)),
        (np.uint16, 0, 65535, (0, 65535)),
        (np.float32, 0.2, 0.7, (0, 1)),
        (np.float32, 0, 1.5, (0, 1.5)),
        (np.float32, -1024, 3071, (-1024, 3071)),
        (np.float32, 5, 5, (5, 6)),
    ],
)
def test_value_range(dtype: type, low: float, high: float, expected: tuple[float, float]) -> None:
    assert value_range(np.dtype(dtype), low, high) == expected


def test_no_thread_outlives_a_reader_that_fails() -> None:
    before = threading.active_count()
    with (
        pytest.raises(ZeroDivisionError) as held,
        in_parallel(  # its traceback keeps what the block held
            str, range(1000), total=1000, what="numbers", progress=False
        ) as results,
    ):
        assert next(results) == "0"
        raise ZeroDivisionError
    assert threading.active_count() == before and held is not None


def test_results_come_in_order() -> None:
    with in_parallel(str, range(50), total=50, what="numbers", progress=False) as results:
        assert list(results) == [str(i) for i in range(50)]
