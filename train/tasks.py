"""What IP has to undo: a task is a degradation with the settings of a run filled in."""

from __future__ import annotations

from models.registry import Registry
from train.config import RunConfig
from train.degradations import DEGRADATIONS, Degradation

TASKS: Registry[Degradation] = Registry("task")


@TASKS.register("denoise")
def denoise(config: RunConfig) -> Degradation:
    """White Gaussian noise of ``config.sigma``."""
    return DEGRADATIONS.build("gaussian", sigma=config.sigma)


@TASKS.register("sr2")
def sr2(config: RunConfig) -> Degradation:
    """Half the resolution."""
    return DEGRADATIONS.build("downsample", scale=2)


@TASKS.register("sr4")
def sr4(config: RunConfig) -> Degradation:
    """A quarter of the resolution."""
    return DEGRADATIONS.build("downsample", scale=4)
