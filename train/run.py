"""The command line: ``python -m train.run --help``."""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, RunError, parse

if TYPE_CHECKING:
    import torch

    from train.data import ImageData
    from train.degradations import Degradation
    from train.engine import Engine
    from train.evaluation import Evaluation
    from train.report import Metrics

USER_ERROR, INTERRUPTED = 2, 130  # exit statuses; 130 is what shells report after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr) or 130 (interrupted).
    """
    from train.text import printable

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
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


def run(config: RunConfig) -> int:
    """Does one run, or what is left of it.

    :returns: 0, or 130 if somebody stopped it.
    :raises RunError: something the user can put right.
    """
    begun = time.monotonic()
    from rich.console import Console

    from train.engine import Engine
    from train.folder import free_folder, make_folder, read_metrics, write_config
    from train.progress import Display, stop_on_signal
    from train.report import introduction, run_name, summary
    from train.text import printable, shell_word

    console = Console(markup=False, emoji=False, highlight=False)  # names are data: nothing in them is for the console
    degrade = look_up_names(config)
    device = choose_device(config.device)
    data = load_data(config, progress=console.is_terminal)
    if config.resume:
        assert config.out is not None  # parse() has put the run's folder there
        folder = config.out
        if metrics := read_metrics(folder):
            console.print(f"{printable(str(folder))} is finished, there is nothing to continue:", soft_wrap=True)
            console.print(summary(metrics, folder), soft_wrap=True)
            return 0
    else:
        folder = free_folder(config.out, run_name(config, data))
        config = dataclasses.replace(
            config, source=data.source, device="cuda" if device.type == "cuda" else "cpu", out=folder
        )

    engine = Engine(config, data, degrade, folder=folder, device=device, begun=begun)
    display = Display(console, config.batch_size, folder / "tensorboard" if config.tensorboard else None)
    if config.resume:
        engine.resume()
    else:
        make_folder(folder)
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
    from train.data import DataError, load

    try:
        return load(
            config.dataset,
            root=config.data_root,
            source=config.source,
            size=config.size,
            channels=config.channels,
            progress=progress,
        )
    except (DataError, ValueError) as error:
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
