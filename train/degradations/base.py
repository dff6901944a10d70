"""What a degradation is: seeded per image, written as one word of a command line, its classical remedy beside it."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from models.registry import Registry
from train.seeds import stable_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEGRADATIONS: Registry[Degradation] = Registry("degradation")
CLASSICAL = "classical"
"""The name of the remedy that every run is compared with, among :attr:`Degradation.remedies` and in metrics."""


class Remedy(NamedTuple):
    """A classical restoration, of a degradation whose arguments it knows.

    :param title: what tables call it.
    :param restore: ``float32 [N, C, h, w]``, not clipped, to ``float32 [N, C, h * scale, w * scale]`` on the CPU.
    :param settings: JSON-able facts that the result depends on besides the pixels: a key for a cache.
    """

    title: str
    restore: Callable[[Tensor], Tensor]
    settings: Mapping[str, Any]


def fixed_seeds(degradation: Degradation, names: Sequence[str]) -> list[int]:
    """Seeds for images whose degradation must never change (validation and test): the image and the degradation decide.

    :param names: ``Subset.names``.
    """
    return [stable_seed("test", degradation.name, repr(degradation), name) for name in names]


class Degradation(ABC):
    """Maps clean images to degraded ones, each image from its own seed.

    A subclass is a frozen dataclass whose fields are the arguments that a command line gives (``gaussian:0.1``), each
    an ``int``, a ``float`` or a word (``str``). It is hashable, comparable and can be pickled. ``repr`` is part of the
    test images' seeds (:func:`fixed_seeds`) and therefore never changes.

    :ivar name: its name in the registry.
    :ivar scale: by what factor the result is smaller than the clean image.
    :ivar remedy: what :meth:`restore` is called in tables; ``None`` where there is no classical remedy.
    :ivar has_truth: whether the image that is given to it is what has to come out.
    """

    name: str
    scale: int = 1
    remedy: str | None = None
    has_truth: bool = True

    def __call__(self, clean: Tensor, seeds: Sequence[int]) -> Tensor:
        """
        :param clean: ``float32 [N, C, H, W]`` in [0, 1].
        :param seeds: one per image; an image's result depends on its own seed only, not on its place in the batch.
        :returns: ``float32 [N, C, H / scale, W / scale]`` on the device of ``clean``; not clipped to [0, 1] unless the
            physics says so.
        :raises ValueError: a shape, dtype or number of seeds is not as above.
        """
        import torch

        if clean.ndim != 4 or clean.dtype != torch.float32:
            raise ValueError(f"clean images must be float32 [N, C, H, W], not {clean.dtype} {list(clean.shape)}")
        if len(seeds) != len(clean):
            raise ValueError(f"{len(clean)} images need as many seeds, not {len(seeds)}")
        if not len(clean):
            raise ValueError("there is no image to degrade: the batch is empty")
        return torch.stack([self.from_seed(image, seed) for image, seed in zip(clean, seeds, strict=True)])

    def from_seed(self, image: Tensor, seed: int) -> Tensor:
        """One image, ``float32 [C, H, W]``, from its seed."""
        import torch

        # The random numbers come from the CPU's generator on every device: the same seed, the same noise.
        return self.degrade(image, torch.Generator().manual_seed(seed))

    @abstractmethod
    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One image.

        :param image: ``float32 [C, H, W]``.
        :param generator: a CPU generator, the only permitted source of randomness.
        """

    def restore(self, degraded: Tensor) -> Tensor | None:
        """What a person has without a network: the classical remedy, which knows the degradation and its arguments.

        :param degraded: one image, ``float32 [C, h, w]``, not clipped.
        :returns: ``float32 [C, h * scale, w * scale]`` on the CPU, not clipped; ``None`` where there is no remedy.
        """
        return None

    @property
    def remedies(self) -> dict[str, Remedy]:
        """Every classical remedy by its name in metrics. ``classical`` is :meth:`restore`, and the first; others, which
        may be slow or need what is not installed, are tried where they are asked for. Empty where there is none."""
        return {} if self.remedy is None else {CLASSICAL: Remedy(self.remedy, self._each, self.remedy_settings)}

    def restore_batch(self, degraded: Tensor) -> Tensor | None:
        """:meth:`restore` of each image, on every core.

        :param degraded: ``float32 [N, C, h, w]``, not clipped.
        :returns: ``float32 [N, C, h * scale, w * scale]`` on the CPU; ``None`` where there is no remedy.
        """
        return None if self.remedy is None else self._each(degraded)

    def _each(self, degraded: Tensor) -> Tensor:
        import torch

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # scikit-image's loops run without the interpreter lock
            restored = [image for image in pool.map(self.restore, degraded.cpu()) if image is not None]
        return torch.stack(restored)

    @property
    def remedy_settings(self) -> Mapping[str, Any]:
        """JSON-able facts that :meth:`restore` depends on besides the pixels: a key for a cache of its results. The
        arguments of the degradation, unless there is more to say."""
        return dict(vars(self))

    @property
    def noise_level(self) -> float | None:
        """Standard deviation of white Gaussian noise in units of the range [0, 1]; ``None`` for every other kind."""
        return None

    def __str__(self) -> str:
        """How a command line writes it; :func:`train.degradations.parse` reads exactly this back.

        >>> from train.degradations import Gaussian
        >>> str(Gaussian(0.1)), str(Gaussian(1.0))
        ('gaussian:0.1', 'gaussian:1')
        """
        values = [written(getattr(self, field.name)) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return ":".join([self.name, ",".join(values)]) if values else self.name


def written(value: float | str) -> str:
    """The shortest text that is read back as exactly this number, without a plus sign: that joins the parts of a chain.
    A word stays as it is.

    >>> written(0.1), written(30.0), written(1e20), written(1e-7), written(4), written("shuffle")
    ('0.1', '30', '1e20', '1e-07', '4', 'shuffle')
    """
    if isinstance(value, str):
        return value
    return repr(value).removesuffix(".0").replace("e+", "e")
