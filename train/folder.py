"""The folder of a run: which one it is, to whom it belongs, and what its files hold."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from train.config import RUNS, RunConfig
from train.data.base import ImageData
from train.data.fingerprint import differences, fingerprint
from train.errors import RunError, reason
from train.files import LOCK, locked, read_json, write_file, write_json


@contextlib.contextmanager
def new_folder(out: Path | None, name: str) -> Iterator[Path]:
    """A folder for a new run, which no other process shares while the block runs.

    If nothing was written into it, the folder (and each parent that was made for it) disappears again.

    :param out: the user's choice: a folder that is empty or does not exist.
    :param name: the run's name, for the default ``runs/NAME``, ``runs/NAME-2``, ...: the first that can be made.
    :raises RunError: ``out`` is a file, or there is something in it, or the folder cannot be made, or another process
        is at work in it.
    """
    made: list[Path] = []
    try:
        if out is not None:
            folder = out
            made = _make(out, exist_ok=True)
            _refuse_contents(out, but_locked=True)  # which must not even get a lock
        else:
            numbered = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
            for folder in (RUNS / each for each in numbered):
                # Making the folder decides whose it is: of two processes at the same instant, one finds it there.
                with contextlib.suppress(FileExistsError):
                    made = _make(folder, exist_ok=False)
                    break
        with locked(folder):
            _refuse_contents(folder)
            yield folder
    finally:
        with contextlib.suppress(OSError):  # one that has something in it stays, and so do those around it
            for each in made:
                each.rmdir()


def _make(folder: Path, *, exist_ok: bool) -> list[Path]:
    """Makes a folder.

    :returns: what was made, the innermost first.
    :raises RunError: it cannot be made.
    :raises FileExistsError: it is there, and ``exist_ok`` is false.
    """
    try:
        if exist_ok and folder.exists() and not folder.is_dir():
            raise RunError(f"--out {folder} is a file; give a folder")
        missing = list(itertools.takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
        folder.mkdir(parents=True, exist_ok=exist_ok)
    except FileExistsError as error:
        if not exist_ok and folder.parent.is_dir():
            raise
        raise RunError(f"the run folder {folder} cannot be made: {reason(error)}") from error
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be made: {reason(error)}") from error
    return missing


def _refuse_contents(folder: Path, *, but_locked: bool = False) -> None:
    """
    :param but_locked: not where there is a lock file: whether a process is at work is to be found out first.
    :raises RunError: the folder holds anything besides a lock, or cannot be read.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be read: {reason(error)}") from error
    if names - {LOCK} and not (but_locked and LOCK in names):
        raise RunError(
            f"--out {folder} is not empty; give another folder, or --resume {folder} to continue the run in it"
        )


def write_config(folder: Path, config: RunConfig) -> None:
    """Writes ``config.json``.

    :raises RunError: it cannot be written.
    """
    write_json(folder / "config.json", config.to_json())


def write_data(folder: Path, data: ImageData) -> None:
    """Writes ``data.json``, by which a continued run recognizes its data.

    :raises RunError: it cannot be written.
    """
    write_json(folder / "data.json", fingerprint(data))


def refuse_other_data(folder: Path, data: ImageData) -> None:
    """Makes sure that a run goes on with the data it began with, wherever they lie by now.

    A run of an earlier version has no ``data.json``; it is believed.

    :raises RunError: the data differ, or ``data.json`` is damaged; the message says what differs.
    """
    path = folder / "data.json"
    stored = read_json(path)
    if stored is None:
        return
    if differing := differences(stored, fingerprint(data)):
        where = "the generated PHANTOM images" if data.folder is None else f"the images in {data.folder}"
        raise RunError(
            f"--resume {folder}: {where} are not the data that the run began with (see {path}): "
            f"{'; '.join(differing)}. Give the folder that holds those with --data-root, or start a new run."
        )


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes ``metrics.json``, whose presence says that the run is finished.

    :raises RunError: it cannot be written.
    """
    write_json(folder / "metrics.json", metrics)


def read_metrics(folder: Path) -> dict[str, Any] | None:
    """The metrics of a finished run; ``None`` where it is not finished.

    :raises RunError: the file cannot be read or is damaged.
    """
    try:
        return read_json(folder / "metrics.json")
    except RunError as error:
        raise RunError(f"{error}. Remove the file, and --resume evaluates the run again.") from error


def write_weights(folder: Path, config: RunConfig, ip: nn.Module, vr: nn.Module | None) -> None:
    """Writes ``weights.safetensors``: tensors ``ip.*`` and ``vr.*``, the settings as JSON in the metadata.

    Weights are handed to other people, so the settings are without the paths of this machine.

    :raises RunError: it cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()  # channels_last weights are not contiguous
        for name, network in (("ip", ip), ("vr", vr))
        if network is not None
        for key, value in network.state_dict().items()
    }
    metadata = {"config": json.dumps(config.without_paths().to_json())}
    write_file(folder / "weights.safetensors", save(tensors, metadata))
