"""The folder of a run: which one it is, and how its files get there whole or not at all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from torch import nn

from train.config import RUNS, RunConfig, RunError
from train.data.cache import atomic_file


def free_folder(out: Path | None, name: str) -> Path:
    """Where a new run goes, without touching an older one.

    :param out: the user's choice: a folder that is empty or does not exist.
    :param name: the run's name, for the default ``runs/NAME``, ``runs/NAME-2``, ...
    :raises RunError: ``out`` is a file, or there is something in it.
    """
    if out is None:
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(RUNS / each for each in names if not (RUNS / each).exists())
    if out.exists() and not out.is_dir():
        raise RunError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"--out {out} is not empty; give another folder, or --resume {out} to continue the run in it")
    return out


def make_folder(folder: Path) -> None:
    """
    :raises RunError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be made: {error.strerror}") from error


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes ``config.json``."""
    write_file(folder / "config.json", (json.dumps(config.to_json(), indent=2) + "\n").encode())


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes ``metrics.json``, whose presence says that the run is finished."""
    write_file(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run; ``None`` where it is not finished."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_weights(folder: Path, config: RunConfig, ip: nn.Module, vr: nn.Module | None) -> None:
    """Writes ``weights.safetensors``: tensors ``ip.*`` and ``vr.*``, the settings as JSON in the metadata."""
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()  # channels_last weights are not contiguous
        for name, network in (("ip", ip), ("vr", vr))
        if network is not None
        for key, value in network.state_dict().items()
    }
    write_file(folder / "weights.safetensors", save(tensors, {"config": json.dumps(config.to_json())}))


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    :raises RunError: it cannot be written; the message names it.
    """
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
