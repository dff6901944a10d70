"""What a data set is: the types every loader returns, and the errors every loader raises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from models.registry import Registry
from train.data.cache import ArrayCache
from train.errors import RunError

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "val", "test")


class DataError(RunError):
    """Something about the data that the user can put right; the message names the culprit and what to do."""


class DataUnavailableError(DataError):
    """The data set is not on this machine and could not be fetched (``source="auto"`` goes on with phantoms)."""


@dataclass(frozen=True)
class Subset:
    """One split of a data set, decoded and resized.

    :param images: ``uint8 [N, H, W, C]``; often a read-only memory map of the cache.
    :param labels: ``int64 [N]`` class indices, or ``None``.
    :param masks: ``uint8 [N, H, W]`` class index of each pixel, or ``None``.
    :param names: a stable identifier per image (its official file name); it seeds the image's degradation.
    :raises ValueError: a shape or dtype is not as above.
    """

    images: np.ndarray
    labels: np.ndarray | None
    masks: np.ndarray | None
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.names)
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or len(self.images) != n:
            raise ValueError(f"images must be uint8 [{n}, H, W, C], not {self.images.dtype} {list(self.images.shape)}")
        if self.labels is not None and (self.labels.dtype != np.int64 or self.labels.shape != (n,)):
            raise ValueError(f"labels must be int64 [{n}], not {self.labels.dtype} {list(self.labels.shape)}")
        if self.masks is not None and (self.masks.dtype != np.uint8 or self.masks.shape != self.images.shape[:3]):
            raise ValueError(
                f"masks must be uint8 {list(self.images.shape[:3])}, not {self.masks.dtype} {list(self.masks.shape)}"
            )

    def __len__(self) -> int:
        return len(self.names)

    def tensor(self, index: Sequence[int] | np.ndarray | slice = slice(None)) -> torch.Tensor:
        """Images as the networks take them: ``float32 [n, C, H, W]`` in [0, 1] (a copy).

        :param index: which images; all of them by default.
        """
        import torch

        # Advanced indexing and np.array both copy: torch must not be handed a read-only memory map.
        batch = torch.from_numpy(np.array(self.images[index]))
        return batch.permute(0, 3, 1, 2).float().div_(255)


@dataclass(frozen=True)
class ImageData:
    """A data set in memory.

    :param name: its name on the command line (``"covidct"``).
    :param source: ``"real"``, or ``"phantom"`` for generated images.
    :param class_names: what the labels 0, 1, ... mean.
    :param folder: where real images were read from.
    """

    name: str
    source: Literal["real", "phantom"]
    class_names: tuple[str, ...]
    train: Subset
    val: Subset
    test: Subset
    folder: Path | None = None

    @property
    def channels(self) -> int:
        return self.train.images.shape[3]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[1:3]


class DataSet(ABC):
    """How one data set is found, read, fetched and imitated. A subclass is a stateless description.

    :cvar name: its name on the command line.
    :cvar title: its name in sentences.
    :cvar folder: the name of its folder inside a data root.
    :cvar homepage: where a person gets it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[str]
    homepage: ClassVar[str]

    @abstractmethod
    def is_at(self, path: Path) -> bool:
        """Whether ``path`` is this data set's folder (complete or not: :meth:`read` names what is missing)."""

    @abstractmethod
    def read(self, path: Path, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        """Reads the data set from its folder.

        :raises DataError: anything is missing, damaged or contradictory.
        :raises OSError: a file or folder cannot be read.
        """

    @abstractmethod
    def phantom(self, *, size: int, channels: int, cache: ArrayCache, progress: bool) -> ImageData:
        """Generated images with the classes and the split sizes of the real data set."""

    @abstractmethod
    def download(self, target: Path, *, progress: bool) -> None:
        """Fetches the data set into the folder ``target`` (which appears only when complete and verified).

        :raises DataUnavailableError: no network, a damaged file, no space, or no public download.
        """


DATASETS: Registry[DataSet] = Registry("data set")
