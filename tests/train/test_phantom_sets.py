"""Phantoms of the data sets with masks or color: what can be seen in them is what their labels and masks say."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.data import DATASETS, ImageData, load
from train.data.cache import ArrayCache
from train.data.phantoms import drawing, fundus, head, heart, skin, tissue

Draw = Callable[[int, int, int], drawing.Drawing]
SPLITS = ("train", "val", "test")
KINDS: dict[str, tuple[Draw, int]] = {
    "isic2018": (skin.lesion, 3),
    "drimdb": (fundus.photograph, 3),
    "camus": (heart.echo, 3),
    "lizard": (tissue.tile, 1),
    "mri": (head.head, 1),
}
"""How an image is drawn, and how many classes there are."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ImageData]:
    cache = tmp_path_factory.mktemp("cache")
    return lambda name: load(name, source="phantom", size=32, channels=3, cache_dir=cache)


@pytest.mark.parametrize("name", list(KINDS))
def test_like_the_real_set(name: str, phantoms: Callable[[str], ImageData]) -> None:
    """Names of classes and masks are those of the listing, and no image occurs twice."""
    data, module = phantoms(name), importlib.import_module(f"train.data.sets.{name}")
    assert data.class_names == getattr(module, "CLASS_NAMES", ())
    assert data.mask_names == getattr(module, "MASK_NAMES", ())
    assert (data.name, data.source, data.channels, data.size) == (name, "phantom", 3, (32, 32))
    assert [len(getattr(data, split)) for split in SPLITS] == [120, 30, 60]
    for split in SPLITS:
        subset = getattr(data, split)
        if data.class_names:
            assert np.unique(subset.labels).tolist() == list(range(data.num_classes))
        if data.mask_names:
            assert np.unique(subset.masks).tolist() == list(range(data.num_mask_classes))
    images = np.concatenate([getattr(data, split).images for split in SPLITS])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("size", [16, 65])
def test_the_seed_decides(name: str, size: int) -> None:
    draw, kinds = KINDS[name]
    for kind in range(kinds):
        image, mask = draw(7, kind, size)
        again, other = draw(7, kind, size), draw(8, kind, size)
        assert image.dtype == np.uint8
        assert image.shape[:2] == (size, size)
        assert (again[0] == image).all()
        assert (other[0] != image).any()
        if mask is not None:
            assert (mask.dtype, mask.shape) == (np.uint8, (size, size))
            assert again[1] is not None
            assert (again[1] == mask).all()


def test_every_set_is_here() -> None:
    drawn = {
        name
        for name in DATASETS
        if DATASETS[name].__module__.startswith("train.") and DATASETS.build(name).has_phantoms
    }
    assert drawn - {"covidct"} == set(KINDS)


def test_gray_is_that_of_the_color(tmp_path: Path) -> None:
    color = load("isic2018", source="phantom", size=16, channels=3, cache_dir=tmp_path).val
    gray = load("isic2018", source="phantom", size=16, channels=1, cache_dir=tmp_path).val
    luma = color.images @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma - gray.images[..., 0]).max() <= 1
    assert (color.masks == gray.masks).all()


def test_patients_and_labels_are_optional(tmp_path: Path) -> None:
    counts = {split: {"tile": 6} for split in SPLITS}
    data = drawing.drawn(
        "tiles", skin.lesion, counts=counts, size=16, channels=1, cache=ArrayCache(tmp_path), progress=False,
        labeled=False, per_patient=4,
    )  # fmt: skip
    assert (data.class_names, data.train.labels, data.train.masks) == ((), None, None)
    assert data.train.names[5] == "phantom-train-tile-005"
    assert data.train.patients == ("phantom-train-tile-patient000",) * 4 + ("phantom-train-tile-patient001",) * 2


def test_lesions_are_darker_than_skin() -> None:
    for kind in range(3):
        for seed in range(8):
            image, mask = skin.lesion(seed, kind, 64)
            assert mask is not None
            assert 0.02 < mask.mean() < 0.6
            middle = np.hypot(*np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64))) < 0.9
            assert image[mask == 1].mean() < image[(mask == 0) & middle].mean() - 20


def test_bad_photographs_show_less() -> None:
    """Vessels are what a good one has most of, and they are lost in a bad one."""

    def detail(kind: int, seed: int) -> float:
        green = fundus.photograph(seed, kind, 96)[0][24:72, 24:72, 1].astype(float)
        return float(np.abs(np.diff(green)).mean())

    assert max(detail(1, seed) for seed in range(12)) < min(detail(0, seed) for seed in range(12))


def test_hearts_are_dark_blood_in_bright_muscle() -> None:
    """The poorer the quality, the less they differ."""
    contrast = []
    for kind in range(3):
        found = []
        for seed in range(12):
            image, mask = heart.echo(seed, kind, 64)
            assert mask is not None
            blood, muscle, atrium = (image[mask == index].mean() for index in (1, 2, 3))
            assert blood < muscle
            assert np.argwhere(mask == 1)[:, 0].mean() < np.argwhere(mask == 3)[:, 0].mean()  # the atrium is below
            found.append(muscle - max(blood, atrium))
        contrast.append(np.mean(found))
    assert contrast[0] > contrast[1] > contrast[2] > 0


def test_nuclei_are_darker_than_what_is_around_them() -> None:
    tiles = [tissue.tile(seed, 0, 128) for seed in range(8)]
    pixels = np.concatenate([image.reshape(-1, 3) for image, _ in tiles]).astype(float)
    masks = np.concatenate([mask.ravel() for _, mask in tiles if mask is not None])
    means = [pixels[masks == index].mean(0) for index in range(7)]
    assert max(mean.mean() for mean in means[1:]) < means[0].mean() - 30
    assert np.bincount(masks, minlength=7)[1:].argmax() == 1  # epithelial ones are the most, as in life


def test_the_looks_of_hearts_do_not_tell_the_quality() -> None:
    """The masks of all qualities are alike: it is in the image alone."""
    for seed in range(4):
        masks = [heart.echo(seed, kind, 48)[1] for kind in range(3)]
        assert all((mask == masks[0]).all() for mask in masks[1:])
