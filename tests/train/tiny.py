"""The smallest data sets, networks and settings that exercise everything. Importing this registers ``tiny`` (a data set
and networks of every kind) and ``tiny-masks``; run as a module, it is ``python -m train.run`` with them."""

from __future__ import annotations

import csv
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import IP, SEG, VR
from models.training import Term, TrainingLoss
from train.data import DATASETS, ImageData, Subset
from train.data.base import DataSet
from train.settings import Settings, preset_settings
from train.training.step_log import PERFORMANCE

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


def with_masks(data: ImageData) -> ImageData:
    """The same data with a mask for every image: where it is brighter than its own mean."""

    def masked(images: Subset) -> Subset:
        gray = images.images[..., 0].astype(float)
        return dataclasses.replace(images, masks=(gray > gray.mean((1, 2), keepdims=True)).astype(np.uint8))

    splits = {name: masked(getattr(data, name)) for name in ("train", "val", "test")}
    return dataclasses.replace(data, **splits, mask_names=("background", "waves"))


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


@DATASETS.register("tiny-masks")
class TinyMasks(Tiny):
    name = "tiny-masks"

    def phantom(self, *, channels: int, **options) -> ImageData:
        return dataclasses.replace(with_masks(image_data(channels)), name="tiny-masks", title="tiny-masks")


@dataclass(frozen=True)
class TinyIPOptions:
    """Options of which SR-ResNet has none."""

    width: int = 2
    """Features."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width must be at least 1, not {self.width}")


@IP.register("tiny", TinyIPOptions)
class TinyIP(nn.Module):
    """An IP with options of its own: what is handed to it is not what SR-ResNet takes."""

    def __init__(self, options: TinyIPOptions, *, channels: int, scale: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, options.width, 3, padding=1)
        self.last = nn.Conv2d(options.width, channels, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=self.scale)
        return x + self.last(self.first(x).relu())


@IP.register("tiny-staged", TinyIPOptions, terms={"rec": 0.25, "flat": 0.5})
class TinyStaged(TinyIP):
    """An IP that owns its loss: the main one and two further ones."""

    def training_loss(self, degraded: Tensor, clean: Tensor) -> TrainingLoss:
        enhanced = self(degraded)
        small = nn.functional.avg_pool2d(clean, self.scale)
        rec = (self.first(degraded) - small.mean(1, keepdim=True)).abs().mean()
        flat = (enhanced.mean((2, 3)) - clean.mean((2, 3))).square().mean()
        return TrainingLoss(
            enhanced, (enhanced - clean).abs().mean(), {"rec": Term(0.25, rec), "flat": Term(0.5, flat)}
        )


@SEG.register("tiny")
def tiny_seg(*, channels: int, num_classes: int) -> nn.Module:
    """With batch statistics, as the diagnosis network below."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, num_classes, 1)
    )


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


@VR.register("tiny-encoder")
class TinyEncoder(nn.Module):
    """A network with an embedding; batch statistics and dropout on the way to it."""

    width, stride, head = 4, 2, ("last",)

    def __init__(self, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.25)
        self.last = nn.Linear(4, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.first(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x).mean((2, 3)))


SETTINGS = {
    "dataset": "tiny",
    "source": "phantom",
    "size": SIDE,
    "crop": 8,
    "batch_size": 4,
    "ip.blocks": 1,
    "ip.features": 4,
    "vr": "tiny",
    "epochs": 2,
    "pretrain_epochs": 1,
    "preset": "quick",
    "device": "cpu",
    "log_every": 1,
}
"""Three steps per epoch, six steps in all."""


def changed(changes: dict) -> dict:
    """``SETTINGS`` with changes: the options go with the network. What is pre-trained is an encoder, and a critic takes
    no crop of 8 px."""
    values = SETTINGS | ({"vr": "tiny-encoder", "crop": SIDE} if changes.get("strategy") == "masked" else {}) | changes
    if values.get("ip", "srresnet") != "srresnet":
        values = {name: value for name, value in values.items() if name in changes or not name.startswith("ip.")}
    return values


def config(**changes) -> Settings:
    """Settings for programs; ``ip_blocks=2`` is not one: options are given as ``**{"ip.blocks": 2}``."""
    values = changed(changes)
    return preset_settings(values.pop("preset")).change(values)


def digits(log: Path, like: Path | None = None) -> list[dict[str, str]]:
    """The rows of a step log, character by character, without the speed and the memory that no two runs have alike.

    :param like: another one, of whose columns alone they are.
    """
    with (log if like is None else like).open(newline="") as file:
        kept = set(next(csv.reader(file))) - set(PERFORMANCE)
    with log.open(newline="") as file:
        return [{name: cell for name, cell in row.items() if name in kept} for row in csv.DictReader(file)]


def arguments(**changes) -> list[str]:
    """The same as a command line."""
    return [
        part
        for name, value in changed(changes).items()
        for part in (f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
    ]


def name_of(**changes) -> str:
    """The name of the run with these settings."""
    from train.data.fingerprint import fingerprint
    from train.experiment import look_up, task_word
    from train.settings.naming import identity, run_name

    settings = config(**changes)
    degrade = look_up(settings)
    data = DATASETS.build(settings.data.dataset).phantom(channels=settings.data.channels)
    return run_name(
        settings,
        title=data.title,
        source=data.source,
        task=task_word(settings, degrade),
        identity=identity(settings, fingerprint(data), degradation=str(degrade)),
    )


if __name__ == "__main__":
    from train.run import main

    torch.set_num_threads(1)
    sys.exit(main())
