"""The folder of a run: which one it is, to whom it belongs, and what its files are called and hold."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import RunError, reason
from train.files import LOCK, generations, is_leftover, locked, read_json, write_file, write_json

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

RUNS = Path("runs")


class RunFolder:
    """A run's folder, and the name of every file in it.

    :param path: the folder; it need not exist.
    """

    CHECKPOINT = "checkpoint.pt"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.data = path / "data.json"
        self.steps = path / "steps.csv"
        self.checkpoint = path / self.CHECKPOINT
        self.images = path / "images.csv"
        self.metrics = path / "metrics.json"
        self.weights = path / "weights.safetensors"
        self.validation = path / "validation.csv"
        self.best = path / "best.safetensors"
        self.panel = path / "panel.png"
        self.gate = path / "gate.png"
        self.tensorboard = path / "tensorboard"

    @property
    def checkpoints(self) -> list[Path]:
        """Those that are there, the newest first."""
        return generations(self.checkpoint)

    def gate_of(self, auxiliary: str) -> Path:
        """The picture of the gate of one among several auxiliaries."""
        return self.gate.with_name(f"{self.gate.stem}-{auxiliary}{self.gate.suffix}")

    def write_config(self, settings: dict[str, Any]) -> None:
        """Writes ``config.json``.

        :param settings: as plain JSON values.
        :raises RunError: it cannot be written.
        """
        write_json(self.config, settings)

    def write_data(self, fingerprint: dict[str, Any]) -> None:
        """Writes ``data.json``, by which a continued run recognizes its data.

        :raises RunError: it cannot be written.
        """
        write_json(self.data, fingerprint)

    def refuse_other_data(self, fingerprint: dict[str, Any], where: Path | None) -> None:
        """Makes sure that a run goes on with the data it began with, wherever they lie by now.

        A run of an earlier version has no ``data.json``; it is believed.

        :param fingerprint: of the data at hand.
        :param where: they are; ``None``: they are generated.
        :raises RunError: the data differ, or ``data.json`` is damaged; the message says what differs.
        """
        from train.data.fingerprint import differences

        stored = read_json(self.data)
        if stored is None:
            return
        if differing := differences(stored, fingerprint):
            what = "the generated PHANTOM images" if where is None else f"the images in {where}"
            raise RunError(
                f"--resume {self.path}: {what} are not the data that the run began with (see {self.data}): "
                f"{'; '.join(differing)}. Give the folder that holds those with --data-root, or start a new run."
            )

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Writes ``metrics.json``, whose presence says that the run is finished.

        :raises RunError: it cannot be written.
        """
        write_json(self.metrics, metrics)

    def write_images(self, names: Sequence[str], scores: Mapping[str, np.ndarray]) -> None:
        """Writes ``images.csv``: a row per image that was scored; empty cells where it has no such score.

        :param names: of the images.
        :param scores: ``float64 [N]`` each, by the names of their columns.
        :raises RunError: it cannot be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", *scores])
        for name, *values in zip(names, *(column.tolist() for column in scores.values()), strict=True):
            writer.writerow([name, *("" if value != value else f"{value:.9g}" for value in values)])
        write_file(self.images, text.getvalue().encode(errors="surrogateescape"))

    def read_images(self) -> tuple[list[str], dict[str, np.ndarray]]:
        """What :meth:`write_images` was given.

        :raises RunError: the file is missing or damaged; the message names it.
        """
        import numpy as np

        try:
            with self.images.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
                header, *rows = list(csv.reader(file, strict=True))
            columns = list(zip(*rows, strict=True)) or [()] * len(header)
            scores = {
                name: np.array([float(cell or "nan") for cell in cells])
                for name, cells in zip(header[1:], columns[1:], strict=True)
            }
        except OSError as error:
            raise RunError(f"{self.images} cannot be read: {reason(error)}") from error
        except (ValueError, csv.Error) as error:
            raise RunError(f"{self.images} is damaged: {error}; --resume evaluates the run again without it") from error
        return list(columns[0]), scores

    def read_metrics(self) -> dict[str, Any] | None:
        """The metrics of a finished run; ``None`` where it is not finished.

        :raises RunError: the file cannot be read or is damaged.
        """
        try:
            return read_json(self.metrics)
        except RunError as error:
            raise RunError(f"{error}. Remove the file, and --resume evaluates the run again.") from error

    def write_weights(
        self, networks: Mapping[str, nn.Module], settings: dict[str, Any], *, without: Collection[str] = ()
    ) -> None:
        """Writes ``weights.safetensors``: tensors ``ip.*``, ``vr.*`` ..., the settings as JSON in the metadata.

        :param networks: by the keys of their roles.
        :param settings: without the paths of this machine, as weights are handed to other people.
        :param without: tensors that are left out.
        :raises RunError: it cannot be written.
        """
        states = {key: network.state_dict() for key, network in networks.items()}
        _write_tensors(self.weights, states, {"config": json.dumps(settings)}, without)

    def write_best(
        self,
        states: Mapping[str, Mapping[str, Tensor]],
        settings: dict[str, Any],
        score: dict[str, Any],
        *,
        without: Collection[str] = (),
    ) -> None:
        """Writes ``best.safetensors``, which is like ``weights.safetensors`` and has its score in the metadata, too.

        :param states: of the networks, by the keys of their roles.
        :param settings: as for ``weights.safetensors``.
        :param score: as plain JSON values.
        :param without: tensors that are left out.
        :raises RunError: it cannot be written.
        """
        _write_tensors(self.best, states, {"config": json.dumps(settings), "validation": json.dumps(score)}, without)


def _write_tensors(
    path: Path, states: Mapping[str, Mapping[str, Tensor]], metadata: dict[str, str], without: Collection[str]
) -> None:
    from safetensors.torch import save

    tensors = {
        f"{key}.{name}": value.detach().cpu().contiguous()  # channels_last weights are not contiguous
        for key, state in states.items()
        for name, value in state.items()
        if f"{key}.{name}" not in without
    }
    write_file(path, save(tensors, metadata))


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
        names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be read: {reason(error)}") from error
    if names - {LOCK} and not (but_locked and LOCK in names):
        raise RunError(
            f"--out {folder} is not empty; give another folder, or --resume {folder} to continue the run in it"
        )
