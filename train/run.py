"""The command line: ``python -m train.run --help``."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import io
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, parse, stored
from train.errors import INTERRUPTED, USER_ERROR, RunError, reason

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from train.data import ImageData
    from train.degradations import Degradation
    from train.engine import Engine
    from train.evaluation import Evaluation
    from train.report import Metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr) or 130 (interrupted).
    """
    from train.text import printable

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    give_user_a_name()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name with a letter that the terminal lacks is no crash
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except RunError as error:
        print(f"Error: {printable(str(error))}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        # What is foreseen has a better message; this is for a file system that fails where none expected it to.
        print(f"Error: {printable(str(error.filename or 'a file'))}: {printable(reason(error))}", file=sys.stderr)
        return USER_ERROR


def give_user_a_name() -> None:
    """Calls a user without a name by the number.

    MONAI asks for the name when it is imported, and cannot be imported without; a container that runs under a bare
    number has none.
    """
    try:
        getpass.getuser()
    except (KeyError, ImportError, OSError):  # which one depends on the version of Python
        os.environ["USER"] = str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def run(config: RunConfig) -> int:
    """Does one run, or what is left of it.

    :returns: 0, or 130 if it was asked to stop.
    :raises RunError: something the user can put right.
    """
    begun = time.monotonic()
    from rich.console import Console

    from train.folder import new_folder
    from train.report import run_name

    console = Console(markup=False, emoji=False, highlight=False)  # names are data: nothing in them is for the console
    degrade = look_up_names(config)
    device = choose_device(config.device)
    with contextlib.ExitStack() as held:
        if config.resume:
            assert config.out is not None  # parse() has put the run's folder there
            folder = config.out
            if show_finished(folder, console, held):
                return 0
        data = load_data(config, progress=console.is_terminal)
        if not config.resume:
            folder = held.enter_context(new_folder(config.out, run_name(config, data)))
            config = dataclasses.replace(
                config,
                source=data.source,
                device="cuda" if device.type == "cuda" else "cpu",
                out=folder,
                data_root=config.data_root if data.folder is None else data.folder.absolute(),
            )
        return work(config, data, degrade, folder=folder, device=device, console=console, begun=begun)


def show_finished(folder: Path, console: Console, held: contextlib.ExitStack) -> bool:
    """Shows a finished run; else takes possession of its folder.

    :param held: what keeps other processes out of the folder, until it is closed.
    :returns: whether the run is finished.
    :raises RunError: another process is at work on the run, or ``metrics.json`` is damaged.
    """
    from train.files import locked
    from train.folder import read_metrics
    from train.report import summary
    from train.text import printable

    metrics = read_metrics(folder)
    if metrics is None:
        held.enter_context(locked(folder))
        metrics = read_metrics(folder)  # another process may have finished the run just before
    if metrics is None:
        return False
    try:
        shown = summary(metrics, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder / 'metrics.json'} is damaged ({type(error).__name__}: {error}). "
            "Remove the file, and --resume evaluates the run again."
        ) from error
    console.print(f"{printable(str(folder))} is finished, there is nothing to continue:", soft_wrap=True)
    console.print(shown, soft_wrap=True)
    return True


def work(
    config: RunConfig,
    data: ImageData,
    degrade: Degradation,
    *,
    folder: Path,
    device: torch.device,
    console: Console,
    begun: float,
) -> int:
    """Trains and evaluates a run, or what is left of it, in a folder that belongs to this process.

    :returns: 0, or 130 if the run was asked to stop.
    :raises RunError: something the user can put right.
    """
    from train.engine import Engine
    from train.folder import refuse_other_data, write_config, write_data
    from train.progress import Display, stop_on_signal
    from train.report import introduction, summary
    from train.text import shell_word

    engine = Engine(config, data, degrade, folder=folder, device=device, begun=begun)
    display = Display(console, config.batch_size, folder / "tensorboard" if config.tensorboard else None)
    if config.resume:
        refuse_other_data(folder, data)
        engine.resume()
    else:
        write_data(folder, data)
        write_config(folder, config)
    console.print(introduction(engine, folder), soft_wrap=True)
    go_on = f"python -m train.run --resume {shell_word(folder)}"
    with stop_on_signal() as stop:
        finished = engine.train(display, stop)
    if not finished:
        console.print(f"Stopped after step {engine.step} of {engine.steps}. To go on:\n  {go_on}", soft_wrap=True)
        return INTERRUPTED
    try:
        console.print(summary(finish(engine, folder), folder), soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"Stopped before the evaluation was done. To go on:\n  {go_on}", soft_wrap=True)
        return INTERRUPTED
    return 0


def look_up_names(config: RunConfig) -> Degradation:
    """Looks all names up before the first of them costs time; returns the task's degradation.

    :raises RunError: a name does not exist; the message lists those that do.
    """
    from models import IP, VR, Registry, UnknownNameError
    from train.data import DATASETS
    from train.strategies import STRATEGIES
    from train.tasks import TASKS

    registries: dict[str, Registry[Any]] = {
        "dataset": DATASETS,
        "ip": IP,
        "vr": VR,
        "strategy": STRATEGIES,
        "task": TASKS,
    }
    try:
        for setting, registry in registries.items():
            registry[getattr(config, setting)]
    except UnknownNameError as error:
        raise RunError(f"--{setting}: {error}") from error
    return TASKS.build(config.task, config=config)


def choose_device(name: str) -> torch.device:
    """
    :raises RunError: a GPU was asked for and there is none.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no CUDA GPU here (python -m gradprom_ext.doctor says why)")
    return torch.device(name)


def load_data(config: RunConfig, *, progress: bool) -> ImageData:
    """
    :raises RunError: there are no such data, or they are damaged.
    """
    from train.data import load

    # A run that goes on knows where its data were. They may have moved; what it gets is compared with what it had.
    formerly = stored(config.out).data_root if config.resume and config.out else None
    try:
        return load(
            config.dataset,
            root=None if config.data_root == formerly else config.data_root,
            formerly=formerly,
            source=config.source,
            size=config.size,
            channels=config.channels,
            progress=progress,
        )
    except ValueError as error:
        raise RunError(str(error)) from error


def finish(engine: Engine, folder: Path) -> Metrics:
    """Evaluates a trained run and writes all that its folder holds at the end; the metrics last.

    :raises RunError: a file cannot be written.
    """
    from train.data.cache import ArrayCache, default_cache_dir
    from train.evaluation import evaluate
    from train.folder import write_metrics, write_weights
    from train.report import collect

    evaluation = evaluate(
        *engine.networks,
        engine.data.test,
        engine.degrade,
        device=engine.device,
        cache=ArrayCache(default_cache_dir()),
    )
    write_weights(folder, engine.config, *engine.networks)
    draw(engine, evaluation, folder)
    metrics = collect(engine, evaluation)
    write_metrics(folder, metrics)
    return metrics


def draw(engine: Engine, evaluation: Evaluation, folder: Path) -> None:
    """Writes ``panel.png`` (three test images: a badly, a typically and a well enhanced one) and ``gate.png``.

    :raises RunError: a file cannot be written.
    """
    from train.figures import save_gate, save_panel
    from train.report import run_name

    data = engine.data
    about: dict[str, Any] = {"title": run_name(engine.config, data), "source": data.source}
    labels = data.test.labels

    def diagnosis(row: int) -> str:
        return "" if labels is None else f"{data.class_names[labels[row]]}, "

    # An image of NaN is the worst one; where scores are equal, as at the cap, the order is that of the data set.
    ranking = evaluation.quality_enhanced.psnr.nan_to_num(nan=-math.inf).argsort(stable=True)
    shown = {f"{percent}th percentile": int(ranking[percent * (len(ranking) - 1) // 100]) for percent in (10, 50, 90)}
    rows = list(shown.values())
    save_panel(
        folder / "panel.png",
        clean=evaluation.clean[rows],
        degraded=evaluation.degraded[rows],
        enhanced=evaluation.enhanced[rows],
        labels=[f"{diagnosis(row)}{where}" for where, row in shown.items()],
        **about,
    )
    steps = engine.table.columns()
    advised = engine.strategy.vr is not None
    save_gate(
        folder / "gate.png",
        step=steps["step"],
        cosine=steps["cosine"] if advised else None,
        gate=steps["gate"] if advised else None,
        **about,
    )


if __name__ == "__main__":
    sys.exit(main())
