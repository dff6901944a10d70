"""The per-step log ``steps.csv``: measured on the device, read back and written a few steps at a time."""

from __future__ import annotations

import csv
import io
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.errors import RunError, reason
from train.files import write_file
from train.strategies.base import Measure, Measurements

Row = dict[str, float]
"""Numbers by the names of columns."""

PERFORMANCE = ("images_per_s", "memory_mib")
"""Columns that say how fast the machine was: no two runs have the same numbers here, and a run that goes on after an
interruption is not held to them."""
_BEGIN, _LR = ("step", "phase"), "lr"
# Columns, or what their names begin with, that logs of earlier versions lack.
_YOUNGER = ("main_norm", "aux_norm", *PERFORMANCE)
MOST_ROWS = 1024  # of a ring: who looks less often has them read back in between
_STATM = Path("/proc/self/statm")


class Ring:
    """Rows of numbers that a device writes and the host reads later, so that neither waits for the other.

    The device writes a row, and copies the rows to page-locked memory of the host, in one stream: no row is written
    over before it has been copied. The host waits for nothing but the last copy, which has long arrived when the next
    one is about to be sent. On the CPU the rows are where they are read.

    :param device: that the numbers are on.
    :param length: rows between two copies.
    :param width: of the longest row.
    """

    def __init__(self, device: torch.device, length: int, width: int) -> None:
        self.length = length
        self._there = torch.zeros(length, width, device=device)
        self._here, self._arrived = self._there, None
        if device.type == "cuda":
            self._here = torch.zeros(length, width, pin_memory=True)
            self._arrived = torch.cuda.Event()

    @property
    def at_once(self) -> bool:
        """Whether what is sent is there: nothing is gained by reading it later."""
        return self._arrived is None

    def put(self, place: int, values: Sequence[Tensor]) -> None:
        """Writes a row.

        :param values: any real numbers, ``[]`` on the device; they become float32.
        """
        torch.stack([value.float() for value in values], out=self._there[place, : len(values)])

    def send(self, rows: int) -> None:
        """Begins to copy the first rows to the host."""
        if self._arrived is not None:
            self._here[:rows].copy_(self._there[:rows], non_blocking=True)
            self._arrived.record()

    def receive(self, rows: int) -> list[list[float]]:
        """The rows as they were when they were sent."""
        if self._arrived is not None:
            self._arrived.synchronize()
        found: list[list[float]] = self._here[:rows].tolist()
        return found


class Clock:
    """Tells how long a device took between two moments of its work; on a GPU, of its stream."""

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"

    def now(self) -> Any:
        """This moment."""
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, second: Any) -> float:
        """Seconds; both moments have passed."""
        return first.elapsed_time(second) / 1000 if self._events else second - first


class _Noted(NamedTuple):
    """A step whose measurements are in the ring."""

    step: int
    phase: str
    measured: tuple[str, ...]
    lr: float
    begun: Any
    ended: Any


class StepLog:
    """``steps.csv`` with a ring of steps that were not read back yet.

    Columns: ``step`` (from 1, over all phases), ``phase``, what the strategy measures, ``lr`` (of the main network),
    ``images_per_s`` (of this step, with all that it waited for) and ``memory_mib`` (on a GPU the most that was
    allocated so far, else what the process has resident; at the time of reading back). Empty cells: the phase has no
    such thing.

    :param path: the file.
    :param measures: what is measured.
    :param device: where it is measured.
    :param every: steps that may be noted between two :meth:`flush`; further ones are read back without being asked.
    :param batch_size: images per step.
    """

    def __init__(
        self,
        path: Path,
        measures: Sequence[Measure],
        *,
        device: torch.device | str = "cpu",
        every: int = 10,
        batch_size: int = 1,
    ) -> None:
        self.path = path
        self.measured = tuple(each.name for each in measures)
        self.columns: tuple[str, ...] = (*_BEGIN, *self.measured, _LR, *PERFORMANCE)
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._ring = Ring(self.device, min(every, MOST_ROWS), len(measures))
        self._clock = Clock(self.device)
        self._last = self._clock.now()
        self._noted: list[_Noted] = []
        self._sent: list[_Noted] = []
        self._written: list[Row] = []

    def begin(self) -> None:
        """The next step begins now: what came before takes no part in its speed."""
        self._last = self._clock.now()

    def add(self, step: int, phase: str, found: Measurements, lr: float) -> None:
        """Notes a step without waiting for the device.

        :param phase: its name.
        :raises ValueError: something was measured that the strategy had not declared.
        :raises RunError: as :meth:`flush`.
        """
        if undeclared := set(found) - set(self.measured):
            raise ValueError(f"the strategy measured {', '.join(sorted(undeclared))} without declaring it")
        if len(self._noted) == self._ring.length:
            self._pass_on()
        measured = tuple(name for name in self.measured if name in found)
        self._ring.put(len(self._noted), [found[name] for name in measured])
        begun, self._last = self._last, self._clock.now()
        self._noted.append(_Noted(step, phase, measured, lr, begun, self._last))

    def flush(self, *, wait: bool = True) -> list[Row]:
        """Reads noted steps back and appends them to the file.

        :param wait: ``False``: a GPU may keep those that were noted since the last flush until the next one.
        :returns: the numbers of the steps that were written since the last flush, in their order, with ``step``;
            without those that the phase does not measure.
        :raises RunError: the file cannot be written; the message names it.
        """
        self._pass_on()
        if wait:
            self._receive()
        written, self._written = self._written, []
        return written

    def _pass_on(self) -> None:
        """Receives what was sent, and sends what was noted."""
        self._receive()
        self._ring.send(len(self._noted))
        self._sent, self._noted = self._noted, []
        if self._ring.at_once:
            self._receive()

    def _receive(self) -> None:
        """Appends what was sent to the file."""
        if not self._sent:
            return
        memory = memory_mib(self.device)
        rows: list[Row] = []
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        for noted, values in zip(self._sent, self._ring.receive(len(self._sent)), strict=True):
            seconds = max(self._clock.between(noted.begun, noted.ended), 1e-9)
            row = dict(zip(noted.measured, values, strict=False)) | {
                "lr": noted.lr,
                "images_per_s": self.batch_size / seconds,
                "memory_mib": memory,
            }
            cells = {name: f"{value:.9g}" for name, value in row.items() if name not in PERFORMANCE}
            cells |= {"images_per_s": f"{row['images_per_s']:.5g}"}
            cells |= {"memory_mib": f"{memory:.1f}" if math.isfinite(memory) else ""}
            writer.writerow({"step": noted.step, "phase": noted.phase} | cells)
            rows.append({"step": noted.step} | row)
        try:
            with self.path.open("a", newline="") as file:
                if not file.tell():
                    file.write(_header(self.columns))
                file.write(text.getvalue())
        except OSError as error:
            raise RunError(f"the step log {self.path} cannot be written: {reason(error)}") from error
        self._sent = []
        self._written += rows

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
        """Forgets everything after ``step``: what a run did after its last checkpoint, it will do again. A log that an
        earlier version began keeps the columns that it has.

        :raises RunError: the file cannot be written, or it does not hold the steps 1 to ``step``; the message names
            the line.
        """
        self._noted, self._sent, self._written = [], [], []
        text = _text(self.path, missing_is_empty=step == 0)
        found = _columns(text)
        lacks = [name for name in self.columns if name not in found]
        if found == tuple(name for name in self.columns if name in found) and all(
            name.startswith(_YOUNGER) for name in lacks
        ):
            self.columns = found
        rows = _rows(self.path, text, self.columns, step)
        write_file(self.path, "".join([_header(self.columns), *(f"{','.join(row)}\n" for row in rows)]).encode())

    def read(self, phase: str | None = None) -> dict[str, np.ndarray]:
        """What is in the file, see :func:`read_steps`."""
        return read_steps(self.path, phase)


def memory_mib(device: torch.device) -> float:
    """Memory in MiB: on a GPU the most that was allocated at once so far, else what this process has resident; NaN
    where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return math.nan
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def means(rows: Sequence[Row]) -> Row:
    """For each thing that was measured, its mean over some steps, those left out where it was not finite (NaN if it
    never was). Of ``images_per_s`` the harmonic mean, as all steps have as many images.

    >>> means([{"step": 1, "loss": 1.0, "images_per_s": 10.0}, {"step": 2, "loss": 3.0, "images_per_s": 40.0}])
    {'loss': 2.0, 'images_per_s': 16.0}
    """
    finite: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            finite.setdefault(name, []).extend([value] if math.isfinite(value) else [])
    found = {name: sum(some) / len(some) if some else math.nan for name, some in finite.items() if name != "step"}
    if rates := finite.get("images_per_s"):
        found["images_per_s"] = len(rates) / sum(1 / rate for rate in rates)
    return found


def read_steps(path: Path, phase: str | None = None) -> dict[str, np.ndarray]:
    """What a step log holds, of this version or an earlier one: its columns but for ``phase``, ``float64 [steps]``
    each, NaN in empty cells.

    :param phase: only in the phase of this name.
    :raises RunError: the file cannot be read, is no step log, or has been damaged; the message names the line.
    """
    text = _text(path)
    columns = _columns(text)
    if columns[:2] != _BEGIN or _LR not in columns:
        raise RunError(f"{path} is no step log: it must begin with the columns step and phase, and have one that is lr")
    rows = [dict(zip(columns, row, strict=True)) for row in _rows(path, text, columns)]
    rows = [row for row in rows if phase in (None, row["phase"])]
    return {name: np.array([float(row[name] or "nan") for row in rows]) for name in columns if name != "phase"}


def _header(columns: Sequence[str]) -> str:
    return ",".join(columns) + "\n"


def _columns(text: str) -> tuple[str, ...]:
    """What a log says that it has."""
    return tuple(next((line.strip() for line in text.split("\n") if line.strip()), "").split(","))


def _text(path: Path, *, missing_is_empty: bool = False) -> str:
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        if missing_is_empty and isinstance(error, FileNotFoundError):
            return ""
        raise RunError(f"the step log {path} cannot be read: {reason(error)}") from error


def _rows(path: Path, text: str, columns: Sequence[str], until: int | None = None) -> list[list[str]]:
    """The cells of the steps 1, 2, ... in the file; blank lines, line ends and byte order marks do not matter.

    :param text: its content.
    :param until: the last step that is wanted, and must be there; what follows may be cut off, and is not read.
    :raises RunError: see :meth:`StepLog.truncate`.
    """

    def damaged(line: int, what: str) -> RunError:
        return RunError(f"the step log {path} is damaged at line {line}: {what}; restore it, or start a new run")

    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[list[str]] = []
    header = _header(columns).strip()
    if (lines or until) and (not lines or lines[0][1] != header):
        raise damaged(1, f"it must be the header {header}")
    for number, line in lines[1:]:
        if until is not None and len(rows) == until:
            break
        cells = line.split(",")
        if cells[0] != str(len(rows) + 1):
            raise damaged(number, f"it must be that of step {len(rows) + 1}, and begins with {cells[0]!r}")
        if len(cells) != len(columns):
            raise damaged(number, f"it has {len(cells)} cells instead of {len(columns)}")
        for name, cell in zip(columns, cells, strict=True):
            if name != "phase" and cell and not _is_number(cell):
                raise damaged(number, f"{name} is {cell!r}")
        rows.append(cells)
    if until is not None and len(rows) < until:
        raise damaged(
            len(text.splitlines()) + 1, f"the steps {len(rows) + 1} to {until}, which the checkpoint has, are missing"
        )
    return rows


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
