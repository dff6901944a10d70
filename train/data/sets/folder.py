"""Any images in a plain layout of folders::

    DIR/images/*      PNG, JPEG, TIFF, BMP, NPY, ...; of any size; 8 bits, 16 bits or floating point;
                      DICOM, NIfTI, MetaImage
    DIR/masks/*       optional: for each image a mask of the same stem and size, holding class indices 0, 1, 2, ...
    DIR/labels.csv    optional: a row per image; columns image and any of label, patient, split
    DIR/hq/*          optional: other images, of high quality; those in images/ are then of low quality (--task none)

In ``labels.csv`` an image is named as in ``images/``, with or without that folder and its ending. Columns may come in
any order, and others are ignored. ``label`` is the class in words, or a number. ``split`` is train, val or test;
without that column the images are split by a seed: by patient where patients are known, each label shared out alike.

The slices of a volume, the frames of a DICOM file and the pages of a TIFF are images each, called ``NAME-000``,
``NAME-001``, ... They share a row of ``labels.csv``, their mask is a volume (or a TIFF) of as many slices, and they
stay together in one split: with all others of the patient whom the table or else the DICOM header tells, or by
themselves.

Photographs are turned upright as their EXIF data say, and their masks have to fit that view. Where an image was turned
by half a circle, or is as wide as it is high, a mask of the view before cannot be told from one of the view after.

Names are compared in Unicode's composed form (NFC): the same name from a Mac may be written with other code points.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.data.base import DATASETS, SPLITS, DataError, DataSet, Example, ImageData, Listing
from train.data.formats import files_of
from train.data.frames import ScanFrame, ScanMask, opened
from train.data.layout import table
from train.data.readers import ImageFile, MaskFile, Reader, tiff_pages
from train.data.splits import refuse_shared_patients, seeded

# By these names people know that a file is an image; what is in it is found out when it is read.
ENDINGS = {
    ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".npy", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"
}  # fmt: skip
_LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what operating systems leave in folders, beside hidden files
_COLUMNS = ("image", "label", "patient", "split")
HIGH = "hq"


@DATASETS.register("folder")
class Folder(DataSet):
    name = "folder"
    title = "the data set in the folder"

    def is_at(self, path: Path) -> bool:
        return (path / "images").is_dir()

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        images = _files(path / "images", what="image")
        masks = _masks(path / "masks", images) if (path / "masks").exists() else {}
        rows = _rows(path / "labels.csv", images)
        labels = {row.label for row in rows.values() if row.label is not None}
        class_names = tuple(sorted(labels, key=_in_order(labels)))
        examples: dict[str, list[Example]] = {}
        for name, file in images.items():
            row = rows.get(name)
            label = None if row is None or row.label is None else class_names.index(row.label)
            told = None if row is None else row.patient
            examples[name] = [
                Example(each.id, each.image, each.mask, label, told or each.patient)
                for each in _frames(name, file, masks.get(name))
            ]
        _refuse_shared_ids(path, examples)
        every = [example for found in examples.values() for example in found]
        if any(row.split for row in rows.values()):
            splits = {
                split: [each for name in images if rows[name].split == split for each in examples[name]]
                for split in SPLITS
            }
            for split in ("train", "test"):
                if not splits[split]:
                    raise DataError(f"{path / 'labels.csv'} puts no image into {split}; a run needs some there")
            refuse_shared_patients(splits, what=str(path / "labels.csv"))
        else:
            splits = seeded(every, seed=split_seed, what=str(path))
        return Listing(splits, class_names, title=f"{self.name}-{path.absolute().resolve().name}")

    def completed(self, data: ImageData, path: Path, decode: Callable[[Listing], ImageData]) -> ImageData:
        if not (path / HIGH).exists():
            return data
        files = _files(path / HIGH, what="image")
        low = {name for split in SPLITS for name in getattr(data, split).names}
        guides = [
            replace(each, id=f"{HIGH}/{each.id}", patient=None)
            for name, file in files.items()
            for each in _frames(name, file, None)
        ]
        stems = {_stem(name): name for name in low}
        high_names = [each.id.removeprefix(f"{HIGH}/") for each in guides]
        if shared := [name for name in high_names if _stem(name) in stems]:
            more = f", and {len(shared) - 1} more such pairs" if len(shared) > 1 else ""
            raise DataError(
                f"{path} has {stems[_stem(shared[0])]} in images/ and {shared[0]} in {HIGH}/"
                f"{more}; images of low and of high "
                "quality must be of different scenes: rename what is, and remove what is not"
            )
        listing = Listing({"train": guides, "val": (), "test": ()}, title=data.title)
        high = decode(listing).train
        if high.images.dtype != data.train.images.dtype:
            raise DataError(
                f"{path / HIGH} holds {high.images.dtype} values and {path / 'images'} {data.train.images.dtype}: "
                "which values are equally bright cannot be known; save all images in one type"
            )
        # Of floating-point images the extremes tell what 0 and 1 stand for: those of both folders.
        pairs = list(zip(data.train.value_range, high.value_range, strict=True))
        common = (min(pairs[0]), max(pairs[1]))
        subsets: dict[str, Any] = {s: replace(getattr(data, s), value_range=common) for s in SPLITS}
        return replace(data, guides=replace(high, value_range=common), low_quality=frozenset(low), **subsets)


@dataclass(frozen=True)
class _Row:
    """A row of ``labels.csv``; ``None`` where there is no such column, or, for a patient, nothing in it."""

    line: int
    label: str | None
    patient: str | None
    split: str | None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _stem(name: str) -> str:
    """A name without its ending, if that is one of an image.

    >>> _stem("a.b.png"), _stem("a.nii.gz"), _stem("1.2.840.3")
    ('a.b', 'a', '1.2.840.3')
    """
    from train.scans import ENDINGS as SCANS

    known = sorted({*ENDINGS, *SCANS}, key=len, reverse=True)
    ending = next((each for each in known if name.lower().endswith(each)), "")
    return name.removesuffix(name[len(name) - len(ending) :])


def _frames(name: str, path: Path, mask: Path | None) -> list[Example]:
    """The images in a file, with their masks and, as far as the file says, their patient.

    :raises DataError: it cannot be opened, or its mask has not as many frames.
    """
    scan = opened(path) if _has_frames(path) else None
    frames = 1 if scan is None else scan.frames
    axis = getattr(scan, "through", None)
    masks: list[Reader | None] = [None] * frames
    if mask is not None and _has_frames(mask):
        masks = [ScanMask(mask, index, axis) for index in range(opened(mask, axis).frames)]
    elif mask is not None:
        masks = [MaskFile(mask)]
    if len(masks) != frames:
        raise DataError(f"the mask {mask} has {len(masks)} frames or slices, and its image {path} {frames}")
    if scan is None:
        return [Example(id=name, image=ImageFile(path), mask=masks[0])]
    if frames == 1:
        return [Example(id=name, image=ScanFrame(path, 0), mask=masks[0], patient=scan.patient)]
    digits = max(3, len(str(frames - 1)))
    # Slices of which nobody is told to be the patient are one patient's.
    patient = scan.patient or name
    return [
        Example(f"{_stem(name)}-{index:0{digits}d}", ScanFrame(path, index), each, patient=patient)
        for index, each in enumerate(masks)
    ]


def _has_frames(path: Path) -> bool:
    """Whether a file is read as a scan: a medical format, or a TIFF of several pages."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return path.suffix.lower() not in ENDINGS
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return len(tiff_pages(file)) > 1
    except Exception:  # a damaged file; its reader has the words for it
        return False


def _refuse_shared_ids(path: Path, examples: dict[str, list[Example]]) -> None:
    first: dict[str, str] = {}
    for name, found in examples.items():
        for example in found:
            if (other := first.setdefault(example.id, name)) != name:
                raise DataError(
                    f"{path / 'images'} has {other} and {name}, both with an image {example.id}; rename one"
                )


def _files(folder: Path, *, what: str) -> dict[str, Path]:
    """The files of a folder by their names (composed), sorted by these.

    :raises DataError: it holds something that is no image, or nothing at all, or two names that look alike.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; it has to hold the {what}s")
    from train.scans import ENDINGS as SCANS
    from train.scans import is_scan

    found: dict[str, Path] = {}
    everything = sorted(folder.iterdir())
    pixels = {file for path in everything if path.suffix.lower() == ".mhd" for file in files_of(path)[1:]}
    for path in everything:
        if path.name.startswith(".") or path.name.lower() in _LITTER:
            continue
        if path.is_dir():
            raise DataError(
                f"{folder} holds a folder, {path.name}; put all {what}s into {folder.name}/ itself, and what the "
                "folders tell about them into labels.csv (columns image, label, patient, split)"
            )
        if path in pixels:
            continue
        if path.suffix.lower() not in ENDINGS and not is_scan(path):
            raise DataError(
                f"{path} is no {what} by its ending ({path.suffix or 'none'}); convert it to one of "
                f"{', '.join(sorted({*ENDINGS, *SCANS}))}, or move it away"
            )
        name = _composed(path.name)
        if name in found:
            raise DataError(
                f"{folder} holds two files called {name}, one written with composed letters, one with separate "
                "accents; rename one"
            )
        found[name] = path
    if not found:
        raise DataError(f"{folder} holds no {what}")
    return dict(sorted(found.items()))


def _masks(folder: Path, images: dict[str, Path]) -> dict[str, Path]:
    """The mask of each image, by the image's name.

    :raises DataError: not every image has exactly one, or a mask has no image; the message names it.
    """
    by_stem: dict[str, Path] = {}
    for name, path in _files(folder, what="mask").items():
        stem = _stem(name)
        if stem in by_stem:
            raise DataError(f"{folder} holds two masks for {stem}: {by_stem[stem].name} and {path.name}; remove one")
        by_stem[stem] = path
    masks: dict[str, Path] = {}
    for name in images:
        stem = _stem(name)
        if stem not in by_stem:
            begin = stem.casefold()
            near = next((path.name for other, path in by_stem.items() if other.casefold().startswith(begin)), None)
            hint = "add it" if near is None else f"rename {near}, if that is it"
            raise DataError(f"the image {name} has no mask {stem}.* in {folder}; {hint}, or move the folder away")
        masks[name] = by_stem[stem]
    stems = Counter(_stem(name) for name in images)
    if unused := [path for stem, path in by_stem.items() if stem not in stems]:
        raise DataError(
            f"the mask {unused[0]} has no image {_stem(unused[0].name)}.* beside it; remove it, or add the image"
        )
    if twice := [stem for stem, number in stems.items() if number > 1]:
        raise DataError(f"{twice[0]} is the stem of {stems[twice[0]]} images, so whose the mask is cannot be known")
    return masks


def _rows(path: Path, images: dict[str, Path]) -> dict[str, _Row]:
    """The rows of ``labels.csv`` by the image's name; empty where there is no such file.

    :raises DataError: the table does not fit the images or itself; the message has the number of the line.
    """
    if not path.exists():
        return {}
    by_stem: dict[str, list[str]] = {}
    for name in images:
        by_stem.setdefault(_stem(name), []).append(name)
    rows: dict[str, _Row] = {}
    for line, values in table(path, required=_COLUMNS[:1], optional=_COLUMNS[1:]):
        where = f"line {line} of {path}"
        given = _composed(values["image"]).removeprefix("images/")
        candidates = [given] if given in images else by_stem.get(given, [])
        if len(candidates) != 1:
            which = f"{', '.join(candidates)} could be meant" if candidates else f"{path.parent / 'images'} has none"
            raise DataError(f"{where}: which image is {given!r}? {which}")
        if (name := candidates[0]) in rows:
            raise DataError(f"{where}: {given!r} has a row already, in line {rows[name].line}; remove one of them")
        for column in ("label", "split"):
            if values.get(column) == "":
                raise DataError(f"{where}: {given!r} has no {column}; fill it in, or leave out the column or the image")
        split = values["split"].lower() if "split" in values else None
        if split is not None and split not in SPLITS:
            raise DataError(f"{where}: the split must be one of {', '.join(SPLITS)}, not {values['split']!r}")
        rows[name] = _Row(line, values.get("label"), values.get("patient") or None, split)
    if missing := [name for name in images if name not in rows]:
        more = f" (nor have {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise DataError(f"{path} has no row for the image {missing[0]}{more}; add it, or move the image away")
    return rows


def _in_order(labels: set[str]) -> Callable[[str], Any]:
    """How labels are sorted: as numbers, if all of them are whole numbers (2 before 10), else as text."""
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return lambda label: (int(label), label)
    return str
