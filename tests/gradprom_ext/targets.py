"""Where the tests of the library's semantics run.

A *target* is a backend as the optimizers take it, under the name that a failing test shows:

* ``cpu`` and ``reference``, as they are;
* ``cuda-on-host``: the CUDA scheduler and its kernels compiled as host C++ (tests/cuda_host);
* ``triton-interpreter``: the Triton kernels in Triton's interpreter, on host memory;
* ``mirror-of-cpu``: the mirror itself, with clones in host memory as the other device;
* ``gpu-cuda`` and ``gpu-triton``, marked ``gpu``, where there is a GPU: mirrors of the real kernels (mirror.py), so
  that tests go on looking at tensors in host memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from gradprom_ext import backends, triton_plan
from gradprom_ext.compiled_plan import CompiledPlan
from gradprom_ext.plan import PlanBase, PlanSpec

from . import mirror

ROOT = Path(__file__).resolve().parents[2]
HOST = torch.device("cpu")


def usable_on_host(name: str) -> bool:
    return backends.explain(HOST)[name] is None


TARGETS: list[Any] = [name for name in ("cpu", "reference") if usable_on_host(name)]
TARGETS += ["cuda-on-host", "triton-interpreter", "mirror-of-cpu"]
if torch.cuda.is_available():
    TARGETS += [pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu-cuda", "gpu-triton")]


# The CUDA kernels on the host ----------------------------------------------------------------------------------------


def find_tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} was not found")
    return path


@functools.cache
def built(target: str) -> Path:
    """The build folder after CMake has built ``target`` in it."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("the Python package pybind11 is not installed")
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    build = ROOT / "build" / "cuda_on_host"
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                 f"-DPython_EXECUTABLE={sys.executable}", "-DGRADPROM_CUDA=OFF",
                 "-DGRADPROM_OPTIMIZATION=-O1"]  # fmt: skip
    build.mkdir(parents=True, exist_ok=True)
    # The processes of pytest-xdist must not load what another one is still writing.
    with (build / "tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(build), "--target", target]):
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
    return build


@functools.cache
def cuda_on_host() -> ModuleType:
    """``gradprom_ext._C`` with the CUDA scheduler working on host memory: 4 multiprocessors, blocks of 64 threads, 23
    KB of shared memory for gradients in each."""
    build = built("cuda_on_host")
    (path,) = (build / "cuda_on_host").glob("_C*")
    spec = importlib.util.spec_from_file_location("_C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class HostCuda(backends.CudaBackend):
    """The CUDA backend for tensors in host memory.

    :param options: of ``_C.CudaOptions``.
    """

    device_type: str | None = "cpu"

    def missing(self) -> str | None:
        return None

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        limit = cuda_on_host().MAX_AUX
        return f"takes up to {limit} auxiliaries, not {num_aux}" if num_aux > limit else None

    def plan(self, spec: PlanSpec) -> PlanBase:
        return CompiledPlan(cuda_on_host(), spec, self.options)


# The Triton kernels in the interpreter -------------------------------------------------------------------------------


@functools.cache
def interpreted() -> ModuleType:
    """The kernels as they are where ``TRITON_INTERPRET`` was set before they were imported."""
    return load_interpreted(Path(triton_plan.__file__).with_name("triton_kernels.py"))


def load_interpreted(path: Path) -> ModuleType:
    """A source of such kernels."""
    pytest.importorskip("triton", minversion="3.9", reason="needs the interpreter of triton 3.9 or later")
    spec = importlib.util.spec_from_file_location("interpreted_triton_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    return module


class HostTriton(backends.TritonBackend):
    """The Triton backend for tensors in host memory."""

    def missing(self) -> str | None:
        return None

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        return backends._too_many(num_aux)

    def plan(self, spec: PlanSpec) -> PlanBase:
        return triton_plan.TritonPlan(interpreted(), spec)


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """The interpreter patches triton.language anew for every kernel and every helper that a kernel calls: here it is
    done once. And it looks for overflow in all arithmetic of integers: not here. That makes it more than twice as
    fast."""
    kernels = interpreted()
    import triton.language
    from triton.runtime import interpreter

    with contextlib.ExitStack() as stack:
        for name in ("sum", "max"):  # Triton's own kernels: they may have been imported to be compiled
            function = getattr(triton.language, name)
            if not isinstance(function, interpreter.InterpretedFunction):
                wrapped = interpreter.InterpretedFunction(function.fn)
                stack.enter_context(mock.patch.object(triton.language, name, wrapped))
        scope = interpreter._patch_lang(kernels.load.fn)
        stack.callback(scope.restore)
        builder = interpreter.interpreter_builder
        stack.enter_context(mock.patch.object(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope()))
        options = dataclasses.replace(builder.options, sanitize_overflow=False)
        stack.enter_context(mock.patch.object(builder, "options", options))
        # It computes with NumPy, which warns of the very NaN that a test is about.
        stack.enter_context(np.errstate(invalid="ignore", over="ignore"))
        yield


# All of them ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(target: str) -> Iterator[Any]:
    """The backend of a target, as the argument ``backend`` of optimizers and functions."""
    if target == "cuda-on-host":
        cuda_on_host()
        yield HostCuda()
    elif target == "triton-interpreter":
        with quick_interpreter():
            yield HostTriton()
    elif target == "mirror-of-cpu":
        yield mirror.Mirror(backends.CpuBackend(), HOST)
    elif target.startswith("gpu-"):
        inner = next(b for b in backends.BACKENDS if b.name == target.removeprefix("gpu-"))
        device = torch.device("cuda", torch.cuda.current_device())
        reason = inner.missing() or inner.rejects(device, 1)
        if reason is not None:
            pytest.skip(f"{inner.name}: {reason}")
        yield mirror.Mirror(inner, device)
    else:
        yield target
