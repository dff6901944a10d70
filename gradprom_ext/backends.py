"""Which code runs a step: the compiled kernels where they exist, the reference where nothing else can.

A backend makes *plans*. A plan belongs to fixed parameter objects on one device; at every step it is handed the
gradients and either runs the whole step (a kernel) or its two halves, the Gram matrix and the update, between which
somebody else decides (several devices, or a policy written in Python).
"""

from __future__ import annotations

import functools
import importlib.util
import operator
import os
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .policy import GatePolicy
from .reference import Gradients, ReferencePlan
from .rules import Hyper, Rule
from .stats import GateStats, packed_size
from .triton_plan import MAX_AUX, TritonPlan

__all__ = ["Backend", "Plan", "available_backends", "choose", "explain"]


class Plan(Protocol):
    """Parameters of one device and their optimizer states, ready to be stepped."""

    def matches(self, params: Sequence[Tensor]) -> bool:
        """Whether these are the very parameter objects the plan was made for, still on its device."""

    def bind_gradients(self, main: Gradients, aux: Sequence[Gradients]) -> None:
        """Hands over this step's gradients, one per parameter and loss. Checks everything, writes nothing.

        A plan keeps addresses, not tensors: the caller keeps the gradients alive until the step is done.
        """

    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        """Parameters that have a gradient but lack a state tensor."""

    def gram(self) -> Tensor:
        """Float64 ``[rows, K + 1, K + 1]``."""

    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        """Steps with ``weights`` float64 ``[rows, K + 1]`` unless ``skipped`` (bool ``[]``)."""


class FusedPlan(Plan, Protocol):
    """A plan that can also gate on its own."""

    def step(
        self,
        hypers: Sequence[Hyper],
        policy: GatePolicy,
        aux_weight: tuple[float, ...] | Tensor,
        max_grad_norm: float | None,
        skipped_steps: Tensor | None,
    ) -> GateStats:
        """Gram matrix, gate and update in one go.

        :param aux_weight: one lambda per auxiliary; a tensor of one or of as many on the plan's device is read when the
            step runs, one in host memory now. The same holds for each ``Hyper.lr``.
        :param skipped_steps: float64 ``[]`` on the plan's device, raised by 1 where a gradient is not finite;
            or ``None``.
        """


class Backend(Protocol):
    """A way to run steps."""

    name: str
    device_type: str | None  #: of the tensors it takes; ``None``: any

    def missing(self) -> str | None:
        """Why this backend cannot run on this machine at all; ``None`` where it can."""

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        """Why it cannot take tensors of ``device`` with ``num_aux`` auxiliaries; ``None`` where it can."""

    def plan(
        self,
        rule: Rule,
        params: list[Tensor],
        groups: list[int],
        states: list[dict[str, Any]],
        num_aux: int,
        per_tensor: bool,
    ) -> Plan:
        """A plan for parameters of one device; ``groups[i]`` is the index of params[i]'s hyper-parameters."""


@functools.cache
def extension() -> tuple[Any, str | None]:
    """The compiled module and ``None``, or ``None`` and the reason why there is none."""
    # torch is imported first (at the top of this file), so that both share one OpenMP runtime: then
    # torch.set_num_threads is honoured and no second pool of threads competes for the cores.
    try:
        from . import _C
    except ImportError as error:
        return None, (
            f"the compiled module cannot be imported ({error}); install a C++17 compiler (Debian, Ubuntu: apt-get "
            "install g++) and run `pip install -e .` again"
        )
    return _C, None


class ReferenceBackend:
    """Plain PyTorch (:mod:`gradprom_ext.reference`): every device, every dtype, any number of auxiliaries."""

    name = "reference"
    device_type: str | None = None

    def missing(self) -> str | None:
        return None

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        return None

    plan = staticmethod(ReferencePlan)


class CompiledPlan:
    """A plan of ``gradprom_ext._C``; see :class:`Plan`."""

    def __init__(
        self,
        rule: Rule,
        params: list[Tensor],
        groups: list[int],
        states: list[dict[str, Any]],
        num_aux: int,
        per_tensor: bool,
    ) -> None:
        self._c, _ = extension()
        self._params, self._num_aux = params, num_aux
        self._rows = len(params) if per_tensor else None
        self._seen: Sequence[Hyper] = ()
        self._converted: list[Any] = []
        self._gate: Any = None
        self._gate_key: tuple[Any, ...] = ()
        self._plan = self._c.Plan(
            rule=getattr(self._c.Rule, rule.name),
            params=params,
            groups=groups,
            states=states,
            num_aux=num_aux,
            per_tensor=per_tensor,
            master_weights=rule.master_weights,
        )
        self.matches = self._plan.matches
        self.bind_gradients = self._plan.bind_gradients

    def missing_states(self, hypers: Sequence[Hyper]) -> list[int]:
        return self._plan.bind_states(self._settings(hypers))

    def gram(self) -> Tensor:
        n = self._num_aux + 1
        packed = self._empty((self._rows if self._rows is not None else 1, n * (n + 1) // 2))
        self._plan.gram(packed)
        i, j = torch.triu_indices(n, n, device=packed.device)
        gram = packed.new_empty(len(packed), n, n)
        gram[:, i, j] = packed
        gram[:, j, i] = packed
        return gram

    def update(self, hypers: Sequence[Hyper], weights: Tensor, skipped: Tensor) -> None:
        self._plan.update(self._settings(hypers), weights.contiguous(), skipped.to(weights.dtype))
        torch.autograd.graph.increment_version(self._params)

    def step(
        self,
        hypers: Sequence[Hyper],
        policy: GatePolicy,
        aux_weight: tuple[float, ...] | Tensor,
        max_grad_norm: float | None,
        skipped_steps: Tensor | None,
    ) -> GateStats:
        rows = self._rows if self._rows is not None else 1
        stats = self._empty((packed_size(rows, self._num_aux),))
        key = (policy.kernel, policy.threshold, aux_weight, max_grad_norm)
        if self._gate is None or not all(map(operator.is_, key, self._gate_key)):
            self._gate_key = key
            self._gate = self._c.GateSettings(
                gate=getattr(self._c.Gate, str(policy.kernel)),
                threshold=policy.threshold,
                max_grad_norm=max_grad_norm or 0.0,
                aux_weight=aux_weight,
            )
        self._plan.step(self._settings(hypers), self._gate, stats, skipped_steps)
        # The kernels write through raw pointers; autograd must still notice that saved parameters are stale.
        torch.autograd.graph.increment_version(self._params)
        return GateStats(stats, self._num_aux, self._rows)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=self._params[0].device)

    def _settings(self, hypers: Sequence[Hyper]) -> list[Any]:
        seen = self._seen  # they change when a scheduler moves, at most once per step
        if len(seen) != len(hypers) or not all(map(Hyper.same, hypers, seen)):
            self._seen, self._converted = hypers, [self._c.Group(**vars(h)) for h in hypers]
        return self._converted


def _too_many(num_aux: int) -> str | None:
    limit = extension()[0].MAX_AUX
    return f"takes up to {limit} auxiliaries, not {num_aux}" if num_aux > limit else None


class CudaBackend:
    """The compiled CUDA kernels (csrc/cuda): the whole step in one launch, nothing waits for the device."""

    name = "cuda"
    device_type: str | None = "cuda"

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

    plan = staticmethod(CompiledPlan)


class CpuBackend:
    """The compiled CPU kernels (csrc/cpu): OpenMP, AVX2 or AVX-512 where the processor has it."""

    name = "cpu"
    device_type: str | None = "cpu"

    def missing(self) -> str | None:
        return extension()[1]

    def rejects(self, device: torch.device, num_aux: int) -> str | None:
        if device.type != self.device_type:
            return f"takes tensors in host memory, not on {device}"
        return _too_many(num_aux)

    plan = staticmethod(CompiledPlan)


@functools.cache
def triton_kernels() -> Any:
    """The module of the Triton kernels: Triton is imported when they are first used."""
    from . import triton_kernels as kernels

    return kernels


def triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on host memory, as its own documentation tells how to."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend:
    """The Triton kernels (gradprom_ext/triton_plan.py): a GPU that the CUDA kernels cannot use, of any vendor."""

    name = "triton"
    device_type: str | None = "cuda"  #: AMD's GPUs have this type in PyTorch too

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
        return f"takes up to {MAX_AUX} auxiliaries, not {num_aux}" if num_aux > MAX_AUX else None

    def plan(
        self,
        rule: Rule,
        params: list[Tensor],
        groups: list[int],
        states: list[dict[str, Any]],
        num_aux: int,
        per_tensor: bool,
    ) -> Plan:
        return TritonPlan(triton_kernels(), rule, params, groups, states, num_aux, per_tensor)


#: In order of preference.
BACKENDS: tuple[Backend, ...] = (CudaBackend(), CpuBackend(), TritonBackend(), ReferenceBackend())


def available_backends() -> list[str]:
    """Names of the backends that can run on this machine, fastest first, e.g. ``["cpu", "reference"]``."""
    return [b.name for b in BACKENDS if b.missing() is None]


def explain(device: torch.device, num_aux: int = 1) -> dict[str, str | None]:
    """For every backend ``None`` where it takes tensors of ``device``, else the reason why not."""
    return {b.name: b.missing() or b.rejects(device, num_aux) for b in BACKENDS}


def check_name(name: str) -> None:
    """:raises ValueError: ``name`` is no backend, or one that cannot run on this machine."""
    if name == "auto" or torch.compiler.is_compiling():  # the operator looks when it runs
        return
    known = {b.name: b for b in BACKENDS}
    if name not in known:
        raise ValueError(f"unknown backend {name!r}; choose 'auto' or one of {', '.join(map(repr, known))}")
    reason = known[name].missing()
    if reason is not None:
        raise ValueError(f"backend {name!r} is not available here: {reason}")


@functools.cache
def choose(name: str, device: torch.device, num_aux: int) -> Backend:
    """The backend for tensors of ``device``.

    :param name: ``"auto"`` or a backend's name.
    :raises ValueError: the named backend cannot take them; says why.
    """
    check_name(name)
    reasons = explain(device, num_aux)
    for backend in BACKENDS:
        if name not in ("auto", backend.name):
            continue
        reason = reasons[backend.name]
        if reason is None:
            if name == "auto" and backend.name == "reference":
                why = "; ".join(f"{b.name}: {reasons[b.name]}" for b in BACKENDS if b.device_type == device.type)
                warnings.warn(f"gradprom_ext runs its slow reference on {device} ({why})", stacklevel=2)
            return backend
        if name == backend.name:
            raise ValueError(f"backend {name!r} {reason}")
    raise AssertionError("the reference takes everything")
