"""What the networks of a training are worth so far, on a few validation images that are always the same.

The training does not notice: modes, batch statistics and random numbers are afterwards what they were before.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, Protocol

import torch
from torch import nn

from train.data.base import Subset
from train.degradations import Degradation
from train.evaluation.evaluate import Trained, answer, groups, pairs
from train.evaluation.metrics import psnr_of
from train.inference import BATCH, Tiling, enlarged, forward
from train.seeds import stable_seed


class Validated(Trained, Protocol):
    """A strategy, as far as a validation knows it."""

    @property
    def validated_by(self) -> Literal["images", "tasks"] | None: ...


def sample(images: Subset, most: int) -> Subset:
    """At most so many of the images, the same ones whatever the seed of a run is, in their order."""
    if len(images) <= most:
        return images
    generator = torch.Generator().manual_seed(stable_seed("validation"))
    return images.take(torch.randperm(len(images), generator=generator)[:most].sort().values.numpy())


@torch.no_grad()
def validate(
    trained: Validated,
    images: Subset,
    degrade: Degradation,
    *,
    device: torch.device,
    seen: Literal["degraded", "clean"] = "degraded",
    stopped: Callable[[], bool] = lambda: False,
) -> float | None:
    """Scores the networks of a strategy as its ``validated_by`` says: the mean PSNR of the images in dB, as an
    evaluation finds it, or the mean over the tasks of what counts most in each.

    :param seen: what the VRs of a strategy without IP look at.
    :param stopped: is asked every :data:`train.inference.BATCH` images.
    :returns: more is better; NaN where any image has no score, ``None`` where it was stopped.
    """
    by_images = trained.validated_by == "images"
    judges = [] if by_images else [(judge, network, judge.scorer(images)) for judge, network in trained.judges]
    psnr: list[torch.Tensor] = []
    with at_rest(trained.networks.values(), device):
        for group in groups(images):
            for begin in range(group[0], group[-1] + 1, BATCH):
                if stopped():
                    return None
                index = range(begin, min(begin + BATCH, group[-1] + 1))
                clean, given = pairs(images, degrade, index)
                if by_images:
                    made = forward(trained.enhance, given, device=device, tiling=Tiling())
                    psnr.append(psnr_of(made, clean, dim=(1, 2, 3)))
                shown = clean if seen == "clean" else enlarged(given, degrade.scale)
                for judge, network, scorer in judges:
                    scorer.add(answer(judge, network, shown, device, Tiling()), index)
    if by_images:
        return torch.cat(psnr).double().mean().item()
    return math.fsum(scorer.result()[judge.scores[0].key] for judge, _, scorer in judges) / len(judges)


@contextlib.contextmanager
def at_rest(networks: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Networks in evaluation mode while the block runs. Afterwards every module has the mode that it had (which need
    not be that of its network), and PyTorch's generators are where they were."""
    networks = list(networks)
    modes = [(module, module.training) for network in networks for module in network.modules()]
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        try:
            for network in networks:
                network.eval()
            yield
        finally:
            for module, mode in modes:
                module.training = mode
