"""ISIC 2018 Task 1: dermoscopic images of skin lesions with the border of each lesion.

N. Codella et al., "Skin Lesion Analysis Toward Melanoma Detection 2018", arXiv:1902.03368; P. Tschandl, C. Rosendahl,
H. Kittler, "The HAM10000 dataset", Scientific Data 5, 180161 (2018). The challenge gives no diagnosis with these
images; most of them were in the challenge of 2017 (N. Codella et al., arXiv:1710.05006), whose Part 3 has one.

Layout of the folder, as the challenge publishes it::

    ISIC2018_Task1-2_Training_Input/ISIC_*.jpg
    ISIC2018_Task1_Training_GroundTruth/ISIC_*_segmentation.png      0 skin, 255 lesion
    ISIC2018_Task1-2_Validation_Input, ISIC2018_Task1_Validation_GroundTruth   } optional: the official
    ISIC2018_Task1-2_Test_Input, ISIC2018_Task1_Test_GroundTruth               } validation and test images
    ISIC-2017_*_Part3_GroundTruth.csv or labels.csv    optional: columns image_id, melanoma, seborrheic_keratosis

Where the official validation and test images are missing, the training images are split by a seed. An image that no
table has a diagnosis of is of unknown label. Which images are of one patient is not published.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, Listing
from train.data.readers import ImageFile, MaskFile
from train.data.splits import seeded

CLASS_NAMES = ("other", "melanoma", "seborrheic keratosis")
MASK_NAMES = ("skin", "lesion")

_PARTS = {"train": "Training", "val": "Validation", "test": "Test"}
_MASK_END = "_segmentation.png"
_YES = {"0": False, "0.0": False, "1": True, "1.0": True}


def image_folder(split: str) -> str:
    """Path of a split's images, relative to the data set's folder."""
    return f"ISIC2018_Task1-2_{_PARTS[split]}_Input"


def mask_folder(split: str) -> str:
    """Path of a split's masks, relative to the data set's folder."""
    return f"ISIC2018_Task1_{_PARTS[split]}_GroundTruth"


@DATASETS.register("isic2018")
class ISIC2018(DataSet):
    name = "isic2018"
    title = "ISIC 2018 Task 1"
    folder = "ISIC2018"
    copies = ("ISIC2018_256", "ISIC2018_600x450")
    homepage = "https://challenge.isic-archive.com/data/#2018"

    def is_at(self, path: Path) -> bool:
        return (path / image_folder("train")).is_dir()

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        files = {
            split: _pairs(path, split) for split in SPLITS if split == "train" or (path / image_folder(split)).is_dir()
        }
        if len(files) == 2:
            (missing,) = set(SPLITS) - set(files)
            raise DataError(
                f"{path} has {image_folder('test' if missing == 'val' else 'val')} but no {image_folder(missing)}; add "
                "that folder, or move the other one away"
            )
        labels = _diagnoses(path, {id for found in files.values() for id in found})
        examples = {
            split: [
                Example(id=id, image=ImageFile(image), mask=MaskFile(mask), label=labels.get(id))
                for id, (image, mask) in found.items()
            ]
            for split, found in files.items()
        }
        if len(files) == 1:
            examples = seeded(examples["train"], seed=split_seed, what=str(path))
        return Listing(examples, CLASS_NAMES if labels else (), MASK_NAMES)


def _pairs(path: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The images of a split with their masks, by their ids, in the order of these.

    :raises DataError: an image has no mask, or a mask no image.
    """
    folder, masks = path / image_folder(split), path / mask_folder(split)
    if not masks.is_dir():
        raise DataError(f"the folder {masks} is missing; the masks of {folder.name} belong there")
    images = {file.stem: file for file in sorted(folder.glob("ISIC_*.jpg"))}
    if not images:
        raise DataError(f"{folder} holds no image ISIC_*.jpg")
    found = {file.name.removesuffix(_MASK_END): file for file in masks.glob(f"ISIC_*{_MASK_END}")}
    for id, image in images.items():
        if id not in found:
            raise DataError(f"the image {image} has no mask {masks / (id + _MASK_END)}; add it, or move the image away")
    if unused := sorted(set(found) - set(images)):
        raise DataError(
            f"the mask {found[unused[0]]} has no image {folder / (unused[0] + '.jpg')}; add it, or remove the mask"
        )
    return {id: (image, found[id]) for id, image in images.items()}


def _diagnoses(path: Path, ids: set[str]) -> dict[str, int]:
    """The class of each image of which a table knows it.

    :raises DataError: a table is damaged, contradicts itself or another one, or knows none of the images.
    """
    tables = sorted(path.glob("ISIC-2017_*_Part3_GroundTruth.csv")) + [f for f in (path / "labels.csv",) if f.exists()]
    found: dict[str, int] = {}
    first: dict[str, str] = {}
    for table in tables:
        own: set[str] = set()
        for line, row in _rows(table):
            where, id = f"line {line} of {table}", row["image_id"].strip()
            if id in own:
                raise DataError(f"{where}: {id} has a row already; remove one of them")
            own.add(id)
            told = [row[name].strip() for name in ("melanoma", "seborrheic_keratosis")]
            if told == ["", ""]:
                continue  # an image whose diagnosis is not known
            if not set(told) <= set(_YES):
                raise DataError(
                    f"{where}: melanoma and seborrheic_keratosis must be 0 or 1 each, not {told[0]!r}, {told[1]!r}"
                )
            melanoma, keratosis = (_YES[each] for each in told)
            if melanoma and keratosis:
                raise DataError(f"{where}: {id} cannot be both a melanoma and a seborrheic keratosis")
            label = 1 if melanoma else 2 if keratosis else 0
            if found.setdefault(id, label) != label:
                raise DataError(f"{where}: {id} is {CLASS_NAMES[label]}, but {CLASS_NAMES[found[id]]} in {first[id]}")
            first.setdefault(id, where)
        # The tables of 2017 are of all its images, of which a part is here; a table that knows none is another set's.
        if own and not own & ids:
            raise DataError(f"{table} has a row for none of the images in {path}; is it that of another data set?")
    return {id: label for id, label in found.items() if id in ids}


def _rows(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            wanted = ("image_id", "melanoma", "seborrheic_keratosis")
            if missing := [name for name in wanted if name not in (reader.fieldnames or ())]:
                raise DataError(f"{table} has no column {missing[0]}")
            for row in reader:
                if any(row[name] is None for name in wanted) or None in row:
                    raise DataError(f"line {reader.line_num} of {table} has more or fewer fields than the first line")
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table: {error}") from error
