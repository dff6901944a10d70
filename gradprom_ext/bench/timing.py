"""Clocks for the CPU and for a GPU, and the order in which contestants take turns."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from .. import _torch

Step = Callable[[], object]
Watch = Callable[[], float]  #: runs something once and returns its seconds
T = TypeVar("T")
K = TypeVar("K")  #: a contestant's name

#: A sample on a GPU covers at least this many seconds of work, so that the clock's grain does not matter.
SAMPLE_SECONDS = 1e-3
#: What the host gets, beside twice the time it took before, to queue a sample while the GPU is held back.
HEAD_START_SECONDS = 1e-4
#: Of a GPU, about; with a slower clock it is held back longer, which costs nothing but time.
CYCLES_PER_SECOND = 2e9
#: Steps that the host queues between two synchronisations: few enough for the queue never to be full.
QUEUED_STEPS = 10


def laps(parts: Sequence[Step], device: torch.device) -> Callable[[], list[float]]:
    """A function that runs ``parts`` in their order and returns the seconds of each.

    On the CPU by the clock. On a GPU by events on the current stream, which is empty at the start and awaited at the
    end: the time the device takes, and waits for the host where the host is slower.
    """
    if device.type == "cpu":

        def run() -> list[float]:
            marks = [time.perf_counter()]
            for part in parts:
                part()
                marks.append(time.perf_counter())
            return [end - start for start, end in itertools.pairwise(marks)]

        return run

    def run_on_gpu() -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        torch.cuda.synchronize(device)
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in itertools.pairwise(events)]

    return run_on_gpu


def stopwatch(step: Step, device: torch.device) -> Watch:
    """:func:`laps` of a single part."""
    run = laps([step], device)
    return lambda: run()[0]


def host_watch(steps: Sequence[Step], synchronise: Callable[[], object], queued: int) -> Watch:
    """Seconds the host takes to queue one of ``steps``; they take turns.

    :param synchronise: waits until the queue is empty; called outside the time.
    :param queued: steps queued in one go, and averaged over.
    """
    turns = itertools.cycle(steps)

    def run() -> float:
        synchronise()
        start = time.perf_counter()
        for _ in range(queued):
            next(turns)()
        seconds = (time.perf_counter() - start) / queued
        synchronise()
        return seconds

    return run


class Gpu:
    """A CUDA device: its sizes, and what only a GPU can do with a step. Everything runs on the current stream.

    Making one gives back the memory of whatever was timed before.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()  # optimizers, parameters and graphs refer to each other in circles
        torch.cuda.empty_cache()
        self.device = device
        self.free_bytes: int = torch.cuda.mem_get_info(device)[0]
        properties = torch.cuda.get_device_properties(device)
        self.l2_bytes: int = properties.L2_cache_size
        #: Shared memory of all multiprocessors: what can stay on chip between two halves of a kernel.
        self.on_chip_bytes: int = properties.multi_processor_count * getattr(
            properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
        )
        # Graphs share their memory: they never run at the same time, and none reads what another left behind.
        self._pool = torch.cuda.graph_pool_handle()

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.device)

    def is_awaited_by(self, step: Step) -> bool:
        """Whether a step makes the host wait for the device, by PyTorch's own detector; runs the step."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return False

    def capture(self, steps: Sequence[Step]) -> Step:
        """The replay of a CUDA graph that holds ``steps`` one after the other. They must not wait for the device."""
        # What is built at a first step (state, plans, workspaces) is built before the capture, on a stream of its own,
        # as the documentation of torch.cuda.graph has it.
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for step in (*steps, *steps):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            for step in steps:
                step()
        return graph.replay

    def queue_watch(self, run: Step) -> Watch:
        """Seconds that ``run`` takes on the device, which starts when the host has queued enough runs for a sample and
        so never waits for it."""
        repeats = math.ceil(SAMPLE_SECONDS / max(stopwatch(run, self.device)(), 1e-6))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def queue() -> None:
            start.record()
            for _ in range(repeats):
                run()
            end.record()

        queue_seconds = host_watch([queue], self.synchronise, queued=1)()
        head_start = round(CYCLES_PER_SECOND * (HEAD_START_SECONDS + 2 * queue_seconds))

        def sample() -> float:
            self.synchronise()
            _torch.keep_busy(head_start)
            queue()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / repeats

        return sample


def interleave(watches: Mapping[K, Callable[[], T]], rounds: int, warmup: int = 3) -> dict[K, list[T]]:
    """What each function returned in each round. They take turns in an order that rotates from round to round, so that
    drift of the machine hits all of them and none always follows the same one.

    >>> turns = []
    >>> interleave({n: lambda n=n: turns.append(n) for n in "abc"}, rounds=2, warmup=0) and "".join(turns)
    'abcbca'
    """
    names = list(watches)
    samples: dict[K, list[T]] = {name: [] for name in names}
    for r in range(warmup + rounds):
        for i in range(len(names)):
            name = names[(i + r) % len(names)]
            sample = watches[name]()
            if r >= warmup:
                samples[name].append(sample)
    return samples


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def ratios(times: Sequence[float], base: Sequence[float]) -> list[float]:
    """Of two contestants in the same rounds: what both share of the machine's mood cancels.

    >>> ratios([2.0, 40.0], [1.0, 10.0])
    [2.0, 4.0]
    """
    return [t / b for t, b in zip(times, base, strict=True)]
