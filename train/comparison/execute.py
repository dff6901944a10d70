"""The runs of a comparison, one after the other or side by side: a finished one is never repeated, a stopped one goes
on, and nothing of anybody else is touched."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from train.comparison.plan import Job, Plan, arm_key, differing
from train.errors import RunError
from train.files import LOCK, is_leftover, is_locked, locked, read_json, write_json
from train.interruption import follow, status_of, stop_on_signal, work
from train.outputs.run_folder import RunFolder
from train.settings import Settings
from train.settings.command_line import stored
from train.threads import cores, threads_each

ABOUT = "comparison.json"

Say = Callable[[str], None]


class Interrupted(Exception):
    """A signal asked to stop; what is done stays done.

    :ivar status: the exit status that says so.
    """

    def __init__(self, status: int) -> None:
        self.status = status


@contextlib.contextmanager
def opened(folder: Path, plan: Plan) -> Iterator[None]:
    """Keeps other comparisons out of a folder while the block runs, and what it holds is this one.

    :raises RunError: it holds another comparison, or something else, or another process is at work in it.
    """
    about = folder / ABOUT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = [each.name for each in folder.iterdir() if each.name != LOCK and not is_leftover(each.name)]
    except OSError as error:
        raise RunError(f"--out {folder} cannot be made or read: {error.strerror}") from error
    if others and not about.exists():
        raise RunError(f"--out {folder} holds other things ({min(others)}); give an empty or a new folder")
    with locked(folder):
        facts, found = plan.facts(), read_json(about)
        if found is None:
            write_json(about, facts)
        elif found.get("recipe") != facts["recipe"]:
            raise RunError(
                f"--out {folder} holds a comparison of recipe {found.get('recipe')}, not {facts['recipe']}; give "
                "another folder"
            )
        elif found != facts:
            what = ", ".join(name for name in facts if found.get(name) != facts[name])
            raise RunError(
                f"--out {folder} holds a comparison with another {what} ({found.get(what.split(', ')[0])}); its runs "
                "would not be comparable: give another folder, or the same --preset, --set and --max-steps"
            )
        yield


@dataclass(frozen=True)
class Outcome:
    """What became of a job: the metrics of its run, or ``None`` where it was asked to stop.

    :param status: the exit status that says which signal asked for that.
    """

    metrics: dict[str, Any] | None
    seconds: float
    status: int = 0


def do_job(settings: Settings, folder: Path, threads: int | None = None) -> Outcome:
    """Does a run, or what is left of it.

    :param settings: without a folder.
    :param folder: of the run.
    :param threads: of PyTorch; by default as many as it likes.
    :raises RunError: something the user can put right.
    """
    from rich.console import Console

    from train.experiment import do_run
    from train.training.progress import Brief

    begun = time.monotonic()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    if (metrics := finished(settings, folder)) is not None:
        return Outcome(metrics, 0.0)
    # A process whose parent was killed stops by itself, and writes a checkpoint before.
    while is_locked(folder) and time.monotonic() < begun + PATIENCE:
        time.sleep(0.2)
    run = RunFolder(folder)
    if run.checkpoints:
        settings = stored(folder).change({"resume": str(folder), "device": settings.training.device})
    else:
        if folder.is_dir():  # it was killed before its first checkpoint, so that there is nothing to lose
            with locked(folder):
                shutil.rmtree(folder)
        settings = settings.change({"out": folder})
    display = Brief(Console(markup=False, emoji=False, highlight=False))
    try:
        result = do_run(settings, display=display)
    except KeyboardInterrupt as error:
        return Outcome(None, time.monotonic() - begun, status_of(error))
    return Outcome(result.metrics, time.monotonic() - begun, result.status)


def finished(settings: Settings, folder: Path) -> dict[str, Any] | None:
    """The metrics of a run that is there; ``None`` where it is not, or not finished.

    :raises RunError: the folder holds a run that computes something else.
    """
    run = RunFolder(folder)
    if not run.config.exists():
        return None
    if others := differing(stored(folder), settings):
        raise RunError(
            f"{folder} holds a run with other settings ({', '.join(others)}) than the comparison has now; give another "
            "--out, or remove that folder"
        )
    return run.read_metrics()


def carry_out(jobs: Sequence[Job], out: Path, *, at_once: int, say: Say, what: str) -> None:
    """Does what is not done yet.

    :param at_once: how many runs side by side, each in a process of its own where there are several.
    :param what: is said of each run.
    :raises RunError: a run fails; those that are done stay.
    :raises Interrupted: a signal asked to stop.
    """
    left = [job for job in jobs if finished(job.settings, out / job.folder) is None]
    if len(left) < len(jobs):
        say(f"{what}: {len(jobs) - len(left)} of {len(jobs)} are done already")
    if not left:
        return
    begun = time.monotonic()
    with _workers(at_once) as do:
        for number, (job, outcome) in enumerate(do(left, out), 1):
            if outcome.metrics is None:
                raise Interrupted(outcome.status)
            spent = time.monotonic() - begun
            remaining = timedelta(seconds=round(spent / number * (len(left) - number)))
            say(f"{what} {number}/{len(left)}: {describe(job, outcome)}; about {remaining} left")


def describe(job: Job, outcome: Outcome) -> str:
    """A run that is done, on a line."""
    metrics = outcome.metrics or {}
    tried = "" if job.value is None else f" with {job.value}"
    told = [] if metrics.get("psnr") is None else [f"{metrics['psnr']:.2f} dB"]
    told += [f"reader {key[7:]} {metrics[key]:.3f}" for key in ("reader_accuracy", "reader_miou") if metrics.get(key)]
    return f"{arm_key(job.condition, job.arm)}{tried}, seed {job.seed}: {', '.join(told)} ({outcome.seconds:.0f} s)"


PATIENCE = 30
"""Seconds to wait for a run that another process is at work on."""
MOST_AT_ONCE = 4
"""Runs side by side where nobody says how many: each takes more than a gigabyte of memory."""


def default_at_once() -> int:
    """One run per CPU core, as small networks hardly use a second one; one in all where there is a GPU, which it
    fills."""
    import torch

    return 1 if torch.cuda.is_available() else min(MOST_AT_ONCE, cores())


Do = Callable[[Sequence[Job], Path], Iterator[tuple[Job, Outcome]]]


@contextlib.contextmanager
def _workers(at_once: int) -> Iterator[Do]:
    if at_once == 1:
        yield lambda jobs, out: ((job, do_job(job.settings, out / job.folder)) for job in jobs)
        return
    threads = threads_each(at_once)
    context = get_context("spawn")  # a process that is forked would share PyTorch's threads
    told, telling = context.Pipe(duplex=False)
    with (
        contextlib.closing(told),
        contextlib.closing(telling),
        stop_on_signal(telling.close) as stop,
        ProcessPoolExecutor(at_once, context, follow, (told,)) as pool,
    ):

        def result(job: Job, future: Future[Outcome]) -> tuple[Job, Outcome]:
            try:
                outcome = future.result()
            except BrokenProcessPool as error:
                if not stop.requested:
                    raise RunError(
                        "a process of the comparison was ended from outside, perhaps for lack of memory; what is done "
                        "stays done: give the same command again, with fewer --jobs"
                    ) from error
                outcome = Outcome(None, 0.0)
            if stop.requested:
                raise Interrupted(stop.status)
            return job, outcome

        def do(jobs: Sequence[Job], out: Path) -> Iterator[tuple[Job, Outcome]]:
            waiting: dict[Future[Outcome], Job] = {}
            # The first run by itself: what several need (decoded images, VRs of clean images) is made once.
            queue = iter(jobs)
            first = next(queue)
            yield result(first, pool.submit(_follow_job, first.settings, out / first.folder, threads))
            for job in queue:
                waiting[pool.submit(_follow_job, job.settings, out / job.folder, threads)] = job
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield result(waiting.pop(future), future)

        try:
            yield do
        except BaseException:
            telling.close()  # nothing more is wanted
            pool.shutdown(cancel_futures=True)
            raise


def _follow_job(settings: Settings, folder: Path, threads: int) -> Outcome:
    """:func:`do_job` in a process of its own."""
    try:
        with work():
            return do_job(settings, folder, threads)
    except KeyboardInterrupt as error:
        return Outcome(None, 0.0, status_of(error))


def choose(plan: Plan, out: Path, *, at_once: int, say: Say) -> dict[str, Any]:
    """Chooses the tuned setting of every arm by validation images, or reads what was chosen before.

    :returns: the chosen value of each arm under each condition, by :func:`arm_key`.
    """
    trials = {
        arm_key(condition.name, arm.name): plan.trials(condition, arm)
        for condition in plan.conditions
        for arm in plan.arms
    }
    trials = {key: jobs for key, jobs in trials.items() if jobs}
    if not trials:
        return {}
    carry_out([job for jobs in trials.values() for job in jobs], out, at_once=at_once, say=say, what="choosing")
    chosen = {key: best([(job.value, _metrics(job, out)) for job in jobs]) for key, jobs in trials.items()}
    write_json(out / "tuned.json", {key: list(v) if isinstance(v, tuple) else v for key, v in chosen.items()})
    return chosen


TOLERANCE = 0.1
"""By how many dB a trial may be below the best one of its arm and still be chosen for what the reader says."""


def best(trials: Sequence[tuple[Any, Mapping[str, Any]]]) -> Any:
    """Of several values the one that is chosen: where the reader is right most often among those whose PSNR is within
    ``TOLERANCE`` of the best, all on validation images. Without a reader, and between equals, PSNR decides.

    :param trials: values with the metrics of their runs.

    >>> best([(0.1, {"psnr": 27.0, "reader_miou": 0.7}), (0.2, {"psnr": 27.05, "reader_miou": 0.6})])
    0.1
    """

    def psnr(metrics: Mapping[str, Any]) -> float:
        return float(metrics["psnr"]) if metrics.get("psnr") is not None else float("-inf")

    def read(metrics: Mapping[str, Any]) -> float:
        return sum(metrics.get(key) or 0.0 for key in ("reader_accuracy", "reader_miou"))

    least = max(psnr(metrics) for _, metrics in trials) - TOLERANCE
    return max((each for each in trials if psnr(each[1]) >= least), key=lambda each: (read(each[1]), psnr(each[1])))[0]


def _metrics(job: Job, out: Path) -> dict[str, Any]:
    metrics = RunFolder(out / job.folder).read_metrics()
    assert metrics is not None
    return metrics
