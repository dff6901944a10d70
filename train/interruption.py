"""Signals that ask a command to stop: SIGINT (Ctrl-C), and SIGTERM, as clusters send it before they kill.

The first one is a request: what is under way is brought to a state from which the same command goes on, and the exit
status is 130 or 143, as shells have it. The second one ends the process at once.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from train.errors import INTERRUPTED, TERMINATED

_STATUS: dict[int, int] = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nothing waits for a request to stop."""


class Stop:
    """Whether the user (or the system) has asked to stop.

    :ivar status: the exit status that says so.
    """

    requested = False
    status = INTERRUPTED

    def error(self) -> KeyboardInterrupt:
        """What to raise where nothing else can be done about a request."""
        return Terminated() if self.status == TERMINATED else KeyboardInterrupt()


def status_of(error: KeyboardInterrupt) -> int:
    """The exit status of a command that an error has ended."""
    return TERMINATED if isinstance(error, Terminated) else INTERRUPTED


def same_command() -> str:
    """The command line of this process, for a shell."""
    return shlex.join(sys.orig_argv)


_stops: list[Stop] = []  # those that wait for a request in this process
_asked = False  # whether a signal has asked the command to stop


@contextlib.contextmanager
def stop_on_signal(tell: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """While the block runs, the first SIGINT or SIGTERM is a request, to be met between two steps; the second one has
    its usual effect. Outside the main thread, where Python takes no signals, nothing happens.

    :param tell: called with the request, in the midst of anything.
    """
    stop = Stop()
    usual: dict[int, Any] = {}

    def request(number: int, frame: FrameType | None) -> None:
        global _asked
        _asked = True
        stop.status = _STATUS[number]
        stop.requested = True
        for each, handler in usual.items():
            signal.signal(each, handler)
        tell()

    if threading.current_thread() is threading.main_thread():
        for number in _STATUS:
            usual[number] = signal.signal(number, request)
    _stops.append(stop)
    try:
        yield stop
    finally:
        _stops.remove(stop)
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_of_a_command() -> Iterator[None]:
    """While the block runs, which is all that a process is for, SIGTERM is raised as :class:`Terminated`, as SIGINT is
    as ``KeyboardInterrupt``, and the second signal ends the process at once, whatever it is doing."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        global _asked
        if _asked:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _asked = True
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    _asked = False
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # behind a shell's &
    numbers = [signal.SIGTERM] if ignored else list(_STATUS)
    usual = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------------
# In a process that works for another one

_GRACE = 2.0  # seconds for what a process has found out to reach the other one
_told = threading.Event()  # whether the other one has asked for a stop or has died, or the system has
_working = threading.Lock()


def follow(asked: Connection) -> None:
    """Has this process stop its work, and end, when the process that it works for is asked to stop or has died.

    SIGTERM means the same, as often as it comes: systems send it to every process of a command, and a pool of processes
    to all of it when one has died.

    :param asked: the reading end of a pipe whose writing end the other process alone has, and closes when it is asked
        to stop. The operating system closes it should that process be killed.
    """

    def tell(*_: Any) -> None:
        with contextlib.suppress(OSError):
            asked.poll(None)  # until the end of the pipe
        _told.set()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    signal.signal(signal.SIGTERM, lambda *_: _told.set())
    threading.Thread(target=tell, daemon=True).start()
    threading.Thread(target=_end, daemon=True).start()


@contextlib.contextmanager
def work() -> Iterator[None]:
    """A piece of the work of a process that follows another one.

    :raises Terminated: it is not to be begun any more, or not to be gone on with.
    """

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, usual)
        _told.set()
        raise Terminated

    with _working:
        usual = signal.signal(signal.SIGTERM, terminate)
        try:
            if _told.is_set():
                raise Terminated
            yield
        finally:
            signal.signal(signal.SIGTERM, usual)


def _end() -> None:
    _told.wait()
    if _stops:  # between two steps of a training
        for stop in _stops:
            stop.status = TERMINATED
            stop.requested = True
    elif _working.locked():
        _thread.interrupt_main(signal.SIGTERM)
    with _working:
        time.sleep(_GRACE)
        os._exit(TERMINATED)
