"""A person's own files, enhanced by a finished run: ``python -m train.enhance --run RUN INPUT OUTPUT``."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.data.window import Window
from train.errors import RunError
from train.run import guarded
from train.text import printable, shell_word

if TYPE_CHECKING:
    from train.enhancement.finished import FinishedRun
    from train.enhancement.plan import Job, Plan
    from train.enhancement.record import Record
    from train.enhancement.work import Outcome

SOME_FAILED = 1
MANY = 20  # names that a summary lists

ABOUT = """Enhance your own files with the network of a finished run. INPUT is a file, a folder (with all that is below
it) or a pattern; OUTPUT is a folder, or the name of the file for one file. Files are written in their own format, in
their own values: PNG, JPEG, TIFF, BMP, DICOM, NIfTI, MetaImage. No input is ever written over. Given again, the command
goes on where it was stopped. Not for diagnosis."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m train.enhance", description=ABOUT, allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("input", metavar="INPUT", nargs="+", help="what is enhanced")
    parser.add_argument("output", metavar="OUTPUT", help="where the enhanced files are written")
    parser.add_argument(
        "--run",
        required=True,
        help="folder of a finished run, or latest: of the last under runs/; or the best.safetensors of any run",
    )
    parser.add_argument("--strength", type=float, default=1.0, help="1: all that the network changes; 0: nothing")
    parser.add_argument(
        "--window", metavar="CENTER/WIDTH", type=window,
        help="values that the network sees from black to white, such as -600/1500, or percentiles of each file, such "
        "as P1-P99 (default: what the run was trained with, or else what each file says); values outside are kept",
    )  # fmt: skip
    parser.add_argument(
        "--color", choices=("refuse", "luma"), default="refuse",
        help="a color image for a network of gray ones. luma: its brightness is enhanced, its colors stay",
    )  # fmt: skip
    parser.add_argument(
        "--anonymize", action="store_true",
        help="leave out what identifies a person; files get numbers for names. What is burnt into pixels stays",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="also write a page with before, after and noise")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N files only")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="files at once, each in a process of its own")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network computes")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, and write nothing")
    # The center of a window for lungs is negative, which argparse takes for a flag.
    return parser.parse_args(_joined(argv, "--window"))


def _joined(argv: Sequence[str], flag: str) -> list[str]:
    """A command line whose ``flag`` and its value are one word."""
    words = iter(argv)
    return [f"{flag}={next(words, '')}" if word == flag else word for word in words]


def window(text: str) -> Window:
    """
    :raises argparse.ArgumentTypeError: this is no window.
    """
    try:
        return Window.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 1 (some files could not be enhanced, the others are), 2 (an error of the user's,
        explained on stderr) or 130 (interrupted).
    """
    return guarded(lambda: run(arguments(sys.argv[1:] if argv is None else argv)))


def run(given: argparse.Namespace) -> int:
    """Does what the command line asks.

    :raises RunError: something the user can put right; nothing was written.
    """
    from train.enhancement import finished, plan
    from train.enhancement.record import NAME, Record
    from train.scans import is_scan

    if not 0 <= given.strength <= 1:
        raise RunError(f"--strength must be at least 0 and at most 1, not {given.strength:g}")
    for name in ("limit", "jobs"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            raise RunError(f"--{name} must be at least 1, not {getattr(given, name)}")
    trained = finished.read(finished.find(given.run), given.window)
    todo = plan.made(given.input, given.output, is_scan=is_scan, anonymize=given.anonymize, limit=given.limit)
    facts = _facts(given, trained)
    record = None if todo.single else Record(todo.output, facts)
    left = list(todo.jobs)
    if record is not None:
        record.read()
        left = record.left(left)
    ours = record is not None and record.path.exists()
    if given.report and os.path.lexists(todo.report) and not ours:
        raise RunError(f"{todo.report} is there already; move it away, or give another OUTPUT")
    plan.refuse_too_little_space(left, todo.output, trained.scale)
    _say(trained.introduction)
    _say(
        "Whether your images are of that kind cannot be told from their pixels: of another organ, scanner or modality, "
        "what comes out may be wrong and look right."
    )
    for note in _notes(given, trained):
        _say(note)
    skipped = len(todo.jobs) - len(left)
    if given.dry_run:
        _dry_run(left, skipped, todo, None if record is None else NAME)
        return 0
    return _enhanced(given, trained, todo, left, record, facts)


def _facts(given: argparse.Namespace, trained: FinishedRun) -> dict[str, Any]:
    """What decides what is written: by it the files of another run or of other options are told apart."""
    return {
        "version": 1,
        "run": trained.name,
        "weights": trained.digest,
        "strength": given.strength,
        "window": _told(trained.window),
        "color": given.color,
        "anonymize": given.anonymize,
    }


def _told(chosen: Window | None) -> str:
    """Which values the network sees as black and white, in words."""
    if chosen is None:
        return "as each file says"
    return f"{chosen.low:g} to {chosen.high:g}" + (" percent of the values of each file" if chosen.percentiles else "")


def _notes(given: argparse.Namespace, trained: FinishedRun) -> list[str]:
    """What a person should know before it begins."""
    notes = []
    if trained.sigma is None:
        notes.append(
            f"The run was not trained to remove noise of one strength ({trained.degradation}), so that nothing can be "
            "said of whether yours is what it knows."
        )
    if trained.window is None and trained.unit is not None:
        low, high = trained.unit
        notes.append(
            f"The run saw values from {low:g} to {high:g} as black to white, and sees yours as each file says; if they "
            f"have the same unit, give --window {(low + high) / 2:g}/{high - low:g}"
        )
    if trained.channels == 3:
        notes.append("The network is for color: a gray image is given to it three times, and the mean is taken.")
    elif given.color == "luma":
        notes.append("Of color images the brightness is enhanced; noise in their colors stays.")
    if given.anonymize:
        notes.append(
            "--anonymize: files are numbered in the order of their names; names stand in none of them. Look at the "
            "images: what is burnt into pixels stays."
        )
    return notes


def _enhanced(
    given: argparse.Namespace,
    trained: FinishedRun,
    todo: Plan,
    left: list[Job],
    record: Record | None,
    facts: dict[str, Any],
) -> int:
    import contextlib

    from rich.console import Console

    from train.enhancement.network import Enhancer, Options
    from train.enhancement.work import Order, carry_out
    from train.inference import choose_device
    from train.interruption import same_command, stop_on_signal
    from train.scans.base import Derivation

    begun = time.monotonic()
    device = choose_device(given.device)
    options = Options(given.strength, trained.window, given.color)
    derivation = Derivation(
        _description(given, trained),
        hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16],
        trained.scale,
        given.anonymize,
    )
    order = Order(trained, options, derivation, device.type)
    enhancer = Enhancer(trained, options, device)  # complains now, before a folder is made
    skipped = len(todo.jobs) - len(left)
    outcomes: list[Outcome] = []
    console = Console(markup=False, emoji=False, highlight=False)
    with contextlib.ExitStack() as held:
        if record is not None:
            held.enter_context(record.opened())
        stop = held.enter_context(stop_on_signal())
        advance = held.enter_context(_bar(console, len(left)))
        for outcome in carry_out(enhancer, order, left, record, at_once=given.jobs, stop=stop):
            if outcome.stopped:
                continue
            outcomes.append(outcome)
            console.print(printable(_line(outcome, len(outcomes), len(left))), soft_wrap=True)
            advance()
        summary = _summary(outcomes, skipped, len(left) - len(outcomes), time.monotonic() - begun)
        for line in summary:
            _say(line)
        if given.report and not stop.requested:
            _report(given, trained, todo, record, outcomes, summary)
            _say(f"Report: {todo.report}")
    if stop.requested:
        _say(f"Stopped; {shell_word(given.output)} has what is done. To go on, give the same command again:")
        _say(f"  {same_command()}")
        return stop.status
    if any(each.full for each in outcomes):
        raise RunError(f"the disk of OUTPUT {todo.output} is full; make room, and give the same command again")
    return SOME_FAILED if any(each.error for each in outcomes) else 0


def _description(given: argparse.Namespace, trained: FinishedRun) -> str:
    """What stands in the files."""
    from gradprom_ext import __version__

    told = [f"Enhanced by gradprom_ext {__version__}, run {trained.introduction}"]
    if given.strength != 1:
        told.append(f"Blended with the input: strength {given.strength:g}.")
    if trained.window is not None:
        told.append(f"Black and white of the network: {_told(trained.window)}.")
    if trained.channels == 1 and given.color == "luma":
        told.append("Of color images, the luma (BT.601) was enhanced and the chroma kept.")
    if trained.channels == 3:
        told.append("Of gray images, the mean of the three channels was taken.")
    return " ".join(told)[:1024]


def _bar(console: Any, total: int) -> Any:
    """A progress bar on a terminal: a context that gives what moves it on by one."""
    import contextlib

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextlib.contextmanager
    def shown() -> Any:
        if not console.is_terminal:
            yield lambda: None
            return
        columns = TextColumn("enhancing", style="bold"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("enhancing", total=total)
            yield lambda: bar.advance(task)

    return shown()


def _line(outcome: Outcome, number: int, total: int) -> str:
    """What became of a file, on a line."""
    where = f"{number}/{total} {outcome.job.source}"
    if outcome.error:
        return f"{number}/{total} NOT ENHANCED: {_why(outcome)}"
    facts = outcome.facts
    height, width = facts["size"]
    frames = f", {facts['frames']} frames" if facts["frames"] > 1 else ""
    noise = ["-" if facts[each] is None else f"{facts[each]:.3f}" for each in ("noise before", "noise after")]
    warned = "".join(f"; WARNING: {each}" for each in facts["warnings"])
    return f"{where}: {width} x {height} px{frames}, noise {noise[0]} -> {noise[1]}, {facts['seconds']:.1f} s{warned}"


def _why(outcome: Outcome) -> str:
    """The file with what is wrong with it, which most messages begin with."""
    source = str(outcome.job.source)
    return outcome.error if outcome.error.startswith(source) else f"{source}: {outcome.error}"


def _summary(outcomes: Sequence[Outcome], skipped: int, untried: int, seconds: float) -> list[str]:
    """What came out, in sentences."""
    failed = [each for each in outcomes if each.error]
    counts = {
        "enhanced": len(outcomes) - len(failed),
        "skipped, as they were done before": skipped,
        "not enhanced": len(failed),
        "not tried": untried,
    }
    told = [", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "enhanced")]
    told[0] = f"{told[0]}, in {seconds:.0f} s."
    told += [f"Not enhanced: {_why(each)}" for each in failed[:MANY]]
    if len(failed) > MANY:
        told.append(f"Not enhanced: {len(failed) - MANY} more.")
    # Warnings of many files differ in their numbers, which stand in parentheses: those of one kind are said once.
    warnings = [warning for each in outcomes for warning in each.facts.get("warnings", ())]
    kinds = Counter(re.sub(r" \(.*?\)", "", warning) for warning in warnings)
    told += [f"WARNING for {count} of {len(outcomes)} files: {kind}." for kind, count in kinds.items()]
    return told


def _report(
    given: argparse.Namespace,
    trained: FinishedRun,
    todo: Plan,
    record: Record | None,
    outcomes: Sequence[Outcome],
    summary: Sequence[str],
) -> None:
    """Writes the page, which names nobody where that was asked for."""
    from train.enhancement import page

    done = {each.job.name: each.facts for each in outcomes if each.facts}
    if record is not None:
        done = {name: line["done"] for name, line in record.done.items()}
    # The page may be handed on: it has the names under OUTPUT, and no folder of this machine.
    failed = {
        each.job.name: "" if given.anonymize else each.error.replace(str(each.job.source), each.job.name)
        for each in outcomes
        if each.error
    }
    facts = {
        "run": trained.name,
        "trained on": trained.trained,
        "achieved there": trained.achieved,
        "strength": f"{given.strength:g}",
        "black and white": _told(trained.window),
    }
    if given.anonymize:
        facts["names"] = "files are numbered; their former names, and why files were not enhanced, are left out"
    told = [line for line in summary if not line.startswith("Not enhanced")]
    page.write(todo.report, trained, todo.jobs, done, failed, facts, told)


def _dry_run(left: Sequence[Job], skipped: int, todo: Plan, record: str | None) -> None:
    from train.scans import open_scan

    for job in left:
        try:
            scan = open_scan(job.source)
            height, width = scan.size(0)
            frames = f", {scan.frames} frames" if scan.frames > 1 else ""
            about = f"{scan.format}, {width} x {height} px{frames}, {'color' if scan.channels == 3 else 'gray'}"
        except (RunError, OSError) as error:
            about = f"CANNOT BE READ: {error}"
        _say(f"{job.source} -> {job.target} ({about})")
    ignored = f", {todo.ignored} other files are no images" if todo.ignored else ""
    _say(f"{len(left)} files would be enhanced, {skipped} are done already{ignored}. Nothing was written.")
    if record is not None:
        _say(f"{todo.output / record} would keep account of them.")


def _say(text: str) -> None:
    print(printable(text), flush=True)


if __name__ == "__main__":
    sys.exit(main())
