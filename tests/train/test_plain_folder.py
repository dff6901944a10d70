"""The data set ``folder``: images, masks and a table as people have them, and what can be wrong with them."""

from __future__ import annotations

import csv
import logging
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.data import DataError, DataUnavailableError, ImageData, load, readers
from train.data.fingerprint import differences, fingerprint

SPLITS = ("train", "val", "test")
SHAPE = (20, 30)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images with masks, no table."""
    rng = np.random.default_rng(0)
    root = tmp_path / "my data"
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, SHAPE, dtype=np.uint8)).save(root / "images" / f"scan.v1.{i}.png")
        Image.fromarray(rng.integers(0, 3, SHAPE, dtype=np.uint8)).save(root / "masks" / f"scan.v1.{i}.png")
    return root


def read(root: Path, **options: object) -> ImageData:
    cache = root.parent / "cache"
    return load("folder", root=root, cache_dir=cache, **({"size": 16} | options))  # type: ignore[arg-type]


def table(root: Path, rows: list[str] | None = None, header: str = "image,label", ending: str = "\n") -> Path:
    if rows is None:
        rows = [f"scan.v1.{i}.png,{'ab'[i % 2]}" for i in range(10)]
    path = root / "labels.csv"
    path.write_text(ending.join([header, *rows, ""]), newline="", encoding="utf-8")
    return path


def by_name(data: ImageData) -> dict[str, tuple[str, int | None, str | None]]:
    """Split, label and patient of each image."""
    return {
        name: (
            split,
            None if subset.labels is None else int(subset.labels[i]),
            None if subset.patients is None else subset.patients[i],
        )
        for split in SPLITS
        for subset in [getattr(data, split)]
        for i, name in enumerate(subset.names)
    }


def refused(root: Path, *culprits: str) -> None:
    with pytest.raises(DataError) as caught:
        read(root)
    assert not isinstance(caught.value, DataUnavailableError)
    assert "\n" not in str(caught.value)
    for culprit in culprits:
        assert culprit in str(caught.value)


class TestImagesAndMasks:
    def test_as_they_are(self, root: Path) -> None:
        data = read(root, size=None)
        assert (data.name, data.title, data.source) == ("folder", "folder-my data", "real")
        assert (data.size, data.channels, data.num_classes, data.mask_names) == (SHAPE, 1, 0, ("0", "1", "2"))
        assert [len(getattr(data, split)) for split in SPLITS] == [7, 1, 2]
        assert data.folder == root
        for split in SPLITS:
            subset = getattr(data, split)
            assert subset.labels is None
            assert subset.patients is None
            for i, name in enumerate(subset.names):
                pixels = np.asarray(Image.open(root / "images" / name)).astype(np.float32) / 255
                torch.testing.assert_close(subset.image(i)[0], torch.from_numpy(pixels))
                indices = np.asarray(Image.open(root / "masks" / name))
                assert (subset.mask(i).numpy() == indices).all()

    def test_squares(self, root: Path) -> None:
        train = read(root, channels=3).train
        assert train.tensor().shape == (7, 3, 16, 16)
        assert train.masks_tensor([3, 1]).shape == (2, 16, 16)
        for i, name in enumerate(train.names):
            image = Image.open(root / "images" / name).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)
            assert (train.images[i] == np.asarray(image)).all()
            mask = Image.open(root / "masks" / name).resize((16, 16), Image.Resampling.NEAREST)
            assert (train.masks[i] == np.asarray(mask)).all()

    def test_images_of_different_sizes(self, root: Path) -> None:
        for folder in ("images", "masks"):
            path = root / folder / "scan.v1.4.png"
            Image.open(path).resize((50, 11), Image.Resampling.NEAREST).save(path)
        for _ in range(2):  # decoded, and from the cache
            data = read(root, size=None)
            assert data.size is None
            place = {name: (split, i) for split in SPLITS for i, name in enumerate(getattr(data, split).names)}
            split, i = place["scan.v1.4.png"]
            subset = getattr(data, split)
            assert subset.size(i) == subset.mask(i).shape == (11, 50)
            pixels = np.asarray(Image.open(root / "images" / "scan.v1.4.png"))
            torch.testing.assert_close(subset.image(i)[0], torch.from_numpy(pixels / np.float32(255)))
            chosen = subset.take([i])
            assert chosen.tensor().shape == (1, 1, 11, 50)
            assert chosen.masks_tensor().shape == (1, 11, 50)
            if len(subset) > 1:
                with pytest.raises(ValueError, match="different sizes"):
                    subset.tensor()
        assert read(root).size == (16, 16)

    @pytest.mark.parametrize("ending", [".PNG", ".TIFF", ".Tif", ".npy"])
    def test_depths(self, root: Path, ending: str) -> None:
        """A detector of 12 bits: 4095 is white, in every image alike."""
        levels = [(i + 1) * 400 for i in range(10)]
        for i, level in enumerate(levels):
            (root / "images" / f"scan.v1.{i}.png").unlink()
            pixels = np.full(SHAPE, level, np.uint16)
            path = root / "images" / f"scan.v1.{i}{ending}"
            np.save(path, pixels) if ending == ".npy" else Image.fromarray(pixels).save(path)
        data = read(root)
        assert data.train.images.dtype == np.uint16
        assert data.train.value_range == data.test.value_range == (0, 4095)
        for split in SPLITS:
            subset = getattr(data, split)
            for i, name in enumerate(subset.names):
                level = levels[int(name.removesuffix(ending)[-1])]
                torch.testing.assert_close(subset.image(i), torch.full((1, 16, 16), level / 4095))

    def test_mixed_depths_are_refused(self, root: Path) -> None:
        Image.fromarray(np.full(SHAPE, 40_000, np.uint16)).save(root / "images" / "scan.v1.4.png")
        refused(root, "scan.v1.4.png", "uint16", "uint8", "save all images in one type")

    def test_hounsfield_units(self, root: Path) -> None:
        shutil.rmtree(root / "masks")
        for i in range(10):
            (root / "images" / f"scan.v1.{i}.png").unlink()
            np.save(root / "images" / f"scan.v1.{i}.npy", np.linspace(-1000, 200 * i, 600).reshape(SHAPE))
        data = read(root, size=None)
        assert data.train.value_range == (-1000, 1800)
        image = data.train.image(0)
        number = int(data.train.names[0].removesuffix(".npy")[-1])
        assert image.min() == 0
        assert image.max() == pytest.approx((200 * number + 1000) / 2800)

    def test_zero_and_255_are_two_classes(self, root: Path, tmp_path: Path) -> None:
        for i, path in enumerate(sorted((root / "masks").iterdir())):
            Image.fromarray(np.uint8(255 * (np.indices(SHAPE)[1] < i))).save(path)
        data = read(root, size=None)
        assert data.mask_names == ("0", "1")
        for split in SPLITS:
            subset = getattr(data, split)
            for i, name in enumerate(subset.names):
                number = int(name.removesuffix(".png")[-1])
                assert (subset.mask(i).numpy() == (np.indices(SHAPE)[1] < number)).all()

    @pytest.mark.parametrize("value", [255, 200])
    def test_other_large_values_are_refused(self, root: Path, value: int) -> None:
        indices = np.uint8(np.indices(SHAPE)[1] % 3)
        indices[3, 3] = value
        Image.fromarray(indices).save(root / "masks" / "scan.v1.7.png")
        refused(root, "scan.v1.7.png", str(value), "no class indices from 0 to 63")

    def test_jpeg_masks_are_refused(self, root: Path) -> None:
        (root / "masks" / "scan.v1.7.png").unlink()
        Image.new("L", SHAPE[::-1], 1).save(root / "masks" / "scan.v1.7.jpg")
        refused(root, "scan.v1.7.jpg", "stored as JPEG")

    def test_mask_of_another_size(self, root: Path) -> None:
        Image.new("L", (20, 30), 1).save(root / "masks" / "scan.v1.7.png")
        refused(root, "scan.v1.7.png has 30 x 20 pixels", "its image 20 x 30")

    def test_missing_mask(self, root: Path) -> None:
        mask = root / "masks" / "scan.v1.7.png"
        mask.rename(root / "masks" / "scan.v1.7_segmentation.png")
        refused(root, "scan.v1.7.png has no mask scan.v1.7.*", "rename scan.v1.7_segmentation.png")

    def test_mask_without_image(self, root: Path) -> None:
        (root / "images" / "scan.v1.7.png").unlink()
        refused(root, "mask", "scan.v1.7.png has no image")

    def test_two_masks(self, root: Path) -> None:
        Image.new("L", SHAPE[::-1], 1).save(root / "masks" / "scan.v1.7.bmp")
        refused(root, "two masks for scan.v1.7", "scan.v1.7.bmp and scan.v1.7.png")

    def test_two_images_of_one_stem(self, root: Path) -> None:
        Image.new("L", SHAPE[::-1], 1).save(root / "images" / "scan.v1.7.bmp")
        refused(root, "scan.v1.7 is the stem of 2 images")

    def test_litter_is_passed_over(self, root: Path) -> None:
        for folder in (root / "images", root / "masks"):
            for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._scan.v1.1.png"):
                (folder / name).write_bytes(b"litter")
            for name in ("__MACOSX", ".ipynb_checkpoints"):
                (folder / name).mkdir()
        assert len(by_name(read(root))) == 10

    def test_nested_folders(self, root: Path) -> None:
        (root / "images" / "benign").mkdir()
        refused(root, "images holds a folder, benign", "labels.csv")

    def test_something_else_among_the_images(self, root: Path) -> None:
        (root / "images" / "x.docx").write_bytes(b"PK")
        refused(root, "x.docx is no image by its ending", ".png")

    def test_no_images(self, root: Path) -> None:
        shutil.rmtree(root / "images")
        (root / "images").mkdir()
        refused(root, "images holds no image")

    @pytest.mark.parametrize("n", [1, 2])
    def test_too_few_images(self, root: Path, n: int) -> None:
        for i in range(n, 10):
            for folder in ("images", "masks"):
                (root / folder / f"scan.v1.{i}.png").unlink()
        refused(root, f"has {n} images", "training, validation and test need one each")

    def test_names_from_a_mac(self, root: Path) -> None:
        """The same letter, composed in the table and decomposed in the folder, or the other way around."""
        for folder, form in (("images", "NFD"), ("masks", "NFC")):
            (root / folder / "scan.v1.3.png").rename(root / folder / unicodedata.normalize(form, "sc\u00e4n.png"))
        rows = [f"scan.v1.{i}.png,a" if i != 3 else "sc\u00e4n.png,b" for i in range(10)]
        table(root, rows)
        found = by_name(read(root))
        assert found["sc\u00e4n.png"][1] == 1
        assert unicodedata.normalize("NFD", "sc\u00e4n.png") not in found

    def test_the_same_image_in_two_splits(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        shutil.copy(root / "images" / "scan.v1.3.png", root / "images" / "scan.v1.8.png")
        for other, warned in (("test", True), ("train", False)):
            split = {3: "train", 8: other, 9: "test"}
            table(root, [f"scan.v1.{i}.png,{split.get(i, 'val')}" for i in range(10)], header="image,split")
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                read(root)
            assert ("scan.v1.3.png in train and scan.v1.8.png in test" in caplog.text) == warned

    def test_two_names_that_look_alike(self, root: Path) -> None:
        for form in ("NFC", "NFD"):
            shutil.copy(root / "images" / "scan.v1.3.png", root / "images" / unicodedata.normalize(form, "\u00e4.png"))
        if len(list((root / "images").iterdir())) < 12:
            pytest.skip("this file system takes the two names for one")
        refused(root, "two files called \u00e4.png")

    def test_cached(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        table(root)
        first = read(root, size=None)
        monkeypatch.setattr(readers, "in_parallel", None)
        assert differences(fingerprint(first), fingerprint(read(root, size=None))) == []
        table(root, [f"scan.v1.{i}.png,{'ba'[i % 2]}" for i in range(10)])
        again = read(root, size=None)  # other labels do not change a pixel
        assert differences(fingerprint(first), fingerprint(again))

    def test_changed_mask_is_noticed(self, root: Path) -> None:
        before = fingerprint(read(root))
        Image.new("L", SHAPE[::-1], 2).save(root / "masks" / "scan.v1.3.png")
        changed = differences(before, fingerprint(read(root)))
        assert len(changed) == 1
        assert changed[0].endswith("images: other masks")


class TestTable:
    def test_labels_patients_and_splits(self, root: Path) -> None:
        where = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
        table(root, [f"{'xyz'[i % 3]},{where[i]},p{where[i]}{i % 2},scan.v1.{i}.png" for i in range(10)],
              header="label,split,patient,image")  # fmt: skip
        data = read(root)
        assert data.class_names == ("x", "y", "z")
        assert by_name(data) == {f"scan.v1.{i}.png": (where[i], i % 3, f"p{where[i]}{i % 2}") for i in range(10)}

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("ending", ["\n", "\r\n"])
    def test_as_spreadsheets_write_it(self, root: Path, encoding: str, ending: str) -> None:
        lines = ['"Image",age,"Label "', *(f'"scan.v1.{i}",,"a, ""b"" {i % 2}"' for i in range(10)), ",,"]
        (root / "labels.csv").write_bytes(ending.join(lines).encode(encoding))
        data = read(root)
        assert data.class_names == ('a, "b" 0', 'a, "b" 1')
        assert by_name(data)["scan.v1.3.png"][1] == 1

    @pytest.mark.parametrize("form", ["scan.v1.{}.png", "scan.v1.{}", "images/scan.v1.{}.png", "images/scan.v1.{}"])
    def test_how_images_are_named(self, root: Path, form: str) -> None:
        table(root, [f"{form.format(i)},{'ab'[i % 2]}" for i in range(10)])
        assert {name: label for name, (_, label, _) in by_name(read(root)).items()} == {
            f"scan.v1.{i}.png": i % 2 for i in range(10)
        }

    def test_numbers_are_sorted_as_numbers(self, root: Path) -> None:
        table(root, [f"scan.v1.{i}.png,{i + 1}" for i in range(10)])
        assert read(root).class_names == tuple(map(str, range(1, 11)))

    def test_split_by_patient_without_a_split(self, root: Path) -> None:
        table(root, [f"scan.v1.{i}.png,p{i // 2}" for i in range(10)], header="image,patient")
        found = by_name(read(root))
        for i in range(0, 10, 2):
            assert found[f"scan.v1.{i}.png"][0] == found[f"scan.v1.{i + 1}.png"][0]
        assert by_name(read(root, split_seed=1)) != found

    def test_patients_of_some(self, root: Path) -> None:
        table(root, [f"scan.v1.{i}.png,{'p' if i < 4 else ''}" for i in range(10)], header="image,patient")
        found = by_name(read(root))
        assert len({found[f"scan.v1.{i}.png"][0] for i in range(4)}) == 1
        assert found["scan.v1.7.png"][2] == "scan.v1.7.png"

    def test_no_validation_images(self, root: Path) -> None:
        table(root, [f"scan.v1.{i}.png,{'test' if i < 3 else 'TRAIN'}" for i in range(10)], header="image,split")
        for size in (16, None):
            data = read(root, size=size)
            assert [len(getattr(data, split)) for split in SPLITS] == [7, 0, 3]
            assert data.size == (SHAPE if size is None else (16, 16))

    def test_a_class_that_is_not_trained(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        rows = [f"scan.v1.{i}.png,{'rare' if i == 9 else 'common'},{'test' if i > 6 else 'train'}" for i in range(10)]
        table(root, rows, header="image,label,split")
        with caplog.at_level(logging.WARNING):
            read(root)
        assert "no image in train has the label rare" in caplog.text

    @pytest.mark.parametrize(
        ("change", "culprits"),
        [
            ({3: "scan.v1.33.png,a"}, ["line 5 of", "which image is 'scan.v1.33.png'?", "images has none"]),
            ({3: "scan.v1.2.png,a"}, ["line 5 of", "'scan.v1.2.png' has a row already, in line 4"]),
            ({3: "scan.v1.2,a"}, ["line 5 of", "has a row already, in line 4"]),
            ({3: ""}, ["no row for the image scan.v1.3.png"]),
            ({3: "", 4: "", 5: ""}, ["no row for the image scan.v1.3.png (nor have 2 others)"]),
            ({3: "scan.v1.3.png,"}, ["line 5 of", "has no label"]),
            ({3: "scan.v1.3.png"}, ["line 5 of", "has 1 fields, the first line 2"]),
            ({3: "scan.v1.3.png,a,b"}, ["line 5 of", "has 3 fields", "quote what holds a comma"]),
            ({3: 'scan.v1.3.png,"a'}, ["cannot be read as a table"]),
        ],
    )
    def test_rows(self, root: Path, change: dict[int, str], culprits: list[str]) -> None:
        table(root, [change.get(i, f"scan.v1.{i}.png,a") for i in range(10)])
        refused(root, "labels.csv", *culprits)

    @pytest.mark.parametrize(
        ("content", "culprit"),
        [
            (b"", "has no column image (only nothing)"),
            (b"file,label\nx,y\n", "has no column image (only file, label)"),
            (b"image;label\nx;y\n", "separated by commas"),
            (b"image,label,Label\n", "two columns called label"),
            ("image,label\nx,\u00e4\n".encode("latin-1"), "not written in UTF-8"),
            ("image,label\n".encode("utf-16"), "not written in UTF-8"),
            (b"image,label\n", "no row for the image scan.v1.0.png (nor have 9 others)"),
        ],
    )
    def test_tables(self, root: Path, content: bytes, culprit: str) -> None:
        (root / "labels.csv").write_bytes(content)
        refused(root, "labels.csv", culprit)

    @pytest.mark.parametrize("word", ["training", "dev", "0"])
    def test_bad_split(self, root: Path, word: str) -> None:
        table(root, [f"scan.v1.{i}.png,{word if i == 4 else 'train'}" for i in range(10)], header="image,split")
        refused(root, "line 6 of", "one of train, val, test", repr(word))

    def test_no_test_images(self, root: Path) -> None:
        table(root, [f"scan.v1.{i}.png,train" for i in range(10)], header="image,split")
        refused(root, "puts no image into test")

    def test_a_patient_in_two_splits(self, root: Path) -> None:
        rows = [f"scan.v1.{i}.png,p{i % 3},{'test' if i > 6 else 'train'}" for i in range(10)]
        table(root, rows, header="image,patient,split")
        refused(root, "labels.csv puts patient p1 into two splits")

    def test_a_stem_of_two_images(self, root: Path) -> None:
        shutil.rmtree(root / "masks")
        Image.new("L", SHAPE[::-1], 1).save(root / "images" / "scan.v1.7.bmp")
        rows = [f"scan.v1.{i},a" for i in range(10)]
        table(root, rows)
        refused(root, "line 9 of", "scan.v1.7.bmp, scan.v1.7.png could be meant")


class TestWhere:
    def test_root_is_needed(self, no_data_at_hand: Path) -> None:
        for source in ("auto", "real"):
            with pytest.raises(DataError, match="--dataset folder needs --data-root DIR"):
                load("folder", source=source)

    def test_where_a_run_had_it(self, root: Path, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        assert load("folder", formerly=root, size=16, cache_dir=cache).folder == root
        with pytest.raises(DataError, match=r"needs --data-root DIR.*where it was, does not hold it any more"):
            load("folder", formerly=tmp_path / "gone", size=16, cache_dir=cache)

    def test_a_typo(self, root: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no such folder"):
            read(tmp_path / "typo")
        for near in (root / "images", tmp_path):
            with pytest.raises(DataError, match=r"holds no folder images; did you mean .*my data\?"):
                read(near)

    def test_no_phantoms(self, root: Path) -> None:
        with pytest.raises(DataError, match="--dataset folder has no phantoms"):
            read(root, source="phantom")

    def test_titles_tell_folders_apart(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(root)
        assert load("folder", root=".", size=16, cache_dir=root.parent / "cache").title == "folder-my data"


class TestRealData:
    def test_camus(self, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
        root = shared_data("CAMUS_512")
        data = load("folder", root=root, size=64, cache_dir=tmp_path)
        assert (data.title, data.class_names, data.mask_names) == ("folder-CAMUS_512", ("2CH", "4CH"), (*"0123",))
        assert sum(len(getattr(data, split)) for split in SPLITS) == 400
        with (root / "labels.csv").open(newline="") as file:
            told = {row["image"]: (row["label"], row["patient"]) for row in csv.DictReader(file)}
        found = by_name(data)
        assert {name: (data.class_names[label], patient) for name, (_, label, patient) in found.items()} == told
        # Plain and mirrored frames of one patient are in one split.
        split_of: dict[str, set[str]] = {}
        for name, (split, _, _) in found.items():
            split_of.setdefault(name.removeprefix("mirrored_")[:11], set()).add(split)
        assert len(split_of) == 280
        assert all(len(splits) == 1 for splits in split_of.values())
        assert len(data.test) == pytest.approx(80, abs=4)
        for split in SPLITS:
            assert getattr(data, split).masks_tensor().unique().tolist() == [0, 1, 2, 3]

    def test_lizard(self, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
        root = shared_data("LIZARD_512")
        data = load("folder", root=root, size=None, channels=3, cache_dir=tmp_path)
        assert (data.size, data.channels, data.class_names, data.mask_names) == ((512, 512), 3, (), ("0", "1"))
        name = data.test.names[0]
        assert (data.test.images[0] == np.asarray(Image.open(root / "images" / name))).all()
        assert (data.test.mask(0).numpy() == np.asarray(Image.open(root / "masks" / name))).all()

    def test_isic(self, shared_data: Callable[[str], Path], tmp_path: Path) -> None:
        """Files as they are published, linked into the plain layout: different sizes, masks of 0 and 255."""
        source = shared_data("ISIC2018_256")
        with (source / "labels.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["melanoma"]][::40]
        root = tmp_path / "ISIC"
        (root / "images").mkdir(parents=True)
        (root / "masks").mkdir()
        lines = ["image,label"]
        for row in rows:
            id = row["image_id"]
            os.symlink(source / "ISIC2018_Task1-2_Training_Input" / f"{id}.jpg", root / "images" / f"{id}.jpg")
            mask = source / "ISIC2018_Task1_Training_GroundTruth" / f"{id}_segmentation.png"
            os.symlink(mask, root / "masks" / f"{id}.png")
            lines.append(f"{id},{'melanoma' if float(row['melanoma']) else 'other'}")
        (root / "labels.csv").write_text("\n".join(lines))
        data = load("folder", root=root, size=None, channels=3, cache_dir=tmp_path / "cache")
        assert data.size is None
        assert data.class_names == ("melanoma", "other")
        assert data.mask_names == ("0", "1")
        for i, name in enumerate(data.test.names):
            image = Image.open(root / "images" / name)
            assert data.test.size(i) == image.size[::-1]
            truth = np.asarray(Image.open(root / "masks" / f"{name[:-4]}.png")) // 255
            assert (data.test.mask(i).numpy() == truth).all()
        melanoma = [int((getattr(data, split).labels == 0).sum()) for split in SPLITS]
        total = sum(melanoma)
        assert melanoma == pytest.approx([0.7 * total, 0.1 * total, 0.2 * total], abs=1)
