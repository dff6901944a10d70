"""Lizard: colon tissue (hematoxylin and eosin, 20 times) with the class of nearly half a million nuclei.

S. Graham et al., "Lizard: a large-scale dataset for colonic nuclear instance segmentation and classification", ICCV
Workshops 2021, arXiv:2108.11195.

Layout of the folder: the three archives of its authors, unpacked beside each other::

    lizard_images1/Lizard_Images1/*.png      lizard_labels/Lizard_Labels/Labels/*.mat     one for each image
    lizard_images2/Lizard_Images2/*.png      lizard_labels/Lizard_Labels/info.csv         Filename, Source, Split

A file of labels holds ``inst_map`` (which nucleus each pixel belongs to), ``id`` and ``class``: ``class[i]`` is that of
the nucleus whose number is ``id[i]``, and not of number i + 1. The masks are classes; touching nuclei of one class
merge.

Images differ in size. They are cut into square tiles on a grid without overlap, in the middle of the image; what is
left at its edges, and images smaller than a tile, are not used. All tiles of an image are in one split, as those of a
patient are elsewhere: the image takes a patient's place. ``Split`` in info.csv gives the three parts of the authors'
cross-validation; here the first one is for training, the second one for validation and the third one for testing.
Without info.csv, the images are split by a seed.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, ImageData, Listing
from train.data.cache import ArrayCache
from train.data.instances import class_mask
from train.data.layout import existing_folder, table
from train.data.limits import refuse_large
from train.data.parts import Tile
from train.data.phantoms.drawing import drawn
from train.data.phantoms.tissue import tile
from train.data.readers import ImageFile, guarded, whole_numbers
from train.data.splits import seeded

MASK_NAMES = ("background", "neutrophil", "epithelial", "lymphocyte", "plasma", "eosinophil", "connective")
PARTS = {"1": "train", "2": "val", "3": "test"}

IMAGE_FOLDERS = ("lizard_images1/Lizard_Images1", "lizard_images2/Lizard_Images2")
LABEL_FOLDER = "lizard_labels/Lizard_Labels/Labels"
INFO = "lizard_labels/Lizard_Labels/info.csv"

# Tiles, ten of an image. They have masks and no class, so that this one word is only a part of their names.
PHANTOM_COUNTS = {"train": {"tile": 120}, "val": {"tile": 30}, "test": {"tile": 60}}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LizardLabels:
    """The class of every pixel, of a file of labels of Lizard.

    :param path: a MATLAB file with ``inst_map`` ``[H, W]``, ``id`` ``[n, 1]`` and ``class`` ``[n, 1]``.
    """

    path: Path
    libraries: ClassVar[tuple[str, ...]] = ("scipy",)

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def read(self, channels: int = 1) -> np.ndarray:
        """
        :returns: ``uint8 [H, W]``, indices of ``MASK_NAMES``.
        :raises DataError: the file is missing, damaged or contradictory.
        """
        return guarded(self.path, self._read)

    def _read(self) -> np.ndarray:
        from scipy.io import loadmat, whosmat

        wanted = ("inst_map", "id", "class")
        for name, shape, _ in whosmat(self.path):
            if name in wanted and 0 not in shape:
                refuse_large(self.path, *shape)
        content: dict[str, Any] = loadmat(self.path, variable_names=wanted)
        if missing := [name for name in wanted if name not in content]:
            raise DataError(f"{self.path} has no variable {missing[0]}; restore it from the data set")
        # MATLAB knows no vectors, and saves whole numbers as floating point unless it is told otherwise.
        instances, ids, classes = (whole_numbers(content[name]) for name in wanted)
        try:
            mask = class_mask(instances, ids.ravel(), classes.ravel())
        except ValueError as error:
            raise DataError(f"{self.path} contradicts itself: {error}; restore it from the data set") from None
        if mask.max(initial=0) >= len(MASK_NAMES):
            raise DataError(f"{self.path} has a nucleus of class {mask.max()}; there are {len(MASK_NAMES) - 1} of them")
        return mask


@DATASETS.register("lizard")
class Lizard(DataSet):
    """
    :cvar tile: side of the tiles in pixels.
    """

    name = "lizard"
    title = "Lizard"
    folder = "Lizard"
    copies = ("lizard",)
    homepage = "https://warwick.ac.uk/fac/cross_fac/tia/data/lizard/"
    tile: ClassVar[int] = 256

    def is_at(self, path: Path) -> bool:
        return any((path / each).is_dir() for each in (*IMAGE_FOLDERS, LABEL_FOLDER))

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        images = _images(path)
        tiles = {stem: _tiles(file, path / LABEL_FOLDER / f"{stem}.mat", self.tile) for stem, file in images.items()}
        if small := [stem for stem, some in tiles.items() if not some]:
            more = f", and {len(small) - 1} more" if len(small) > 1 else ""
            logger.warning("%s: smaller than a tile of %d px and not used: %s%s.", path, self.tile, small[0], more)
        if (path / INFO).exists():
            part = _parts(path / INFO, images)
            splits = {split: [e for stem in images if part[stem] == split for e in tiles[stem]] for split in SPLITS}
            for split in ("train", "test"):
                if not splits[split]:
                    raise DataError(f"{path / INFO} leaves no tile for {split}; a run needs some there")
        else:
            splits = seeded([e for some in tiles.values() for e in some], seed=split_seed, what=str(path))
        return Listing(splits, mask_names=MASK_NAMES)

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        return drawn(
            self.name,
            tile,
            counts=PHANTOM_COUNTS,
            labeled=False,
            mask_names=MASK_NAMES,
            per_patient=10,
            size=size,
            channels=channels,
            cache=cache,
            progress=progress,
        )


def _images(path: Path) -> dict[str, Path]:
    """The images by their stems, sorted by these.

    :raises DataError: a folder is missing or empty, or images and labels are not the same.
    """
    found: dict[str, Path] = {}
    for name in IMAGE_FOLDERS:
        folder = existing_folder(path / name, holds="it is one of the three archives of the data set")
        for file in folder.glob("*.png"):
            if file.stem in found:
                raise DataError(f"{file} has the name of {found[file.stem]}; remove one of them")
            found[file.stem] = file
    folder = existing_folder(path / LABEL_FOLDER, holds="it is one of the three archives of the data set")
    labels = {file.stem: file for file in folder.glob("*.mat")}
    if not found:
        raise DataError(f"{path} holds no image {IMAGE_FOLDERS[0]}/*.png")
    if missing := sorted(found.keys() - labels.keys()):
        raise DataError(f"the image {found[missing[0]]} has no labels {folder / missing[0]}.mat; restore the file")
    if unused := sorted(labels.keys() - found.keys()):
        raise DataError(
            f"the labels {labels[unused[0]]} have no image {unused[0]}.png; restore it, or remove the labels"
        )
    return dict(sorted(found.items()))


def _tiles(image: Path, labels: Path, side: int) -> list[Example]:
    """The tiles of an image, row by row.

    :raises DataError: its size cannot be read.
    """
    whole = _size(image)
    tops, lefts = (range(length % side // 2, length - side + 1, side) for length in whole)
    return [
        Example(
            id=f"{image.stem}-{row}-{column}",
            image=Tile(ImageFile(image), top, left, side, side, whole),
            mask=Tile(LizardLabels(labels), top, left, side, side, whole),
            patient=image.stem,
        )
        for row, top in enumerate(tops)
        for column, left in enumerate(lefts)
    ]


def _size(image: Path) -> tuple[int, int]:
    """Height and width of an image, of which nothing is decoded."""
    try:
        with Image.open(image) as file:
            return file.height, file.width
    except OSError as error:
        raise DataError(f"{image} cannot be read as an image ({error}); restore the file from the data set") from error


def _parts(info: Path, images: dict[str, Path]) -> dict[str, str]:
    """The split of each image.

    :raises DataError: the table and the images are not the same, or a part is unknown; the message names the line.
    """
    found: dict[str, str] = {}
    first: dict[str, int] = {}
    for line, row in table(info, required=("filename", "split")):
        where, stem = f"line {line} of {info}", row["filename"].removesuffix(".png")
        if stem not in images:
            raise DataError(f"{where}: there is no image {stem}.png; restore it, or remove the line")
        if stem in found:
            raise DataError(f"{where}: {stem} has a row already, in line {first[stem]}; remove one of them")
        if row["split"] not in PARTS:
            raise DataError(f"{where}: the split must be one of {', '.join(PARTS)}, not {row['split']!r}")
        found[stem], first[stem] = PARTS[row["split"]], line
    if missing := sorted(images.keys() - found.keys()):
        raise DataError(f"{info} has no row for the image {missing[0]}; add it, or move the image away")
    return found
