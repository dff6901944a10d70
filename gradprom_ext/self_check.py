"""A backend proves itself on a device before its first step there.

Kernels that are right on one GPU need not be right on another: a compiler, a driver or a memory model may differ. So
before a backend makes its first plan of a kind on a device, it takes a few steps on generated tensors, from a single
element to megabytes, and parameters, states and statistics are compared with those of the reference on the same device.
:mod:`gradprom_ext.backends` asks (:func:`fault`); a backend with a fault is not used.

That is done once for a kind of plan, in a thread of its own: modes of PyTorch that the caller is in (inference,
autocast, ``torch.func``) do not reach it, a kernel that never ends does not keep the caller, and OpenMP has no threads
in the caller's thread yet, with which a forked process would wait for ever. What was found is remembered in this
process and in ``self-check/`` below ``$GRADPROM_CACHE``, ``$XDG_CACHE_HOME/gradprom_ext`` or ``~/.cache/gradprom_ext``,
by driver, device, build of the kernels and versions. ``GRADPROM_SELF_CHECK=off`` skips it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import reference, rules
from ._device import is_capturing
from ._extension import extension
from .plan import Gradients, PlanBase, PlanSpec, StepRequest
from .policy import GATES, GatePolicy
from .reference import ReferencePlan
from .rules import Hyper, Rule
from .version import __version__

if TYPE_CHECKING:
    from .backends import Backend

__all__ = ["Needs", "Row", "examine", "fault", "long_form"]

#: The device may take so long for what a check has launched, in seconds: milliseconds where nothing is wrong.
DEVICE_LIMIT = 60.0
#: The whole check may take so long, in seconds. Triton compiles in that time.
LIMIT = 300.0

#: How far two correct results may lie apart after three steps, relative to 1 + their size.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
#: In the mean the rounding of single elements the other way hardly shows; wrong rounding does.
MEAN_SHARE = 0.01
#: Numbers of which a mean is taken.
ENOUGH = 1000
#: Of inner products, which are summed in fp64 in another order; those of fp32 products are farther off.
SUMS_TOLERANCE = 1e-11

#: Elements of the largest tensors: every multiprocessor of a GPU gets several tiles of them.
ELEMENTS = {"cuda": 300_007, "cpu": 20_011}
#: What the largest GPU that is known holds on chip of a pair of fp32 gradients is 3.7 million.
BEYOND_ANY_CHIP = 6_000_011

GUARD = 7.0
RULES: dict[str, Rule] = {rule.name: rule for rule in (rules.SGD, rules.ADAM)}
#: Of each rule every kind of update that its kernels have; the one with the most states last. A large ``eps`` keeps
#: rounding errors of tiny gradients small.
HYPERS: dict[str, list[Hyper]] = {
    "sgd": [
        Hyper(0.1, weight_decay=0.1),
        Hyper(0.1, momentum=0.9, nesterov=True, maximize=True),
        Hyper(0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    ],
    "adam": [
        Hyper(0.1, eps=1e-2, weight_decay=0.1),
        Hyper(0.1, eps=1e-2, weight_decay=0.1, decoupled=True, maximize=True),
        Hyper(0.1, eps=1e-2, amsgrad=True),
    ],
}


class Needs(NamedTuple):
    """What a plan asks of a backend.

    :param gate: name of the gate's case in the kernels; ``None`` for a policy in Python, which decides between two of
        their halves.
    :param dtypes: of the parameters; gradients are of the same type, or of any that a backend takes without compiling.
    """

    rule: str
    master_weights: bool
    num_aux: int
    per_tensor: bool
    gate: str | None
    dtypes: frozenset[torch.dtype]

    @classmethod
    def of(cls, spec: PlanSpec, gate: str | None) -> Needs:
        dtypes = frozenset([p.dtype for p in spec.params])
        rule = spec.rule
        return cls(rule.name, rule.master_weights, spec.num_aux, spec.per_tensor, gate, dtypes)

    def __str__(self) -> str:
        types = " ".join(str(d).removeprefix("torch.") for d in TOLERANCE if d in self.dtypes)
        cosine = "a cosine per tensor" if self.per_tensor else "one cosine"
        masters = " with masters" if self.master_weights else ""
        return f"{self.rule}{masters}, {self.num_aux} aux, {self.gate or 'own'} gate, {cosine}, {types}"


class Row(NamedTuple):
    """One number that a check has measured."""

    what: str
    error: float
    allowed: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed  # NaN is wrong too

    def __str__(self) -> str:
        return f"{self.what} off by {self.error:.2g}, where {self.allowed:.2g} is allowed"


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


class Item(NamedTuple):
    """A parameter of the check."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int
    layout: str = "flat"
    grad_dtypes: tuple[torch.dtype, ...] = ()  #: of main and auxiliary gradients in turn; empty: that of the parameter
    grads: str = "all"  #: "none": no gradient at all, "main": no auxiliary one


class Place(NamedTuple):
    """Where a tensor lies in the buffer of its type."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


@dataclass
class Tensors:
    """Tensors amid guards, all of a type in one buffer: a copy is one copy, a comparison is one comparison, and a write
    beside a tensor is a difference like any other."""

    buffers: dict[torch.dtype, Tensor]
    places: list[Place]

    @classmethod
    def lay_out(cls, wanted: Sequence[tuple[tuple[int, ...], torch.dtype, str]], device: torch.device) -> Tensors:
        ends: dict[torch.dtype, int] = {}
        places = []
        for shape, dtype, layout in wanted:
            step = 2 if layout == "with gaps" else 1
            order = range(len(shape)) if layout == "transposed" else range(len(shape) - 1, -1, -1)
            strides = [0] * len(shape)
            for d in order:
                strides[d], step = step, step * max(shape[d], 1)
            # Multiples of 16 elements are multiples of 16 bytes in every type.
            start = -(-(ends.get(dtype, 0) + 8) // 16) * 16 + (1 if layout == "misaligned" else 0)
            places.append(Place(dtype, shape, tuple(strides), start))
            ends[dtype] = start + step
        return cls({d: torch.full((end + 16,), GUARD, dtype=d, device=device) for d, end in ends.items()}, places)

    def views(self) -> list[Tensor]:
        return [self.buffers[p.dtype].as_strided(p.shape, p.strides, p.offset) for p in self.places]

    def copy(self) -> Tensors:
        return Tensors({d: b.clone() for d, b in self.buffers.items()}, self.places)

    def noise(self, generator: torch.Generator) -> Tensors:
        """The same places with other numbers in them; also between them, as gradients are only read."""
        out = {}
        for dtype, b in self.buffers.items():
            out[dtype] = torch.randn(b.shape, generator=generator, device=b.device).to(dtype)
        return Tensors(out, self.places)


def items_of(needs: Needs, elements: int, compiled_each: bool) -> list[Item]:
    """The parameters: of every type and kind of update, of several sizes and, where no kernel has to be compiled for
    it, in several layouts and with gradients of other types."""
    last = len(HYPERS[needs.rule]) - 1
    types = [d for d in TOLERANCE if d in needs.dtypes]
    items = []
    for n, dtype in enumerate(types):
        items += [Item((elements,), dtype, last), *(Item((2_100,), dtype, g) for g in range(last))]
        items += [Item((), dtype, n % (last + 1)), Item((17,), dtype, last, grads="none")]
        if not compiled_each:
            other = list(TOLERANCE)[(list(TOLERANCE).index(dtype) + 1) % 4]
            items += [
                Item((0,), dtype, 0),
                Item((3, 129), dtype, 0, "with gaps"),
                Item((5, 7, 11), dtype, 1, "transposed", grads="main"),
                Item((1_030,), dtype, last, "misaligned", grad_dtypes=(dtype, other)),
            ]
    return items


@dataclass
class Problem:
    """Parameters, states and the gradients of three steps.

    :ivar written: parameters, then the states of each.
    """

    needs: Needs
    device: torch.device
    items: list[Item]
    written: Tensors
    grads: list[list[list[Tensor | None]]]  # [step][loss][parameter]

    STEPS = 3

    @classmethod
    def make(cls, needs: Needs, device: torch.device, elements: int, compiled_each: bool) -> Problem:
        generator = torch.Generator(device).manual_seed(20250101)
        items = items_of(needs, elements, compiled_each)
        rule = RULES[needs.rule].with_masters(needs.master_weights)
        wanted = [(item.shape, item.dtype, item.layout) for item in items]
        for item in items:
            wide = torch.float32 if needs.master_weights and item.dtype.itemsize == 2 else item.dtype
            for name in _state_names(rule, item):
                shape = () if name == "step" else item.shape
                wanted.append((shape, torch.float32 if name == "step" else wide, item.layout))
        written = Tensors.lay_out(wanted, device)
        values = written.noise(generator).views()
        params, states = _split(rule, items, written.views())
        for param, value, state in zip(params, values, states, strict=False):
            param.copy_(value)
            for name, tensor in state.items():
                tensor.copy_(param) if name == "master" else tensor.zero_()

        def types(k: int) -> list[torch.dtype]:
            return [i.grad_dtypes[k % len(i.grad_dtypes)] if i.grad_dtypes else i.dtype for i in items]

        grads: list[list[list[Tensor | None]]] = []
        for step in range(cls.STEPS):
            losses: list[Tensors] = []
            for k in range(1 + needs.num_aux):
                wanted = [(i.shape, dtype, i.layout) for i, dtype in zip(items, types(k), strict=True)]
                losses.append(Tensors.lay_out(wanted, device).noise(generator))
            main = losses[0].views()
            for k, aux in enumerate(losses[1:]):
                # Some point along the main gradient and some against it: gates open and close.
                lean = 1.0 if (step + k) % 2 == 0 else -1.0
                for a, m in zip(aux.views(), main, strict=True):
                    a.add_(m, alpha=lean)
            of_step: list[list[Tensor | None]] = []
            for k, loss in enumerate(losses):
                left_out = ("none",) if k == 0 else ("none", "main")
                of_step.append([None if i.grads in left_out else v for i, v in zip(items, loss.views(), strict=True)])
            grads.append(of_step)
        return cls(needs, device, items, written, grads)

    def spec(self, written: Tensors) -> PlanSpec:
        rule = RULES[self.needs.rule].with_masters(self.needs.master_weights)
        params, states = _split(rule, self.items, written.views())
        groups = [item.group for item in self.items]
        return PlanSpec(rule, params, groups, states, self.needs.num_aux, self.needs.per_tensor)

    @functools.cached_property
    def requests(self) -> list[StepRequest]:
        """Settings of the steps."""
        return [self._request(step) for step in range(self.STEPS)]

    def _request(self, step: int) -> StepRequest:
        """With a cap and clipping at first, then with numbers that lie on the device."""
        policy: GatePolicy = GATES[self.needs.gate or "soft"]()
        hypers = HYPERS[self.needs.rule]
        weights: tuple[float, ...] | Tensor = tuple(0.7 / (1 + k) for k in range(self.needs.num_aux))
        if step == 0:
            return StepRequest(hypers, policy, weights, 0.8, 30.0, None)
        lr = torch.full((), 0.1 / (1 + step), dtype=torch.float32, device=self.device)
        hypers = [Hyper(**{**vars(h), "lr": lr}) for h in hypers]
        weights = torch.full((self.needs.num_aux,), 0.5, dtype=torch.float64, device=self.device)
        return StepRequest(hypers, policy, weights, None, None, None)

    def poisoned(self, step: int) -> list[list[Tensor | None]]:
        """The gradients of a step with a NaN in the last element of the last loss's largest tensor."""
        grads = [list(gs) for gs in self.grads[step]]
        at = max(range(len(self.items)), key=lambda i: math.prod(self.items[i].shape))
        largest = grads[-1][at]
        assert largest is not None
        grads[-1][at] = largest.clone()
        grads[-1][at].view(-1)[-1:].fill_(math.nan)  # type: ignore[union-attr]
        return grads


def _state_names(rule: Rule, item: Item) -> tuple[str, ...]:
    return rule.state_names(HYPERS[rule.name][item.group], torch.empty(0, dtype=item.dtype))


def _split(rule: Rule, items: Sequence[Item], views: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Parameters and state dicts of what was laid out."""
    rest = iter(views[len(items) :])
    states = [{name: next(rest) for name in _state_names(rule, item)} for item in items]
    return views[: len(items)], states


# ----------------------------------------------------------------------------------------------------------------------
# The check


class Expected(NamedTuple):
    """What the reference makes of a problem."""

    grams: list[Tensor]
    weights: list[Tensor]
    stats: list[Tensor]
    written: Tensors


def expected(problem: Problem) -> Expected:
    out = Expected([], [], [], problem.written.copy())
    plan = ReferencePlan(problem.spec(out.written))
    for step, (main, *aux) in enumerate(problem.grads):
        request = problem.requests[step]
        plan.bind_gradients(main, aux)
        gram = plan.gram()
        weights, stats = reference.decide(
            gram, request.gate, request.aux_weight, request.aux_cap, request.max_grad_norm, problem.needs.per_tensor
        )
        plan.update(request.hypers, weights, stats.skipped)
        out.grams.append(gram)
        out.weights.append(weights)
        out.stats.append(stats.packed)
    return out


Measured = list[tuple[str, Tensor, float]]


def steps_of(backend: Backend, problem: Problem, expect: Expected) -> tuple[Measured, Tensors]:
    """The steps of a backend, and what they leave behind. The device is not waited for.

    The first step is gated by the kernels. Then everything moves to other memory, as ``p.data = ...`` does, and what is
    in the old one becomes useless. The second step is measured on its own before it is taken, the third one is decided
    elsewhere, and a fourth one must change nothing.
    """
    measured: Measured = []
    written = problem.written.copy()
    spec = problem.spec(written)
    plan = backend.plan(spec)
    fused = plan.fused and problem.needs.gate is not None
    skipped_steps = torch.zeros((), dtype=torch.float64, device=problem.device)
    ready = True

    def halves(step: int) -> None:
        gram = plan.gram()
        measured.append((f"inner products of step {step + 1}", _worst(gram, expect.grams[step]), SUMS_TOLERANCE))
        if step == 2 or not fused:
            request = problem.requests[step]
            skipped = torch.zeros((), dtype=torch.bool, device=problem.device)
            plan.update(request.hypers, expect.weights[step], skipped)

    def whole(step: int) -> None:
        packed = plan.step(problem.requests[step]._replace(skipped_steps=skipped_steps)).packed
        measured.append((f"statistics of step {step + 1}", _worst(packed, expect.stats[step]), SUMS_TOLERANCE))

    for step in range(problem.STEPS):
        if step == 1:
            old, written = written, written.copy()
            for mine, theirs in _pairs(spec, problem.spec(written)):
                mine.data = theirs
            for buffer in old.buffers.values():
                buffer.fill_(5.0)
        ready = ready and plan.matches(spec.params)
        _bind(plan, problem.grads[step])
        ready = ready and not plan.missing_states(problem.requests[step].hypers)
        if step > 0 or not fused:
            halves(step)
        if step < 2 and fused:
            whole(step)
    before = written.copy()
    poisoned = problem.poisoned(2)  # alive as long as it is bound
    _bind(plan, poisoned)
    ready = ready and not plan.missing_states(problem.requests[2].hypers)
    if fused:
        flag = plan.step(problem.requests[2]._replace(skipped_steps=skipped_steps)).packed[0]
        measured.append(("the flag of a step with NaN", (flag - 1).abs(), 0.0))
        measured.append(("the count of steps with NaN", (skipped_steps - 1).abs(), 0.0))
    else:
        finite = plan.gram().diagonal(dim1=-2, dim2=-1).isfinite().all()
        measured.append(("the inner products of a step with NaN", finite.to(torch.float64), 0.0))
        plan.update(problem.requests[2].hypers, expect.weights[2], ~finite)
    if not ready:
        raise RuntimeError("a plan did not know its own parameters and states any more")
    for dtype, buffer in written.buffers.items():
        same = (_bits(buffer) == _bits(before.buffers[dtype])).all()
        measured.append((f"{_name(dtype)} numbers that a step with NaN should leave alone", (~same).double(), 0.0))
        error = _errors(buffer, expect.written.buffers[dtype])
        measured.append((f"{_name(dtype)} parameters and states", error.amax(), TOLERANCE[dtype]))
        if buffer.numel() >= ENOUGH:
            mean = error.mean()
            measured.append((f"{_name(dtype)} parameters and states in the mean", mean, MEAN_SHARE * TOLERANCE[dtype]))
    return measured, written


def examine(backend: Backend, device: torch.device, needs: Needs, elements: int | None = None) -> list[Row]:
    """Compares a backend, in all the forms that it may be launched in, with the reference.

    :param elements: of the largest tensors.
    :returns: everything that was measured.
    :raises TimeoutError: the device did not finish.
    """
    rows: list[Row] = []
    for form, measured in _launched(backend, device, needs, elements):
        numbers = _read([tensor for _, tensor, _ in measured], device)
        for (what, _, allowed), error in zip(measured, numbers, strict=True):
            rows.append(Row(f"{what}{form and f' ({form})'}", error, allowed))
    return rows


@torch.no_grad()
def _launched(
    backend: Backend, device: torch.device, needs: Needs, elements: int | None
) -> Iterator[tuple[str, Measured]]:
    if not needs.dtypes:
        return
    elements = elements or ELEMENTS.get(device.type, ELEMENTS["cpu"])
    problem = Problem.make(needs, device, elements, backend.compiles_each_kind)
    expect = expected(problem)
    alive = []  # until all has run: plans keep addresses
    for form, variant in backend.forms().items():
        measured, written = steps_of(variant, problem, expect)
        alive.append(written)
        yield form, measured


def _bind(plan: PlanBase, grads: Sequence[Gradients]) -> None:
    main, *aux = grads
    plan.bind_gradients(main, aux)


def _pairs(spec: PlanSpec, other: PlanSpec) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(spec.params, other.params, strict=True)
    for state, twin in zip(spec.states, other.states, strict=True):
        for name in state:
            yield state[name], twin[name]


def _errors(actual: Tensor, wanted: Tensor) -> Tensor:
    wide = wanted.double()
    return (actual.double() - wide).abs() / (1 + wide.abs())


def _worst(actual: Tensor, wanted: Tensor) -> Tensor:
    return _errors(actual, wanted).amax()


def _bits(buffer: Tensor) -> Tensor:
    return buffer.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[buffer.itemsize])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read(numbers: list[Tensor], device: torch.device, limit: float = DEVICE_LIMIT) -> list[float]:
    """Numbers of the device, for which it is waited no longer than ``limit`` seconds.

    :raises TimeoutError: they have not come.
    """
    together = torch.stack(numbers)
    if device.type != "cuda":
        return together.tolist()
    # Neither this copy nor asking for the event is a synchronization, which the caller may have forbidden.
    host = torch.empty(together.shape, dtype=together.dtype, pin_memory=True)
    host.copy_(together, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    end = time.monotonic() + limit
    while not done.query():
        if time.monotonic() > end:
            raise TimeoutError(f"the device did not finish within {limit:.0f} s")
        time.sleep(1e-4)
    return host.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# What is remembered


def cache_folder() -> Path | None:
    """Where records lie; ``None`` for a user without a home."""
    own, shared = os.environ.get("GRADPROM_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    with contextlib.suppress(RuntimeError):  # no home
        if own:
            return Path(own).expanduser() / "self-check"
        base = Path(shared) if os.path.isabs(shared) else Path.home() / ".cache"
        return base / "gradprom_ext" / "self-check"
    return None


@functools.cache
def file_identity(path: str) -> str:
    """Tells builds of a file apart, in a few milliseconds."""
    content = Path(path).read_bytes()
    return f"{zlib.crc32(content):08x}-{len(content)}"


def _driver() -> str:
    """The kernel driver of GPUs, as Linux says it; asking a program would take longer than the check."""
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().partition("\n")[0]
    return ""


@functools.cache
def _device_identity(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        module = extension()[0]
        return {"machine": platform.machine(), "isa": module and module.cpu_isa()}
    gpu = torch.cuda.get_device_properties(device)
    about = {"name": gpu.name, "multiprocessors": gpu.multi_processor_count, "memory": gpu.total_memory}
    about["capability"] = f"{gpu.major}.{gpu.minor}"
    return {**about, "driver": _driver(), "cuda": torch.version.cuda, "hip": torch.version.hip}


class Record:
    """What is known of a backend on a device, in a small file.

    Any number of processes may write it: a file is whole at every moment, and the worst is that what another one has
    found at the same time is found again. One that is damaged, or that cannot be read or written, is none.
    """

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.about = {
            "backend": backend.name,
            "kernels": backend.identity(),
            "device": _device_identity(device),
            "versions": [__version__, torch.__version__, file_identity(__file__)],
        }
        folder = cache_folder()
        digest = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.path = folder and folder / f"{backend.name}-{digest}.json"

    def read(self) -> dict[str, str | None]:
        """By the plans' needs: what was wrong, or ``None``."""
        if self.path is None:
            return {}
        try:
            found = json.loads(self.path.read_bytes()[:1_000_000])
            if found["about"] != self.about:
                return {}
            return {str(k): None if v is None else str(v)[:1000] for k, v in found["faults"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def write(self, faults: dict[str, str | None]) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.stem}-", suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump({"about": self.about, "faults": faults}, file, indent=1)
                os.replace(name, self.path)
            except BaseException:
                os.unlink(name)
                raise

    def add(self, faults: dict[str, str | None]) -> None:
        self.write({**self.read(), **faults})


# ----------------------------------------------------------------------------------------------------------------------
# What backends.py asks


def switched_off() -> bool:
    """Whether ``GRADPROM_SELF_CHECK`` says so."""
    return os.environ.get("GRADPROM_SELF_CHECK", "").lower() in ("0", "off", "no", "false")


REPORT = "Please report the output of `python -m gradprom_ext.doctor --check`"

_known: dict[tuple[int, torch.device, Needs], str | None] = {}


def fault(backend: Backend, device: torch.device, needs: Needs) -> str | None:
    """What is wrong with a backend on a device for a plan of this kind; ``None`` where it proved itself, now or before.

    While a CUDA graph is being captured nothing can be checked: what is known counts, and a later plan is checked.

    :raises RuntimeError: what was wrong has made the device useless for this process; the next one will know.
    """
    if not backend.forms() or switched_off():
        return None
    key = (id(backend), device, needs)
    if key in _known:
        return _known[key]
    record = Record(backend, device)
    known = record.read()
    if str(needs) in known:
        _known[key] = known[str(needs)]
        return _known[key]
    if is_capturing():
        return None
    found, proven = _in_a_thread(backend, device, needs)
    if proven:
        record.add({str(needs): found})
    _known[key] = found
    if found is not None and not is_alive(device):
        raise RuntimeError(
            f"backend {backend.name!r} failed its self-check on {device} ({found}), and this process can no longer use "
            f"the device. Start again: 'auto' will not take this backend then. {REPORT}"
        )
    return found


def _in_a_thread(backend: Backend, device: torch.device, needs: Needs) -> tuple[str | None, bool]:
    """The fault, and whether anything was proven."""
    answer: list[tuple[str | None, bool]] = []
    # Its memory is that of the caller's stream, which has use for it later. What is on that stream is waited for first.
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> None:
        torch.get_num_threads()  # has this thread take as many as the caller's
        with contextlib.ExitStack() as stack:
            if stream is not None:
                stack.enter_context(torch.cuda.device(device))
                stack.enter_context(torch.cuda.stream(stream))
                while not stream.query():
                    time.sleep(1e-4)
            try:
                wrong = [row for row in examine(backend, device, needs) if row.wrong]
                answer.append((str(wrong[0]) if wrong else None, True))
            except torch.OutOfMemoryError:
                answer.append((None, False))  # says nothing about the kernels; the caller will hear of it soon enough
            except Exception as error:
                answer.append((in_a_line(error), True))

    thread = threading.Thread(target=run, name="gradprom_ext self-check", daemon=True)
    thread.start()
    thread.join(LIMIT)
    return answer[0] if answer else (f"it did not finish within {LIMIT:.0f} s", True)


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def is_alive(device: torch.device) -> bool:
    """Whether a device still works for this process: an illegal address, or a kernel without an end, is final."""
    if device.type != "cuda":
        return True
    try:
        with torch.cuda.device(device):
            return _read([torch.ones((), device=device)], device, limit=5.0) == [1.0]
    except Exception:
        return False


# ----------------------------------------------------------------------------------------------------------------------
# The long form


def long_form(device: torch.device) -> list[tuple[Needs, int]]:
    """What ``python -m gradprom_ext.doctor --check`` examines: needs, and elements of the largest tensors."""
    every = frozenset(TOLERANCE)
    small = ELEMENTS.get(device.type, ELEMENTS["cpu"])
    plans: list[tuple[Needs, int]] = []
    single = frozenset({torch.float32})
    for rule, num_aux in itertools.product(RULES, (1, 2, 4)):
        plans.append((Needs(rule, False, num_aux, False, "hard", every if num_aux < 4 else single), small))
        plans.append((Needs(rule, False, num_aux, True, "soft", single), small))
    plans += [(Needs("sgd", False, 1, False, gate, single), small) for gate in (*GATES, None) if gate != "hard"]
    plans += [(Needs(rule, True, 1, False, "hard", every - single), small) for rule in RULES]
    if device.type == "cuda":
        plans += [(Needs(rule, False, 1, False, "hard", single), BEYOND_ANY_CHIP) for rule in RULES]
    return plans
