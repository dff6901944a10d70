"""DRIMDB: fundus photographs of good and bad quality, and pictures that are no fundus. No two are of one scene.

U. Sevik, C. Kose, T. Berber, H. Erdol, "Identification of suitable fundus images using automated quality assessment
methods", Journal of Biomedical Optics 19(4), 046006 (2014).

Layout of the folder, as its authors publish it::

    Good/drimdb_good (*).jpg         Bad/drimdb_bad (*).jpg         Outlier/drimdb_outlier (*).jpg

The class is the quality, so that the set is unpaired by nature: with ``--task none``, bad images are enhanced, good
ones guide, and outliers are left out, as are bad images in which nothing can be recovered
(:func:`train.data.unpaired.recoverable`).

There is no official split, and which images are of one patient is not published: the images
are split by a seed. Date and time of the photograph are burnt in at the top right, often the same for several images of
a class, so that a network could learn the writing; that place is blanked in every image, also in those without writing.
Outliers (eyes, rooms, rulers) have another size at times; a few bad images are nearly white, nearly black or gray.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from train.data.base import DATASETS, DataError, DataSet, Example, ImageData, Listing
from train.data.cache import ArrayCache
from train.data.layout import existing_folder
from train.data.parts import Blanked
from train.data.phantoms.drawing import drawn
from train.data.phantoms.fundus import photograph
from train.data.readers import ImageFile
from train.data.splits import seeded
from train.data.unpaired import by_label

CLASS_NAMES = ("Good", "Bad", "Outlier")

FRAME = (570, 760)
"""Height and width of the photographs."""
WRITING = (0, 560, 32, 688)
"""Where date and time are: rows 7 to 23 and columns 573 to 683 over all images. This rectangle consists of the whole
blocks of 16 x 16 pixels around them, since JPEG spreads an edge over a block."""

# In about the shares of the real ones.
PHANTOM_COUNTS = {
    "train": {"Good": 68, "Bad": 38, "Outlier": 14},
    "val": {"Good": 16, "Bad": 10, "Outlier": 4},
    "test": {"Good": 34, "Bad": 19, "Outlier": 7},
}


@DATASETS.register("drimdb")
class DRIMDB(DataSet):
    name = "drimdb"
    title = "DRIMDB"
    folder = "DRIMDB"
    homepage = "https://doi.org/10.1117/1.JBO.19.4.046006"

    def is_at(self, path: Path) -> bool:
        return (path / "Good").is_dir() and (path / "Bad").is_dir()

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        examples = [
            Example(id=file.name, image=Blanked(ImageFile(file), WRITING, FRAME), label=label)
            for label, quality in enumerate(CLASS_NAMES)
            for file in _images(path / quality)
        ]
        return Listing(seeded(examples, seed=split_seed, what=str(path)), CLASS_NAMES)

    def completed(self, data: ImageData, path: Path, decode: Callable[[Listing], ImageData]) -> ImageData:
        return _rated(data)

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        data = drawn(
            self.name,
            photograph,
            counts=PHANTOM_COUNTS,
            size=size,
            channels=channels,
            cache=cache,
            progress=progress,
        )
        return _rated(data)


def _rated(data: ImageData) -> ImageData:
    return by_label(data, low=CLASS_NAMES.index("Bad"), high=CLASS_NAMES.index("Good"))


def _images(folder: Path) -> list[Path]:
    existing_folder(folder, holds="the data set has images in Good, Bad and Outlier")
    found = sorted(each for each in folder.iterdir() if each.suffix.lower() == ".jpg" and each.name[0] != ".")
    if not found:
        raise DataError(f"{folder} holds no image *.jpg")
    return found
