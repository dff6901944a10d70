"""Readers that read through others: tiles and blanked rectangles, against slices of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError
from train.data.decoding import _identity
from train.data.parts import Blanked, Tile
from train.data.readers import ImageFile, MaskFile

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(1, 256, (30, 50, 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    return tmp_path / "x.png"


class TestTile:
    def test_is_a_slice(self, file: Path) -> None:
        tile = Tile(ImageFile(file), 4, 7, 10, 20)
        found = tile.read(3)
        assert (found == PIXELS[4:14, 7:27]).all()
        assert tile.files == (file,)
        found[:] = 0  # a copy: the next tile is not touched
        assert (tile.read(3) == PIXELS[4:14, 7:27]).all()
        assert (tile.read(1) == ImageFile(file).read(1)[4:14, 7:27]).all()

    @pytest.mark.parametrize("dtype", [np.uint16, np.float32])
    def test_of_any_depth(self, tmp_path: Path, dtype: type) -> None:
        pixels = (PIXELS[..., 0] * 200).astype(dtype)
        np.save(tmp_path / "x.npy", pixels)
        found = Tile(ImageFile(tmp_path / "x.npy"), 20, 30, 10, 20).read(1)
        assert found.dtype == dtype
        assert (found[..., 0] == pixels[20:, 30:]).all()

    def test_of_a_mask(self, tmp_path: Path) -> None:
        indices = RNG.integers(0, 3, (30, 50), dtype=np.uint8)
        Image.fromarray(indices).save(tmp_path / "m.png")
        assert (Tile(MaskFile(tmp_path / "m.png"), 0, 10, 30, 5).read(1) == indices[:, 10:15]).all()

    @pytest.mark.parametrize(("top", "left"), [(21, 0), (0, 31), (-1, 0)])
    def test_outside(self, file: Path, top: int, left: int) -> None:
        with pytest.raises(DataError, match=rf"x\.png has 30 x 50 pixels .* row {top}, column {left}"):
            Tile(ImageFile(file), top, left, 10, 20).read(3)

    def test_of_a_whole_of_another_size(self, file: Path) -> None:
        """A larger mask has that tile, too, but it shows something else."""
        assert Tile(ImageFile(file), 0, 0, 10, 20, (30, 50)).read(3).shape == (10, 20, 3)
        with pytest.raises(DataError, match=r"x\.png has 30 x 50 pixels .* must have 29 x 50"):
            Tile(ImageFile(file), 0, 0, 10, 20, (29, 50)).read(3)

    def test_a_file_that_changed_is_read_again(self, file: Path) -> None:
        tile = Tile(ImageFile(file), 0, 0, 3, 3)
        assert (tile.read(3) == PIXELS[:3, :3]).all()
        Image.fromarray(255 - PIXELS).save(file)
        assert (tile.read(3) == 255 - PIXELS[:3, :3]).all()

    def test_damage_is_reported(self, file: Path) -> None:
        tile = Tile(ImageFile(file), 0, 0, 3, 3)
        file.write_bytes(b"nothing")
        with pytest.raises(DataError, match=r"x\.png cannot be read"):
            tile.read(3)
        file.unlink()
        with pytest.raises(DataError, match=r"x\.png cannot be read"):
            tile.read(3)


class TestBlanked:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_rectangle(self, file: Path, channels: int) -> None:
        found = Blanked(ImageFile(file), (2, 30, 8, 45), (30, 50)).read(channels)
        expected = ImageFile(file).read(channels).copy()
        expected[2:8, 30:45] = 0
        assert (found == expected).all()

    def test_in_an_image_of_another_size(self, file: Path) -> None:
        """Half as large: a pixel that the rectangle touches goes."""
        found = Blanked(ImageFile(file), (3, 30, 9, 45), (60, 100)).read(3)
        expected = PIXELS.copy()
        expected[1:5, 15:23] = 0
        assert (found == expected).all()


def test_what_the_cache_knows_of_them(file: Path) -> None:
    """The part and the settings of every reader, but no path: data may move."""
    here, there = (Tile(Blanked(ImageFile(path), (1, 2, 3, 4), (5, 6)), 7, 8, 9, 10) for path in (file, Path("other")))
    assert _identity(here) == _identity(there)
    assert _identity(here) != _identity(Tile(here.source, 7, 8, 9, 11))
    assert _identity(here) != _identity(Tile(Blanked(ImageFile(file), (1, 2, 3, 5), (5, 6)), 7, 8, 9, 10))
    assert not any(str(file.parent) in each for each in _identity(here))
