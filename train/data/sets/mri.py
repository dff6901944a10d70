"""MR volumes in a folder, as slices: NIfTI (.nii, .nii.gz), or HDF5 in the layout of fastMRI (.h5)::

    DIR/**/*.nii.gz, *.nii, *.h5    at any depth; hidden files and folders are left alone
    DIR/volumes.csv                 optional: which of them are read; a row per volume, columns volume (the path inside
                                    DIR) and any of patient, split (train, val, test), axis (0, 1, 2), every

*Patients*: a volume is one patient's of its own, unless it lies in a folder, or has a name, that begins with
``sub-...`` (BIDS) or ``IXI`` and digits (IXI): then all volumes of that name are one patient's. fastMRI's files tell
theirs (``patient_id``), and the column ``patient`` has the last word. Splits are by patient, and made by a seed where
there is no column ``split``.

*Fewer than three patients* cannot be split by patient. Then every volume is cut into blocks of neighboring slices, for
training, validation and testing, with a gap between two of them, and the data are called ``...-same-patients`` in the
names of runs. Such a run says how well a network does elsewhere in a head that it has seen, not in another one.

*Slices*: see :mod:`train.data.volumes` for which they are and how bright. Empty ones, in which fewer than a tenth of
the pixels are brighter than a tenth of white, are left out. ``every`` n takes each n-th slice of the others.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.data import volumes
from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, ImageData, Listing, View
from train.data.cache import ArrayCache, file_sha256
from train.data.layout import table
from train.data.phantoms.drawing import drawn
from train.data.phantoms.head import head
from train.data.splits import SHARES, refuse_shared_patients, seeded
from train.data.volumes import Facts, VolumeSlice, library_of, patient_of, stem_of

TABLE = "volumes.csv"
GAP = 0.05
"""Share of a volume's slices that lie between two blocks; at least one does."""

_SUBJECT = re.compile(r"(sub-[A-Za-z0-9]+|IXI\d+)(?![A-Za-z0-9])")

# Ten slices of a head; there are no classes, so that this one word is only a part of their names.
PHANTOM_COUNTS = {"train": {"slice": 120}, "val": {"slice": 30}, "test": {"slice": 60}}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Volume:
    """A volume, before it is looked through.

    :param name: its path inside the data set's folder, with slashes.
    :param split: what the table says; ``None`` where it does not.
    :param axis: as ``split``.
    :param every: takes each so many-th slice.
    """

    name: str
    path: Path
    patient: str
    split: str | None = None
    axis: int | None = None
    every: int = 1


@DATASETS.register("mri")
class MRI(DataSet):
    name = "mri"
    title = "the MR volumes in the folder"
    holds = "volume (*.nii, *.nii.gz, *.h5)"

    def is_at(self, path: Path) -> bool:
        return next(_files(path), None) is not None

    def read(
        self,
        path: Path,
        *,
        size: int | None,
        channels: int,
        cache: ArrayCache,
        progress: bool,
        split_seed: int = 0,
    ) -> ImageData:
        from train.data.decoding import decoded

        listing = _listing(path, split_seed=split_seed, cache=cache, progress=progress)
        return decoded(self, listing, View(size, channels), folder=path, cache=cache, progress=progress)

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        return _listing(path, split_seed=split_seed, cache=ArrayCache(None), progress=False)

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        return drawn(
            self.name,
            head,
            counts=PHANTOM_COUNTS,
            labeled=False,
            per_patient=10,
            size=size,
            channels=channels,
            cache=cache,
            progress=progress,
        )


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if library_of(path) is not None and not hidden and path.is_file():
            yield path


def _listing(path: Path, *, split_seed: int, cache: ArrayCache, progress: bool) -> Listing:
    """The slices of all volumes, by split.

    :param cache: keeps what was seen when the volumes were looked through, which takes seconds for each.
    """
    found = _volumes(path)
    known = _look(path, found, cache, progress)
    slices: dict[str, list[Example]] = {}
    for volume, about in zip(found, known, strict=True):
        kept = about.kept[:: volume.every]
        if not kept:
            raise DataError(f"{volume.path} has {about.slices} slice(s), and all of them are empty; move it away")
        slices[volume.name] = [
            Example(
                id=f"{volume.name}-{index:03d}",
                image=VolumeSlice(volume.path, volume.axis, index, about.low, about.white),
                patient=volume.patient,
            )
            for index in kept
        ]
    if empty := sum(about.slices - len(about.kept) for about in known):
        total = sum(about.slices for about in known)
        logger.warning("%s: %d of %d slices are empty and left out.", path, empty, total)
    title = f"mri-{path.absolute().resolve().name}"
    if any(volume.split for volume in found):
        splits = {
            split: [each for volume in found if volume.split == split for each in slices[volume.name]]
            for split in SPLITS
        }
        for split in ("train", "test"):
            if not splits[split]:
                raise DataError(f"{path / TABLE} puts no volume into {split}; a run needs some there")
        refuse_shared_patients(splits, what=str(path / TABLE))
        return Listing(splits, title=title)
    patients = {volume.patient for volume in found}
    if len(patients) >= len(SPLITS):
        return Listing(
            seeded([e for some in slices.values() for e in some], seed=split_seed, what=str(path)), title=title
        )
    logger.warning(
        "%s has %d patient(s), who cannot be split: training, validation and test images are blocks of slices of the "
        "SAME volumes. The scores say nothing about another patient.",
        path,
        len(patients),
    )
    splits = {split: [] for split in SPLITS}
    for volume in found:
        for split, block in _blocks(volume.path, slices[volume.name]).items():
            splits[split] += block
    return Listing(splits, title=f"{title}-same-patients")


def _blocks(path: Path, slices: list[Example]) -> dict[str, list[Example]]:
    """Neighboring slices for each split, with gaps between them.

    :raises DataError: there are too few.
    """
    gap = max(1, round(GAP * len(slices)))
    left = len(slices) - 2 * gap
    if left < len(SPLITS):
        raise DataError(
            f"{path} has {len(slices)} slice(s) that are not empty, too few to train and to test with; add volumes of "
            f"other patients (three in all), or one with at least {len(SPLITS) + 2} slices"
        )
    val, test = (max(1, round(SHARES[split] * left / 10)) for split in ("val", "test"))
    train = left - val - test
    return {
        "train": slices[:train],
        "val": slices[train + gap : train + gap + val],
        "test": slices[train + 2 * gap + val :],
    }


def _look(folder: Path, found: list[_Volume], cache: ArrayCache, progress: bool) -> list[Facts]:
    """Looks through all volumes, or remembers what was seen.

    :raises DataError: one cannot be read.
    """
    from train.data.readers import in_parallel

    def build() -> dict[str, np.ndarray]:
        with in_parallel(
            lambda each: volumes.facts(each.path, each.axis),
            found,
            total=len(found),
            what="Looking through MR volumes",
            progress=progress,
        ) as seen:
            return {
                str(place): np.array([about.low, about.white, about.slices, *about.kept], np.float64)
                for place, about in enumerate(seen)
            }

    digests = cache.digests(folder, [volume.path for volume in found])
    key = {
        "volumes": [[digest, volume.axis] for volume, digest in zip(found, digests, strict=True)],
        "code": file_sha256(Path(volumes.__file__)),
    }
    arrays = cache.arrays("mri-volumes", key, build)
    rows = [arrays[str(place)].tolist() for place in range(len(found))]
    return [Facts(low, white, tuple(map(int, kept)), int(slices)) for low, white, slices, *kept in rows]


def _volumes(folder: Path) -> list[_Volume]:
    """The volumes that are read, by their names.

    :raises DataError: there is none, or the table does not fit them; the message names the line.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    if not paths:
        raise DataError(f"{folder} holds no volume ({', '.join(volumes.ENDINGS)})")
    file = folder / TABLE
    if not file.exists():
        return [_Volume(name, paths[name], _patient(name, paths[name])) for name in sorted(paths)]
    rows: dict[str, _Volume] = {}
    first: dict[str, int] = {}
    for line, row in table(file, required=("volume",), optional=("patient", "split", "axis", "every")):
        where, name = f"line {line} of {file}", row["volume"]
        if name not in paths:
            raise DataError(f"{where}: there is no volume {name!r} in {folder}; restore it, or remove the line")
        if name in rows:
            raise DataError(f"{where}: {name} has a row already, in line {first[name]}; remove one of them")
        if "split" in row and row["split"] not in SPLITS:
            raise DataError(f"{where}: the split must be one of {', '.join(SPLITS)}, not {row['split']!r}")
        if row.get("axis", "") not in ("", "0", "1", "2"):
            raise DataError(f"{where}: the axis must be 0, 1 or 2, not {row['axis']!r}")
        if row.get("axis") and library_of(paths[name]) != "nibabel":
            raise DataError(f"{where}: slices of fastMRI's files lie across their first axis; leave the axis empty")
        every = row.get("every") or "1"
        if not (every.isdecimal() and int(every) > 0):
            raise DataError(f"{where}: every must be a whole number of at least 1, not {every!r}")
        first[name] = line
        rows[name] = _Volume(
            name,
            paths[name],
            row.get("patient") or _patient(name, paths[name]),
            split=row.get("split"),
            axis=int(row["axis"]) if row.get("axis") else None,
            every=int(every),
        )
    if not rows:
        raise DataError(f"{file} names no volume; add some, or remove it to read all of them")
    if left_out := len(paths) - len(rows):
        logger.warning("%s does not name %d of the %d volumes, which are left out.", file, left_out, len(paths))
    return [rows[name] for name in sorted(rows)]


def _patient(name: str, path: Path) -> str:
    """
    :param name: its path inside the data set's folder.
    :raises DataError: the file cannot be read.
    """
    if told := patient_of(path):
        return told
    for part in name.split("/"):
        if subject := _SUBJECT.match(part):
            return subject[1]
    return name[: -len(path.name)] + stem_of(path)
