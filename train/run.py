"""The command line: ``python -m train.run --help``."""

from __future__ import annotations

import getpass
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.errors import USER_ERROR, RunError, reason
from train.interruption import same_command, signals_of_a_command, status_of
from train.settings import Settings, parse
from train.text import printable, shell_word


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr), 130 (SIGINT) or 143 (SIGTERM).
    """
    return guarded(lambda: run(parse(sys.argv[1:] if argv is None else argv)))


def guarded(command: Callable[[], int]) -> int:
    """Does what a command line asks, and explains on stderr why it could not.

    :param command: returns the exit status.
    :returns: that status, 2 (an error of the user's), 130 (interrupted) or 143 (terminated).
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    give_user_a_name()
    legible()
    try:
        with signals_of_a_command():
            return command()
    except KeyboardInterrupt as error:
        print(f"Interrupted. To go on, give the same command again:\n  {printable(same_command())}", file=sys.stderr)
        return status_of(error)
    except RunError as error:
        print(f"Error: {printable(str(error))}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        # What is foreseen has a better message; this is for a file system that fails where none expected it to.
        print(f"Error: {printable(str(error.filename or 'a file'))}: {printable(reason(error))}", file=sys.stderr)
        return USER_ERROR


def legible() -> None:
    """Sees to it that a name with a letter that the terminal lacks is no crash."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_user_a_name() -> None:
    """Calls a user without a name by the number.

    MONAI asks for the name when it is imported, and cannot be imported without; a container that runs under a bare
    number has none.
    """
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # which one depends on the version of Python
        os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def run(settings: Settings) -> int:
    """Does one run, or what is left of it, and prints what a person wants to see of it.

    :returns: 0, or 130 or 143 if it was asked to stop by SIGINT or SIGTERM.
    :raises RunError: something the user can put right.
    """
    from rich.console import Console

    from train.experiment import do_run
    from train.training.progress import Display

    # Names are data: nothing in them is for the console.
    display = Display(Console(markup=False, emoji=False, highlight=False))
    result = do_run(settings, display=display)
    if result.helped:  # the process that leads the run says the rest
        return result.status
    if result.metrics is None:
        trained = result.step == result.steps
        where = "before the evaluation was done" if trained else f"after step {result.step} of {result.steps}"
        several = os.environ.get("LOCAL_WORLD_SIZE") if "TORCHELASTIC_RUN_ID" in os.environ else None
        command = f"torchrun --nproc-per-node {several} -m" if several else "python -m"
        go_on = f"{command} train.run --resume {shell_word(result.folder)}"
        display.say(f"Stopped {where}. To go on:\n  {go_on}")
        return result.status
    shown = table(result.metrics, result.folder)
    if result.was_finished:
        display.say(f"{printable(str(result.folder))} is finished, there is nothing to continue:")
    display.say(shown)
    return 0


def table(metrics: dict[str, Any], folder: Path) -> Any:
    """What a run achieved, for a terminal.

    :raises RunError: ``metrics.json``, which it was read from, is damaged.
    """
    from train.outputs.report import summary
    from train.outputs.run_folder import RunFolder

    try:
        return summary(metrics, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{RunFolder(folder).metrics} is damaged ({type(error).__name__}: {error}). "
            "Remove the file, and --resume evaluates the run again."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
