"""A run with weights, as far as its folder says what it is: what it was trained on, and what may be expected of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.comparison.execute import ABOUT as COMPARISON
from train.data.window import Window
from train.degradations import Degradation, parse
from train.errors import RunError, reason
from train.files import expanded, read_json
from train.outputs import run_folder
from train.outputs.run_folder import RunFolder
from train.settings import Settings
from train.settings.command_line import stored
from train.strategies.base import PSNR

NOT_FOR_DIAGNOSIS = "Not for diagnosis."


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder says.

    :param folder: where it is.
    :param settings: that it was given.
    :param metrics: what it achieved; nothing but its name where it is not finished.
    :param images: how many it was trained on; ``None`` where an early version did not write that down.
    :param unit: the values that were black and white to it, where they are no limits of 8 or 16 bits or of [0, 1].
    :param degradation: what its IP has learned to undo.
    :param weights: the file that they are in.
    :param validated: what these weights achieved on validation images, where that is all that is known of them.
    :param digest: of the file of weights, 16 hexadecimal digits.
    :param window: the values that the network sees as black and white; ``None``: what each file says.
    """

    folder: Path
    settings: Settings
    metrics: Mapping[str, Any]
    images: int | None
    unit: tuple[float, float] | None
    degradation: Degradation
    weights: Path
    validated: Mapping[str, Any] | None
    digest: str
    window: Window | None

    @property
    def name(self) -> str:
        return str(self.metrics.get("run", self.folder.name))

    @property
    def source(self) -> str:
        """``"real"`` or ``"phantom"``."""
        return str(self.metrics.get("data", self.settings.data.source))

    @property
    def channels(self) -> int:
        """1: gray images; 3: color."""
        return self.settings.data.channels

    @property
    def scale(self) -> int:
        """By what factor images become larger."""
        return self.degradation.scale

    @property
    def sigma(self) -> float | None:
        """The standard deviation of the noise that it was trained to remove, in units of the window; ``None`` where
        that is not what it was trained for."""
        return self.degradation.noise_level or None

    @property
    def trained(self) -> str:
        """What the network has learned, in words."""
        settings = self.settings
        kind = "PHANTOM (generated)" if self.source == "phantom" else "real"
        number = "" if self.images is None else f"{self.images} "
        looks = "color" if self.channels == 3 else "gray"
        size = "" if settings.data.size is None else f" of {settings.data.size} px"
        task = "images that are poor as they are" if not self.degradation.has_truth else f"to undo {self.degradation}"
        return f"{settings.network.ip} trained on {number}{kind} {looks} images{size} ({settings.data.dataset}) {task}"

    @property
    def achieved(self) -> str:
        """What became of its own test images, in words."""
        if self.validated is not None:
            score, number, epoch = (self.validated[each] for each in (PSNR.name, "images", "epoch"))
            return f"mean PSNR of {number} of its validation images {score:.2f} dB, after epoch {epoch:g}"
        before, after = self.metrics.get("psnr_degraded"), self.metrics.get("psnr")
        kind = "validation" if self.metrics.get("evaluated_on") == "val" else "test"
        if before is None or after is None:
            return f"how near its {kind} images came to the truth is not known"
        where = "" if self.settings.data.test_dataset is None else f" (of {self.settings.data.test_dataset})"
        return f"PSNR of its {kind} images{where} {before:.2f} dB before, {after:.2f} dB after"

    @property
    def introduction(self) -> str:
        """The first line that a person reads."""
        return f"{self.name}: {self.trained}; {self.achieved}. {NOT_FOR_DIAGNOSIS}"


def find(given: str) -> Path:
    """The folder of a run as a person names it.

    :param given: a path, which may be that of a file of weights in it, or ``latest``: the run under ``runs/`` that was
        finished last.
    :raises RunError: there is no such folder.
    """
    if given != "latest":
        return expanded(given, "--run")
    finished = [each for each in run_folder.RUNS.glob("*/metrics.json") if RunFolder(each.parent).weights.is_file()]
    if not finished:
        raise RunError(f"--run latest: there is no finished run under {run_folder.RUNS}/; give the run's folder")
    return max(finished, key=lambda each: each.stat().st_mtime).parent


def read(path: Path, window: Window | None = None) -> FinishedRun:
    """Reads what a run's folder says, without its network.

    :param path: of the folder; or of the best weights so far in it, for which the run need not be finished.
    :param window: in the place of the one that the run was trained with.
    :raises RunError: it is no folder of a finished run with an IP, or a file in it is damaged or of another version;
        the message says which.
    """
    weights = RunFolder(path).weights
    if path.is_file():
        weights, path = path, path.parent
    folder = RunFolder(path)
    best = weights.name == folder.best.name
    if not path.is_dir():
        raise RunError(f"--run {path}: there is no such folder")
    if not folder.config.is_file():
        if (path / COMPARISON).is_file():
            raise RunError(f"--run {path} is the folder of a comparison; give one of its runs, under {path / 'runs'}")
        raise RunError(f"--run {path} is no folder of a run: it has no {folder.config.name}")
    try:
        settings = stored(path)
    except RunError as error:
        raise RunError(f"--run {path} cannot be used by this version of the project: {error}") from error
    if not settings.method.kind.trains_ip:
        raise RunError(
            f"--run {path}: strategy {settings.method.strategy} trains no image processing network, so there is "
            "nothing to enhance with"
        )
    for file in () if best else (weights, folder.metrics):
        if not file.is_file():
            raise RunError(
                f"--run {path} has no {file.name}: the run is not finished; python -m train.run --resume {path} goes on"
            )
    metrics = folder.read_metrics() or {"run": (read_json(folder.config) or {}).get("name", path.name)}
    try:
        degradation = parse(settings.degradation.task, sigma=settings.degradation.sigma)
        digest = digest_of(weights)
        validated = _validated(weights) if best else None
    except OSError as error:
        raise RunError(f"--run {path}: {weights} cannot be read: {reason(error)}") from error
    if window is None and settings.data.window is not None:
        window = Window.parse(settings.data.window)
    return FinishedRun(path, settings, metrics, *_trained_on(folder), degradation, weights, validated, digest, window)


def digest_of(file: Path) -> str:
    """16 hexadecimal digits.

    :raises OSError: it cannot be read.
    """
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _validated(weights: Path) -> dict[str, Any]:
    """The score that stands in ``best.safetensors``.

    :raises RunError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "np") as file:
            found = json.loads(file.metadata()["validation"])
        return {
            name: float(found[name]) if name != "images" else int(found[name])
            for name in (PSNR.name, "epoch", "images")
        }
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"--run {weights} is damaged, or no file of best weights: {error}") from error


def _trained_on(folder: RunFolder) -> tuple[int | None, tuple[float, float] | None]:
    """The number of training images and the range of their values, as far as they were written down."""
    try:
        facts = (read_json(folder.data) or {})["splits"]["train"]
        number, (low, high) = int(facts["number"]), map(float, facts.get("value range", (0, 255)))
    except (KeyError, TypeError, ValueError):
        return None, None
    plain = low == 0 and (high + 1).is_integer() and (int(high) & int(high + 1)) == 0
    return number, None if plain else (low, high)
