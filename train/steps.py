"""The per-step log ``steps.csv``: measured on the device, read back and written a few steps at a time."""

from __future__ import annotations

import csv
import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.errors import RunError, reason
from train.files import write_file
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
            raise RunError(f"the step log {self.path} cannot be written: {reason(error)}") from error
        self._waiting.clear()
        return {name: sum(some) / len(some) if some else math.nan for name, some in finite.items()}

    def sync(self) -> None:
        """Returns once what was written so far will survive a power cut.

        :raises RunError: the disk says no.
        """
        try:
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"the step log {self.path} cannot be written: {reason(error)}") from error

    def truncate(self, step: int) -> None:
        """Forgets everything after ``step``: what a run did after its last checkpoint, it will do again.

        :raises RunError: the file cannot be written, or it does not hold the steps 1 to ``step``; the message names
            the line.
        """
        self._waiting.clear()
        rows = self._rows(step)
        write_file(self.path, "".join([HEADER, *(f"{','.join(row)}\n" for row in rows)]).encode())

    def columns(self) -> dict[str, np.ndarray]:
        """What was measured, ``float64 [steps]`` each, NaN in empty cells; with the column ``step``.

        :raises RunError: the file has been damaged; the message names the line.
        """
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in self._rows()]
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in ("step", *MEASURED)}

    def _rows(self, until: int | None = None) -> list[list[str]]:
        """The cells of the steps 1, 2, ... in the file; blank lines, line ends and byte order marks do not matter.

        :param until: the last step that is wanted, and must be there; what follows may be cut off, and is not read.
        :raises RunError: see :meth:`truncate`.
        """
        try:
            text = self.path.read_text(encoding="utf-8-sig", errors="replace")
        except OSError as error:
            if until == 0 and isinstance(error, FileNotFoundError):
                return []
            raise RunError(f"the step log {self.path} cannot be read: {reason(error)}") from error
        lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows: list[list[str]] = []
        if (lines or until) and (not lines or lines[0][1] != HEADER.strip()):
            raise self._damaged(1, f"it must be the header {HEADER.strip()}")
        for number, line in lines[1:]:
            if until is not None and len(rows) == until:
                break
            cells = line.split(",")
            if cells[0] != str(len(rows) + 1):
                raise self._damaged(number, f"it must be that of step {len(rows) + 1}, and begins with {cells[0]!r}")
            if len(cells) != len(COLUMNS):
                raise self._damaged(number, f"it has {len(cells)} cells instead of {len(COLUMNS)}")
            for name, cell in zip(COLUMNS, cells, strict=True):
                if name != "phase" and cell and not _is_number(cell):
                    raise self._damaged(number, f"{name} is {cell!r}")
            rows.append(cells)
        if until is not None and len(rows) < until:
            raise self._damaged(
                len(text.splitlines()) + 1,
                f"the steps {len(rows) + 1} to {until}, which the checkpoint has, are missing",
            )
        return rows

    def _damaged(self, line: int, what: str) -> RunError:
        return RunError(f"the step log {self.path} is damaged at line {line}: {what}; restore it, or start a new run")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
