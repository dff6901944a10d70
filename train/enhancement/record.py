"""What OUTPUT knows of itself: by which run and options its files were made, which were begun and which are done.

A file of JSON lines, so that a line is all that a further file costs, and a process that is killed spoils no more than
the line it was writing. A file is written down before it is begun: what has the name of one that was begun is ours.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.enhancement.plan import Job
from train.errors import RunError, reason
from train.files import locked, write_file

NAME = "enhanced.jsonl"


class Record:
    """The record of an OUTPUT folder, which this process has to itself.

    :param folder: OUTPUT.
    :param facts: what makes files of one run and other options another thing, as JSON values.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.path = folder / NAME
        self.facts = dict(facts)
        self.begun: set[str] = set()
        self.done: dict[str, dict[str, Any]] = {}
        self._torn = 0

    def read(self) -> None:
        """Reads what earlier processes have written.

        :raises RunError: another run or other options wrote it, or it is damaged.
        """
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {reason(error)}") from error
        self._torn = len(lines.pop())  # what a killed process did not write to its end
        try:
            first, *others = [json.loads(line) for line in lines] or [self.facts]
            self.begun, self.done = set(), {}
            for each in others:
                self.begun.add(each["file"])
                if "done" in each:
                    self.done[each["file"]] = each
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.path} is damaged ({error}); give another OUTPUT") from error
        if first != self.facts:
            what = [name for name in {**self.facts, **first} if first.get(name) != self.facts.get(name)]
            told = "; ".join(f"{name} was {first.get(name)}, and is {self.facts.get(name)}" for name in what)
            raise RunError(
                f"{self.path.parent} holds what was enhanced in another way ({told}); give another OUTPUT, or the same "
                "run and options to go on"
            )

    def left(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that are not done, or whose source is another one by now.

        :raises RunError: a file that is none of ours has the name of one that is to be written.
        """
        left = []
        for job in jobs:
            there = os.path.lexists(job.target)
            if there and job.name not in self.begun:
                raise RunError(
                    f"{job.target} is there already, and was not written by an earlier run of this command; move it "
                    "away, or give another OUTPUT"
                )
            done = self.done.get(job.name)
            if not (there and done and done["source"] == job.stamp):
                left.append(job)
        return left

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder and keeps other processes out of it while the block runs.

        :raises RunError: it cannot be written, or another process is at work in it.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"OUTPUT {folder} cannot be made: {reason(error)}") from error
        with locked(folder):
            self.read()  # another process may have gone on just before
            if not self.path.exists():
                write_file(self.path, _line(self.facts))
            elif self._torn:
                os.truncate(self.path, self.path.stat().st_size - self._torn)
            yield

    def begin(self, job: Job) -> None:
        """Writes down that a file is about to be written."""
        self._add({"file": job.name})

    def finish(self, job: Job, facts: Mapping[str, Any]) -> None:
        """Writes down that a file is done.

        :param facts: what is known of it, as JSON values.
        """
        line = {"file": job.name, "source": job.stamp, "done": dict(facts)}
        self._add(line)
        self.done[job.name] = line

    def _add(self, line: Mapping[str, Any]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(_line(line))
        except OSError as error:
            raise RunError(f"{self.path} cannot be written: {reason(error)}") from error


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
