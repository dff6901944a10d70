"""Small data sets in the layouts of the official ones, in the formats and with the traps of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.sets import isic2018


def folder(root: Path) -> Path:
    """Images of different sizes, with masks, labels and patients."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rows = ["image,patient,label"]
    for i in range(12):
        shape = (30 + i, 40 - i)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 3, shape, dtype=np.uint8)).save(root / "masks" / f"{i}.png")
        rows.append(f"{i}.png,p{i // 2},{'ab'[i // 2 % 2]}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


ISIC = {f"ISIC_{3 + i:07d}": i % 4 - 1 for i in range(20)}
"""Twenty images with their labels; every fourth is unknown."""


def isic_pairs(root: Path, split: str, ids: list[str]) -> None:
    """Images of noise with lesions, as the challenge names them; every image is of another size."""
    rng = np.random.default_rng(len(ids))
    images, masks = root / isic2018.image_folder(split), root / isic2018.mask_folder(split)
    images.mkdir(parents=True)
    masks.mkdir()
    for i, id in enumerate(ids):
        shape = (18 + i, 40 - i)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(images / f"{id}.jpg")
        Image.fromarray(255 * rng.integers(0, 2, shape, dtype=np.uint8)).save(masks / f"{id}_segmentation.png")
    for folder in (images, masks):  # as the official archives have them
        (folder / "ATTRIBUTION.txt").touch()
        (folder / "LICENSE.txt").touch()


def isic_table(path: Path, labels: dict[str, int], *, form: str = "{:.1f}") -> Path:
    """In the columns of the official tables; an unknown label is a row with empty fields."""
    rows = ["image_id,melanoma,seborrheic_keratosis"]
    for id, label in labels.items():
        told = ["", ""] if label < 0 else [form.format(label == 1), form.format(label == 2)]
        rows.append(",".join([id, *told]))
    path.write_text("\n".join(rows) + "\n")
    return path


def isic(root: Path) -> Path:
    """In two tables of 2017, which do not know five of the images, and know one of another year."""
    isic_pairs(root, "train", list(ISIC))
    known = [(id, label) for id, label in ISIC.items() if label >= 0]
    isic_table(root / "ISIC-2017_Training_Part3_GroundTruth.csv", dict(known[:7]) | {"ISIC_0009999": 1})
    isic_table(root / "ISIC-2017_Validation_Part3_GroundTruth.csv", dict(known[7:]))
    return root


def drimdb(root: Path) -> Path:
    """With date and time burnt in, in white, and an outlier of another size."""
    rng = np.random.default_rng(0)
    for quality, number in (("Good", 6), ("Bad", 5), ("Outlier", 4)):
        (root / quality).mkdir(parents=True)
        for i in range(number):
            scale = 3 if (quality, i) == ("Outlier", 2) else 1
            pixels = np.repeat(np.repeat(rng.integers(40, 200, (57, 76, 3), dtype=np.uint8), 10, 0), 10, 1)
            pixels[8:23, 574:682] = 255
            image = Image.fromarray(pixels).resize((760 * scale, 570 * scale), Image.Resampling.NEAREST)
            image.save(root / quality / f"drimdb_{quality.lower()} ({i + 1}).jpg", quality=90)
    return root


SMALL: dict[str, Callable[[Path], Path]] = {"folder": folder, "isic2018": isic, "drimdb": drimdb}
"""How to write a small data set of one's own, by the name of the data set whose layout it has."""
