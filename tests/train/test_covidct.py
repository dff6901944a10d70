"""COVID-CT: the official layout, everything that can be wrong with it, and the search for it."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from train.data import DATASETS, DataError, DataUnavailableError, ImageData, load, readers
from train.data.download import read_manifest, verify
from train.data.sets import covidct as module


def read(path: Path, cache_dir: Path, **options: object) -> ImageData:
    return load("covidct", root=path, source="real", cache_dir=cache_dir, **({"size": 16} | options))


class TestReading:
    def test_split_labels_names_and_pixels(self, small_covidct: Path, tmp_path: Path) -> None:
        data = read(small_covidct, tmp_path / "cache")
        assert (data.name, data.source, data.class_names) == ("covidct", "real", ("NonCOVID", "COVID"))
        assert (data.channels, data.num_classes, data.size) == (1, 2, (16, 16))
        for split in ("train", "val", "test"):
            subset = getattr(data, split)
            assert subset.names == tuple(f"{split} {c}%{i}.png" for c in ("NonCOVID", "COVID") for i in range(2))
            assert subset.labels.tolist() == [0, 0, 1, 1]
            for name, pixels in zip(subset.names, subset.images, strict=True):
                folder = "CT_NonCOVID" if "Non" in name else "CT_COVID"
                file = small_covidct / "Images-processed" / folder / name
                expected = Image.open(file).resize((16, 16), Image.Resampling.LANCZOS)
                assert (pixels[..., 0] == np.asarray(expected)).all()

    def test_batches_for_networks(self, small_covidct: Path, tmp_path: Path) -> None:
        subset = read(small_covidct, tmp_path / "cache", channels=3).train
        batch = subset.tensor([2, 0])
        assert batch.shape == (2, 3, 16, 16)
        np.testing.assert_allclose(batch[0].permute(1, 2, 0) * 255, subset.images[2], atol=1e-4)
        batch.zero_()  # a copy: the cache is not written to
        assert subset.images[2].any()

    def test_data_root_may_be_the_parent(self, small_covidct: Path, tmp_path: Path) -> None:
        assert len(read(small_covidct.parent, tmp_path / "cache").train) == 4

    def test_windows_line_ends_blank_lines_and_byte_order_mark(self, small_covidct: Path, tmp_path: Path) -> None:
        file = small_covidct / module.list_file("val", "COVID")
        file.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(file.read_bytes().splitlines()) + b"  \r\n")
        assert len(read(small_covidct, tmp_path / "cache").val) == 4

    def test_changed_image_is_decoded_again(self, small_covidct: Path, tmp_path: Path) -> None:
        before = read(small_covidct, tmp_path / "cache").train.images[0].copy()
        name = "train NonCOVID%0.png"
        Image.new("L", (50, 50), 9).save(small_covidct / "Images-processed" / "CT_NonCOVID" / name)
        after = read(small_covidct, tmp_path / "cache").train.images[0]
        assert (after == 9).all()
        assert (before != 9).any()

    def test_other_content_of_the_same_size_and_time_is_decoded_again(
        self, small_covidct: Path, tmp_path: Path
    ) -> None:
        """Bitmaps are not compressed: two of them are equal in size."""
        image = small_covidct / "Images-processed" / "CT_NonCOVID" / "train NonCOVID%0.png"
        Image.new("L", (20, 20), 100).save(image, format="BMP")
        before = image.stat()
        assert (read(small_covidct, tmp_path / "cache").train.images[0] == 100).all()
        Image.new("L", (20, 20), 200).save(image, format="BMP")
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (image.stat().st_size, image.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        assert (read(small_covidct, tmp_path / "cache").train.images[0] == 200).all()

    def test_a_touch_makes_no_second_entry(
        self, small_covidct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache = tmp_path / "cache"
        read(small_covidct, cache)
        entries = sorted(cache.iterdir())
        monkeypatch.setattr(readers, "in_parallel", None)
        for file in small_covidct.rglob("*.png"):
            os.utime(file, (1e9, 1e9))
        read(small_covidct, cache)
        moved = small_covidct.rename(tmp_path / "moved")
        read(moved, cache)  # nor does another place
        assert [path for path in sorted(cache.iterdir()) if path.is_dir()] == [e for e in entries if e.is_dir()]

    def test_second_run_decodes_nothing(
        self, small_covidct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = read(small_covidct, tmp_path / "cache")
        monkeypatch.setattr(readers, "in_parallel", None)
        assert (read(small_covidct, tmp_path / "cache").train.images == first.train.images).all()
        with pytest.raises(TypeError):  # another size does need it
            read(small_covidct, tmp_path / "cache", size=17)


class TestDamage:
    """Each culprit is named, before training."""

    def refused(self, path: Path, tmp_path: Path, *culprits: str) -> None:
        with pytest.raises(DataError) as caught:
            read(path, tmp_path / "cache")
        assert not isinstance(caught.value, DataUnavailableError)  # which source="auto" would answer with phantoms
        for culprit in culprits:
            assert culprit in str(caught.value)

    def image(self, root: Path, class_name: str = "COVID", split: str = "val") -> Path:
        return root / "Images-processed" / f"CT_{class_name}" / f"{split} {class_name}%1.png"

    def test_missing_image(self, small_covidct: Path, tmp_path: Path) -> None:
        self.image(small_covidct).unlink()
        self.refused(small_covidct, tmp_path, "val COVID%1.png is missing", "line 2 of", "valCT_COVID.txt")

    @pytest.mark.parametrize("damage", [b"", b"not an image", None], ids=["empty", "text", "cut off"])
    def test_corrupt_image(self, small_covidct: Path, tmp_path: Path, damage: bytes | None) -> None:
        image = self.image(small_covidct)
        image.write_bytes(image.read_bytes()[:200] if damage is None else damage)
        self.refused(small_covidct, tmp_path, "val COVID%1.png cannot be read as an image")

    def test_flipped_bits(self, small_covidct: Path, tmp_path: Path) -> None:
        image = self.image(small_covidct)
        content = bytearray(image.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
        image.write_bytes(content)
        self.refused(small_covidct, tmp_path, "val COVID%1.png cannot be read as an image")

    @pytest.mark.parametrize("other", ["val", "test"])
    def test_listed_twice(self, small_covidct: Path, tmp_path: Path, other: str) -> None:
        with (small_covidct / module.list_file(other, "COVID")).open("a") as file:
            file.write("val COVID%1.png\n")
        self.refused(small_covidct, tmp_path, "val COVID%1.png is listed twice", "line 2 of", f"{other}CT_COVID.txt")

    def test_missing_list(self, small_covidct: Path, tmp_path: Path) -> None:
        (small_covidct / module.list_file("test", "NonCOVID")).unlink()
        self.refused(small_covidct, tmp_path, "testCT_NonCOVID.txt is missing")

    def test_empty_list_leaves_a_single_class(self, small_covidct: Path, tmp_path: Path) -> None:
        (small_covidct / module.list_file("test", "NonCOVID")).write_text("\n")
        self.refused(small_covidct, tmp_path, "testCT_NonCOVID.txt names no image", "single class")

    def test_list_that_is_no_text(self, small_covidct: Path, tmp_path: Path) -> None:
        (small_covidct / module.list_file("test", "COVID")).write_bytes(b"\xff\xfe\x00")
        self.refused(small_covidct, tmp_path, "testCT_COVID.txt cannot be read")

    @pytest.mark.parametrize("name", ["../CT_NonCOVID/val NonCOVID%1.png", "/etc/hostname"])
    def test_list_that_leads_elsewhere(self, small_covidct: Path, tmp_path: Path, name: str) -> None:
        (small_covidct / module.list_file("test", "COVID")).write_text(name)
        self.refused(small_covidct, tmp_path, "testCT_COVID.txt", "plain file name", name)

    def test_images_still_zipped(self, small_covidct: Path, tmp_path: Path) -> None:
        folder = small_covidct / "Images-processed" / "CT_COVID"
        folder.rename(tmp_path / "elsewhere")
        folder.with_name("CT_COVID.zip").write_bytes(b"PK")
        self.refused(small_covidct, tmp_path, "CT_COVID is missing", "unzip", "CT_COVID.zip")

    def test_data_root_is_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        self.refused(file, tmp_path, f"data root {file} is a file")

    def test_auto_does_not_hide_damage_behind_phantoms(self, small_covidct: Path, tmp_path: Path) -> None:
        self.image(small_covidct).unlink()
        with pytest.raises(DataError, match="is missing"):
            load("covidct", root=small_covidct, source="auto", size=16, cache_dir=tmp_path / "cache")


class TestSearch:
    @pytest.fixture(autouse=True)
    def offline(self, no_data_at_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: object, target: Path, *, progress: bool) -> None:
            raise DataUnavailableError("no network")

        monkeypatch.setattr(module.CovidCT, "download", fail)

    def test_order(self, small_covidct: Path, no_data_at_hand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def found(root: Path | None = None) -> bool:
            try:
                return load("covidct", root=root, source="real", size=16, cache_dir="cache").source == "real"
            except DataUnavailableError:
                return False

        assert not found()
        assert found(small_covidct)
        (no_data_at_hand / "data").symlink_to(small_covidct.parent)
        assert found()
        (no_data_at_hand / "data").unlink()
        monkeypatch.setenv("GRADPROM_DATA", str(small_covidct))
        assert found()
        with pytest.raises(DataError, match="neither is nor holds"):  # a root that was given is not passed over
            found(no_data_at_hand)
        broken = no_data_at_hand / "COVID-CT" / "Data-split"
        broken.mkdir(parents=True)
        with pytest.raises(DataError, match="missing"):  # but one that has it wins over the environment
            found(no_data_at_hand)

    @pytest.mark.parametrize("name", ["COVID-CT-master", "COVID-CT-main"])
    @pytest.mark.parametrize("inner", ["", "{}"])
    def test_what_a_zip_file_of_github_unpacks_to(
        self, small_covidct: Path, no_data_at_hand: Path, name: str, inner: str
    ) -> None:
        """Given itself, or the folder that holds it (with Windows, a folder of the same name)."""
        root = no_data_at_hand / name / inner.format(name)
        shutil.copytree(small_covidct, root, dirs_exist_ok=True)
        for given in {root, root.parent}:
            data = load("covidct", root=given, source="real", size=16, cache_dir="cache")
            assert data.folder == root
            assert len(data.train) == 4

    @pytest.mark.parametrize("source", ["real", "auto"])
    def test_a_root_that_was_given_has_to_hold_the_data(
        self, small_covidct: Path, no_data_at_hand: Path, monkeypatch: pytest.MonkeyPatch, source: str
    ) -> None:
        """Even where they could be found elsewhere; it was not asked for those."""
        monkeypatch.setenv("GRADPROM_DATA", str(small_covidct))
        (no_data_at_hand / "empty").mkdir()
        nested = no_data_at_hand / "outer" / "inner" / "COVID-CT"
        shutil.copytree(small_covidct, nested)
        for given, words in (
            ("typo", "--data-root typo: there is no such folder"),
            ("empty", "--data-root empty neither is nor holds the folder of COVID-CT (COVID-CT); get it from https"),
            (nested / "Images-processed", f"did you mean {nested}?"),
            (no_data_at_hand / "outer", f"did you mean {nested}?"),
        ):
            with pytest.raises(DataError) as caught:
                load("covidct", root=given, source=source, size=16)
            assert not isinstance(caught.value, DataUnavailableError)
            assert words in str(caught.value)

    def test_the_environment_is_passed_over_but_not_in_silence(
        self,
        small_covidct: Path,
        no_data_at_hand: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """It may be there for other data sets."""
        (no_data_at_hand / "data").symlink_to(small_covidct.parent)
        monkeypatch.setenv("GRADPROM_DATA", "~/elsewhere")
        data = load("covidct", source="real", size=16)
        assert data.folder == Path("data/COVID-CT")
        assert f"COVID-CT is not in $GRADPROM_DATA ({no_data_at_hand}/elsewhere)" in caplog.text

    def test_real_says_where_it_looked_and_what_to_do(self, no_data_at_hand: Path) -> None:
        with pytest.raises(DataUnavailableError) as caught:
            load("covidct", formerly=no_data_at_hand / "here", source="real")
        for part in (f"{no_data_at_hand}/here, data", "no network", module.CovidCT.homepage, "--data-root"):
            assert part in str(caught.value)

    def test_auto_goes_on_with_phantoms_in_one_line(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts = {split: {"NonCOVID": 1, "COVID": 1} for split in ("train", "val", "test")}
        monkeypatch.setattr(module, "PHANTOM_COUNTS", counts)
        with caplog.at_level(logging.WARNING):
            data = load("covidct", source="auto", size=16)
        assert data.source == "phantom"
        (record,) = caplog.records
        assert "PHANTOM" in record.getMessage()
        assert "\n" not in record.getMessage()

    @pytest.mark.parametrize(
        ("argument", "culprit"), [({"source": "reel"}, "reel"), ({"channels": 2}, "channels"), ({"size": 0}, "size")]
    )
    def test_arguments(self, argument: dict[str, object], culprit: str) -> None:
        with pytest.raises(ValueError, match=culprit):
            load("covidct", **argument)

    def test_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(ValueError, match="covidct"):
            load("covid")
        assert "covidct" in DATASETS


@pytest.fixture(scope="module")
def data(shared_data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> ImageData:
    return read(shared_data("COVID-CT"), tmp_path_factory.mktemp("cache"), size=64)


class TestRealData:
    def test_official_counts(self, data: ImageData) -> None:
        counts = {split: np.bincount(getattr(data, split).labels).tolist() for split in ("train", "val", "test")}
        assert counts == {"train": [234, 191], "val": [58, 60], "test": [105, 98]}
        assert counts == {split: list(phantoms.values()) for split, phantoms in module.PHANTOM_COUNTS.items()}
        names = [name for split in ("train", "val", "test") for name in getattr(data, split).names]
        assert len(set(names)) == 746

    def test_they_are_images(self, data: ImageData) -> None:
        """Every image has dark and bright parts: nothing was decoded to a blank."""
        images = np.concatenate([data.train.images, data.val.images, data.test.images])
        assert (np.ptp(images.reshape(746, -1), axis=1) > 100).all()

    def test_manifest_is_that_of_the_real_files(self, shared_data: Callable[[str], Path]) -> None:
        manifest = read_manifest(module.MANIFEST)
        assert len(manifest) == 746 + 6
        verify(shared_data("COVID-CT"), manifest)
