"""DRIMDB: quality as the class, and no writing left in any image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError, ImageData, load
from train.data.sets.drimdb import CLASS_NAMES, WRITING

from .layouts import drimdb

SPLITS = ("train", "val", "test")


def read(root: Path, cache: Path, **options: object) -> ImageData:
    return load("drimdb", root=root, source="real", cache_dir=cache, **({"size": None, "channels": 3} | options))  # type: ignore[arg-type]


def test_images_without_the_writing(tmp_path: Path) -> None:
    root = drimdb(tmp_path / "DRIMDB")
    data = read(root, tmp_path / "cache")
    assert (data.class_names, data.mask_names) == (CLASS_NAMES, ())
    seen = 0
    for split in SPLITS:
        subset = getattr(data, split)
        assert subset.patients is None
        for name, label, pixels in zip(subset.names, subset.labels, subset.images, strict=True):
            quality = CLASS_NAMES[label]
            assert name.startswith(f"drimdb_{quality.lower()} (")
            expected = np.array(Image.open(root / quality / name))
            scale = len(expected) // 570
            top, left, bottom, right = (scale * each for each in WRITING)
            assert expected[top:bottom, left:right].max() == 255
            expected[top:bottom, left:right] = 0
            assert (pixels == expected).all()
            seen += 1
    assert seen == 15


@pytest.mark.parametrize("quality", CLASS_NAMES)
def test_damage(tmp_path: Path, quality: str) -> None:
    root = drimdb(tmp_path / "DRIMDB")
    for file in (root / quality).iterdir():
        file.unlink()
    with pytest.raises(DataError, match=rf"{quality} holds no image \*\.jpg"):
        read(root, tmp_path / "cache")
    (root / quality).rmdir()
    with pytest.raises(DataError, match=r"DRIMDB"):
        read(root, tmp_path / "cache")


class TestRealData:
    def test_all_of_them(self, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
        root = shared_data("DRIMDB")
        data = read(root, tmp_path, size=48)
        labels = np.concatenate([getattr(data, split).labels for split in SPLITS])
        assert np.bincount(labels).tolist() == [125, 69, 22]
        assert data.test.labels is not None
        assert np.bincount(data.test.labels) == pytest.approx([25, 14, 4], abs=1)

    def test_nothing_is_written_outside_of_the_rectangle(self, shared_data: Callable[[str], Path]) -> None:
        """The letters are pure green in colored photographs and white on black in gray ones."""
        top, left, bottom, right = WRITING
        written = 0
        for file in sorted(shared_data("DRIMDB").glob("*/*.jpg"))[::3]:
            pixels = np.asarray(Image.open(file)).astype(int)
            if pixels.shape[:2] != (570, 760):
                continue
            letters = pixels[..., 1] - np.maximum(pixels[..., 0], pixels[..., 2]) > 90
            written += letters[top:bottom, left:right].any()
            letters[top:bottom, left:right] = False
            assert not letters[:60, 400:].any(), file.name
        assert written > 60
