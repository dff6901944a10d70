"""Lizard: tiles of large images, the classes of nuclei by number, the official parts; and what can be wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from train.data import DataError, ImageData, load
from train.data.sets.lizard import INFO, LABEL_FOLDER, MASK_NAMES, LizardLabels

from .layouts import LIZARD, lizard
from .test_instances import written_out

SPLITS = ("train", "val", "test")
SIDE = 256


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return lizard(tmp_path / "Lizard")


def read(root: Path, **options: object) -> ImageData:
    cache = root.parent / "cache"
    return load("lizard", root=root, source="real", cache_dir=cache, **({"size": None, "channels": 3} | options))  # type: ignore[arg-type]


def refused(root: Path, *culprits: str) -> None:
    with pytest.raises(DataError) as caught:
        read(root, size=32)
    for culprit in culprits:
        assert culprit in str(caught.value)


def labels(root: Path, stem: str) -> Path:
    return root / LABEL_FOLDER / f"{stem}.mat"


def test_tiles_and_classes(root: Path) -> None:
    """Every tile beside the same part of the image, and of the classes looked up one nucleus after the other."""
    data = read(root)
    assert (data.size, data.class_names, data.mask_names) == ((SIDE, SIDE), (), MASK_NAMES)
    seen = set()
    for split in SPLITS:
        subset = getattr(data, split)
        assert subset.labels is None
        for i, name in enumerate(subset.names):
            stem, row, column = name.rsplit("-", 2)
            assert subset.patients[i] == stem
            assert split == ("train", "val", "test")[LIZARD[stem] - 1]
            (file,) = root.glob(f"lizard_images*/Lizard_Images*/{stem}.png")
            image = np.asarray(Image.open(file))
            top, left = (
                (side % SIDE) // 2 + SIDE * int(n) for side, n in zip(image.shape[:2], (row, column), strict=True)
            )
            where = np.s_[top : top + SIDE, left : left + SIDE]
            assert (subset.images[i] == image[where]).all()
            told = loadmat(labels(root, stem))
            expected = written_out(told["inst_map"], told["id"].ravel().tolist(), told["class"].ravel().tolist())
            assert (subset.mask(i).numpy() == expected[where]).all()
            seen.add((stem, int(row), int(column)))
    assert seen == {(stem, 0, column) for stem in LIZARD for column in (0, 1)}


def test_without_the_table_all_tiles_of_an_image_stay_together(tmp_path: Path) -> None:
    data = read(lizard(tmp_path / "Lizard", info=False), size=32)
    stems = [{name.rsplit("-", 2)[0] for name in getattr(data, split).names} for split in SPLITS]
    assert all(stems)
    assert set.union(*stems) == set(LIZARD)
    assert sum(map(len, stems)) == len(LIZARD)


def test_small_images_are_not_used_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (file,) = root.glob("*/*/crag_2.png")
    Image.open(file).crop((0, 0, 530, 255)).save(file)
    with caplog.at_level(logging.WARNING):
        data = read(root, size=32)
    assert "smaller than a tile of 256 px and not used: crag_2." in caplog.text
    assert not any(name.startswith("crag_2-") for name in data.train.names)


class TestDamage:
    def test_labels_of_another_size(self, root: Path) -> None:
        (file,) = root.glob("*/*/crag_2.png")
        Image.open(file).resize((600, 600)).save(file)
        refused(root, "crag_2.mat has 280 x 537 pixels (height x width), and must have 600 x 600")

    def test_a_damaged_image(self, root: Path) -> None:
        (file,) = root.glob("*/*/crag_2.png")
        file.write_bytes(b"nothing")
        refused(root, "crag_2.png cannot be read as an image")

    def test_image_without_labels(self, root: Path) -> None:
        labels(root, "crag_2").unlink()
        refused(root, "crag_2.png has no labels", f"{labels(root, 'crag_2')}")

    def test_labels_without_image(self, root: Path) -> None:
        (file,) = root.glob("*/*/crag_2.png")
        file.unlink()
        refused(root, f"the labels {labels(root, 'crag_2')} have no image crag_2.png")

    def test_the_same_name_in_both_folders(self, root: Path) -> None:
        (file,) = root.glob("lizard_images1/*/consep_1.png")
        other = root / "lizard_images2" / "Lizard_Images2" / file.name
        other.write_bytes(file.read_bytes())
        refused(root, f"{other} has the name of {file}")

    def test_a_missing_archive(self, root: Path) -> None:
        (root / "lizard_images2").rename(root / "elsewhere")
        refused(root, f"the folder {root / 'lizard_images2/Lizard_Images2'} is missing")

    @pytest.mark.parametrize(
        ("change", "culprit"),
        [
            ({"class": None}, "has no variable class"),
            (
                {"inst_map": np.full((280, 537), 9999)},
                "contradicts itself: object 9999 of the instance map has no class",
            ),
            (
                {"id": np.array([[1], [1]]), "class": np.array([[1], [2]])},
                "contradicts itself: object 1 is listed twice",
            ),
            (
                {"id": np.array([[1], [2]]), "class": np.array([[1]])},
                "contradicts itself: there are 2 numbers of objects and 1 classes",
            ),
            ({"inst_map": np.eye(9), "id": np.array([[1.0]]), "class": np.array([[7]])}, "has a nucleus of class 7"),
        ],
        ids=["missing", "unlisted", "twice", "too few", "unknown class"],
    )
    def test_labels(self, root: Path, change: dict, culprit: str) -> None:
        file = labels(root, "crag_2")
        content = {name: value for name, value in loadmat(file).items() if not name.startswith("__")} | change
        savemat(file, {name: value for name, value in content.items() if value is not None})
        with pytest.raises(DataError, match=rf"crag_2\.mat {culprit}"):
            LizardLabels(file).read()

    def test_a_file_that_is_no_matlab_file(self, root: Path) -> None:
        labels(root, "crag_2").write_bytes(b"nothing")
        refused(root, "crag_2.mat cannot be read")

    @pytest.mark.parametrize(
        ("line", "row", "culprits"),
        [
            (3, "crag_2,crag,4", ["line 3 of", "the split must be one of 1, 2, 3, not '4'"]),
            (3, "crag_3,crag,1", ["line 3 of", "there is no image crag_3.png"]),
            (3, "consep_1,consep,2", ["line 3 of", "consep_1 has a row already, in line 2"]),
            (3, "", ["has no row for the image crag_2"]),
            (1, "Filename;Source;Split", ["has no column filename", "separated by commas"]),
        ],
    )
    def test_table(self, root: Path, line: int, row: str, culprits: list[str]) -> None:
        rows = (root / INFO).read_text().splitlines()
        rows[line - 1] = row
        (root / INFO).write_text("\n".join(rows))
        refused(root, "info.csv", *culprits)

    def test_no_tile_for_testing(self, root: Path) -> None:
        (root / INFO).write_text((root / INFO).read_text().replace(",3", ",2"))
        refused(root, "info.csv leaves no tile for test")


def test_real_data(shared_data: Callable[..., Path], tmp_path: Path) -> None:
    """For those who have the official files: 238 images with nuclei of all six classes."""
    root = shared_data("Lizard", "lizard", required=False)
    data = load("lizard", root=root, source="real", size=64, channels=3, cache_dir=tmp_path)
    assert len({patient for split in SPLITS for patient in getattr(data, split).patients}) > 200
    assert data.train.masks_tensor().unique().tolist() == [*range(7)]
