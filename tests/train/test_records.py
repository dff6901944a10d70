"""A data set is what lists its records: here one whose images are slices of a single file, as volumes have them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.train.contracts import check_dataset
from train.data import DataError, ImageData
from train.data.base import DataSet, Example, Listing
from train.data.cache import ArrayCache
from train.data.splits import seeded


@dataclass(frozen=True)
class Slice:
    path: Path
    index: int

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, channels: int) -> np.ndarray:
        return np.load(self.path)[self.index][..., None].repeat(channels, 2)


@dataclass(frozen=True)
class SliceMask(Slice):
    def read(self, channels: int) -> np.ndarray:
        return (np.load(self.path)[self.index] > 1500).astype(np.uint8)


class Volume(DataSet):
    name = "volume"
    title = "the volume"

    def is_at(self, path: Path) -> bool:
        return (path / "volume.npy").is_file()

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        file = path / "volume.npy"
        examples = [
            Example(f"slice {i}", Slice(file, i), SliceMask(file, i), label=i % 2, patient=f"p{i // 2}")
            for i in range(12)
        ]
        splits = seeded(examples, seed=split_seed, what=self.title)
        return Listing(splits, ("even", "odd"), mask_names=("soft", "bone"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "volume"
    root.mkdir()
    np.save(root / "volume.npy", np.random.default_rng(0).integers(0, 3000, (12, 20, 24), dtype=np.uint16))
    return root


def read(root: Path, dataset: DataSet | None = None, *, size: int | None = None, channels: int = 1, cache_dir: Path):
    return (dataset or Volume()).read(
        root, size=size, channels=channels, cache=ArrayCache(cache_dir), progress=False, split_seed=0
    )


def test_contract(root: Path, tmp_path: Path) -> None:
    check_dataset(lambda **options: read(root, **options), tmp_path / "check")


def test_each_record_is_its_own_part_of_the_file(root: Path, tmp_path: Path) -> None:
    volume = np.load(root / "volume.npy")
    for _ in range(2):
        data: ImageData = read(root, cache_dir=tmp_path / "cache")
        assert (data.mask_names, data.class_names, data.size) == (("soft", "bone"), ("even", "odd"), (20, 24))
        assert data.train.value_range == (0, 4095)
        for subset in (data.train, data.val, data.test):
            for i, name in enumerate(subset.names):
                pixels = volume[int(name.split()[1])]
                np.testing.assert_allclose(subset.image(i)[0], pixels / 4095, atol=1e-6)
                assert (subset.mask(i).numpy() == (pixels > 1500)).all()


def test_another_part_is_another_entry_of_the_cache(root: Path, tmp_path: Path) -> None:
    class Backwards(Volume):
        def listing(self, path: Path, *, split_seed: int) -> Listing:
            listing = super().listing(path, split_seed=split_seed)
            turned = {
                split: [replace(e, image=Slice(e.image.path, 11 - e.image.index)) for e in examples]
                for split, examples in listing.splits.items()
            }
            return replace(listing, splits=turned)

    one = read(root, cache_dir=tmp_path / "cache")
    other = read(root, Backwards(), cache_dir=tmp_path / "cache")
    number = int(one.train.names[0].split()[1])
    assert (other.train.images[0][..., 0] == np.load(root / "volume.npy")[11 - number]).all()


@pytest.mark.parametrize(
    ("change", "error", "culprit"),
    [
        ({"id": "slice 1"}, ValueError, "two images of the volume have the same id"),
        ({"label": 2}, ValueError, "a label of the volume has no name"),
        ({"mask": None}, ValueError, "some images of the volume have a mask"),
    ],
)
def test_a_listing_that_contradicts_itself(
    root: Path, tmp_path: Path, change: dict, error: type[Exception], culprit: str
) -> None:
    class Wrong(Volume):
        def listing(self, path: Path, *, split_seed: int) -> Listing:
            listing = super().listing(path, split_seed=split_seed)
            splits = {
                split: [replace(e, **change) if e.id == "slice 0" else e for e in examples]
                for split, examples in listing.splits.items()
            }
            return replace(listing, splits=splits)

    with pytest.raises(error, match=culprit):
        read(root, Wrong(), cache_dir=tmp_path / "cache")


def test_more_classes_in_the_masks_than_names(root: Path, tmp_path: Path) -> None:
    class Unnamed(Volume):
        def listing(self, path: Path, *, split_seed: int) -> Listing:
            return replace(super().listing(path, split_seed=split_seed), mask_names=("soft",))

    with pytest.raises(DataError, match="the masks of the volume have 2 classes, not 1"):
        read(root, Unnamed(), cache_dir=tmp_path / "cache")
