"""The per-step log ``steps.csv``: measured on the device, read back and written a few steps at a time."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.config import RunError
from train.data.cache import atomic_file
from train.strategies.base import Phase, StepLog

MEASURED = ("loss", "psnr", "aux_loss", "accuracy", "cosine", "gate", "skipped")
COLUMNS = ("step", "phase", *MEASURED, "lr")
HEADER = ",".join(COLUMNS) + "\n"

Row = dict[str, float]


class StepTable:
    """``steps.csv`` with a buffer of steps that nobody has read yet.

    Columns: ``step`` (from 1, over all phases), ``phase``, ``loss`` (mean squared error), ``psnr`` (dB, capped),
    ``aux_loss``, ``accuracy`` (of VR on the batch), ``cosine``, ``gate``, ``skipped``, ``lr`` (of IP). Empty cells:
    the strategy has no such thing.

    :param path: the file; one that is there is continued.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[tuple[int, Phase, tuple[str, ...], Tensor, float]] = []

    def add(self, step: int, phase: Phase, log: StepLog, psnr: Tensor | None, lr: float) -> None:
        """Notes a step without waiting for the device."""
        values = {**log._asdict(), "psnr": psnr}
        measured = tuple(name for name in MEASURED if values[name] is not None)
        self._waiting.append((step, phase, measured, torch.stack([values[name].float() for name in measured]), lr))

    def flush(self) -> Row:
        """Reads the noted steps back in one transfer and appends them to the file.

        :returns: for each thing that was measured, its mean over these steps, steps where it was not finite left out
            (NaN if it never was); empty if no step waits.
        :raises RunError: the file cannot be written; the message names it.
        """
        if not self._waiting:
            return {}
        values = iter(torch.cat([cells for *_, cells, _ in self._waiting]).tolist())
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        finite: dict[str, list[float]] = {}
        for step, phase, measured, _, lr in self._waiting:
            cells = {name: next(values) for name in measured}
            writer.writerow(
                {"step": step, "phase": phase, "lr": f"{lr:.9g}"} | {k: f"{v:.9g}" for k, v in cells.items()}
            )
            for name, value in cells.items():
                finite.setdefault(name, []).extend([value] if math.isfinite(value) else [])
        try:
            with self.path.open("a", newline="") as file:
                if not file.tell():
                    file.write(HEADER)
                file.write(text.getvalue())
        except OSError as error:
            raise RunError(f"the step log {self.path} cannot be written: {error.strerror}") from error
        self._waiting.clear()
        return {name: sum(some) / len(some) if some else math.nan for name, some in finite.items()}

    def truncate(self, step: int) -> None:
        """Forgets everything after ``step``: what a run did after its last checkpoint, it will do again."""
        self._waiting.clear()
        if not self.path.exists():
            return
        rows = self.path.read_text().splitlines(keepends=True)[1:]
        # A line without an end was cut off: its number may be, too.
        kept = [row for row in rows if row.endswith("\n") and int(row.split(",", 1)[0]) <= step]
        with atomic_file(self.path) as file:
            file.write("".join([HEADER, *kept]).encode())

    def columns(self) -> dict[str, np.ndarray]:
        """What was measured, ``float64 [steps]`` each, NaN in empty cells; with the column ``step``."""
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in ("step", *MEASURED)}
