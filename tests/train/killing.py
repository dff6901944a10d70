"""Commands in processes that are cheap to start and to kill.

:class:`Commands` starts this module once; it imports everything, and forks for each command. A command can be killed
(SIGKILL, by itself) right before its nth event, where an event is whatever touches the disk: a file is opened, renamed,
linked, removed or synchronized, a folder is made.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def count_events(below: str, reached: Callable[[int, str], None]) -> None:
    """From now on, calls ``reached`` with a number and a name before each event in a folder. Nothing undoes that."""
    number = 0

    def event(name: str) -> None:
        nonlocal number
        number += 1
        reached(number, name)

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in EVENTS and str(arguments[0]).startswith(below):
            event(f"{name} {arguments[0]}")

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        event("fsync")
        sync(descriptor)

    os.fsync = fsync
    sys.addaudithook(hook)


def die(*_: Any) -> None:
    """Ends the process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Command:
    """A command under way."""

    def __init__(self, server: subprocess.Popen[str], pid: int, log: Path) -> None:
        self.server, self.pid, self.log, self.ended = server, pid, log, False

    def wait_for(self, told: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 400
        while not told():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def status(self) -> int:
        """Waits for the end; minus the number of the signal that ended it."""
        self.ended = True
        return int(self.server.stdout.readline())


class Commands:
    """Starts commands, one after the other: ``run``, ``pretrain`` or ``compare`` of ``train``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: Command | None = None
        environment = os.environ | {"GRADPROM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.train.killing"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def start(
        self, command: str, argv: list[str], *, kill_at: int | None = None, longest: int | None = None
    ) -> Command:
        """
        :param kill_at: the number of the event under ``folder/out`` before which the command is killed.
        :param longest: how many bytes a file may have: writing more fails as on a full disk.
        """
        log = self.folder / "log.txt"
        order = {
            "command": command,
            "argv": argv,
            "kill_at": kill_at,
            "longest": longest,
            "folder": str(self.folder / "out"),
            "log": str(log),
        }
        self.end()
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        self.last = Command(self.server, int(self.server.stdout.readline()), log)
        return self.last

    def end(self) -> None:
        """Ends a command that nobody has waited for: its test has failed."""
        if self.last is not None and not self.last.ended:
            self.last.send(signal.SIGKILL)
            self.last.status()

    def run(self, command: str, argv: list[str], **how: int | None) -> tuple[int, str]:
        """Status and output of a whole command."""
        started = self.start(command, argv, **how)
        return started.status(), started.log.read_text()


@contextmanager
def commands(folder: Path) -> Iterator[Commands]:
    started = Commands(folder)
    try:
        yield started
    finally:
        started.end()
        started.server.stdin.close()
        started.server.wait(timeout=120)


def _do(order: dict[str, Any]) -> int:
    from train import compare, pretrain, run

    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if order["longest"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["longest"], resource.RLIM_INFINITY))
    last = order["kill_at"]
    if last is not None:
        count_events(order["folder"], lambda number, _: die() if number == last else None)
    return {"run": run, "pretrain": pretrain, "compare": compare}[order["command"]].main(order["argv"])


def _serve() -> None:
    import torch

    import train.experiment
    import train.run
    from tests.train import test_compare, tiny  # noqa: F401  (they register what the commands use)
    from train.comparison import execute, write
    from train.files import write_file

    def draw(data: Any, experiment: Any, engine: Any, evaluation: Any, folder: Any, name: str) -> None:
        for path in (folder.panel, folder.gate):  # pictures take seconds
            write_file(path, b"a picture")

    train.experiment.draw = draw
    write.draw = lambda *_: ([], [])
    execute.cores = lambda: 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:  # what is imported late is imported once
        warm = ["--out", f"{scratch}/out", "--max-steps", "2"]
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            assert train.run.main([*tiny.arguments(), *warm]) == 0
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                status = _do(json.loads(line))
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    _serve()
