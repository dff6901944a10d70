"""What a data set is: the types every loader returns, and the errors every loader raises."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from models.registry import Registry
from train.data.cache import ArrayCache
from train.errors import RunError

if TYPE_CHECKING:
    import torch

    from train.data.readers import Reader

SPLITS = ("train", "val", "test")
UNKNOWN = -1
"""The label of an image whose class is not known."""
DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))


class DataError(RunError):
    """Something about the data that the user can put right; the message names the culprit and what to do."""


class DataUnavailableError(DataError):
    """The data set is not on this machine and could not be fetched (``source="auto"`` goes on with phantoms)."""


class Ragged(Sequence[np.ndarray]):
    """Arrays of different shapes in one flat array, so that they can be memory-mapped as one file.

    :param flat: ``[total]``: one array after the other, each in C order.
    :param shapes: ``int64 [N, D]``: the shape of each.
    :raises ValueError: the shapes need more or less than there is.
    """

    def __init__(self, flat: np.ndarray, shapes: np.ndarray) -> None:
        self.flat = flat
        self.shapes = shapes
        self.ends = np.cumsum(shapes.prod(axis=1, dtype=np.int64))
        if flat.ndim != 1 or shapes.ndim != 2 or (self.ends[-1] if len(shapes) else 0) != len(flat):
            raise ValueError(f"shapes {shapes.tolist()} do not describe {list(flat.shape)} numbers")

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], *, dtype: np.dtype, ndim: int) -> Ragged:
        """Copies arrays of ``ndim`` dimensions into one."""
        shapes = np.array([array.shape for array in arrays], np.int64).reshape(len(arrays), ndim)
        flat = np.concatenate([array.ravel() for array in arrays]) if arrays else np.empty(0, dtype)
        return cls(flat.astype(dtype, copy=False), shapes)

    @property
    def dtype(self) -> np.dtype:
        return self.flat.dtype

    def stacked(self) -> np.ndarray | Ragged:
        """The arrays as one, ``[N, ...]``, without a copy, where they all have one shape."""
        if not len(self) or (self.shapes != self.shapes[0]).any():
            return self
        return self.flat.reshape(len(self), *self.shapes[0])

    def take(self, index: np.ndarray) -> Ragged:
        """The arrays of some places (a copy)."""
        return Ragged.of([self[int(i)] for i in index], dtype=self.dtype, ndim=self.shapes.shape[1])

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: Any) -> Any:
        """A view of one array. (Several are had with :meth:`take`.)"""
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"there are {len(self)} arrays, and no number {i}")
        i %= len(self)
        return self.flat[self.ends[i - 1] if i else 0 : self.ends[i]].reshape(self.shapes[i])


Arrays = np.ndarray | Ragged
"""N arrays of equal shapes (``[N, ...]``), or of different ones."""


@dataclass(frozen=True)
class Subset:
    """One split of a data set, decoded.

    :param images: ``uint8``, ``uint16`` or ``float32``, ``[N, H, W, C]``, or N images of different sizes; often a
        read-only memory map of the cache. In the units of the files: :meth:`image` and :meth:`tensor` are in [0, 1].
    :param labels: ``int64 [N]`` class indices, or :data:`UNKNOWN` where an image's class is not known: losses and
        scores ignore these images. ``None`` where that is so of all of them.
    :param masks: ``uint8 [N, H, W]`` class index of each pixel, or N masks of the images' sizes, or ``None``.
    :param names: a stable identifier per image (its official file name); it seeds the image's degradation.
    :param patients: whose each image is, or ``None`` where that is not known.
    :param value_range: what 0 and 1 stand for in the units of the files. By default (0, 255) for 8 bits, (0, 65535) for
        16 bits, and (0, 1) for floating point.
    :raises ValueError: a shape, dtype or number is not as above.
    """

    images: Arrays
    labels: np.ndarray | None
    masks: Arrays | None
    names: tuple[str, ...]
    patients: tuple[str, ...] | None = None
    value_range: tuple[float, float] = None  # type: ignore[assignment]  # never None once it is made

    def __post_init__(self) -> None:
        n = len(self.names)
        if self.value_range is None:
            top = float(np.iinfo(self.images.dtype).max) if self.images.dtype.kind == "u" else 1.0
            object.__setattr__(self, "value_range", (0.0, top))
        images, labels, masks = self.images, self.labels, self.masks
        if images.dtype not in DTYPES or _ndim(images) != 4 or len(images) != n:
            raise ValueError(
                f"images must be {', '.join(map(str, DTYPES))} [{n}, H, W, C], not {images.dtype} {_shape(images)}"
            )
        if labels is not None and (labels.dtype != np.int64 or labels.shape != (n,)):
            raise ValueError(f"labels must be int64 [{n}], not {labels.dtype} {list(labels.shape)}")
        if labels is not None and n and labels.min() < UNKNOWN:
            raise ValueError(f"labels must be class indices, or {UNKNOWN} where there is none, not {labels.min()}")
        if masks is not None and (masks.dtype != np.uint8 or _sides(masks) != _sides(images)):
            raise ValueError(
                f"masks must be uint8 and of the size of their images {_shape(images)}, "
                f"not {masks.dtype} {_shape(masks)}"
            )
        if self.patients is not None and len(self.patients) != n:
            raise ValueError(f"{n} images need as many patients, not {len(self.patients)}")
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"value_range must rise, not {self.value_range}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def size(self, i: int) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        height, width = self.images[i].shape[:2]
        return height, width

    def image(self, i: int) -> torch.Tensor:
        """One image as the networks take it: ``float32 [C, H, W]`` in [0, 1] (a copy)."""
        return self._unit(np.array(self.images[i])).permute(2, 0, 1)

    def mask(self, i: int) -> torch.Tensor:
        """Class index of each pixel: ``int64 [H, W]`` (a copy).

        :raises ValueError: the data set has no masks.
        """
        import torch

        return torch.from_numpy(self._known_masks()[i].astype(np.int64))

    def tensor(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Images as the networks take them: ``float32 [n, C, H, W]`` in [0, 1] (a copy).

        :param index: which images; all of them by default.
        :raises ValueError: they differ in size.
        """
        return self._unit(self._together(self.images, index)).permute(0, 3, 1, 2)

    def masks_tensor(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Masks: ``int64 [n, H, W]`` (a copy).

        :param index: which; all of them by default.
        :raises ValueError: they differ in size, or the data set has none.
        """
        import torch

        return torch.from_numpy(self._together(self._known_masks(), index).astype(np.int64))

    def take(self, index: Sequence[int] | np.ndarray | slice) -> Subset:
        """Some of the images with all that belongs to them."""
        places = np.arange(len(self))[index]

        def some(arrays: Arrays) -> Arrays:
            return arrays.take(places) if isinstance(arrays, Ragged) else arrays[index]

        return Subset(
            images=some(self.images),
            labels=None if self.labels is None else self.labels[places],
            masks=None if self.masks is None else some(self.masks),
            names=tuple(self.names[i] for i in places),
            patients=None if self.patients is None else tuple(self.patients[i] for i in places),
            value_range=self.value_range,
        )

    def _unit(self, pixels: np.ndarray) -> torch.Tensor:
        """Pixels (owned by the caller) as ``float32`` in [0, 1], in their order."""
        import torch

        low, high = self.value_range
        if pixels.dtype == np.uint8 and (low, high) == (0, 255):
            return torch.from_numpy(pixels).float().div_(high)
        unit = (torch.from_numpy(pixels.astype(np.float64)) - low) / (high - low)
        # A filter that resizes overshoots; a detector could not.
        return unit.clamp_(0, 1).float()

    def _together(self, arrays: Arrays, index: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        if not isinstance(arrays, Ragged):
            # Advanced indexing and np.array both copy: torch must not be handed a read-only memory map.
            return np.array(arrays[index])
        chosen = [arrays[int(i)] for i in np.arange(len(self))[index]]
        if sizes := sorted({array.shape[:2] for array in chosen})[1:]:
            raise ValueError(
                f"images of different sizes ({len(sizes) + 1} of them, {chosen[0].shape[:2]} to begin with) do not fit "
                "into one tensor; take them one by one, or load them with a size"
            )
        return np.stack(chosen)

    def _known_masks(self) -> Arrays:
        if self.masks is None:
            raise ValueError("there are no masks in this data set")
        return self.masks


def _ndim(arrays: Arrays) -> int:
    return 1 + arrays.shapes.shape[1] if isinstance(arrays, Ragged) else arrays.ndim


def _shape(arrays: Arrays) -> list[int] | str:
    """The shape in words."""
    return "of different shapes" if isinstance(arrays, Ragged) else list(arrays.shape)


def _sides(arrays: Arrays) -> list[tuple[int, ...]]:
    """Heights and widths."""
    if isinstance(arrays, Ragged):
        return [tuple(shape[:2]) for shape in arrays.shapes.tolist()]
    return [arrays.shape[1:3]] * len(arrays)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    :param name: its name on the command line (``"covidct"``).
    :param source: ``"real"``, or ``"phantom"`` for generated images.
    :param class_names: what the labels 0, 1, ... mean.
    :param folder: where real images were read from.
    :param mask_names: what the class indices 0, 1, ... of the masks mean; empty without masks.
    :param title: what tells it apart from other data of the same name, as a word for the name of a run
        (``"folder-CAMUS_512"``); ``name`` by default.
    :param guides: images of high quality for training, where the data set says which ones are; they need not be among
        those of ``train``.
    :param low_quality: names of the images that are of low quality as they are, where it says so.
    """

    name: str
    source: Literal["real", "phantom"]
    class_names: tuple[str, ...]
    train: Subset
    val: Subset
    test: Subset
    folder: Path | None = None
    mask_names: tuple[str, ...] = ()
    title: str = ""
    guides: Subset | None = None
    low_quality: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.title:
            object.__setattr__(self, "title", self.name)

    @property
    def channels(self) -> int:
        return self.train.images[0].shape[2]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_mask_classes(self) -> int:
        """0 without masks."""
        return len(self.mask_names)

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width in pixels; ``None`` where images differ."""
        sizes = {size for split in SPLITS for size in _sides(getattr(self, split).images)}
        height, width = sizes.pop() if len(sizes) == 1 else (0, 0)
        return (height, width) if height else None


@dataclass(frozen=True)
class View:
    """How images are to be seen: what a run asks of a data set.

    :param size: side of the square that each image is squeezed into, in pixels; ``None`` leaves every image as it is.
    :param channels: 1 (gray) or 3 (RGB).
    """

    size: int | None = 128
    channels: int = 1


@dataclass(frozen=True)
class Example:
    """One image and what is known of it, before anything is decoded.

    :param id: unique in the data set and stable (the official file name): it seeds the image's degradation.
    :param image: how it is read.
    :param mask: how its mask is read, of the same size, if there is one.
    :param label: index of its class, if that is known; some images of a data set may have one and others none.
    :param patient: whose it is, if that is known.
    """

    id: str
    image: Reader
    mask: Reader | None = None
    label: int | None = None
    patient: str | None = None


@dataclass(frozen=True)
class Listing:
    """A data set before anything is decoded. Either all examples have a mask, or none has.

    :param splits: the examples of each split, in their order.
    :param class_names: what the labels mean.
    :param mask_names: what the class indices of the masks mean; ``None``: they are called by their numbers.
    :param title: see :class:`ImageData`.
    """

    splits: Mapping[str, Sequence[Example]]
    class_names: tuple[str, ...] = ()
    mask_names: tuple[str, ...] | None = None
    title: str = ""


class DataSet(ABC):
    """How one data set is found, listed and, where that is possible, fetched and imitated.

    A subclass is a stateless description with :meth:`is_at` and :meth:`listing`.

    :cvar name: its name on the command line.
    :cvar title: its name in sentences.
    :cvar folder: the name of its folder inside a data root; empty where a root is the data set's folder itself.
    :cvar copies: names of folders that hold other versions of it (reduced images, say), the preferred one first.
    :cvar homepage: where a person gets it.
    :cvar holds: what a root holds, where it is the data set's folder itself.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str] = ""
    copies: ClassVar[tuple[str, ...]] = ()
    homepage: ClassVar[str] = ""
    holds: ClassVar[str] = "folder images"

    @abstractmethod
    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is this data set's folder (complete or not: :meth:`listing` names what is missing)."""

    def listing(self, path: Path, *, split_seed: int) -> Listing:
        """The examples in the data set's folder.

        :param split_seed: decides the split, where there is no official one.
        :raises DataError: anything is missing or contradictory.
        :raises OSError: a file or folder cannot be read.
        """
        raise NotImplementedError

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
        """Reads the data set from its folder.

        :raises DataError: anything is missing, damaged or contradictory.
        :raises OSError: a file or folder cannot be read.
        """
        from train.data.decoding import decoded

        def decode(listing: Listing) -> ImageData:
            return decoded(self, listing, View(size, channels), folder=path, cache=cache, progress=progress)

        return self.completed(decode(self.listing(path, split_seed=split_seed)), path, decode)

    def completed(self, data: ImageData, path: Path, decode: Callable[[Listing], ImageData]) -> ImageData:
        """The data with what else their folder tells; by default that is nothing.

        :param data: what the listing names.
        :param decode: reads what another listing names, in the same way.
        :raises DataError: what else there is is contradictory.
        """
        return data

    @property
    def has_phantoms(self) -> bool:
        return type(self).phantom is not DataSet.phantom

    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        """Generated images with the classes and the split sizes of the real data set.

        :raises DataError: there are none.
        """
        raise DataError(f"--dataset {self.name} has no phantoms; leave --source phantom out")

    def download(self, target: Path, *, progress: bool) -> None:
        """Fetches the data set into the folder ``target`` (which appears only when complete and verified).

        :raises DataUnavailableError: no network, a damaged file, no space, or no public download.
        """
        raise DataUnavailableError(f"{self.title} has no public download")


DATASETS: Registry[DataSet] = Registry("data set")
