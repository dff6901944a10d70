"""Training batches: which images, which crop, which noise, all of it a pure function of (seed, phase, epoch, image)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train.data.base import Subset
from train.degradations import Degradation
from train.errors import RunError
from train.seeds import stable_seed
from train.strategies.base import Batch
from train.team import ALONE, Team
from train.training.augment import augmented


class Key(NamedTuple):
    """One training example: an image, by its place in the training set, as it is seen in an epoch of a phase."""

    phase: str
    epoch: int
    image: int


class Crops(Dataset[Batch]):
    """Random crops, mirrored left to right half of the time, and their degraded versions.

    :param crop: side of the crops in pixels.
    :param seed: the run's seed.
    :param masks: whether the masks are cut out, too.
    :param augment: whether crops are also turned, enlarged, shifted and brightened (:func:`train.training.augment`).
    :param guides: images of high quality that are none of ``subset``; of each example, one is cut out too.
    :param second: whether every crop is degraded a second time, too.
    :raises RunError: an image is smaller than a crop; the message names it.
    """

    def __init__(
        self,
        subset: Subset,
        degrade: Degradation,
        *,
        crop: int,
        seed: int,
        masks: bool = False,
        augment: bool = False,
        guides: Subset | None = None,
        second: bool = False,
    ) -> None:
        self.subset = subset
        self.degrade = degrade
        self.crop = crop
        self.seed = seed
        self.masks = masks
        self.augment = augment
        self.guides = guides
        self.second = second
        for each in (subset,) if guides is None else (subset, guides):
            small = next((i for i in range(len(each)) if min(each.size(i)) < crop), None)
            if small is not None:
                height, width = each.size(small)
                raise RunError(
                    f"--crop {crop} does not fit into the training image {each.names[small]} of {height} x {width} px; "
                    "give a smaller --crop, or a --size"
                )

    def _cut(self, key: Key) -> tuple[Tensor, Tensor | None]:
        """A crop ``float32 [C, crop, crop]``, and its mask ``int64 [crop, crop]``."""
        image = self.subset.image(key.image)
        generator = torch.Generator().manual_seed(stable_seed("crop", self.seed, *key))
        cut = self._window(image, generator)
        crop, mask = cut(image), cut(self.subset.mask(key.image)) if self.masks else None
        return augmented(crop, mask, generator) if self.augment else (crop, mask)

    def _guide(self, guides: Subset, key: Key) -> Tensor:
        """A crop of a random image of high quality, ``float32 [C, crop, crop]``."""
        generator = torch.Generator().manual_seed(stable_seed("guide", self.seed, *key))
        image = guides.image(int(torch.randint(len(guides), (), generator=generator)))
        return self._window(image, generator)(image)

    def _window(self, image: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        """A random crop of images of this size, mirrored or not."""
        rows, columns = image.shape[1] - self.crop + 1, image.shape[2] - self.crop + 1
        top, left, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (rows, columns, 2))

        def cut(pixels: Tensor) -> Tensor:
            pixels = pixels[..., top : top + self.crop, left : left + self.crop]
            return pixels.flip(-1) if mirrored else pixels

        return cut

    def whole_guides(self, most: int) -> list[Tensor]:
        """Some of the images of high quality, as the seed decides: ``float32 [C, H, W]`` each.

        :param most: how many, at most.
        """
        if self.guides is None:
            return []
        generator = torch.Generator().manual_seed(stable_seed("guides", self.seed))
        chosen = torch.randperm(len(self.guides), generator=generator)[:most].tolist()
        return [self.guides.image(place) for place in chosen]

    def __getitems__(self, keys: list[Key]) -> Batch:
        cut = [self._cut(key) for key in keys]
        clean = torch.stack([image for image, _ in cut])
        degraded = self.degrade(clean, [stable_seed("noise", self.seed, *key) for key in keys])
        labels = self.subset.labels
        known = [-1 if labels is None else int(labels[key.image]) for key in keys]
        masks = [mask for _, mask in cut if mask is not None]
        guide = None if self.guides is None else torch.stack([self._guide(self.guides, key) for key in keys])
        second = None
        if self.second:
            second = self.degrade(clean, [stable_seed("second noise", self.seed, *key) for key in keys])
        return Batch(clean, degraded, torch.tensor(known), torch.stack(masks) if masks else None, guide, second)


class Order(Sampler[list[Key]]):
    """The batches of a phase from step ``start`` on: a new permutation per epoch, an incomplete last batch left out.

    :param images: how many training images there are, at least ``batch_size``.
    :param steps: how many steps the phase has in all.
    :param team: of the processes that share each batch.
    """

    def __init__(
        self,
        phase: str,
        *,
        images: int,
        batch_size: int,
        steps: int,
        seed: int,
        start: int = 0,
        team: Team = ALONE,
    ) -> None:
        self.phase = phase
        self.images = images
        self.batch_size = batch_size
        self.steps = range(start, steps)
        self.seed = seed
        self.team = team

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch = self.images // self.batch_size
        permutation: list[int] = []
        for step in self.steps:
            epoch, position = divmod(step, per_epoch)
            if position == 0 or not permutation:
                generator = torch.Generator().manual_seed(stable_seed("order", self.seed, self.phase, epoch))
                permutation = torch.randperm(self.images, generator=generator).tolist()
            chosen = permutation[position * self.batch_size : (position + 1) * self.batch_size]
            yield [Key(self.phase, epoch, image) for image in self.team.part(chosen)]


def _same(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C goes to all processes of a terminal, and SIGTERM of a cluster to all of a job. The main one decides when to
    # stop, and needs its workers until then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def batches(crops: Crops, order: Order, *, num_workers: int) -> DataLoader[Batch]:
    """The batches of ``order``, on the CPU.

    :param num_workers: processes that prepare them; 0: this process. The batches are the same.
    """
    return DataLoader(
        crops,
        batch_sampler=order,
        collate_fn=_same,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # else the loader draws a seed, unused here, from the global generator
    )
