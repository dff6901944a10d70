"""ISIC 2018: the official layout, images of unknown diagnosis, and what can be wrong with files and tables."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DataError, DataUnavailableError, ImageData, load
from train.data.base import DATASETS, Example
from train.data.decoding import decoded
from train.data.sets import isic2018 as module
from train.experiment import do_run

from . import tiny
from .layouts import ISIC, isic, isic_pairs, isic_table

SPLITS = ("train", "val", "test")
IDS, LABELS = list(ISIC), ISIC


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return isic(tmp_path / "ISIC2018")


def read(root: Path, **options: object) -> ImageData:
    cache = root.parent / "cache"
    return load("isic2018", root=root, source="real", cache_dir=cache, **({"size": 16, "channels": 3} | options))  # type: ignore[arg-type]


def refused(root: Path, *culprits: str) -> None:
    with pytest.raises(DataError) as caught:
        read(root)
    assert not isinstance(caught.value, DataUnavailableError)
    for culprit in culprits:
        assert culprit in str(caught.value)


def labels_of(data: ImageData) -> dict[str, int]:
    return {
        name: int(label)
        for subset in (data.train, data.val, data.test)
        for name, label in zip(
            subset.names, [] if subset.labels is None else subset.labels, strict=subset.labels is not None
        )
    }


class TestReading:
    def test_pixels_masks_and_diagnoses(self, root: Path) -> None:
        data = read(root, size=None)
        assert data.class_names == ("other", "melanoma", "seborrheic keratosis")
        assert data.mask_names == ("skin", "lesion")
        assert sorted(name for split in SPLITS for name in getattr(data, split).names) == IDS
        for split in SPLITS:
            subset = getattr(data, split)
            assert subset.patients is None
            for i, id in enumerate(subset.names):
                image = Image.open(root / module.image_folder("train") / f"{id}.jpg")
                assert (subset.images[i] == np.asarray(image)).all()
                mask = Image.open(root / module.mask_folder("train") / f"{id}_segmentation.png")
                assert (subset.mask(i).numpy() * 255 == np.asarray(mask)).all()
                assert (LABELS[id] if subset.labels is None else subset.labels[i]) == LABELS[id]

    def test_those_of_unknown_diagnosis_are_shared_out_as_well(self, root: Path) -> None:
        """They are no class of their own, but each split gets its part of them."""
        data = read(root)
        unknown = [sum(LABELS[name] < 0 for name in getattr(data, split).names) for split in SPLITS]
        assert sum(unknown) == 5
        assert unknown[0] >= 2
        assert data.train.labels is not None
        assert set(data.train.labels) == {-1, 0, 1, 2}

    def test_a_table_of_its_own_says_the_same(self, root: Path) -> None:
        before = labels_of(read(root))
        for file in root.glob("ISIC-2017*.csv"):
            file.unlink()
        isic_table(root / "labels.csv", LABELS, form="{:d}")
        assert labels_of(read(root)) == before

    def test_without_tables(self, root: Path) -> None:
        for file in root.glob("*.csv"):
            file.unlink()
        data = read(root)
        assert data.class_names == ()
        assert data.train.labels is None

    def test_official_splits(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Of the official validation and test images no diagnosis is known: these splits have no labels."""
        other = {"val": ["ISIC_0010001", "ISIC_0010002"], "test": ["ISIC_0010003"]}
        for split, ids in other.items():
            isic_pairs(root, split, ids)
        data = read(root)
        assert data.train.names == tuple(IDS)
        assert {split: list(getattr(data, split).names) for split in other} == other
        assert data.train.labels is not None
        assert data.val.labels is data.test.labels is None
        assert "no image in test" not in caplog.text

    def test_half_of_the_official_splits(self, root: Path) -> None:
        isic_pairs(root, "test", ["ISIC_0010003"])
        refused(root, "ISIC2018_Task1-2_Test_Input but no ISIC2018_Task1-2_Validation_Input")

    def test_names_of_folders(self, root: Path, no_data_at_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The official one before the copies, and the complete copy before the other one."""
        shelf = no_data_at_hand / "shelf"
        shelf.mkdir()
        monkeypatch.setenv("GRADPROM_DATA", str(shelf))
        for name in ("ISIC2018_600x450", "ISIC2018_256", "ISIC2018"):
            (shelf / name).symlink_to(root)
            data = load("isic2018", source="real", size=16, cache_dir=no_data_at_hand / "cache")
            assert data.folder == shelf / name

    def test_a_class_that_is_not_trained(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        for file in root.glob("ISIC-2017*.csv"):
            file.unlink()
        isic_table(root / "labels.csv", dict.fromkeys(IDS, 1))
        read(root)
        assert f"{root}: no image in train has the label other, seborrheic keratosis." in caplog.text


def test_a_run_of_which_some_diagnoses_are_unknown(root: Path, no_data_at_hand: Path) -> None:
    """Training, scores and captions, with both tasks."""
    settings = tiny.config(
        dataset="isic2018", source="real", data_root=root, channels=3, aux="dia,seg", seg="tiny", max_steps=3
    )
    result = do_run(settings)
    test = read(root).test
    known = np.array([LABELS[name] for name in test.names])
    known = known[known >= 0]
    assert result.metrics is not None
    accuracy = result.metrics["accuracy"]
    assert accuracy * len(known) == pytest.approx(round(accuracy * len(known)))
    assert result.metrics["accuracy_majority"] == np.bincount(known).max() / len(known)
    assert 0 <= result.metrics["dice"] <= 1


class TestDamage:
    def image(self, root: Path) -> Path:
        return root / module.image_folder("train") / f"{IDS[4]}.jpg"

    def mask(self, root: Path) -> Path:
        return root / module.mask_folder("train") / f"{IDS[4]}_segmentation.png"

    def test_image_without_mask(self, root: Path) -> None:
        self.mask(root).unlink()
        refused(root, f"the image {self.image(root)} has no mask", self.mask(root).name)

    def test_mask_without_image(self, root: Path) -> None:
        self.image(root).unlink()
        refused(root, f"the mask {self.mask(root)} has no image", self.image(root).name)

    def test_mask_of_another_size(self, root: Path) -> None:
        Image.new("L", (36, 21), 255).save(self.mask(root))
        refused(root, f"the mask {self.mask(root)} has 21 x 36 pixels", "its image 22 x 36")

    @pytest.mark.parametrize("value", [1, 128, 254])
    def test_unknown_mask_value(self, root: Path, value: int) -> None:
        """As a mask has that was resized smoothly; 1 would be a class in other data sets."""
        mask = np.array(Image.open(self.mask(root)))
        mask[3, 3] = value
        Image.fromarray(mask).save(self.mask(root))
        refused(root, f"the mask {self.mask(root)} holds the values {value}, and only 0, 255 have a meaning")

    def test_no_mask_folder(self, root: Path) -> None:
        folder = root / module.mask_folder("train")
        folder.rename(root / "elsewhere")
        refused(root, f"the folder {folder} is missing; the masks of ISIC2018_Task1-2_Training_Input belong there")
        folder.with_suffix(".zip").touch()
        refused(root, f"unzip {folder}.zip")

    def test_no_images(self, root: Path) -> None:
        for file in (root / module.image_folder("train")).iterdir():
            file.unlink()
        refused(root, "ISIC2018_Task1-2_Training_Input holds no image ISIC_*.jpg")

    @pytest.mark.parametrize("n", [1, 2])
    def test_too_few_images(self, tmp_path: Path, n: int) -> None:
        isic_pairs(tmp_path / "small", "train", IDS[:n])
        refused(tmp_path / "small", f"has {n} images", "training, validation and test need one each")

    @pytest.mark.parametrize(
        ("rows", "culprit"),
        [
            ([f"{IDS[0]},1.0,0.0", f"{IDS[0]},1.0,0.0"], f"line 3 of {{}}: {IDS[0]} has a row already, in line 2"),
            ([f"{IDS[1]},1.0,1.0"], f"line 2 of {{}}: {IDS[1]} cannot be both"),
            ([f"{IDS[1]},2,0"], "line 2 of {}: melanoma and seborrheic_keratosis must be 0 or 1 each"),
            ([f"{IDS[1]},1,"], "line 2 of {}: melanoma and seborrheic_keratosis must be 0 or 1 each"),
            ([f"{IDS[1]},1"], "line 2 of {} has 2 fields, the first line 3"),
            (["ISIC_0009999,1,0"], "{} has a row for none of the images beside it"),
            ([f'{IDS[1]},"1,0'], "{} cannot be read as a table"),
        ],
    )
    def test_official_tables(self, root: Path, rows: list[str], culprit: str) -> None:
        file = root / "ISIC-2017_Test_v2_Part3_GroundTruth.csv"
        file.write_text("\n".join(["image_id,melanoma,seborrheic_keratosis", *rows]))
        (root / "ISIC-2017_Training_Part3_GroundTruth.csv").unlink()
        refused(root, culprit.format(file))

    def test_tables_that_contradict_each_other(self, root: Path) -> None:
        file = isic_table(root / "ISIC-2017_Test_v2_Part3_GroundTruth.csv", {IDS[1]: 2})
        first = root / "ISIC-2017_Training_Part3_GroundTruth.csv"
        refused(root, f"line 2 of {first}: {IDS[1]} is other, but seborrheic keratosis in line 2 of {file}")

    def test_missing_column(self, root: Path) -> None:
        (root / "labels.csv").write_text("image_id;melanoma\n")
        refused(root, "labels.csv has no column image_id (only image_id;melanoma)", "separated by commas")

    def test_a_table_of_its_own_has_these_images_and_no_others(self, root: Path) -> None:
        for file in root.glob("ISIC-2017*.csv"):
            file.unlink()
        file = isic_table(root / "labels.csv", LABELS | {"ISIC_0009999": 0})
        refused(root, f"line 22 of {file}: there is no image ISIC_0009999")
        isic_table(file, {id: label for id, label in LABELS.items() if id not in (IDS[3], IDS[5])})
        refused(root, f"{file} has no row for the image {IDS[3]} (nor for 1 others)")


def test_masks_are_of_all_images_or_of_none(root: Path) -> None:
    """An error of a data set's file, and not of its data."""
    dataset = DATASETS.build("isic2018")
    listing = dataset.listing(root, split_seed=0)
    first: Example = listing.splits["train"][0]
    splits = dict(listing.splits) | {"train": [dataclasses.replace(first, mask=None), *listing.splits["train"][1:]]}
    with pytest.raises(ValueError, match="some images of ISIC 2018 Task 1 have a mask, and others have none"):
        decoded(dataset, dataclasses.replace(listing, splits=splits), None, folder=root, cache=None, progress=False)  # type: ignore[arg-type]


class TestRealData:
    @pytest.mark.parametrize(
        ("name", "pairs", "counts"),
        [("ISIC2018_256", 2594, [144, 1752, 490, 208]), ("ISIC2018_600x450", 264, None)],
    )
    def test_copies(
        self, shared_data: Callable[[str], Path], tmp_path: Path, name: str, pairs: int, counts: list[int] | None
    ) -> None:
        root = shared_data(name)
        data = load("isic2018", root=root, source="real", size=32, channels=3, cache_dir=tmp_path)
        found = labels_of(data)
        assert len(found) == pairs
        with (root / "labels.csv").open(newline="") as file:
            told = {row["image_id"]: (row["melanoma"], row["seborrheic_keratosis"]) for row in csv.DictReader(file)}
        meaning = {("", ""): -1, ("0", "0"): 0, ("1", "0"): 1, ("0", "1"): 2}
        assert found == {id: meaning[row] for id, row in told.items()}
        if counts:
            assert np.bincount(np.array(list(found.values())) + 1).tolist() == counts
        for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
            subset = getattr(data, split)
            assert len(subset) == pytest.approx(share * pairs, abs=2)
            assert subset.masks_tensor().unique().tolist() == [0, 1]
