"""The smallest data set, network and settings that exercise everything. Importing this registers ``tiny``; run as a
module, it is ``python -m train.run`` with them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models import VR
from train.config import RunConfig
from train.data import DATASETS, ImageData, Subset
from train.data.base import DataSet

SIDE = 16


def subset(split: str, n: int, channels: int = 1) -> Subset:
    """Smooth random images whose mean brightness tells the class."""
    rng = np.random.default_rng([n, len(split)])
    labels = np.arange(n) % 2
    rows, columns = np.mgrid[:SIDE, :SIDE]
    waves = np.sin(rows * rng.uniform(0.2, 0.6, (n, 1, 1)) + columns * rng.uniform(0.2, 0.6, (n, 1, 1)))
    images = np.clip(100 + 60 * waves + 60 * labels[:, None, None], 0, 255).astype(np.uint8)
    images = np.repeat(images[..., None], channels, axis=3)
    return Subset(images, labels.astype(np.int64), None, tuple(f"{split}-{i}.png" for i in range(n)))


def image_data(channels: int = 1) -> ImageData:
    return ImageData(
        name="tiny",
        source="phantom",
        class_names=("dark", "bright"),
        train=subset("train", 13, channels),
        val=subset("val", 4, channels),
        test=subset("test", 6, channels),
    )


@DATASETS.register("tiny")
class Tiny(DataSet):
    name = "tiny"
    title = "the tiny data set"
    folder = "tiny"
    homepage = "nowhere"

    def is_at(self, path: Path) -> bool:
        return False

    def read(self, path, **options) -> ImageData:
        raise NotImplementedError

    def phantom(self, *, channels: int, **options) -> ImageData:
        return image_data(channels)

    def download(self, target: Path, *, progress: bool) -> None:
        raise NotImplementedError


@VR.register("tiny")
def tiny_vr(*, channels: int, num_classes: int) -> nn.Module:
    """With batch statistics and dropout: state and randomness that a resumed run must get right."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(4, num_classes),
    )


SETTINGS = {
    "dataset": "tiny",
    "source": "phantom",
    "size": SIDE,
    "crop": 8,
    "batch_size": 4,
    "blocks": 1,
    "features": 4,
    "vr": "tiny",
    "epochs": 2,
    "pretrain_epochs": 1,
    "preset": "quick",
    "device": "cpu",
    "log_every": 1,
}
"""Three steps per epoch, six steps in all."""


def config(**changes) -> RunConfig:
    return RunConfig(**(SETTINGS | changes))


def arguments(**changes) -> list[str]:
    """The same as a command line."""
    return [
        part for name, value in (SETTINGS | changes).items() for part in ("--" + name.replace("_", "-"), str(value))
    ]


if __name__ == "__main__":
    from train.run import main

    torch.set_num_threads(1)
    sys.exit(main())
