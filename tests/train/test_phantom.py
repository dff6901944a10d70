"""Phantoms: reproducible, of the split sizes of the real data, and with a diagnosis that one can see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from train.data import ImageData, load
from train.data.phantoms.chest_ct import chest_slice


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def data(cache_dir: Path) -> ImageData:
    return load("covidct", source="phantom", size=32, cache_dir=cache_dir)


def test_like_the_real_split(data: ImageData) -> None:
    assert (data.name, data.source, data.class_names) == ("covidct", "phantom", ("NonCOVID", "COVID"))
    assert (data.size, data.channels) == ((32, 32), 1)
    counts = {split: np.bincount(getattr(data, split).labels).tolist() for split in ("train", "val", "test")}
    assert counts == {"train": [234, 191], "val": [58, 60], "test": [105, 98]}


def test_no_image_occurs_twice(data: ImageData) -> None:
    images = np.concatenate([data.train.images, data.val.images, data.test.images])
    assert len(np.unique(images.reshape(746, -1), axis=0)) == 746
    names = {*data.train.names, *data.val.names, *data.test.names}
    assert len(names) == 746


def test_cached(data: ImageData, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.data.phantoms.chest_ct.chest_slice", None)
    again = load("covidct", source="phantom", size=32, cache_dir=cache_dir)
    assert (again.train.images == data.train.images).all()


def test_three_channels_are_equal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = {split: {"NonCOVID": 1, "COVID": 1} for split in ("train", "val", "test")}
    monkeypatch.setattr("train.data.sets.covidct.PHANTOM_COUNTS", counts)
    data = load("covidct", source="phantom", size=32, channels=3, cache_dir=tmp_path)
    assert data.test.images.shape == (2, 32, 32, 3)
    assert (data.test.images == data.test.images[..., :1]).all()


def test_they_have_no_size_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = {split: {"NonCOVID": 1, "COVID": 1} for split in ("train", "val", "test")}
    monkeypatch.setattr("train.data.sets.covidct.PHANTOM_COUNTS", counts)
    assert load("covidct", source="phantom", size=None, cache_dir=tmp_path).size == (128, 128)


@pytest.mark.parametrize("diseased", [False, True])
def test_the_seed_decides(diseased: bool) -> None:
    slice_ = chest_slice(7, diseased=diseased, size=64)
    assert slice_.shape == (64, 64)
    assert slice_.dtype == np.uint8
    assert (chest_slice(7, diseased=diseased, size=64) == slice_).all()
    assert (chest_slice(8, diseased=diseased, size=64) != slice_).any()


def test_anatomy() -> None:
    """On average over patients: bright chest wall and spine, dark lungs on both sides, background outside."""
    mean = np.mean([chest_slice(seed, diseased=False, size=64) for seed in range(24)], axis=0)
    lungs = mean[26:40, 13:20].mean(), mean[26:40, 46:51].mean()
    assert max(lungs) < 0.6 * min(mean[42:48, 29:35].mean(), mean[8:11, 26:38].mean())  # spine, front wall
    assert mean[:3].max() < 0.6 * mean[42:48, 29:35].mean()


def test_opacities_are_peripheral_and_denser() -> None:
    """The same patients with and without disease: what differs lies in the lungs and is mostly brighter."""
    change = [
        chest_slice(s, diseased=True, size=64).astype(float) - chest_slice(s, diseased=False, size=64)
        for s in range(24)
    ]
    mean = np.mean(change, axis=0)
    periphery = mean[40:50, 12:18].mean(), mean[40:50, 46:52].mean()
    assert min(periphery) > 5  # gray levels, both sides
    assert abs(mean[20:44, 30:34].mean()) < 0.3 * min(periphery)  # the mediastinum stays
    assert abs(mean[:4].mean()) < 2  # and so does the background


def test_the_mean_grey_is_not_the_diagnosis(data: ImageData) -> None:
    """A classifier that looks at the mean of the image alone gets little further than guessing."""
    gray = data.train.images.reshape(len(data.train), -1).mean(1)
    cuts = np.quantile(gray, np.linspace(0.05, 0.95, 19))
    best = max(((gray > cut) == data.train.labels).mean() for cut in cuts)
    assert best < 0.65
