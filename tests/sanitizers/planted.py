"""Errors on purpose, each in a process of its own: proof that the sanitizers of .ci/sanitize see what they are for.

Nothing is planted in the library. Memory of n numbers says that it holds n + 1, and the kernels believe it; a kernel of
this file's own writes beyond its shared memory; a number overflows. Each must end its process with the report that
names it, or this ends with status 1. Run by .ci/sanitize, whose build it needs.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

import gradprom_ext as gp

from ..gradprom_ext import targets

kept: list[torch.Tensor] = []


def overlong(n: int) -> torch.Tensor:
    """n numbers of memory, and a tensor of n + 1."""
    kept.append(torch.ones(n))
    numbers = (ctypes.c_float * (n + 1)).from_address(kept[-1].data_ptr())
    return torch.frombuffer(numbers, dtype=torch.float32)


def step(target: str, param: torch.Tensor, main: torch.Tensor) -> None:
    with targets.running(target) as backend:
        gp.gradprom_([param], [main], [torch.ones(param.shape)], lr=0.1, gate="always", backend=backend)


def write_shared(bytes_: int, at: int) -> None:
    ctypes.CDLL(targets.cuda_on_host().__file__).cuda_host_write_shared(ctypes.c_size_t(bytes_), ctypes.c_size_t(at))


# What has one element too many, what it is used for, and what of ours must be in the report.
PLANTED: dict[str, tuple[Callable[[], Any], str]] = {
    "a gradient, CPU": (lambda: step("cpu", torch.ones(8), overlong(7)), "csrc/cpu/"),
    "a parameter, CPU": (lambda: step("cpu", overlong(7), torch.ones(8)), "csrc/cpu/"),
    "a gradient, CUDA": (lambda: step("cuda-on-host", torch.ones(8), overlong(7)), "csrc/cuda/"),
    "a parameter, CUDA": (lambda: step("cuda-on-host", overlong(7), torch.ones(8)), "csrc/cuda/"),
    "shared memory": (lambda: write_shared(40, 40), "cuda_host.cpp"),
}


def died(what: str) -> str:
    """What the process said that did this; empty where it lived."""
    with tempfile.TemporaryFile() as report:
        child = os.fork()
        if child == 0:
            os.dup2(report.fileno(), 2)
            PLANTED[what][0]()
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        report.seek(0)
        return report.read().decode() if status != 0 else ""


def main() -> None:
    torch.set_num_threads(1)
    step("cpu", torch.ones(8), torch.ones(8))
    step("cuda-on-host", torch.ones(8), torch.ones(8))
    write_shared(40, 39)
    for what, (_, where) in PLANTED.items():
        report = died(what)
        if "heap-buffer-overflow" not in report or where not in report:
            sys.exit(f"the sanitizer did not report one element too many of {what}:\n{report}")
    program = targets.built("layout_test") / "layout_test"
    overflow = subprocess.run([program, "overflow"], capture_output=True, text=True)
    if overflow.returncode == 0 or "signed integer overflow" not in overflow.stderr:
        sys.exit(f"the sanitizer did not report a signed overflow:\n{overflow.stderr}")
    print(f"the sanitizers reported each of {len(PLANTED) + 1} planted errors")


if __name__ == "__main__":
    main()
