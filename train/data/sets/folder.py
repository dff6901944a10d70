"""Any images in a plain layout of folders::

    DIR/images/*      PNG, JPEG, TIFF, BMP, NPY, ...; of any size; 8 bits, 16 bits or floating point
    DIR/masks/*       optional: for each image a mask of the same stem and size, holding class indices 0, 1, 2, ...
    DIR/labels.csv    optional: a row per image; columns image and any of label, patient, split
    DIR/hq/*          optional: other images, of high quality; those in images/ are then of low quality (--task none)

In ``labels.csv`` an image is named as in ``images/``, with or without that folder and its ending. Columns may come in
any order, and others are ignored. ``label`` is the class in words, or a number. ``split`` is train, val or test;
without that column the images are split by a seed: by patient where patients are known, each label shared out alike.

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
from train.data.layout import table
from train.data.readers import ImageFile, MaskFile
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
        examples = {
            id: Example(
                id=id,
                image=ImageFile(file),
                mask=None if id not in masks else MaskFile(masks[id]),
                label=None if id not in rows or rows[id].label is None else class_names.index(rows[id].label or ""),
                patient=rows[id].patient if id in rows else None,
            )
            for id, file in images.items()
        }
        if any(row.split for row in rows.values()):
            splits = {split: [examples[id] for id in images if rows[id].split == split] for split in SPLITS}
            for split in ("train", "test"):
                if not splits[split]:
                    raise DataError(f"{path / 'labels.csv'} puts no image into {split}; a run needs some there")
            refuse_shared_patients(splits, what=str(path / "labels.csv"))
        else:
            splits = seeded(list(examples.values()), seed=split_seed, what=str(path))
        return Listing(splits, class_names, title=f"{self.name}-{path.absolute().resolve().name}")

    def completed(self, data: ImageData, path: Path, decode: Callable[[Listing], ImageData]) -> ImageData:
        if not (path / HIGH).exists():
            return data
        files = _files(path / HIGH, what="image")
        low = {name for split in SPLITS for name in getattr(data, split).names}
        stems = {Path(name).stem: name for name in low}
        if shared := [name for name in files if Path(name).stem in stems]:
            more = f", and {len(shared) - 1} more such pairs" if len(shared) > 1 else ""
            raise DataError(
                f"{path} has {stems[Path(shared[0]).stem]} in images/ and {shared[0]} in {HIGH}/"
                f"{more}; images of low and of high "
                "quality must be of different scenes: rename what is, and remove what is not"
            )
        guides = [Example(id=f"{HIGH}/{name}", image=ImageFile(file)) for name, file in files.items()]
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


def _files(folder: Path, *, what: str) -> dict[str, Path]:
    """The files of a folder by their names (composed), sorted by these.

    :raises DataError: it holds something that is no image, or nothing at all, or two names that look alike.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; it has to hold the {what}s")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LITTER:
            continue
        if path.is_dir():
            raise DataError(
                f"{folder} holds a folder, {path.name}; put all {what}s into {folder.name}/ itself, and what the "
                "folders tell about them into labels.csv (columns image, label, patient, split)"
            )
        if path.suffix.lower() not in ENDINGS:
            raise DataError(
                f"{path} is no {what} by its ending ({path.suffix or 'none'}); convert it to one of "
                f"{', '.join(sorted(ENDINGS))}, or move it away"
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
        stem = Path(name).stem
        if stem in by_stem:
            raise DataError(f"{folder} holds two masks for {stem}: {by_stem[stem].name} and {path.name}; remove one")
        by_stem[stem] = path
    masks: dict[str, Path] = {}
    for name in images:
        stem = Path(name).stem
        if stem not in by_stem:
            begin = stem.casefold()
            near = next((path.name for other, path in by_stem.items() if other.casefold().startswith(begin)), None)
            hint = "add it" if near is None else f"rename {near}, if that is it"
            raise DataError(f"the image {name} has no mask {stem}.* in {folder}; {hint}, or move the folder away")
        masks[name] = by_stem[stem]
    stems = Counter(Path(name).stem for name in images)
    if unused := [path for stem, path in by_stem.items() if stem not in stems]:
        raise DataError(f"the mask {unused[0]} has no image {unused[0].stem}.* beside it; remove it, or add the image")
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
        by_stem.setdefault(Path(name).stem, []).append(name)
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
