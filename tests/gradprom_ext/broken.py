"""Backends that are broken on purpose, in the ways in which a device that was never seen may break them.

Also for ``python -m gradprom_ext.doctor --check --backend tests.gradprom_ext.broken:CLASS``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gradprom_ext import triton_plan
from gradprom_ext.plan import Gradients, PlanBase, PlanSpec

from .targets import HostCuda, HostTriton, cuda_on_host, interpreted, load_interpreted, quick_interpreter


class Around(PlanBase):
    """A plan that hands everything on."""

    def __init__(self, inner: PlanBase) -> None:
        super().__init__(inner.spec)
        self.inner = inner
        self.fused = inner.fused  # type: ignore[misc]

    def matches(self, params):
        return self.inner.matches(params)

    def bind_gradients(self, main, aux):
        self.inner.bind_gradients(main, aux)

    def missing_states(self, hypers):
        return self.inner.missing_states(hypers)

    def gram(self):
        return self.inner.gram()

    def update(self, hypers, weights, skipped):
        self.inner.update(hypers, weights, skipped)

    def step(self, request):
        return self.inner.step(request)


class StaleTable(Around):
    """What is known of the gradients stays what it was at the first step."""

    bound: tuple[Gradients, Sequence[Gradients]] | None = None

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        self.bound = self.bound or (main, aux)
        super().bind_gradients(*self.bound)


class WrongDtype(Around):
    """float16 gradients are read as bfloat16."""

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        def misread(g: Tensor | None) -> Tensor | None:
            return g.view(torch.bfloat16) if g is not None and g.dtype == torch.float16 else g

        super().bind_gradients([misread(g) for g in main], [[misread(g) for g in gs] for gs in aux])


# The CUDA kernels on the host ----------------------------------------------------------------------------------------


class FaultyDevice(HostCuda):
    """The CUDA backend on a device with a fault of tests/cuda_host/cuda_runtime.h, for as long as a plan runs."""

    fault = 0

    def plan(self, spec: PlanSpec) -> PlanBase:
        fault = self.fault

        class OnIt(Around):
            def gram(self) -> Tensor:
                with played(fault):
                    return super().gram()

            def update(self, *args: Any) -> None:
                with played(fault):
                    super().update(*args)

            def step(self, request: Any) -> Any:
                with played(fault):
                    return super().step(request)

        return OnIt(super().plan(spec))


class played:
    """The fault of that number, inside of the block."""

    def __init__(self, fault: int) -> None:
        self.fault = fault

    def __enter__(self) -> None:
        ctypes.CDLL(cuda_on_host().__file__).cuda_host_break(self.fault)

    def __exit__(self, *_: object) -> None:
        ctypes.CDLL(cuda_on_host().__file__).cuda_host_break(0)


class CudaWrongSum(FaultyDevice):
    fault = 1


class CudaNoGridBarrier(FaultyDevice):
    fault = 2


class CudaNoBlockBarrier(FaultyDevice):
    fault = 3


class CudaEndless(FaultyDevice):
    fault = 4


class CudaWrongDtype(HostCuda):
    def plan(self, spec: PlanSpec) -> PlanBase:
        return WrongDtype(super().plan(spec))


class CudaStaleTable(HostCuda):
    def plan(self, spec: PlanSpec) -> PlanBase:
        return StaleTable(super().plan(spec))


class Dies(HostCuda):
    """Takes its process with it."""

    def plan(self, spec: PlanSpec) -> PlanBase:
        os.abort()


# The Triton kernels in the interpreter -------------------------------------------------------------------------------


@functools.cache
def rewritten(old: str, new: str) -> ModuleType:
    """The kernels with something else in one place of their source."""
    path = Path(triton_plan.__file__).with_name("triton_kernels.py")
    source = path.read_text()
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in {path.name}"
    folder = tempfile.mkdtemp(prefix="gradprom-broken-")
    copy = Path(folder) / path.name
    copy.write_text(source.replace(old, new))
    return load_interpreted(copy)


class RewrittenTriton(HostTriton):
    old, new = "", ""

    def plan(self, spec: PlanSpec) -> PlanBase:
        return triton_plan.TritonPlan(rewritten(self.old, self.new), spec)


class TritonWrongSum(RewrittenTriton):
    """The last partial matrix of a row is left out."""

    old = "mask = slot < last[:, None]"
    new = "mask = slot < last[:, None] - 1"


class TritonWrongDtype(RewrittenTriton):
    """Products in fp32."""

    old = "x[i] * x[j]"
    new = "(x[i].to(tl.float32) * x[j].to(tl.float32)).to(tl.float64)"


class TritonCutsOff(RewrittenTriton):
    """bfloat16 numbers are not rounded."""

    old = "rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16"
    new = "rounded = bits >> 16"


class TritonEndless(RewrittenTriton):
    """For a process of its own."""

    old = '"""From the partial Gram matrices to weights, statistics and coefficients, in one program."""'
    new = old + "\n    while rows >= 0:\n        rows = rows + 0"

    def plan(self, spec: PlanSpec) -> PlanBase:
        _interpret_from_now_on()
        return super().plan(spec)


_modes = contextlib.ExitStack()


@functools.cache
def _interpret_from_now_on() -> None:
    _modes.enter_context(quick_interpreter())


class TritonNoBarrier(HostTriton):
    """The decision does not wait for what is measured: it finds the sums of the step before."""

    def plan(self, spec: PlanSpec) -> PlanBase:
        class Early(triton_plan.TritonPlan):
            before: Tensor | None = None

            def _measure(self, *args: Any) -> Tensor:
                measured = super()._measure(*args)
                early, self.before = self.before, measured
                return torch.zeros_like(measured) if early is None else early

        return Early(interpreted(), spec)


class TritonStaleTable(HostTriton):
    def plan(self, spec: PlanSpec) -> PlanBase:
        plan = super().plan(spec)
        for arrangement in (plan._measured, plan._stepped):  # type: ignore[attr-defined]
            arrangement._sender = First(arrangement._sender)
        return plan


class First:
    """Sends tables once."""

    def __init__(self, sender: Any) -> None:
        self.sender, self.tables = sender, None

    def send(self, tables: Any) -> Any:
        if self.tables is None:
            self.tables = [t.clone() for t in self.sender.send(tables)]
        return self.tables
