"""From a clean image to a degraded one: seeded per image, so that every strategy and every device sees the same noise.

A new degradation is a subclass of :class:`Degradation` with one method, and one ``@DEGRADATIONS.register`` line.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.registry import Registry

DEGRADATIONS: Registry[Degradation] = Registry("degradation")


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on ``parts`` alone: the same in every process, version and machine.

    The parts keep their borders and types apart: ``("ab", "c")``, ``("a", "bc")`` and ``(1,)``, ``("1",)`` all differ.

    :raises TypeError: a part is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a seed is made of integers and strings, not {part!r}")
        text = str(part).encode()
        digest.update(f"{type(part).__name__}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def fixed_seeds(degradation: Degradation, names: Sequence[str]) -> list[int]:
    """Seeds for images whose degradation must never change (validation and test): the image and the degradation decide.

    :param names: ``Subset.names``.
    """
    return [stable_seed("test", degradation.name, repr(degradation), name) for name in names]


class Degradation(ABC):
    """Maps clean images to degraded ones, each image from its own seed.

    :cvar name: its name in the registry.
    :cvar scale: by what factor the result is smaller than the clean image.
    """

    name: ClassVar[str]
    scale: int = 1

    def __call__(self, clean: Tensor, seeds: Sequence[int]) -> Tensor:
        """
        :param clean: ``float32 [N, C, H, W]`` in [0, 1].
        :param seeds: one per image; an image's result depends on its own seed only, not on its place in the batch.
        :returns: ``float32 [N, C, H / scale, W / scale]`` on the device of ``clean``; not clipped to [0, 1] unless the
            physics says so.
        :raises ValueError: a shape, dtype or number of seeds is not as above.
        """
        if clean.ndim != 4 or clean.dtype != torch.float32:
            raise ValueError(f"clean images must be float32 [N, C, H, W], not {clean.dtype} {list(clean.shape)}")
        if len(seeds) != len(clean):
            raise ValueError(f"{len(clean)} images need as many seeds, not {len(seeds)}")
        if not len(clean):
            raise ValueError("there is no image to degrade: the batch is empty")
        # The random numbers come from the CPU's generator on every device: the same seed, the same noise.
        return torch.stack(
            [self.degrade(image, torch.Generator().manual_seed(seed)) for image, seed in zip(clean, seeds, strict=True)]
        )

    @abstractmethod
    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One image.

        :param image: ``float32 [C, H, W]``.
        :param generator: a CPU generator, the only permitted source of randomness.
        """


@DEGRADATIONS.register("gaussian")
@dataclass(frozen=True)
class Gaussian(Degradation):
    """White Gaussian noise: ``x + sigma * n``, not clipped, as the noise of a detector is not.

    :param sigma: standard deviation, in units of the image range [0, 1].
    :raises ValueError: ``sigma`` is negative or not finite.
    """

    sigma: float = 0.1
    name: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma >= 0):
            raise ValueError(f"sigma must be a finite number >= 0, not {self.sigma!r}")

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(image.shape, generator=generator)
        return image + self.sigma * noise.to(image.device)


@DEGRADATIONS.register("downsample")
@dataclass(frozen=True)
class Downsample(Degradation):
    """Antialiased bicubic reduction: the usual degradation of super-resolution; there is nothing random in it.

    :param scale: 2, 3, 4, ...: the factor by which both sides shrink.
    :raises ValueError: ``scale`` is not an integer > 1; on use: an image's sides are no multiples of it.
    """

    scale: int = 2
    name: ClassVar[str] = "downsample"

    def __post_init__(self) -> None:
        if not isinstance(self.scale, int) or self.scale < 2:
            raise ValueError(f"scale must be an integer > 1, not {self.scale!r}")

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        height, width = image.shape[1:]
        if height % self.scale or width % self.scale:
            raise ValueError(f"images of {height} x {width} pixels cannot be reduced by {self.scale} without a rest")
        size = (height // self.scale, width // self.scale)
        # Bicubic overshoots at edges; a stored low-resolution image could not.
        small = torch.nn.functional.interpolate(image[None], size=size, mode="bicubic", antialias=True)
        return small[0].clamp_(0, 1)
