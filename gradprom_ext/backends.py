"""Which code runs a step: the compiled kernels where they exist, the reference where nothing else can.

A backend makes *plans* (:class:`gradprom_ext.plan.PlanBase`) for the tensors of one device.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch

from . import self_check
from ._device import is_capturing
from ._extension import extension
from .compiled_plan import CompiledPlan
from .plan import MAX_AUX, PlanBase, PlanSpec
from .reference import ReferencePlan
from .self_check import Needs

__all__ = ["Backend", "available_backends", "choose", "explain", "passed_over", "proven"]


class Backend(ABC):
    """A way to run steps."""

    name: str
    device_type: str | None  #: of the tensors it takes; ``None``: any
    compiles_each_kind: bool = False  #: types and layouts of tensors are compiled into a kernel, which takes seconds

    @abstractmethod
    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all; ``None`` where it can."""

    @abstractmethod
    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        """Why it cannot take tensors of ``device`` with ``num_aux`` auxiliaries; ``None`` where it can."""

    @abstractmethod
    def plan(self, spec: PlanSpec) -> PlanBase:
        """A plan for the parameters of one device."""

    def forms(self) -> dict[str, Backend]:
        """The ways in which this backend may come to be launched, by their names: each has to prove itself
        (``gradprom_ext.self_check``). None of the reference, which is what they are compared with."""
        return {"": self}

    def identity(self) -> str:
        """Tells builds of the kernels apart."""
        return ""


class ReferenceBackend(Backend):
    """Plain PyTorch (:mod:`gradprom_ext.reference`): every device, every dtype, any number of auxiliaries."""

    name = "reference"
    device_type: str | None = None

    def missing(self) -> str | None:
        return None

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        return None

    def plan(self, spec: PlanSpec) -> PlanBase:
        return ReferencePlan(spec)

    def forms(self) -> dict[str, Backend]:
        return {}


def _too_many(num_aux: int) -> str | None:
    return f"takes up to {MAX_AUX} auxiliaries, not {num_aux}" if num_aux > MAX_AUX else None


class CudaBackend(Backend):
    """The compiled CUDA kernels (csrc/cuda): the whole step in one launch, nothing waits for the device."""

    name = "cuda"
    device_type: str | None = "cuda"

    def __init__(self, **options: Any) -> None:
        self.options = options  #: of ``_C.CudaOptions``, for tests and measurements

    def missing(self) -> str | None:
        module, problem = extension()
        if module is None:
            return problem
        if not module.CUDA_ARCHITECTURES:
            return "not built: no nvcc was found when the package was installed"
        if torch.version.cuda is None:
            return "this PyTorch is built without CUDA"
        return None if torch.cuda.is_available() else "PyTorch finds no NVIDIA GPU or no driver for it"

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        if device.type != self.device_type:
            return f"takes tensors in the memory of an NVIDIA GPU, not on {device}"
        problem = extension()[0].cuda_unusable(device.index or 0)
        return f"cannot run on {device}: {problem}" if problem else _too_many(num_aux)

    def plan(self, spec: PlanSpec) -> PlanBase:
        return CompiledPlan(extension()[0], spec, self.options)

    def forms(self) -> dict[str, Backend]:
        few = {"max_shared_bytes": 4096, **self.options}
        apart = {"cooperative": False, **self.options}
        return {"": self, "4 KB on chip": type(self)(**few), "one launch per stage": type(self)(**apart)}

    def identity(self) -> str:
        return self_check.file_identity(extension()[0].__file__)


class CpuBackend(Backend):
    """The compiled CPU kernels (csrc/cpu): OpenMP, AVX2 or AVX-512 where the processor has it."""

    name = "cpu"
    device_type: str | None = "cpu"

    def missing(self) -> str | None:
        return extension()[1]

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        if device.type != self.device_type:
            return f"takes tensors in host memory, not on {device}"
        return _too_many(num_aux)

    def plan(self, spec: PlanSpec) -> PlanBase:
        return CompiledPlan(extension()[0], spec, {})

    def identity(self) -> str:
        return self_check.file_identity(extension()[0].__file__)


@functools.cache
def triton_kernels() -> Any:
    """The module of the Triton kernels: Triton is imported when they are first used."""
    from . import triton_kernels as kernels

    return kernels


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on host memory, as its own documentation tells how to."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend(Backend):
    """The Triton kernels (gradprom_ext/triton_plan.py): a GPU that the CUDA kernels cannot use, of any vendor."""

    name = "triton"
    device_type: str | None = "cuda"  #: AMD's GPUs have this type in PyTorch too
    compiles_each_kind = True

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if triton_interprets() or torch.cuda.is_available():
            return None
        return "PyTorch finds no GPU (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter, slowly)"

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        if triton_interprets():
            if device.type != "cpu":
                return f"takes tensors in host memory while TRITON_INTERPRET is set, not on {device}"
        elif device.type != self.device_type:
            return f"takes tensors in the memory of a GPU, not on {device}"
        elif torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
            return f"cannot run on {device}: Triton needs compute capability 7.0"
        return _too_many(num_aux)

    def plan(self, spec: PlanSpec) -> PlanBase:
        from .triton_plan import TritonPlan  # imported when it is first used, as Triton is

        return TritonPlan(triton_kernels(), spec)

    def identity(self) -> str:
        import triton

        own = [
            self_check.file_identity(str(Path(__file__).with_name(f"triton_{part}.py"))) for part in ("kernels", "plan")
        ]
        return " ".join([*own, triton.__version__, "interpreted" if triton_interprets() else "compiled"])


#: In order of preference.
BACKENDS: tuple[Backend, ...] = (CudaBackend(), CpuBackend(), TritonBackend(), ReferenceBackend())


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, fastest first, e.g. ``["cpu", "reference"]``.

    >>> import gradprom_ext as gp
    >>> gp.available_backends()[-1]  # the one that is everywhere
    'reference'
    """
    return [b.name for b in BACKENDS if b.missing() is None]


def explain(device: torch.device, num_aux: int = 1) -> dict[str, str | None]:
    """For every backend ``None`` where it takes tensors of ``device``, else the reason why not."""
    return {b.name: b.missing() or b.rejects(device, num_aux) for b in BACKENDS}


def check_name(name: str | Backend) -> None:
    """:raises ValueError: ``name`` is no backend, or one that cannot run on this machine."""
    if name == "auto" or torch.compiler.is_compiling():  # the operator looks when it runs
        return
    known = {b.name: b for b in BACKENDS}
    if isinstance(name, str) and name not in known:
        raise ValueError(f"unknown backend {name!r}; choose 'auto' or one of {', '.join(map(repr, known))}")
    backend = known[name] if isinstance(name, str) else name
    reason = backend.missing()
    if reason is not None:
        raise ValueError(f"backend {backend.name!r} is not available here: {reason}")


@functools.cache
def choose(name: str | Backend, device: torch.device, num_aux: int) -> Backend:
    """The backend for tensors of ``device``.

    :param name: ``"auto"``, a backend's name, or a backend itself (one with options of its own, say).
    :raises ValueError: the named backend cannot take them; says why.
    """
    check_name(name)
    if name == "auto":
        reasons = explain(device, num_aux)
        backend = next(b for b in BACKENDS if reasons[b.name] is None)  # the reference takes everything
        if backend.name == "reference":
            why = "; ".join(f"{b.name}: {reasons[b.name]}" for b in BACKENDS if b.device_type == device.type)
            warnings.warn(f"gradprom_ext runs its slow reference on {device} ({why})", stacklevel=2)
        return backend
    backend = next(b for b in BACKENDS if b.name == name) if isinstance(name, str) else name
    reason = backend.rejects(device, num_aux)
    if reason is not None:
        raise ValueError(f"backend {backend.name!r} {reason}")
    return backend


_warned: set[tuple[object, ...]] = set()
_proven: dict[tuple[str | Backend, torch.device, Needs, frozenset[str]], Backend] = {}


def proven(name: str | Backend, device: torch.device, needs: Needs, without: frozenset[str] = frozenset()) -> Backend:
    """The backend of :func:`choose`, after it has passed its self-check for plans of this kind.

    Where ``"auto"`` chose it and it fails, the next one is taken, and one warning says what was wrong. A backend that
    is an object is its owner's affair.

    :param without: names of those that ``"auto"`` is not to choose.
    :raises ValueError: the named backend cannot take the tensors.
    :raises RuntimeError: the named backend failed; or the device is useless afterwards.
    """
    key = (name, device, needs, without)
    if key in _proven:
        return _proven[key]
    if name != "auto":
        backend = choose(name, device, needs.num_aux)
        fault = self_check.fault(backend, device, needs) if isinstance(name, str) else None
        if fault is not None:
            raise RuntimeError(
                f"backend {name!r} failed its self-check on {device} ({needs}): {fault}. backend='auto' takes another "
                f"one, and GRADPROM_SELF_CHECK=off takes this one all the same. {self_check.REPORT}"
            )
    else:
        faults: dict[str, str] = {}
        reasons = explain(device, needs.num_aux)
        for backend in BACKENDS:
            if reasons[backend.name] is None and backend.name not in without:
                fault = self_check.fault(backend, device, needs)
                if fault is None:
                    break
                faults[backend.name] = fault
        if not faults:
            choose(name, device, needs.num_aux)  # warns where it is the reference
        elif (device, *faults) not in _warned:
            _warned.add((device, *faults))
            why = "; ".join(f"{failed}: {fault}" for failed, fault in faults.items())
            taken = "its slow reference" if backend.name == "reference" else backend.name
            warnings.warn(
                f"gradprom_ext runs {taken} on {device}, because the self-check of what comes before it failed "
                f"({needs}): {why}. {self_check.REPORT}",
                stacklevel=2,
            )
    if not is_capturing():  # nothing was proven during a capture
        _proven[key] = backend
    return backend


def passed_over(backend: Backend, device: torch.device) -> frozenset[str]:
    """Names of those made for a device that ``"auto"`` prefers to this one there."""
    before = itertools.takewhile(lambda b: b.name != backend.name, BACKENDS)
    return frozenset(b.name for b in before if b.device_type == device.type)
