"""File after file, in this process or in several: a damaged one is named and the others go on, and a stop leaves whole
files alone."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from typing import Any

import numpy as np
import torch

from train.enhancement.finished import FinishedRun
from train.enhancement.network import Enhancer, Options, spread, window_of
from train.enhancement.noise import estimate, middle, mismatch, typical
from train.enhancement.plan import Job
from train.enhancement.record import Record
from train.errors import RunError, reason
from train.interruption import Stop
from train.scans import open_scan
from train.scans.base import Derivation
from train.threads import threads_each

FULL = (errno.ENOSPC, errno.EDQUOT)
PAUSE = 0.1  # seconds between two looks at whether a stop is asked for


@dataclass(frozen=True)
class Order:
    """What is asked for, of every file alike.

    :param derivation: what is written into the files.
    :param device: the name of the one to compute on.
    """

    run: FinishedRun
    options: Options
    derivation: Derivation
    device: str


@dataclass(frozen=True)
class Outcome:
    """What became of a file.

    :param error: why it could not be enhanced; empty where it was.
    :param full: whether the disk is full, so that no other file can be written either.
    :param stopped: whether a stop was asked for meanwhile; nothing was written.
    :param facts: what is known of an enhanced file, as JSON values.
    """

    job: Job
    error: str = ""
    full: bool = False
    stopped: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Stopped(Exception):
    """A stop was asked for in the midst of a file."""


def enhance_file(
    enhancer: Enhancer, order: Order, job: Job, pause: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Enhances one file.

    :param pause: called between tiles; it may raise.
    :returns: what is known of it, as JSON values.
    :raises DataError: the file is damaged, or not for this network.
    :raises OSError: it cannot be read, or the result cannot be written.
    """
    begun = time.monotonic()
    scan = open_scan(job.source)
    window = window_of(order.options.window, scan)
    looked_at = spread(scan.frames)
    before: list[float | None] = []
    after: list[float | None] = []

    def noise(image: np.ndarray) -> float | None:
        return estimate(enhancer.seen(middle(image), window))

    def frames() -> Iterator[np.ndarray]:
        for number in range(scan.frames):
            image = np.require(scan.read(number), np.float32, ["C", "W"])
            if number in looked_at:
                before.append(noise(image))
            result = enhancer.frame(image, window, pause)
            del image  # a large one is not kept while the next one is read
            if number in looked_at:
                after.append(noise(result))
            yield result

    job.target.parent.mkdir(parents=True, exist_ok=True)
    scan.write(job.target, frames(), order.derivation)
    height, width = scan.size(0)
    noise_before = typical(before)
    warnings = [mismatch(noise_before, order.run.sigma)]
    if window[0] == window[1]:
        warnings.append("one value all over, left as it is")
    elif enhancer.needs_tiles((height, width)) and enhancer.sees_all:
        warnings.append("done in tiles, though the network looks at an image as a whole: tiles fade into each other")
    return {
        "format": scan.format,
        "frames": scan.frames,
        "size": [height, width],
        "window": list(window),
        "noise before": noise_before,
        "noise after": typical(after),
        "warnings": [each for each in warnings if each],
        "seconds": round(time.monotonic() - begun, 2),
    }


def attempt(enhancer: Enhancer, order: Order, job: Job, pause: Callable[[], None]) -> Outcome:
    """Enhances one file, or says why that cannot be."""
    try:
        return Outcome(job, facts=enhance_file(enhancer, order, job, pause))
    except Stopped:
        return Outcome(job, stopped=True)
    except OSError as error:
        return Outcome(job, reason(error), full=error.errno in FULL)
    except RunError as error:
        return Outcome(job, str(error))
    except MemoryError:
        return Outcome(job, "too little memory")
    except Exception as error:  # decoders raise whatever they like about damaged files
        return Outcome(job, f"{type(error).__name__}: {error}")


def carry_out(
    enhancer: Enhancer, order: Order, jobs: Sequence[Job], record: Record | None, *, at_once: int, stop: Stop
) -> Iterator[Outcome]:
    """Enhances files, as they are done.

    :param enhancer: for files that are enhanced in this process.
    :param record: is told what is begun and done.
    :param at_once: how many at once, each in a process of its own where there are several.
    :param stop: is looked at between tiles; what was begun is then given up.
    """
    outcomes = (
        _in_turn(enhancer, order, jobs, record, stop)
        if at_once == 1
        else _side_by_side(order, jobs, record, at_once, stop)
    )
    for outcome in outcomes:
        if record is not None and outcome.facts:
            record.finish(outcome.job, outcome.facts)
        yield outcome
        if outcome.full:
            break


def _begun(job: Job, record: Record | None) -> None:
    if record is not None:
        record.begin(job)
    # What a process that was killed has left of it.
    for each in job.target.parent.glob(f".{glob.escape(job.target.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            each.unlink()


def _in_turn(
    enhancer: Enhancer, order: Order, jobs: Sequence[Job], record: Record | None, stop: Stop
) -> Iterator[Outcome]:
    def pause() -> None:
        if stop.requested:
            raise Stopped

    for job in jobs:
        if stop.requested:
            return
        _begun(job, record)
        yield attempt(enhancer, order, job, pause)


def _side_by_side(
    order: Order, jobs: Sequence[Job], record: Record | None, at_once: int, stop: Stop
) -> Iterator[Outcome]:
    context = get_context("spawn")  # a process that is forked would share PyTorch's threads
    stopped = context.Event()
    queue = list(reversed(jobs))
    threads = threads_each(at_once)
    while queue and not stop.requested:
        started = (order, stopped, threads)
        waiting: dict[Future[Outcome], Job] = {}
        with ProcessPoolExecutor(at_once, context, _start, started) as pool:
            try:
                yield from _pooled(pool, queue, waiting, record, at_once, stop, stopped.set)
            except BrokenProcessPool:
                time.sleep(PAUSE)  # a system that sends SIGTERM to all processes may not have come to this one yet
                if stop.requested:
                    return
                told = "its process was ended from outside, perhaps for lack of memory; give fewer --jobs"
                for job in waiting.values():
                    yield Outcome(job, told)
            except GeneratorExit:  # nothing more is wanted
                stopped.set()
                raise


def _pooled(
    pool: Executor,
    queue: list[Job],
    waiting: dict[Future[Outcome], Job],
    record: Record | None,
    at_once: int,
    stop: Stop,
    tell: Callable[[], None],
) -> Iterator[Outcome]:
    """Has a pool work on a queue from its end until it is empty, a stop is asked for, or the pool breaks.

    :param waiting: is kept up to date: what the pool is working on.
    :param tell: tells the processes of a stop.
    """
    while waiting or (queue and not stop.requested):
        while queue and len(waiting) < at_once and not stop.requested:
            _begun(queue[-1], record)
            future = pool.submit(_do, queue[-1])
            waiting[future] = queue.pop()
        if stop.requested:
            tell()
        done, _ = wait(waiting, timeout=PAUSE, return_when=FIRST_COMPLETED)
        # What was done before the pool broke is not taken for lost.
        for future in sorted(done, key=lambda each: each.exception() is not None):
            outcome = future.result()
            del waiting[future]
            yield outcome


# ----------------------------------------------------------------------------------------------------------------------
# In a process of its own


@dataclass(frozen=True)
class _Worker:
    enhancer: Enhancer
    order: Order
    pause: Callable[[], None]


_worker: _Worker | None = None


def _start(order: Order, stopped: Any, threads: int) -> None:
    """Makes the network, once for all files of the process."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one tells the others
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)

    def pause() -> None:
        if stopped.is_set():
            raise Stopped

    _worker = _Worker(Enhancer(order.run, order.options, torch.device(order.device)), order, pause)


def _end_with(parent: Any) -> None:
    """A process whose parent was killed would wait for work for ever."""
    parent.join()
    os._exit(1)


def _do(job: Job) -> Outcome:
    assert _worker is not None
    return attempt(_worker.enhancer, _worker.order, job, _worker.pause)
