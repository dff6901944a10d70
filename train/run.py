"""The command line: ``python -m train.run --help``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import RUNS, RunConfig, RunError, parse

if TYPE_CHECKING:
    import torch

    from train.data.base import ImageData
    from train.degradations import Degradation

USER_ERROR, INTERRUPTED = 2, 130  # exit statuses; 130 is what shells report after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    :returns: the exit status: 0, 2 (an error of the user's, explained on stderr) or 130 (interrupted).
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return run(parse(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except RunError as error:
        print(f"Error: {error}", file=sys.stderr)
        return USER_ERROR


def run(config: RunConfig) -> int:
    """Does one run, or what is left of it.

    :returns: 0, or 130 if somebody stopped it.
    :raises RunError: something the user can put right.
    """
    begun = time.monotonic()
    from rich.console import Console

    from train.data.cache import ArrayCache, default_cache_dir
    from train.engine import Engine
    from train.evaluation import evaluate
    from train.figures import save_gate, save_panel
    from train.progress import Display, stop_on_signal
    from train.report import collect, parameters, run_name, summary, write_file, write_metrics, write_weights

    console = Console()
    degrade = look_up(config)
    device = choose_device(config.device)
    data = load_data(config, progress=console.is_terminal)
    name = run_name(config, data)
    folder = config.out if config.resume else run_folder(config.out, name)
    if config.resume and (folder / "metrics.json").exists():
        console.print(f"{folder} is finished, there is nothing to continue:")
        console.print(summary(json.loads((folder / "metrics.json").read_text()), folder))
        return 0
    engine = Engine(config, data, degrade, folder=folder, device=device, begun=begun)
    ip, vr = engine.networks
    if config.resume:
        engine.resume()
    else:
        make_folder(folder)
        write_config(folder, dataclasses.replace(config, source=data.source, device=device.type, out=folder))
    display = Display(console, config.batch_size, folder / "tensorboard" if config.tensorboard else None)
    say(console, config, data, engine, folder)

    with stop_on_signal() as stop:
        finished = engine.train(display, stop)
    if not finished:
        console.print(f"Stopped at step {engine.step} of {engine.steps}; to go on: {resume_command(folder)}")
        return INTERRUPTED

    console.print("evaluating on the test images")
    evaluation = evaluate(ip, vr, data.test, degrade, sigma=..., device=device, cache=ArrayCache(default_cache_dir()))
