"""The per-step log ``steps.csv``: measured on the device, read back and written a few steps at a time."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train.errors import RunError, reason
from train.files import write_file
from train.strategies.base import Measure, Measurements

Row = dict[str, float]


class StepLog:
    """``steps.csv`` with a buffer of steps that were not read back yet.

    Columns: ``step`` (from 1, over all phases), ``phase``, what the strategy measures, ``lr`` (of the main network).
    Empty cells: the phase has no such thing.

    :param path: the file; one that is there is continued.
    :param measures: of the strategy.
    """

    def __init__(self, path: Path, measures: Sequence[Measure]) -> None:
        self.path = path
        self.measured = tuple(each.name for each in measures)
        self.columns = ("step", "phase", *self.measured, "lr")
        self.header = ",".join(self.columns) + "\n"
        self._waiting: list[tuple[int, str, tuple[str, ...], Tensor, float]] = []

    @classmethod
    def left_by_a_run(cls, path: Path) -> StepLog:
        """The log that a run has left, with the columns that it has.

        :raises RunError: the file cannot be read, or is none.
        """
        try:
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                columns = file.readline().strip().split(",")
        except OSError as error:
            raise RunError(f"the step log {path} cannot be read: {reason(error)}") from error
        if (columns[:2], columns[2:][-1:]) != (["step", "phase"], ["lr"]):
            raise RunError(f"{path} is no step log: it must begin with the columns step and phase, and end with lr")
        return cls(path, [Measure(name) for name in columns[2:-1]])

    def add(self, step: int, phase: str, found: Measurements, lr: float) -> None:
        """Notes a step without waiting for the device.

        :param phase: its name.
        :raises ValueError: something was measured that the strategy had not declared.
        """
        if undeclared := set(found) - set(self.measured):
            raise ValueError(f"the strategy measured {', '.join(sorted(undeclared))} without declaring it")
        measured = tuple(name for name in self.measured if name in found)
        self._waiting.append((step, phase, measured, torch.stack([found[name].float() for name in measured]), lr))

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
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
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
                    file.write(self.header)
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
        write_file(self.path, "".join([self.header, *(f"{','.join(row)}\n" for row in rows)]).encode())

    def read(self, phase: str | None = None) -> dict[str, np.ndarray]:
        """What was measured, ``float64 [steps]`` each, NaN in empty cells; with the column ``step``.

        :param phase: only in the phase of this name.
        :raises RunError: the file has been damaged; the message names the line.
        """
        rows = [dict(zip(self.columns, row, strict=True)) for row in self._rows()]
        rows = [row for row in rows if phase in (None, row["phase"])]
        return {name: np.array([float(row[name] or "nan") for row in rows]) for name in ("step", *self.measured)}

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
        if (lines or until) and (not lines or lines[0][1] != self.header.strip()):
            raise self._damaged(1, f"it must be the header {self.header.strip()}")
        for number, line in lines[1:]:
            if until is not None and len(rows) == until:
                break
            cells = line.split(",")
            if cells[0] != str(len(rows) + 1):
                raise self._damaged(number, f"it must be that of step {len(rows) + 1}, and begins with {cells[0]!r}")
            if len(cells) != len(self.columns):
                raise self._damaged(number, f"it has {len(cells)} cells instead of {len(self.columns)}")
            for name, cell in zip(self.columns, cells, strict=True):
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
