"""From a listing to pixels, once: what is decoded is kept in the cache under a key of everything it depends on."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from train.data import readers
from train.data.base import (
    SPLITS,
    UNKNOWN,
    Arrays,
    DataError,
    DataSet,
    Example,
    ImageData,
    Listing,
    Ragged,
    Subset,
    View,
)
from train.data.cache import ArrayCache, file_sha256

_LIBRARIES = ("numpy", "pillow", "tifffile")
logger = logging.getLogger(__name__)


def decoded(
    dataset: DataSet, listing: Listing, view: View, *, folder: Path, cache: ArrayCache, progress: bool
) -> ImageData:
    """The images of a listing as a run sees them.

    :param folder: the data set's, in which all files lie.
    :raises DataError: a file is missing, damaged, or does not go with the others.
    :raises OSError: a file cannot be read.
    """
    _check(listing, dataset)
    files = sorted({file for each in _examples(listing) for reader in _readers(each) for file in reader.files})
    digests = dict(zip(files, cache.digests(folder, files), strict=True))
    _warn_of_copies(listing, digests, dataset)
    _warn_of_absent_classes(listing, folder)
    key = {
        "data set": dataset.name,
        "size": view.size,
        "channels": view.channels,
        "files": {
            split: [
                [[*_identity(each), *([file.name, digests[file]] for file in each.files)] for each in _readers(example)]
                for example in listing.splits[split]
            ]
            for split in SPLITS
        },
        **_made_by(listing),
    }
    side = "native" if view.size is None else f"{view.size}px"
    arrays = cache.arrays(
        f"{dataset.name}-{side}-{view.channels}ch",
        key,
        lambda: _build(listing, view, what=f"Decoding {dataset.title}", progress=progress),
    )
    low, high, mask_classes = arrays["facts"].tolist()
    subsets: dict[str, Any] = {split: _subset(listing.splits[split], split, arrays, (low, high)) for split in SPLITS}
    mask_names = tuple(map(str, range(int(mask_classes)))) if listing.mask_names is None else listing.mask_names
    if len(mask_names) < mask_classes:
        raise DataError(f"the masks of {dataset.title} have {mask_classes:.0f} classes, not {len(mask_names)}")
    return ImageData(
        name=dataset.name,
        source="real",
        class_names=listing.class_names,
        folder=folder,
        mask_names=mask_names if mask_classes else (),
        title=listing.title,
        **subsets,
    )


def _examples(listing: Listing) -> list[Example]:
    return [example for split in SPLITS for example in listing.splits[split]]


def _readers(example: Example) -> list[readers.Reader]:
    return [example.image] if example.mask is None else [example.image, example.mask]


def _check(listing: Listing, dataset: DataSet) -> None:
    """
    :raises ValueError: the listing contradicts itself, which is an error of the data set's file and not of its data.
    """
    examples = _examples(listing)
    if len({example.id for example in examples}) < len(examples):
        raise ValueError(f"two images of {dataset.title} have the same id")
    masks = [example.mask for example in examples]
    if None in masks and any(each is not None for each in masks):
        raise ValueError(f"some images of {dataset.title} have a mask, and others have none")
    if any(example.label is not None and not 0 <= example.label < len(listing.class_names) for example in examples):
        raise ValueError(f"a label of {dataset.title} has no name")


def _warn_of_copies(listing: Listing, digests: Mapping[Path, str], dataset: DataSet) -> None:
    """A network is not tested on images that it has been trained on without a word."""
    split_of: dict[tuple[str, ...], tuple[str, str]] = {}
    copies = []
    for split in SPLITS:
        for example in listing.splits[split]:
            content = (*_identity(example.image), *(digests[file] for file in example.image.files))
            where, other = split_of.setdefault(content, (split, example.id))
            if where != split:
                copies.append(f"{other} in {where} and {example.id} in {split}")
    if copies:
        more = f", and {len(copies) - 1} more" if len(copies) > 1 else ""
        logger.warning("%s has the same image in two splits: %s%s.", dataset.title, copies[0], more)


def _warn_of_absent_classes(listing: Listing, folder: Path) -> None:
    """Nobody is tested on a class that was never trained, or the other way round, without a word."""
    for split in ("train", "test"):
        seen = {example.label for example in listing.splits[split]}
        absent = [name for label, name in enumerate(listing.class_names) if label not in seen]
        # A split of which nothing is known, like the official test images of ISIC 2018, has no labels at all.
        if absent and seen != {None}:
            logger.warning("%s: no image in %s has the label %s.", folder, split, ", ".join(absent))


def _identity(reader: readers.Reader) -> list[str]:
    """What a reader is besides its files, which may move: its type, and which part of a file it reads."""
    said = []
    for part in _chain(reader):
        own = [value for value in _fields(part) if not isinstance(value, Path) and not dataclasses.is_dataclass(value)]
        said += [type(part).__name__, *map(repr, own)]
    return said


def _chain(reader: Any) -> Iterator[Any]:
    """A reader, and those that it reads through."""
    yield reader
    for value in _fields(reader):
        if dataclasses.is_dataclass(value):
            yield from _chain(value)


def _fields(reader: Any) -> list[Any]:
    fields: Any = dataclasses.fields(reader) if dataclasses.is_dataclass(reader) else ()
    return [getattr(reader, field.name) for field in fields]


def _made_by(listing: Listing) -> dict[str, list[str | None]]:
    """What else decides the pixels: the code of the readers, and the libraries that they decode with."""
    parts = [part for example in _examples(listing) for reader in _readers(example) for part in _chain(reader)]
    code = {path for part in parts for path in getattr(part, "code", ())}
    code |= {Path(__file__), Path(readers.__file__), *(Path(inspect.getfile(kind)) for kind in set(map(type, parts)))}
    libraries = sorted({*_LIBRARIES, *(library for part in parts for library in getattr(part, "libraries", ()))})
    return {
        "code": [file_sha256(path) for path in sorted(code)],
        "libraries": [_version(each) for each in libraries],
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # the reader says so, in words that help
        return None


def _subset(examples: Any, split: str, arrays: Mapping[str, np.ndarray], value_range: tuple[float, float]) -> Subset:
    def stored(kind: str) -> Arrays | None:
        if (found := arrays.get(f"{split}-{kind}")) is None:
            return None
        shapes = arrays.get(f"{split}-{kind}-shapes")
        return found if shapes is None else Ragged(found, shapes).stacked()

    images = stored("images")
    assert images is not None
    labels = np.array([UNKNOWN if example.label is None else example.label for example in examples], np.int64)
    known = any(example.patient is not None for example in examples)
    # An image of which no patient is known is counted as the only one of its own.
    patients = tuple(example.id if example.patient is None else example.patient for example in examples)
    return Subset(
        images=images,
        labels=labels if (labels != UNKNOWN).any() else None,
        masks=stored("masks"),
        names=tuple(example.id for example in examples),
        patients=patients if known else None,
        value_range=value_range,
    )


def _build(listing: Listing, view: View, *, what: str, progress: bool) -> dict[str, np.ndarray]:
    """All arrays of a cache entry.

    :returns: per split, images and masks, either squares ``[N, S, S, ...]`` or flat with the shape of each; and the
        facts: the values that become 0 and 1, and the number of mask classes (0 without masks).
    """
    examples = _examples(listing)

    def work(example: Example) -> tuple[np.ndarray, np.ndarray | None, np.dtype, float, float, np.ndarray]:
        pixels = example.image.read(view.channels)
        low, high = float(pixels.min()), float(pixels.max())
        mask, values = None, np.zeros(256, bool)
        if example.mask is not None:
            mask = example.mask.read(1)
            if mask.shape != pixels.shape[:2]:
                raise DataError(
                    f"the mask {example.mask.files[0]} has {mask.shape[0]} x {mask.shape[1]} pixels (height x width), "
                    f"its image {pixels.shape[0]} x {pixels.shape[1]}; they must be of one size"
                )
            values[np.unique(mask)] = True
            if view.size is not None:
                mask = readers.resized_mask(mask, view.size)
        seen = pixels if view.size is None else readers.resized(pixels, view.size)
        return seen, mask, pixels.dtype, low, high, values

    images, masks = ({split: _Pile() for split in SPLITS} for _ in range(2))
    dtypes, extremes, all_values = [], [], []
    places = [split for split in SPLITS for _ in listing.splits[split]]
    with readers.in_parallel(work, examples, total=len(examples), what=what, progress=progress) as results:
        for split, example, (seen, mask, dtype, low, high, values) in zip(places, examples, results, strict=True):
            dtypes.append(dtype)
            if dtype != dtypes[0]:
                raise DataError(
                    f"{example.image.files[0]} holds {dtype} values and {examples[0].image.files[0]} {dtypes[0]}: "
                    "which values are equally bright cannot be known; save all images in one type"
                )
            extremes += [low, high]
            all_values.append(values)
            images[split].add(seen)
            if mask is not None:
                masks[split].add(mask)

    mask_classes, divisor = 0, 1
    if any(example.mask is not None for example in examples):
        mask_classes, divisor = _class_indices(examples, all_values)
    square = None if view.size is None else (view.size, view.size)
    arrays: dict[str, np.ndarray] = {}
    for split in SPLITS:
        arrays |= images[split].arrays(f"{split}-images", dtypes[0], square, (view.channels,))
        if mask_classes:
            found = masks[split].arrays(f"{split}-masks", np.dtype(np.uint8), square, ())
            found[f"{split}-masks"] //= divisor
            arrays |= found
    arrays["facts"] = np.array(
        [*readers.value_range(dtypes[0], min(extremes), max(extremes)), mask_classes], np.float64
    )
    return arrays


class _Pile:
    """Arrays one after the other in one growing piece of memory: a list of them would have to be copied in the end."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.shapes: list[tuple[int, ...]] = []

    def add(self, array: np.ndarray) -> None:
        self.content += array.tobytes()
        self.shapes.append(array.shape)

    def arrays(
        self, name: str, dtype: np.dtype, square: tuple[int, int] | None, rest: tuple[int, ...]
    ) -> dict[str, np.ndarray]:
        """What has been added, without a copy.

        :param square: height and width that all of them have; ``None``: each has its own.
        :param rest: their other dimensions.
        :returns: ``name``: ``[N, height, width, *rest]``, or flat with ``name-shapes``: ``int64 [N, 2 + len(rest)]``.
        """
        flat = np.frombuffer(self.content, dtype) if self.content else np.empty(0, dtype)
        if square is not None:
            return {name: flat.reshape(len(self.shapes), *square, *rest)}
        return {name: flat, f"{name}-shapes": np.array(self.shapes, np.int64).reshape(-1, 2 + len(rest))}


def _class_indices(examples: list[Example], values: list[np.ndarray]) -> tuple[int, int]:
    try:
        return readers.class_indices(np.any(values, axis=0))
    except ValueError as error:
        large = next(i for i, each in enumerate(values) if each[readers.MOST_CLASSES :].any())
        mask = examples[large].mask
        assert mask is not None
        raise DataError(f"the mask {mask.files[0]} is no index image: {error}") from None
