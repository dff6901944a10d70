"""The optimizer step alone: ``--what update``.

On the CPU every contestant has tensors of its own. On a GPU they share several *input sets* and take turns over them;
the sets together are several times the L2 cache, so that no step finds its tensors there, and the memory of one
contestant is enough for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import gradprom_ext as gp

from .. import backends as _backends
from . import rivals, timing
from .checking import LeftOut, WrongResultError, is_ours, leaving_out, relative_error
from .networks import Shapes, parameter_shapes
from .results import UpdateResult, update_results
from .timing import Gpu, Step

OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("fp32", "bf16")
LR = 1e-6  # the values must stay ordinary however often a step is repeated
#: The input sets together are at least this many times the L2 cache; a single one at least `ALONE` times.
CACHES, ALONE = 4, 100
MAX_SETS = 256
#: A sample holds as many sets as the host queues in this many seconds: a graph of a million launches is no use, and a
#: step that waits for the device takes its time at every round.
QUEUE_SECONDS = {"queue": 0.1, "graph": 0.1, "eager": 0.02}
#: Of the free memory of a GPU that may be taken.
MEMORY_SHARE = 0.9
#: A copy of at least this many bytes measures the bandwidth.
COPY_BYTES = 2**28
_GRADIENT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """What is stepped, and how."""

    network: str
    optimizer: str
    precision: str

    @property
    def shapes(self) -> Shapes:
        return parameter_shapes(self.network)

    def __str__(self) -> str:
        return f"{self.network}, {self.optimizer}, {self.precision}"


class Inputs:
    """Parameters with a main and an auxiliary gradient that agree (the gate is open), and the optimizer's state.

    The parameters start at zero, so that a first step shows its update in full precision. Contestants make their own
    ``Parameter`` objects over these tensors.
    """

    def __init__(self, shapes: Shapes, optimizer: str, precision: str, device: torch.device, seed: int = 0) -> None:
        g = torch.Generator(device).manual_seed(seed)
        dtype = _GRADIENT_TYPES[precision]
        draw = lambda s: torch.randn(s, generator=g, device=device, dtype=dtype)  # noqa: E731
        zeros = lambda dtype: [torch.zeros(s, device=device, dtype=dtype) for s in shapes]  # noqa: E731
        self.params = zeros(dtype)
        self.main = [draw(s) for s in shapes]
        self.aux = [draw(s).add_(m) for s, m in zip(shapes, self.main, strict=True)]
        #: Float32, what the update acts on: the masters of 16-bit parameters, or the parameters themselves.
        self.weights = self.params if precision == "fp32" else zeros(torch.float32)
        self.moments = {n: zeros(torch.float32) for n in ("exp_avg", "exp_avg_sq")} if optimizer == "adamw" else {}

    @staticmethod
    def bytes_per_parameter(optimizer: str, precision: str) -> int:
        """Memory of one set."""
        return (12 if precision == "fp32" else 6 + 4) + (8 if optimizer == "adamw" else 0)

    def reset(self) -> None:
        """As before the first step, the gradients excepted."""
        for tensors in (self.params, self.weights, *self.moments.values()):
            torch._foreach_zero_(tensors)

    def lend_state(self, opt: torch.optim.Optimizer, params: Sequence[Tensor], masters: bool = False) -> None:
        """Puts these tensors in place of the state that an optimizer would make at its first step."""
        for i, p in enumerate(params):
            state = opt.state[p]
            if self.moments:
                state["step"] = torch.zeros((), device=p.device)
            for name, tensors in self.moments.items():
                state[name] = tensors[i]
            if masters:
                state["master"] = self.weights[i]


# ----------------------------------------------------------------------------------------------------------------------
# Contestants: functions from a case and its inputs to one step


def _parameters(tensors: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> list[Tensor]:
    """``Parameter`` objects over ``tensors``; ``.data``, so that each counts only its own contestant's writes."""
    params: list[Tensor] = [torch.nn.Parameter(t.data) for t in tensors]
    for p, g in zip(params, grads, strict=False):
        p.grad = g
    return params


def gradprom(case: Case, inputs: Inputs, *, backend: str | _backends.Backend) -> Step:
    """What a user calls, ``opt.step()``, Python included."""
    params = _parameters(inputs.params, inputs.main)
    masters = case.precision != "fp32"
    kind = gp.GradPromSGD if case.optimizer == "sgd" else gp.GradPromAdamW
    opt = kind(params, lr=LR, backend=backend, master_weights=masters)
    inputs.lend_state(opt, params, masters)
    opt.aux_grads = [list(inputs.aux)]
    return opt.step


def two_launches(case: Case, inputs: Inputs) -> Step:
    """The CUDA kernels without a cooperative launch: measure, then decide and update."""
    return gradprom(case, inputs, backend=_backends.CudaBackend(cooperative=False))


def plain(case: Case, inputs: Inputs) -> Step:
    """The optimizer alone, on the main gradient alone: no GradProm at all."""
    return pytorch(case, inputs, combine=None)


def pytorch(case: Case, inputs: Inputs, *, combine: rivals.Combine | None) -> Step:
    """A fused optimizer after ``combine``, which adds the auxiliary gradient to the main one where they agree.

    With 16-bit gradients: the usual recipe, an optimizer of float32 masters that gradients are copied to and
    parameters from.
    """
    cast = case.precision != "fp32"
    main, aux = inputs.main, inputs.aux
    if cast:
        main, aux = [g.float() for g in main], [g.float() for g in aux if combine is not None]
    params = _parameters(inputs.weights, main)
    opt = rivals.plain_optimizer(case.optimizer, params, lr=LR, capturable=params[0].is_cuda)
    inputs.lend_state(opt, params)

    def step() -> None:
        if cast:
            torch._foreach_copy_(main, inputs.main)
        if combine is not None:
            if cast:
                torch._foreach_copy_(aux, inputs.aux)
            combine(main, aux)
        opt.step()
        if cast:
            torch._foreach_copy_(inputs.params, inputs.weights)

    return step


def torchjd(case: Case, inputs: Inputs, *, api: Any) -> Step:
    """TorchJD's PCGrad on Jacobians that are already there, then a fused optimizer."""
    params = _parameters(inputs.params)
    opt = rivals.plain_optimizer(case.optimizer, params, lr=LR, capturable=params[0].is_cuda)
    inputs.lend_state(opt, params)
    aggregator = api.PCGrad()
    for p, m, a in zip(params, inputs.main, inputs.aux, strict=True):
        p.jac = torch.stack([m, a])  # type: ignore[attr-defined]

    def step() -> None:
        api.jac_to_grad(params, aggregator, retain_jac=True)
        opt.step()
        opt.zero_grad()

    return step


def lamb(case: Case, inputs: Inputs, *, kind: Any) -> Step:
    """apex's FusedLAMB. Another method: one gradient, another update; beside ours because it too is fused and needs a
    norm over everything before it writes. It writes over its gradients, so it has copies."""
    params = _parameters(inputs.params, [m.clone() for m in inputs.main])
    opt = kind(params, lr=LR)
    inputs.lend_state(opt, params)
    return opt.step


@dataclass(frozen=True)
class Contestant:
    """A way to step, and what it should do."""

    build: Callable[[Case, Inputs], Step]
    gradient: str | None = "combined"  #: that it steps with: "combined" or "main"; ``None``: a method of its own
    scratch: int = 0  #: bytes per parameter that it holds beyond the inputs
    few_launches: bool = False  #: on a GPU: few enough to be queued while the device is held back


def contestants(case: Case, device: torch.device, backends: Sequence[str]) -> dict[str, Contestant]:
    """Everything that can run here, by name."""
    cast = 8 if case.precision != "fp32" else 0
    field = {f"gradprom {b}": Contestant(partial(gradprom, backend=b), few_launches=b != "reference") for b in backends}
    if "cuda" in backends:
        field["gradprom cuda, two launches"] = Contestant(two_launches, few_launches=True)
    best = rivals.best_pytorch(device)
    field["best PyTorch"] = Contestant(partial(pytorch, combine=best), scratch=cast + 8)
    if device.type != "cpu":
        field["PyTorch, dots"] = Contestant(partial(pytorch, combine=rivals.add_gated_by_dots_), scratch=cast)
    if case.precision == "fp32":
        if (api := rivals.torchjd()) is not None:
            field["TorchJD PCGrad"] = Contestant(partial(torchjd, api=api), scratch=28)
        if device.type == "cuda" and case.optimizer == "adamw" and (kind := rivals.fused_lamb()) is not None:
            field["apex FusedLAMB (another method)"] = Contestant(partial(lamb, kind=kind), gradient=None, scratch=4)
    field["plain optimizer"] = Contestant(plain, gradient="main", scratch=cast // 2)
    return field


# ----------------------------------------------------------------------------------------------------------------------
# Correct first, then fast


def check(case: Case, contestant: Contestant, inputs: Inputs, step: Step) -> None:
    """Runs a first step from zero and compares it with the library's definition.

    :raises WrongResultError: it differs; names the tensor and by how much.
    """
    inputs.reset()
    if contestant.gradient == "combined":
        gradient = [torch.zeros_like(w) for w in inputs.weights]
        gp.gradprom_(gradient, inputs.main, inputs.aux, lr=1.0, backend="reference")
        torch._foreach_neg_(gradient)
    else:
        gradient = [m.float() for m in inputs.main]
    step()
    if contestant.gradient is None:
        return
    for i, g in enumerate(gradient):
        if case.optimizer == "sgd":
            pairs = {"parameter": (inputs.weights[i], -LR * g)}
        else:  # the first step of Adam: both moments are corrected to the gradient and its square
            moment = inputs.moments["exp_avg"][i]
            pairs = {"parameter": (inputs.weights[i], -LR * g / (g.abs() + 1e-8)), "exp_avg": (moment, (1 - 0.9) * g)}
        if inputs.params is not inputs.weights:
            pairs["16-bit parameter"] = (inputs.params[i], inputs.weights[i].to(inputs.params[i].dtype))
        for what, (actual, expected) in pairs.items():
            error = relative_error(actual, expected)
            if not error <= 1e-4:
                raise WrongResultError(
                    f"it steps wrongly: {what} of tensor {i} is off by {error:.1e} of its largest value"
                )


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(
    case: Case, device: torch.device, backends: Sequence[str], rounds: int
) -> tuple[list[UpdateResult], list[LeftOut]]:
    """All contestants on one case, checked and timed.

    :param backends: that can run on ``device``, fastest first.
    :returns: the results, and what was left out: contestants that fail or step wrongly, or everything where the
        device's memory is too small.
    """
    if device.type == "cpu":
        return measure_on_cpu(case, backends, rounds)
    try:
        return measure_on_gpu(case, Gpu(device), backends, rounds)
    except torch.OutOfMemoryError as error:
        return [], [LeftOut(f"{case} is left out: {str(error).partition('. ')[0]}", is_failure=False)]


def measure_on_cpu(case: Case, backends: Sequence[str], rounds: int) -> tuple[list[UpdateResult], list[LeftOut]]:
    """See :func:`measure`."""
    device = torch.device("cpu")
    shapes = case.shapes
    notes: list[LeftOut] = []
    steps: dict[str, Step] = {}
    for name, contestant in contestants(case, device, backends).items():
        with leaving_out(notes, name, case):
            [steps[name]] = _build(case, contestant, [Inputs(shapes, case.optimizer, case.precision, device)])
    fused = _fastest(steps)
    if fused is None:
        return [], notes
    common = _common(case, shapes)
    count = common["parameters"]
    total, nothing, a, b = torch.randn(count), torch.zeros(count), torch.randn(count), torch.randn(count)
    steps["memory"] = lambda: total.add_(nothing)
    steps["reads"] = lambda: torch.dot(a, b)
    steps["host"] = _one_element_step(case, len(shapes), device, backends[0])
    samples = timing.interleave({name: timing.stopwatch(step, device) for name, step in steps.items()}, rounds)
    return update_results(common, samples, fused=fused, yardstick="memory", moved=12 * count), notes


def input_sets(set_bytes: int, l2_bytes: int, budget: int, held_bytes: int) -> int:
    """How many input sets a GPU gets.

    :param set_bytes: of one set.
    :param l2_bytes: of the cache that must not flatter.
    :param budget: bytes that may be used.
    :param held_bytes: by all contestants for one set, beside it.
    :returns: 0 or less where not even one fits.

    >>> input_sets(20, l2_bytes=50, budget=10**6, held_bytes=0), input_sets(10**4, 50, budget=10**6, held_bytes=0)
    (10, 1)
    """
    wanted = 1 if set_bytes >= ALONE * l2_bytes else max(2, math.ceil(CACHES * l2_bytes / set_bytes))
    return min(wanted, MAX_SETS, budget // (set_bytes + held_bytes))


def measure_on_gpu(
    case: Case, gpu: Gpu, backends: Sequence[str], rounds: int
) -> tuple[list[UpdateResult], list[LeftOut]]:
    """See :func:`measure`.

    :raises torch.OutOfMemoryError: the estimate of the memory was wrong.
    """
    device, shapes = gpu.device, case.shapes
    common = _common(case, shapes)
    count = common["parameters"]
    field = contestants(case, device, backends)

    # One set's inputs, what each contestant holds beside them, and the expected gradient of the check.
    set_bytes = count * Inputs.bytes_per_parameter(case.optimizer, case.precision)
    held = count * (sum(c.scratch for c in field.values()) + 4)
    copied = max(COPY_BYTES, 2 * CACHES * gpu.l2_bytes)
    number = input_sets(set_bytes, gpu.l2_bytes, int(MEMORY_SHARE * gpu.free_bytes) - 2 * copied, held)
    if number < 1:
        need = (set_bytes + held + 2 * copied) / MEMORY_SHARE
        reason = f"it needs {need / 1e9:.1f} GB of device memory, {gpu.free_bytes / 1e9:.1f} GB are free"
        return [], [LeftOut(f"{case} is left out: {reason}", is_failure=False)]

    sets = [Inputs(shapes, case.optimizer, case.precision, device, seed) for seed in range(number)]
    source, target = (torch.zeros(copied, dtype=torch.uint8, device=device).random_() for _ in range(2))
    notes: list[LeftOut] = []
    ready: dict[str, GpuWatches] = {}
    for name, contestant in field.items():
        with leaving_out(notes, name, case):
            ready[name] = GpuWatches(_build(case, contestant, sets), gpu, contestant.few_launches)
    fused = _fastest(ready)
    if fused is None:
        return [], notes
    with leaving_out(notes, "host", case):
        nothing = [_one_element_step(case, len(shapes), device, backends[0])] * MAX_SETS
        ready["host"] = GpuWatches(nothing, gpu, few_launches=True)
    on_device = {name: watches.on_device for name, watches in ready.items()}
    on_device["copy"] = gpu.queue_watch(lambda: target.copy_(source))
    samples = timing.interleave(on_device, rounds)
    host = timing.interleave({name: watches.on_host for name, watches in ready.items()}, rounds)

    gradient_bytes = sum(g.nbytes for gs in (sets[0].main, sets[0].aux) for g in gs)
    results = update_results(
        {**common, "on_chip": gradient_bytes <= gpu.on_chip_bytes},
        samples,
        fused=fused,
        yardstick="copy",
        moved=2 * copied,
        timed={"copy": "eager"} | {name: watches.timed for name, watches in ready.items()},
        input_sets={name: watches.sets for name, watches in ready.items()},
        host=host,
    )
    return results, notes


class GpuWatches:
    """The seconds of one step on the device and on the host, taken over the steps of several input sets."""

    def __init__(self, steps: Sequence[Step], gpu: Gpu, few_launches: bool) -> None:
        steps[0]()
        #: How the device is timed. Where launches are few, the steps are queued while it is held back; where they are
        #: many, a graph is replayed; where a step waits for the device, events lie around it.
        self.timed = "eager" if gpu.is_awaited_by(steps[0]) else "queue" if few_launches else "graph"
        seconds = timing.host_watch(steps[:1], gpu.synchronise, queued=1)()
        steps = steps[: max(1, int(min(QUEUE_SECONDS[self.timed] / seconds, len(steps))))]
        self.sets = len(steps)
        for step in steps:  # state and plans are made at the first step
            step()
        queued = max(1, min(timing.QUEUED_STEPS, int(timing.SAMPLE_SECONDS / seconds)))
        self.on_host = timing.host_watch(steps, gpu.synchronise, queued)

        def all_steps() -> None:
            for step in steps:
                step()

        if self.timed == "eager":
            self._all_steps = timing.stopwatch(all_steps, gpu.device)
        else:
            self._all_steps = gpu.queue_watch(gpu.capture(steps) if self.timed == "graph" else all_steps)

    def on_device(self) -> float:
        return self._all_steps() / self.sets


def _common(case: Case, shapes: Shapes) -> dict[str, Any]:
    return {
        "network": case.network,
        "parameters": sum(map(math.prod, shapes)),
        "tensors": len(shapes),
        "optimizer": case.optimizer,
        "precision": case.precision,
    }


def _build(case: Case, contestant: Contestant, sets: Sequence[Inputs]) -> list[Step]:
    steps = [contestant.build(case, inputs) for inputs in sets]
    check(case, contestant, sets[0], steps[0])
    return steps


def _fastest(names: Iterable[str]) -> str | None:
    """Ours of the fastest backend that came through; ``None`` where none did."""
    return next(filter(is_ours, names), None)


def _one_element_step(case: Case, tensors: int, device: torch.device, backend: str) -> Step:
    """The same step on as many tensors of one element: all that is not work on the elements."""
    return gradprom(case, Inputs([(1,)] * tensors, case.optimizer, case.precision, device), backend=backend)
