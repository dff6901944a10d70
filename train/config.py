"""What a run is: its typed settings, the presets, and how a command line becomes settings.

Nothing here imports torch, so that ``python -m train.run --help`` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.errors import RunError, reason
from train.files import expanded, is_locked, read_json

GateName = Literal["hard", "soft", "always", "never", "project"]
RUNS = Path("runs")
logger = logging.getLogger(__name__)


def flag(name: str) -> str:
    """A setting's name as the command line spells it."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class RunConfig:
    """Train an image processing network (IP) with a diagnosis network (VR) as its auxiliary.

    A name (of a data set, task, network or strategy) that is not known is answered with the list of those that are:
    --strategy list shows the strategies. The defaults below are those of preset quick; --preset paper --help shows
    the other one's.
    """

    dataset: str = "covidct"
    """Data set."""
    data_root: Path | None = None
    """Where the data set is. By default $GRADPROM_DATA and ./data are searched, then it is downloaded."""
    source: Literal["auto", "real", "phantom"] = "auto"
    """real: the data set or an error. phantom: generated images. auto: phantoms only where there is nothing real."""
    size: int = 128
    """Side of the square images, in pixels."""
    channels: Literal[1, 3] = 1
    """1: grey images. 3: colour."""

    task: str = "denoise"
    """What IP has to undo."""
    sigma: float = 0.1
    """Standard deviation of the noise, for images in [0, 1]."""

    ip: str = "srresnet"
    """Image processing network."""
    blocks: int = 4
    """Residual blocks of IP."""
    features: int = 32
    """Width of IP."""
    vr: str = "resnet18"
    """Diagnosis network."""

    strategy: str = "gradprom"
    """How IP and VR are trained."""
    gate: GateName | None = None
    """Gate of strategy gradprom; the others fix their own."""
    aux_weight: float = 1e-3
    """Weight lambda of the diagnosis loss, a cross-entropy near 0.7, beside a mean squared error near 0.002."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Update rule of both networks (sgd: momentum 0.9)."""
    lr: float = 2e-3
    """Highest learning rate of IP: a linear rise over the first 3 per cent of the steps, then a cosine down to 0."""
    vr_lr: float = 1e-3
    """Learning rate of VR, same course."""
    batch_size: int = 8
    """Crops per step."""
    crop: int = 64
    """Side of the random crops IP and VR are trained on, in pixels."""
    epochs: int = 8
    """Passes over the training images."""
    max_steps: int | None = None
    """Stop after so many steps, if the epochs have more."""
    pretrain_epochs: int = 5
    """Passes over the clean images for VR before IP's training begins (strategy frozen only)."""

    seed: int = 0
    """Decides the networks' first weights, the order of the data, crops and training noise; never the test noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU if there is one."""
    preset: Literal["auto", "quick", "paper"] = "auto"
    """quick: minutes on two CPU cores. paper: for one GPU, meant to beat BM3D (not measured yet). auto: paper with a
    GPU, else quick."""
    num_workers: int = 0
    """Processes that prepare the batches; 0: the training process itself."""

    out: Path | None = None
    """Run folder. By default runs/DATASET-TASK-STRATEGY-sSEED, with a number appended if that exists."""
    resume: str | None = None
    """Continue the run in this folder, or the 'latest' one under runs/, bit for bit, with its own settings."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two looks at the device: the progress line and steps.csv are behind by as many."""
    tensorboard: bool = False
    """Also write TensorBoard events (pip install tensorboard)."""

    def __post_init__(self) -> None:
        for name in (
            "size",
            "blocks",
            "features",
            "batch_size",
            "crop",
            "epochs",
            "max_steps",
            "checkpoint_every",
            "log_every",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RunError(f"{flag(name)} must be at least 1, not {value}")
        for name in ("seed", "num_workers", "pretrain_epochs"):
            if getattr(self, name) < 0:
                raise RunError(f"{flag(name)} must be at least 0, not {getattr(self, name)}")
        for name in ("sigma", "aux_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise RunError(f"{flag(name)} must be a finite number, at least 0, not {value}")
        for name in ("lr", "vr_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise RunError(f"{flag(name)} must be a finite number above 0, not {value}")
        if self.crop > self.size:
            raise RunError(f"--crop {self.crop} does not fit into images of --size {self.size}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The settings' names, in the order of ``--help``."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values; :meth:`from_json` is the way back."""
        return {
            name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RunConfig:
        """
        :raises RunError: a setting is missing, unknown or out of range.
        """
        names = set(cls.field_names())
        if set(values) != names:
            raise RunError(
                f"the settings {', '.join(sorted(set(values) ^ names))} are missing or unknown to this version"
            )
        paths = {name: Path(values[name]) for name in ("data_root", "out") if isinstance(values[name], str)}
        values = values | paths
        for name, kind in get_type_hints(cls).items():
            if not _fits(values[name], kind):
                raise RunError(f"{name} cannot be {values[name]!r}")
        return cls(**values)

    def without_paths(self) -> RunConfig:
        """The settings as they may be handed to other people: without names of folders (and thereby of users)."""
        return dataclasses.replace(self, data_root=None, out=None, resume=None)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read from a file is of a setting's type.

    >>> _fits(3, int | None), _fits(3, float), _fits("3", int), _fits(True, int), _fits(2, Literal[1, 3])
    (True, True, False, False, False)
    """
    if get_origin(kind) is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(kind))
    if isinstance(kind, UnionType) or get_args(kind):
        return any(_fits(value, each) for each in get_args(kind))
    if kind is NoneType or value is None:
        return kind is NoneType and value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


QUICK = RunConfig(preset="quick")
PRESETS: dict[str, RunConfig] = {
    "quick": QUICK,
    "paper": dataclasses.replace(
        QUICK,
        preset="paper",
        size=256,
        blocks=16,
        features=64,
        vr="resnet50",
        lr=3e-4,
        vr_lr=2e-4,
        batch_size=16,
        crop=128,
        epochs=1000,
        pretrain_epochs=100,
        num_workers=8,
        checkpoint_every=1000,
    ),
}

# What may change when a run is continued: where it runs and what it shows, but not what it computes.
CHANGEABLE = {"data_root", "device", "num_workers", "checkpoint_every", "log_every", "tensorboard", "resume"}


def parse(argv: Sequence[str]) -> RunConfig:
    """The settings of a command line, the preset's where a flag is not given; the preset's name is resolved.

    The preset (or the run that is continued) has to be known before the flags can be read over it, hence two readings.

    :raises RunError: a value is out of range, a path begins with the ``~`` of a home that does not exist, or a flag
        contradicts the run that is continued.
    :raises SystemExit: ``--help``, or a flag that does not exist or cannot be read (tyro has said why).
    """
    import tyro

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "device", "resume"):
        first.add_argument(flag(name), nargs="?")
    given, _ = first.parse_known_args(argv)
    wants_help = "-h" in argv or "--help" in argv
    if given.resume and not wants_help:
        base = stored(resume_folder(given.resume))
    else:
        preset = given.preset or "auto"
        if preset == "auto":
            preset = "quick" if wants_help else automatic_preset(given.device or "auto")
        base = PRESETS.get(preset, QUICK)  # a preset that does not exist is reported by the second reading
    config = tyro.cli(RunConfig, prog="python -m train.run", args=list(argv), default=base)
    config = expand_paths(config)
    if given.resume:
        refuse_changes(base, config)
    return dataclasses.replace(config, preset=base.preset)


def expand_paths(config: RunConfig) -> RunConfig:
    """
    :raises RunError: a path begins with the ``~`` of a home that does not exist.
    """
    paths = {name: getattr(config, name) for name in ("data_root", "out")}
    changes: dict[str, Any] = {name: path and expanded(path, flag(name)) for name, path in paths.items()}
    return dataclasses.replace(config, **changes)


def automatic_preset(device: str) -> str:
    """``"paper"`` where the run will have a GPU, else ``"quick"``."""
    import torch

    return "paper" if device != "cpu" and torch.cuda.is_available() else "quick"


def resume_folder(resume: str) -> Path:
    """The folder of the run to be continued.

    :param resume: a run folder, or ``"latest"``: of those under ``runs/`` in which no process is at work, the one that
        was written to last.
    :raises RunError: there is no such run, or it has no checkpoint yet.
    """
    if resume == "latest":
        return latest_run()
    folder = expanded(resume, "--resume")
    try:
        if not folder.is_dir():
            raise RunError(f"--resume {resume}: there is no such folder")
        for name in ("config.json", "checkpoint.pt"):
            if not (folder / name).is_file():
                raise RunError(
                    f"--resume {resume}: the folder has no {name}, so there is nothing to continue; start the run again"
                )
    except OSError as error:
        raise RunError(f"--resume {resume}: the folder cannot be read: {reason(error)}") from error
    return folder


def latest_run() -> Path:
    """
    :raises RunError: there is no run to continue.
    """
    found: list[tuple[float, Path]] = []
    for checkpoint in RUNS.glob("*/checkpoint.pt"):
        with contextlib.suppress(OSError):  # removed meanwhile, or of another user
            found.append((checkpoint.stat().st_mtime, checkpoint.parent))
    if not found:
        raise RunError(f"--resume latest: no run with a checkpoint under {RUNS}/; give the run's folder")
    at_work: list[str] = []
    for _, folder in sorted(found, key=lambda each: each[0], reverse=True):
        if not is_locked(folder):
            if at_work:
                logger.warning("%s is at work; the latest run that is not: %s", ", ".join(at_work), folder)
            return folder
        at_work.append(str(folder))
    raise RunError(f"--resume latest: every run under {RUNS}/ is at work in another process ({', '.join(at_work)})")


def stored(folder: Path) -> RunConfig:
    """The settings of the run in ``folder``, ready to be continued.

    :raises RunError: ``config.json`` cannot be read; the message names it.
    """
    path = folder / "config.json"
    if (values := read_json(path)) is None:
        raise RunError(f"{path} is missing, so there is nothing to continue; start the run again")
    try:
        config = expand_paths(RunConfig.from_json(values))
    except (ValueError, TypeError, RunError) as error:
        raise RunError(f"{path} does not hold the settings of a run: {error}") from error
    return dataclasses.replace(config, out=folder)


def refuse_changes(base: RunConfig, config: RunConfig) -> None:
    """
    :raises RunError: ``config`` changes what the continued run ``base`` computes.
    """
    changed = [name for name in RunConfig.field_names() if getattr(base, name) != getattr(config, name)]
    if refused := [flag(name) for name in changed if name not in CHANGEABLE]:
        allowed = ", ".join(sorted(flag(name) for name in CHANGEABLE - {"resume"}))
        raise RunError(
            f"--resume goes on with the settings of {base.out}, and {', '.join(refused)} would change them. "
            f"Leave that out (only {allowed} may change), or start a new run."
        )
