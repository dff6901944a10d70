"""Steps whose tensors are in the caches, as they are right after a backward pass, with one thread and with all:
``--what warm``, on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

import gradprom_ext as gp

from . import timing, update
from .checking import LeftOut, WrongResultError, leaving_out, relative_error
from .results import Place, WarmResult, warm_results
from .timing import Step, Watch
from .update import Case, Inputs

#: Untimed steps before each sample, which bring back what the other contestants have driven out of the caches.
WARM_UP = 2
#: Before them the process sleeps for so many seconds: on a machine that does other things too, the scheduler then lets
#: its threads go first, for a short while.
REST = 2e-2
#: A sample is the quickest of so many steps.
STEPS = 3


def function(case: Case, inputs: Inputs, *, backend: str) -> Step:
    """What a user calls who has the gradients: ``gp.gradprom_``."""
    params, main, aux = inputs.params, inputs.main, inputs.aux
    return lambda: gp.gradprom_(params, main, aux, lr=update.LR, backend=backend)


def statistics(case: Case, inputs: Inputs, *, backend: str) -> Step:
    """``gp.gradient_stats``, which updates nothing."""
    main, aux = inputs.main, inputs.aux
    return lambda: gp.gradient_stats(main, aux, backend=backend)


def contestants(case: Case, backend: str) -> dict[str, Callable[[Case, Inputs], Step]]:
    """By name; the functions step by the rule of SGD."""
    field: dict[str, Callable[[Case, Inputs], Step]] = {}
    field |= {f"gradprom {backend}, opt.step()": partial(update.gradprom, backend=backend)}
    if case.optimizer == "sgd":
        field[f"gradprom {backend}, gradprom_()"] = partial(function, backend=backend)
        field[f"gradprom {backend}, gradient_stats()"] = partial(statistics, backend=backend)
    field["plain optimizer"] = update.plain
    return field


def check(case: Case, name: str, inputs: Inputs, step: Step) -> None:
    """Compares one step with the library's definition.

    :raises WrongResultError: it differs.
    """
    if not name.endswith("gradient_stats()"):
        gradient = "main" if name == "plain optimizer" else "combined"
        update.check(case, update.Contestant(update.plain, gradient=gradient), inputs, step)
        return
    result = step()
    assert isinstance(result, gp.GateStats)
    expected = gp.gradient_stats(inputs.main, inputs.aux, backend="reference")
    error = relative_error(result.packed, expected.packed)
    if not error <= 1e-9:
        raise WrongResultError(f"it measures wrongly: its statistics are off by {error:.1e} of the largest")


def stopwatch(step: Step, threads: int) -> Watch:
    """Seconds of a step by so many threads whose tensors were just used."""

    def run() -> float:
        torch.set_num_threads(threads)
        time.sleep(REST)
        for _ in range(WARM_UP):
            step()
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return min(times)

    return run


def measure(case: Case, backend: str, rounds: int) -> tuple[list[WarmResult], list[LeftOut]]:
    """All contestants on one case, and on as many tensors of one element each, checked and timed.

    :param backend: of this library's contestants.
    :returns: the results, and what was left out.
    """
    threads = torch.get_num_threads()
    notes: list[LeftOut] = []
    watches: dict[Place, Watch] = {}
    one_element = Case(f"{len(case.shapes)}x1", case.optimizer, case.precision)
    torch.set_num_threads(1)  # to check; each sample sets its own
    try:
        for here, is_host in ((case, False), (one_element, True)):
            for name, build in contestants(here, backend).items():
                with leaving_out(notes, name, here):
                    inputs = Inputs(here.shapes, here.optimizer, here.precision, torch.device("cpu"))
                    step = build(here, inputs)
                    check(here, name, inputs, step)
                    for count in _counts(1 if is_host else threads):
                        watches[name, is_host, count] = stopwatch(step, count)
        parameters = sum(map(math.prod, case.shapes))
        total, nothing = torch.randn(parameters), torch.zeros(parameters)
        for count in _counts(threads):
            watches["memory", False, count] = stopwatch(lambda: total.add_(nothing), count)
        samples = timing.interleave(watches, rounds)
    finally:
        torch.set_num_threads(threads)
    return warm_results(case.network, parameters, len(case.shapes), case.optimizer, samples), notes


def _counts(threads: int) -> Sequence[int]:
    return (1,) if threads == 1 else (1, threads)
