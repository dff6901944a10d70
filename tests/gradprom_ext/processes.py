"""Several processes for a test: started once, as that takes seconds, to do one piece of work after the other."""

from __future__ import annotations

import importlib
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60  # in which the other processes must answer

Works = dict[str, tuple[str, dict[str, Any]]]
"""By a name of its own each: a function of the test's file, which is given the rank and the number of processes, and
its further arguments."""


def _started(rank: int, number: int, folder: str, module: str, works: Works) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", number)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=timedelta(seconds=SECONDS))
    there = vars(importlib.import_module(module))
    found = {name: there[work](rank, number, **options) for name, (work, options) in works.items()}
    with open(f"{folder}/{rank}.pickle", "wb") as file:
        pickle.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()


def start(folder: Path, number: int, module: str, works: Works) -> None:
    """Lets processes do their work.

    :param module: the ``__name__`` of the test's file.
    """
    mp.spawn(_started, (number, str(folder), module, works), nprocs=number)


def together(folder: Path, number: int, module: str, works: Works) -> dict[str, list[Any]]:
    """What each process returned of each work, in the order of their ranks."""
    start(folder, number, module, works)
    found = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(number)]
    return {name: [each[name] for each in found] for name in works}
