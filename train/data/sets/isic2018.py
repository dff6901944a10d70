"""ISIC 2018 Task 1: dermoscopic images of skin lesions with the border of each lesion.

N. Codella et al., "Skin Lesion Analysis Toward Melanoma Detection 2018", arXiv:1902.03368; P. Tschandl, C. Rosendahl,
H. Kittler, "The HAM10000 dataset", Scientific Data 5, 180161 (2018). The challenge gives no diagnosis with these
images; most of them were in the challenge of 2017 (N. Codella et al., arXiv:1710.05006), whose Part 3 has one.

Layout of the folder, as the challenge publishes it::

    ISIC2018_Task1-2_Training_Input/ISIC_*.jpg
    ISIC2018_Task1_Training_GroundTruth/ISIC_*_segmentation.png      0 skin, 255 lesion
    ISIC2018_Task1-2_Validation_Input, ISIC2018_Task1_Validation_GroundTruth   } optional: the official
    ISIC2018_Task1-2_Test_Input, ISIC2018_Task1_Test_GroundTruth               } validation and test images
    ISIC-2017_*_Part3_GroundTruth.csv    optional: the official tables of 2017
    labels.csv                           optional: a table of these very images, a row for each

The tables have columns image_id, melanoma and seborrheic_keratosis, 0 or 1 each; two empty fields in ``labels.csv`` say
that the diagnosis is not known. An image that no table has a diagnosis of is of unknown label. Where the official
validation and test images are missing, the training images are split by a seed. Which images are of one patient is not
published.
"""

from __future__ import annotations

from pathlib import Path

from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, ImageData, Listing
from train.data.cache import ArrayCache
from train.data.layout import existing_folder, table
from train.data.phantoms.drawing import drawn
from train.data.phantoms.skin import lesion
from train.data.readers import ImageFile, MaskFile
from train.data.splits import seeded

CLASS_NAMES = ("other", "melanoma", "seborrheic keratosis")
MASK_NAMES = ("skin", "lesion")
MASK_VALUES = (0, 255)

# Fewer than there really are, in about their shares, so that they are drawn in seconds.
PHANTOM_COUNTS = {
    "train": {"other": 84, "melanoma": 24, "seborrheic keratosis": 12},
    "val": {"other": 21, "melanoma": 6, "seborrheic keratosis": 3},
    "test": {"other": 42, "melanoma": 12, "seborrheic keratosis": 6},
}

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
                Example(id=id, image=ImageFile(image), mask=MaskFile(mask, MASK_VALUES), label=labels.get(id))
                for id, (image, mask) in found.items()
            ]
            for split, found in files.items()
        }
        if len(files) == 1:
            examples = seeded(examples["train"], seed=split_seed, what=str(path))
        return Listing(examples, CLASS_NAMES if labels else (), MASK_NAMES)

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        return drawn(
            self.name,
            lesion,
            counts=PHANTOM_COUNTS,
            mask_names=MASK_NAMES,
            size=size,
            channels=channels,
            cache=cache,
            progress=progress,
        )


def _pairs(path: Path, split: str) -> dict[str, tuple[Path, Path]]:
    """The images of a split with their masks, by their ids, in the order of these.

    :raises DataError: an image has no mask, or a mask no image.
    """
    folder = path / image_folder(split)
    masks = existing_folder(path / mask_folder(split), holds=f"the masks of {folder.name} belong there")
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

    :param ids: of the images.
    :raises DataError: a table is damaged, contradicts itself or another one, or is not that of these images.
    """
    found: dict[str, tuple[int, str]] = {}
    for file in (*sorted(path.glob("ISIC-2017_*_Part3_GroundTruth.csv")), *path.glob("labels.csv")):
        lines: dict[str, int] = {}
        for line, row in table(file, required=("image_id", "melanoma", "seborrheic_keratosis")):
            where, id = f"line {line} of {file}", row["image_id"]
            if id in lines:
                raise DataError(f"{where}: {id} has a row already, in line {lines[id]}; remove one of them")
            lines[id] = line
            if (label := _label(row, where)) is None:
                continue
            known, before = found.setdefault(id, (label, where))
            if known != label:
                raise DataError(f"{where}: {id} is {CLASS_NAMES[label]}, but {CLASS_NAMES[known]} in {before}")
        _refuse_other_images(file, lines, ids)
    return {id: label for id, (label, _) in found.items() if id in ids}


def _label(row: dict[str, str], where: str) -> int | None:
    """
    :param row: a row of a table.
    :raises DataError: it is no diagnosis.
    """
    told = row["melanoma"], row["seborrheic_keratosis"]
    if told == ("", ""):
        return None
    if not set(told) <= set(_YES):
        raise DataError(
            f"{where}: melanoma and seborrheic_keratosis must be 0 or 1 each (or both empty, where it is not "
            f"known), not {told[0]!r}, {told[1]!r}"
        )
    melanoma, keratosis = (_YES[each] for each in told)
    if melanoma and keratosis:
        raise DataError(f"{where}: {row['image_id']} cannot be both a melanoma and a seborrheic keratosis")
    return 1 if melanoma else 2 if keratosis else 0


def _refuse_other_images(file: Path, lines: dict[str, int], ids: set[str]) -> None:
    """
    :param lines: where a table has which image.
    :raises DataError: it is a table of other images.
    """
    if file.name != "labels.csv":
        # The tables of 2017 are of all its images, of which a part is here.
        if not lines.keys() & ids:
            raise DataError(f"{file} has a row for none of the images beside it; is it that of another data set?")
        return
    if strange := [id for id in lines if id not in ids]:
        raise DataError(f"line {lines[strange[0]]} of {file}: there is no image {strange[0]}; remove the row")
    if missing := sorted(ids - lines.keys()):
        more = f" (nor for {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(
            f"{file} has no row for the image {missing[0]}{more}; add it, with empty fields where the diagnosis is not "
            "known"
        )
