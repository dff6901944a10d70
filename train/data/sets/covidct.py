"""COVID-CT: 349 CT images with and 397 without findings of COVID-19, in their official split.

X. Yang, X. He, J. Zhao, Y. Zhang, S. Zhang, P. Xie, "COVID-CT-Dataset: A CT Scan Dataset about COVID-19",
arXiv:2003.13865 (2020).

Layout of the folder, as its authors publish it (the two image folders are zip files there)::

    Images-processed/CT_COVID/*      Data-split/COVID/{train,val,test}CT_COVID.txt
    Images-processed/CT_NonCOVID/*   Data-split/NonCOVID/{train,val,test}CT_NonCOVID.txt
"""

from __future__ import annotations

from pathlib import Path

from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, ImageData, Listing
from train.data.cache import ArrayCache
from train.data.download import Remote, download, read_manifest
from train.data.layout import existing_folder, lines
from train.data.phantoms import chest_ct
from train.data.readers import ImageFile

CLASS_NAMES = ("NonCOVID", "COVID")

# Images per split: what the phantoms imitate. The real split is whatever the list files say.
PHANTOM_COUNTS = {
    "train": {"NonCOVID": 234, "COVID": 191},
    "val": {"NonCOVID": 58, "COVID": 60},
    "test": {"NonCOVID": 105, "COVID": 98},
}

BASE_URL = "https://raw.githubusercontent.com/UCSD-AI4H/COVID-CT/master/"

# The archives carry no published checksum, and zip files of equal content differ from one packing to the next. What is
# verified instead is what matters: the length and SHA-256 of every image and list file that comes out of them, against
# this list, which was taken from the official files.
MANIFEST = Path(__file__).with_name("covidct_manifest.txt")


def list_file(split: str, class_name: str) -> str:
    """Path of a list file, relative to the data set's folder."""
    return f"Data-split/{class_name}/{split}CT_{class_name}.txt"


def image_folder(class_name: str) -> str:
    """Path of a class's images, relative to the data set's folder."""
    return f"Images-processed/CT_{class_name}"


@DATASETS.register("covidct")
class CovidCT(DataSet):
    name = "covidct"
    title = "COVID-CT"
    folder = "COVID-CT"
    homepage = "https://github.com/UCSD-AI4H/COVID-CT"

    def is_at(self, path: Path) -> bool:
        return (path / "Images-processed").is_dir() or (path / "Data-split").is_dir()

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        files = listed_images(path)
        return Listing(
            splits={
                split: [
                    Example(id=file.name, image=ImageFile(file), label=label)
                    for label, class_name in enumerate(CLASS_NAMES)
                    for file in files[split][class_name]
                ]
                for split in SPLITS
            },
            class_names=CLASS_NAMES,
        )

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        return chest_ct.chest_ct(
            self.name,
            counts=PHANTOM_COUNTS,
            class_names=CLASS_NAMES,
            size=size,
            channels=channels,
            cache=cache,
            progress=progress,
        )

    def download(self, target: Path, *, progress: bool) -> None:
        remote = Remote(
            base_url=BASE_URL,
            files=[list_file(split, class_name) for split in SPLITS for class_name in CLASS_NAMES],
            archives={f"{image_folder(class_name)}.zip": image_folder(class_name) for class_name in CLASS_NAMES},
            manifest=read_manifest(MANIFEST),
        )
        download(remote, target, progress=progress)


def listed_images(path: Path) -> dict[str, dict[str, list[Path]]]:
    """Reads the six list files and checks that they and the images agree.

    :param path: the data set's folder.
    :returns: split -> class name -> image files, in the order of the list.
    :raises DataError: a list is missing, empty or unreadable; an image is missing or listed twice.
    """
    files: dict[str, dict[str, list[Path]]] = {}
    first_seen: dict[Path, str] = {}
    for split in SPLITS:
        files[split] = {}
        for class_name in CLASS_NAMES:
            names = _read_list(path / list_file(split, class_name))
            folder = existing_folder(path / image_folder(class_name), holds="the data set has its images in it")
            for number, name in names:
                where = f"line {number} of {path / list_file(split, class_name)}"
                image = folder / name
                if image.name != name:
                    raise DataError(f"{where} must be a plain file name, not {name!r}")
                if image in first_seen:
                    raise DataError(f"{image} is listed twice: {first_seen[image]}, and {where}; remove one of them")
                if not image.is_file():
                    raise DataError(f"{image} is missing ({where} lists it); restore the file or remove the line")
                first_seen[image] = where
            files[split][class_name] = [folder / name for _, name in names]
    return files


def _read_list(path: Path) -> list[tuple[int, str]]:
    """The non-empty lines of a list file, with their numbers."""
    found = lines(path, what="the list file")
    if not found:
        raise DataError(f"the list file {path} names no image, so its split would have a single class")
    return found
