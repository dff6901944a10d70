"""CAMUS: echocardiograms of 500 patients, with the left ventricle, its muscle and the left atrium.

S. Leclerc et al., "Deep learning for segmentation using an open large-scale dataset in 2D echocardiography", IEEE
Transactions on Medical Imaging 38(9), 2198-2210 (2019).

Layout of the folder as its authors publish it today, and, on the right, as it was before::

    database_nifti/patientXXXX/                              training/patientXXXX/
        patientXXXX_{2CH,4CH}_{ED,ES}.nii.gz                     patientXXXX_{2CH,4CH}_{ED,ES}.mhd, .raw
        patientXXXX_{2CH,4CH}_{ED,ES}_gt.nii.gz                  patientXXXX_{2CH,4CH}_{ED,ES}_gt.mhd, .raw
        Info_{2CH,4CH}.cfg                                       Info_{2CH,4CH}.cfg
    database_split/subgroup_{training,validation,testing}.txt

Each patient has two views (two and four chambers), each at the end of diastole and of systole. The class of an image is
the quality of its view, which the file Info tells. Without the lists of ``database_split`` the patients are split by a
seed. Sequences are not read, nor ``testing/`` of the old layout, which has no masks.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, ImageData, Listing
from train.data.cache import ArrayCache
from train.data.formats import MedicalImage, MedicalMask
from train.data.layout import lines
from train.data.phantoms.drawing import drawn
from train.data.phantoms.heart import echo
from train.data.splits import seeded

CLASS_NAMES = ("Good", "Medium", "Poor")
MASK_NAMES = ("background", "left ventricle", "myocardium", "left atrium")
MASK_VALUES = (0, 1, 2, 3)

VIEWS = ("2CH", "4CH")
PHASES = ("ED", "ES")
SUBGROUPS = {"train": "training", "val": "validation", "test": "testing"}

_FOLDERS = {"database_nifti": ".nii.gz", "training": ".mhd"}
_PATIENT = re.compile(r"patient\d+")

# In about the shares of the real qualities.
PHANTOM_COUNTS = {
    "train": {"Good": 56, "Medium": 48, "Poor": 16},
    "val": {"Good": 12, "Medium": 12, "Poor": 6},
    "test": {"Good": 28, "Medium": 24, "Poor": 8},
}


@DATASETS.register("camus")
class CAMUS(DataSet):
    name = "camus"
    title = "CAMUS"
    folder = "CAMUS_public"
    copies = ("CAMUS", "camus")
    homepage = "https://www.creatis.insa-lyon.fr/Challenge/camus/"

    def is_at(self, path: Path) -> bool:
        return _images(path) is not None

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        found = _images(path)
        if found is None:
            raise DataError(f"{path} has no folder database_nifti or training with folders of patients in it")
        folder, ending = found
        patients = sorted(each.name for each in folder.iterdir() if _PATIENT.fullmatch(each.name) and each.is_dir())
        qualities = _qualities(folder, patients)
        examples = {
            patient: [
                _example(folder / patient, view, phase, ending, qualities.get((patient, view)))
                for view in VIEWS
                for phase in PHASES
            ]
            for patient in patients
        }
        subgroups = _subgroups(path / "database_split", patients)
        if subgroups is None:
            everyone = list(itertools.chain.from_iterable(examples.values()))
            splits = seeded(everyone, seed=split_seed, what=str(path))
        else:
            splits = {split: [e for each in members for e in examples[each]] for split, members in subgroups.items()}
        labelled = any(example.label is not None for each in splits.values() for example in each)
        return Listing(splits, CLASS_NAMES if labelled else (), MASK_NAMES)

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        return drawn(
            self.name,
            echo,
            counts=PHANTOM_COUNTS,
            mask_names=MASK_NAMES,
            per_patient=len(VIEWS) * len(PHASES),
            size=size,
            channels=channels,
            cache=cache,
            progress=progress,
        )


def _images(path: Path) -> tuple[Path, str] | None:
    """Where the folders of the patients are, and how the files in them end; ``None`` where there are none."""
    for name, ending in _FOLDERS.items():
        if any(_PATIENT.fullmatch(each.name) for each in (path / name).glob("patient*")):
            return path / name, ending
    return None


def _example(folder: Path, view: str, phase: str, ending: str, quality: int | None) -> Example:
    """
    :raises DataError: the image or its mask is missing.
    """
    id = f"{folder.name}_{view}_{phase}"
    image, mask = folder / f"{id}{ending}", folder / f"{id}_gt{ending}"
    for file, what in ((image, "image"), (mask, "mask")):
        if not file.is_file():
            raise DataError(f"the {what} {file} is missing; restore it from the data set, or move {folder} away")
    return Example(id, MedicalImage(image), MedicalMask(mask, MASK_VALUES), label=quality, patient=folder.name)


def _qualities(folder: Path, patients: list[str]) -> dict[tuple[str, str], int]:
    """The class of each patient's views; empty where no patient has a file that tells it.

    :raises DataError: some have one and others have none, or one does not tell it.
    """
    files = {(patient, view): folder / patient / f"Info_{view}.cfg" for patient in patients for view in VIEWS}
    missing = [file for file in files.values() if not file.is_file()]
    if len(missing) == len(files):
        return {}
    if missing:
        raise DataError(
            f"{missing[0]} is missing, which tells the quality of an image; restore it from the data set, or remove "
            "these files of all patients"
        )
    return {key: _quality(file) for key, file in files.items()}


def _quality(file: Path) -> int:
    told: tuple[int, str] | None = None
    for number, line in lines(file, what="the file"):
        name, _, value = (part.strip() for part in line.partition(":"))
        if name != "ImageQuality":
            continue
        where = f"line {number} of {file}"
        if told is not None:
            raise DataError(f"{where}: the ImageQuality is in line {told[0]} already; remove one of them")
        if value not in CLASS_NAMES:
            raise DataError(f"{where}: the ImageQuality must be one of {', '.join(CLASS_NAMES)}, not {value!r}")
        told = number, value
    if told is None:
        raise DataError(f"{file} has no line 'ImageQuality: ...'; restore it from the data set")
    return CLASS_NAMES.index(told[1])


def _subgroups(folder: Path, patients: list[str]) -> dict[str, list[str]] | None:
    """The patients of each split by the official lists, or ``None`` where there are no lists.

    :raises DataError: a list is missing, or they and the folders of patients do not agree; the message names the line.
    """
    if not folder.is_dir():
        return None
    first: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        file = folder / f"subgroup_{SUBGROUPS[split]}.txt"
        found[split] = []
        for number, patient in lines(file, what="the list"):
            where = f"line {number} of {file}"
            if patient not in patients:
                raise DataError(f"{where}: there is no folder of {patient!r}; restore it, or remove the line")
            if patient in first:
                raise DataError(f"{where}: {patient} is in {first[patient]} already; remove one of them")
            first[patient] = where
            found[split].append(patient)
    if left_out := [patient for patient in patients if patient not in first]:
        raise DataError(f"no list in {folder} has {left_out[0]}; add a line, or move the folder of the patient away")
    return found
