"""Properties that hold for every step, whatever the tensors: random ones on every target, against an oracle.

What is compared, element by element:

* The decision (cosines, gates, caps, norms) with one in extended precision. Where the cosine is within 1e-6 of the
  threshold a gate may fall either way, and the library's is taken.
* Parameters, moments and masters after each step with the exact update, from the values before that step. An element
  may be as far from it as the roundings of the arithmetic can take it, which is bounded operation by operation
  (running_error.py), and is then rounded to the tensor's type. So it is for all types and all scales; where an
  intermediate number leaves the range of the arithmetic (squares of 1e30 in float32), no more is known than that
  PyTorch's own float32 arithmetic leaves it too, and nothing is claimed.
* Where a float32 parameter is at least four times the terms that are added to it, as in training, that is at most 2 ulp
  from the exact update rounded to float32, unless a weight, gradient or moment is subnormal (squares of 1e-20). Where
  the terms cancel, or outweigh the parameter, 2 ulp of the *result* can hold for no arithmetic in float32:
  lr * (w_0 g_0 + w_1 g_1) has six roundings before the parameter is added, each of half an ulp of its largest term.
* Nothing is written beside the tensors, and no gradient is written to; a step that is skipped changes no bit.
* Bits are the same in every run and for every number of threads.

In CI a few hundred cases run, always the same ones; ``make fuzz`` runs 10,000 new ones on each target.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradprom_ext import rules
from gradprom_ext._step import Stepper
from gradprom_ext.plan import PlanSpec
from gradprom_ext.rules import Hyper
from gradprom_ext.settings import StepConfig

from . import targets
from .problems import FLOATS, GATES, bits
from .running_error import DOUBLE, EXACT, SINGLE, Format, Num, stored, ulp

#: Cases in CI, where they take some seconds on each target; the interpreter needs a fifth of a second for one.
CASES = {"cpu": 200, "cuda-on-host": 60, "reference": 60, "triton-interpreter": 10}
CLOSE = 1e-6  # of a cosine to the threshold
SMALLEST_NORMAL = float(torch.finfo(torch.float32).tiny)

# Random tensors ------------------------------------------------------------------------------------------------------


class Look(NamedTuple):
    """Type, place in memory and values of a tensor to come."""

    dtype: torch.dtype
    offset: int
    steps: tuple[int, ...]  # between elements, for each dimension
    order: tuple[int, ...]  # of the dimensions in memory, fastest first
    expanded: int  # the dimension whose elements are one, or -1
    kind: str
    exponent: int


class Case(NamedTuple):
    """A problem and how it is to be solved."""

    seed: int
    rule: str
    masters: bool
    shapes: list[tuple[int, ...]]
    params: list[Look]
    grads: list[list[Look | str | None]]  # [K + 1][parameter]; "copy": of the main gradient, leant
    poison: tuple[int, int, int, float] | None  # gradient, parameter, element, value
    poisoned_param: tuple[int, float] | None
    groups: list[int]
    hypers: list[dict[str, Any]]
    settings: dict[str, Any]
    steps: int


KINDS = ["normal", "normal", "normal", "scales", "signs", "sparse", "zeros", "subnormal"]
SMALLEST = {torch.float32: -149, torch.float64: -1074, torch.float16: -24, torch.bfloat16: -133}


@st.composite
def looks(draw: st.DrawFn, shape: tuple[int, ...], gradient: bool) -> Look:
    plain = draw(st.booleans())
    n = len(shape)
    return Look(
        dtype=draw(st.sampled_from([torch.float32, torch.float32, *FLOATS])),
        offset=0 if plain else draw(st.integers(0, 7)),
        steps=(1,) * n if plain else tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=n, max_size=n))),
        order=tuple(reversed(range(n))) if plain else tuple(draw(st.permutations(range(n)))),
        expanded=draw(st.integers(-1, n - 1)) if gradient and not plain and draw(st.booleans()) else -1,
        kind=draw(st.sampled_from(KINDS)),
        exponent=draw(st.sampled_from([0, 0, 0, 0, 1, -3, 12, -15, 30, -30])),
    )


def lambdas(k: int) -> st.SearchStrategy[list[float]]:
    return st.lists(st.sampled_from([1.0, 0.7, 0.1, 0.0, -0.5, 1e-30, 1e30]), min_size=k, max_size=k)


@st.composite
def hypers(draw: st.DrawFn, rule: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {
        "lr": draw(st.sampled_from([0.05, 1e-3, 0.0, 1.0, 1e-30, 1e30])),
        "lr_type": draw(st.sampled_from(["number", "number", "float32", "float64"])),
        "weight_decay": draw(st.sampled_from([0.0, 0.0, 0.01, 1.5])),
        "maximize": draw(st.booleans()),
    }
    if rule == "sgd":
        chosen["momentum"] = draw(st.sampled_from([0.0, 0.0, 0.9, 0.5]))
        if chosen["momentum"]:
            chosen["nesterov"] = draw(st.booleans())
            chosen["dampening"] = 0.0 if chosen["nesterov"] else draw(st.sampled_from([0.0, 0.3]))
    else:
        chosen["beta1"] = draw(st.sampled_from([0.9, 0.0, 0.5]))
        chosen["beta2"] = draw(st.sampled_from([0.999, 0.9, 0.0]))
        chosen["eps"] = draw(st.sampled_from([1e-8, 1e-3, 0.0]))
        chosen["amsgrad"] = draw(st.booleans())
    return chosen


@st.composite
def cases(draw: st.DrawFn, tiny: bool) -> Case:
    sizes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    shapes = draw(st.lists(sizes, min_size=1, max_size=3 if tiny else 5))
    if not tiny and draw(st.integers(0, 9)) == 9:  # several chunks, several threads
        shapes[0] = draw(st.sampled_from([(1025,), (16_385,), (33, 1000), (70_001,)]))
    num_aux = draw(st.integers(0, 4))
    rule = draw(st.sampled_from(["sgd", "adam", "adamw"]))
    params = [draw(looks(shape, False)) for shape in shapes]
    grads: list[list[Look | str | None]] = []
    for k in range(num_aux + 1):
        like = [looks(shape, True) for shape in shapes]
        other = st.sampled_from([None, "copy"]) if k else st.none()
        grads.append([draw(st.one_of(one, one, one, other)) for one in like])
    num_groups = draw(st.integers(1, 2))
    gate = draw(st.sampled_from(GATES))
    bad = st.sampled_from([np.nan, np.inf, -np.inf])
    return Case(
        seed=draw(st.integers(0, 2**32 - 1)),
        rule=rule,
        masters=draw(st.booleans()),
        shapes=shapes,
        params=params,
        grads=grads,
        poison=draw(st.tuples(st.integers(0, num_aux), st.integers(0, len(shapes) - 1), st.integers(0), bad))
        if draw(st.integers(0, 7)) == 7
        else None,
        poisoned_param=draw(st.tuples(st.integers(0), bad)) if draw(st.integers(0, 7)) == 7 else None,
        groups=[draw(st.integers(0, num_groups - 1)) for _ in shapes],
        hypers=[draw(hypers(rule)) for _ in range(num_groups)],
        settings={
            "gate": gate,
            "threshold": draw(st.sampled_from([0.0, 0.0, 0.3, -0.3, 1.0, -1.0])) if gate in ("hard", "soft") else 0.0,
            "granularity": draw(st.sampled_from(["global", "tensor"])),
            "aux_weight": tuple(draw(lambdas(num_aux))),
            "aux_cap": draw(st.sampled_from([None, None, 0.5, 1e-3])),
            "max_grad_norm": draw(st.sampled_from([None, None, 1.0, 1e-20])),
        },
        steps=draw(st.integers(1, 2)),
    )


class Placed(NamedTuple):
    """A tensor inside a larger piece of memory, whose other elements are nobody's."""

    view: Tensor
    memory: Tensor

    @classmethod
    def at(cls, values: Tensor, look: Look) -> Placed:
        shape = list(values.shape)
        strides, reach = [0] * len(shape), 0
        for d in look.order:
            if d != look.expanded:
                strides[d] = (reach + 1) * look.steps[d]
                reach += strides[d] * max(shape[d] - 1, 0)
        memory = torch.full((look.offset + reach + 9,), 7.0, dtype=look.dtype)
        view = memory.as_strided(shape, strides, look.offset)
        if look.expanded >= 0 and shape[look.expanded] > 0:
            view.select(look.expanded, 0).copy_(values.select(look.expanded, 0))
        else:
            view.copy_(values)
        return cls(view, memory)

    def beside(self) -> bytes:
        """The bits of the memory that is not the tensor's."""
        rest = self.memory.clone()
        rest.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).zero_()
        return bits(rest)


def values_of(look: Look, shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    x = rng.standard_normal(shape)
    if look.kind == "signs":
        x = np.sign(x)
    elif look.kind == "sparse":
        x = np.where(rng.random(shape) < 0.8, 0.0, x)
    elif look.kind == "zeros":
        x = x * 0.0
    elif look.kind == "scales":
        x = x * 10.0 ** rng.uniform(-abs(look.exponent), abs(look.exponent), shape)
    limit = torch.finfo(look.dtype).max if look.dtype != torch.float64 else 1e38
    x = x * 10.0**look.exponent if look.kind != "subnormal" else x * 2.0 ** (SMALLEST[look.dtype] + 5)
    return torch.as_tensor(np.clip(x, -limit, limit), dtype=torch.float64)


@dataclasses.dataclass
class Problem:
    """The tensors of a case, made anew each time: runs are compared bit for bit."""

    params: list[Placed]
    grads: list[list[Placed | None]]
    states: list[dict[str, Tensor]]
    hypers: list[Hyper]

    @classmethod
    def make(cls, case: Case) -> Problem:
        rng = np.random.default_rng(case.seed)
        params = [Placed.at(values_of(p, s, rng), p) for p, s in zip(case.params, case.shapes, strict=True)]
        if case.poisoned_param is not None:
            _spoil(params[0], *case.poisoned_param)
        hypers = [_hyper(chosen, case.rule) for chosen in case.hypers]
        return cls(params, [], [{} for _ in params], hypers)

    def draw_gradients(self, case: Case, step: int) -> None:
        rng = np.random.default_rng([case.seed, step])
        self.grads = []
        for looks_of_one in case.grads:
            row: list[Placed | None] = []
            for i, (look, shape) in enumerate(zip(looks_of_one, case.shapes, strict=True)):
                if look == "copy":
                    main = self.grads[0][i]
                    lean = float(rng.choice([1.0, -1.0, 0.5, -2.0]))
                    row.append(None if main is None else Placed.at(main.view.double() * lean, _plain(main.view)))
                else:
                    assert look is None or isinstance(look, Look)
                    row.append(None if look is None else Placed.at(values_of(look, shape, rng), look))
            self.grads.append(row)
        if case.poison is not None and step == 0:
            k, i, element, value = case.poison
            _spoil(self.grads[k][i], element, value)

    def views(self) -> list[list[Tensor | None]]:
        return [[None if g is None else g.view for g in row] for row in self.grads]

    def snapshot(self) -> list[bytes]:
        states = [bits(s[name]) for s in self.states for name in sorted(s)]
        return [bits(p.memory) for p in self.params] + states


def _plain(t: Tensor) -> Look:
    return Look(t.dtype, 0, (1,) * t.ndim, tuple(reversed(range(t.ndim))), -1, "", 0)


def _spoil(tensor: Placed | None, element: int, value: float) -> None:
    if tensor is not None and tensor.view.numel() > 0:
        index = np.unravel_index(element % tensor.view.numel(), tensor.view.shape)
        tensor.view[tuple(map(int, index))] = value


def _hyper(chosen: dict[str, Any], rule: str) -> Hyper:
    rest = {key: value for key, value in chosen.items() if key not in ("lr", "lr_type")}
    lr: Any = chosen["lr"]
    if chosen["lr_type"] != "number":
        lr = torch.tensor(lr, dtype=getattr(torch, chosen["lr_type"]))
    return Hyper(lr=lr, decoupled=rule == "adamw", **rest)


RULES = {"sgd": rules.SGD, "adam": rules.ADAM, "adamw": rules.ADAMW}


def stepper_of(case: Case, problem: Problem, backend: Any) -> Stepper:
    rule = RULES[case.rule].with_masters(case.masters)
    config = StepConfig.make(backend=backend, **case.settings)
    params = [p.view for p in problem.params]
    num_aux = len(case.grads) - 1
    return Stepper(PlanSpec(rule, params, case.groups, problem.states, num_aux, config.per_tensor), config)


# The oracle ----------------------------------------------------------------------------------------------------------


class Decision(NamedTuple):
    weights: list[Num]  # [K + 1], clipping included
    cosine: list[Num]  # [K]
    gate: list[Num]


def dot(a: list[Num], b: list[Num]) -> Num:
    """Over all tensors; a sum of n products in any order is within n u of the sum of their sizes."""
    n = sum(x.value.size for x in a)
    value = sum((np.sum(x.value * y.value) for x, y in zip(a, b, strict=True)), EXACT(0))
    size = sum((np.sum(np.abs(x.value * y.value)) for x, y in zip(a, b, strict=True)), EXACT(0))
    return Num(DOUBLE, value, (n + 2) * DOUBLE.u * size)


def decide(grads: list[list[Num]], case: Case, given_gate: list[float]) -> tuple[list[Num], list[Num], list[Num], Num]:
    """Weights, cosines, gates and squared norm of one row; policy.h in exact arithmetic.

    :param given_gate: what the library has, for cosines that are too close to the threshold.
    """
    s = case.settings
    gram = [[dot(a, b) for b in grads] for a in grads]
    main_norm = gram[0][0].sqrt()
    if main_norm.value < 1e-170:  # its square leaves float64, and it counts as zero: StepSettings.nonfinite
        main_norm = Num(DOUBLE, EXACT(0))
    weights, cosines, gates = [Num(DOUBLE, EXACT(1))], [], []
    for k in range(1, len(grads)):
        norm = gram[k][k].sqrt()
        zero = main_norm.value == 0 or norm.value < 1e-170
        cosine = Num(DOUBLE, EXACT(0)) if zero else gram[0][k] / main_norm / norm
        weight = Num(DOUBLE, EXACT(s["aux_weight"][k - 1]))
        if s["aux_cap"] is not None and not norm.value < 1e-170:
            limit = main_norm / norm * s["aux_cap"]
            if limit.value < abs(weight.value):
                weight = (limit / weight.size()).clamped(0, 1) * weight
        one, nothing = Num(DOUBLE, EXACT(1)), Num(DOUBLE, EXACT(0))
        distance = cosine.value - s["threshold"]
        if s["gate"] in ("hard", "soft"):
            above = given_gate[k - 1] > 0 if abs(distance) < CLOSE and not zero else distance >= 0
            gate = nothing if not above else one if s["gate"] == "hard" else cosine if cosine.value > 0 else nothing
            if s["gate"] == "soft" and abs(cosine.value) < CLOSE and not zero:
                gate = Num(DOUBLE, np.maximum(cosine.value, 0) if above else EXACT(0), cosine.error)
        else:
            gate = nothing if s["gate"] == "never" else one
        if s["gate"] == "project" and cosine.value < 0:
            weights[0] = weights[0] - weight * (gram[0][k] / gram[0][0])
        cosines.append(cosine)
        gates.append(gate)
        weights.append(
            gate * weight if s["gate"] == "soft" else Num(DOUBLE, gate.value * weight.value, weight.error * gate.value)
        )
    squared = Num(DOUBLE, EXACT(0))
    for (i, a), (j, b) in itertools.product(enumerate(weights), repeat=2):
        squared = squared + a * b * gram[i][j]
    return weights, cosines, gates, squared


def coefficient(f: Format, value: float | Num, roundings: int = 1) -> Num:
    """A number that the kernels work out in float64 and then have in their arithmetic."""
    exact = value if isinstance(value, Num) else Num(DOUBLE, EXACT(value), roundings * DOUBLE.u * abs(value))
    return exact.rounded(f)


Update = tuple[Num, dict[str, Num], Num]


def sgd(f: Format, h: Hyper, first: bool, p: Num, g: Num, size: Num, states: dict[str, Num]) -> Update:
    """The parameter and the states, and how much is added to the parameter, signs left aside.

    :param size: the same of the gradient: the terms that it is the sum of may cancel.
    """
    lr = coefficient(f, float(h.lr))
    if h.weight_decay != 0:
        decay = coefficient(f, h.weight_decay) * p
        g, size = g + decay, size + decay.size()
    if h.momentum == 0:
        return p - lr * g, {}, lr * size
    momentum, keep = coefficient(f, h.momentum), coefficient(f, 1.0 if first else 1.0 - h.dampening)
    old = momentum * states["momentum_buffer"]
    buffer = old + keep * g
    size_of_buffer = old.size() + keep * size
    step = g + momentum * buffer if h.nesterov else buffer
    return p - lr * step, {"momentum_buffer": buffer}, lr * (size + size_of_buffer)


def adam(f: Format, h: Hyper, steps: int, p: Num, g: Num, size: Num, states: dict[str, Num]) -> Update:
    lr = Num(DOUBLE, EXACT(float(h.lr)))
    # beta to the power of the step is within a few roundings in float64, by whatever function it is worked out.
    powers = [Num(DOUBLE, EXACT(b) ** (steps + 1), (4 + 2 * steps) * DOUBLE.u * b) for b in (h.beta1, h.beta2)]
    corrections = [Num(DOUBLE, EXACT(1)) - power for power in powers]
    if h.weight_decay != 0 and not h.decoupled:
        decay = coefficient(f, h.weight_decay) * p
        g, size = g + decay, size + decay.size()
    old = p
    if h.decoupled:
        p = coefficient(f, Num(DOUBLE, EXACT(1)) - lr * h.weight_decay) * p
    mean, square = states["exp_avg"], states["exp_avg_sq"]
    new_mean = mean + coefficient(f, 1.0 - h.beta1) * (g - mean)
    new_square = coefficient(f, h.beta2) * square + coefficient(f, 1.0 - h.beta2) * g * g
    out = {"exp_avg": new_mean, "exp_avg_sq": new_square}
    second = new_square
    if h.amsgrad:
        second = out["max_exp_avg_sq"] = states["max_exp_avg_sq"].maximum(new_square)
    denominator = second.sqrt() * coefficient(f, Num(DOUBLE, EXACT(1)) / corrections[1].sqrt()) + coefficient(f, h.eps)
    rate = coefficient(f, lr / corrections[0])
    # What cancels in the gradient reaches the denominator, too.
    terms = (mean.size() + mean.size() + size) / denominator
    size = rate * terms * (size / denominator + 1.0) + (old - p).size()
    return p - rate * (new_mean / denominator), out, size


def within(name: str, got: Tensor, wanted: Num) -> None:
    """Asserts that a tensor is what the arithmetic may have left, rounded to the tensor's type."""
    have = got.detach().to(torch.float64).numpy().astype(EXACT)
    with np.errstate(all="ignore"):
        low, high = stored(wanted.value - wanted.error, got.dtype), stored(wanted.value + wanted.error, got.dtype)
        special = ~np.isfinite(wanted.value)
        right = np.where(
            special, (have == wanted.value) | (np.isnan(have) & np.isnan(wanted.value)), (low <= have) & (have <= high)
        )
    right = right | wanted.lost
    if not right.all():
        at = tuple(int(x) for x in np.argwhere(~right)[0])
        raise AssertionError(
            f"{name}{list(at)} is {have[at]!r}, but {wanted.value[at]!r} is right, and rounding errors of "
            f"{wanted.error[at]!r} are all that there can be"
        )


def subnormal(number: Num) -> np.ndarray:
    return (number.value != 0) & (np.abs(number.value) < SMALLEST_NORMAL)


def check_two_ulps(name: str, got: Tensor, wanted: Num, before: Num, size: Num, applies: np.ndarray) -> None:
    have = got.detach().to(torch.float64).numpy().astype(EXACT)
    with np.errstate(all="ignore"):
        applies = applies & np.isfinite(wanted.value) & ~wanted.lost & ~size.lost
        applies = applies & (size.value <= np.abs(before.value) / 4)
        target = stored(wanted.value, torch.float32)
        off = np.where(applies, np.abs(have - target) / ulp(np.where(applies, target, 1)), 0)
    assert np.all(off <= 2), f"{name} is {float(off.max())} ulp from the rounded exact update"


# The step ------------------------------------------------------------------------------------------------------------


def check_step(case: Case, problem: Problem, stepper: Stepper) -> None:
    params, grads = problem.params, problem.grads
    before, states = problem.snapshot(), [{n: t.clone() for n, t in s.items()} for s in problem.states]
    old = [p.view.clone() for p in params]
    margins = [p.beside() for p in params]
    given = [[None if g is None else bits(g.memory) for g in row] for row in grads]
    main, *aux = problem.views()
    skipped_steps = torch.zeros((), dtype=torch.float64)
    stats = stepper.step(main, aux, problem.hypers, skipped_steps)

    assert given == [[None if g is None else bits(g.memory) for g in row] for row in grads], "a gradient was written to"
    assert margins == [p.beside() for p in params], "memory beside a parameter was written to"
    finite = all(bool(g.view.isfinite().all()) for row in grads for g in row if g is not None)
    assert bool(stats.skipped) == (not finite)
    assert float(skipped_steps) == (not finite)
    if not finite:
        for s, was in zip(problem.states, states, strict=True):
            for name in s:
                # Made by this step, which has not happened: as they begin.
                assert bits(s[name]) == bits(was[name]) if name in was else name == "master" or not s[name].any()
        assert before[: len(params)] == [bits(p.memory) for p in params]
        return

    shapes = [p.view.shape for p in params]
    numbers = [
        [
            Num(DOUBLE, np.zeros(s, EXACT)) if g is None else Num.given(DOUBLE, g.view)
            for g, s in zip(row, shapes, strict=True)
        ]
        for row in grads
    ]
    per_tensor = case.settings["granularity"] == "tensor"
    rows = [[i] for i in range(len(params))] if per_tensor else [list(range(len(params)))]
    gates = stats.gate if per_tensor else stats.gate[None]
    cosines = stats.cosine if per_tensor else stats.cosine[None]
    with np.errstate(all="ignore"):
        decisions = [
            decide([[g[i] for i in row] for g in numbers], case, gates[r].tolist()) for r, row in enumerate(rows)
        ]
        squared = Num(DOUBLE, EXACT(0))
        for decision in decisions:
            squared = squared + decision[3]
        clip = Num(DOUBLE, EXACT(1))
        if case.settings["max_grad_norm"] is not None:
            squared = Num(DOUBLE, np.maximum(squared.value, 0), squared.error, squared.lost)
            clip = Num(DOUBLE, EXACT(case.settings["max_grad_norm"])) / (squared.sqrt() + 1e-6)
            clip = (
                clip
                if clip.value < 1 or clip.lost
                else Num(DOUBLE, EXACT(1), np.where(clip.value - clip.error < 1, clip.error, 0))
            )
    for r, (_, cosine, gate, _) in enumerate(decisions):
        for k, (c, g) in enumerate(zip(cosine, gate, strict=True)):
            assert abs(float(cosines[r, k]) - c.value) <= c.error + 1e-15, "cosine"
            assert abs(float(gates[r, k]) - g.value) <= g.error + 1e-15, "gate"

    for i, param in enumerate(params):
        state, h = problem.states[i], problem.hypers[case.groups[i]]
        present = [k for k in range(len(grads)) if grads[k][i] is not None]
        if not present:
            assert bits(param.view) == bits(old[i])
            assert not state or states[i]
            continue
        wide = old[i].dtype == torch.float64 or any(grads[k][i].view.dtype == torch.float64 for k in present)  # type: ignore[union-attr]
        f = DOUBLE if wide else SINGLE
        weights = decisions[i if per_tensor else 0][0]
        with np.errstate(all="ignore"):
            g, size_of_g = Num(f, np.zeros(shapes[i], EXACT)), Num(f, np.zeros(shapes[i], EXACT))
            # What clipping, or squaring, has made smaller than float32's smallest normal number has lost digits.
            underflow = np.zeros(shapes[i], bool)
            for k in present:
                if weights[k].value == 0 and weights[k].error == 0:
                    continue
                w = coefficient(f, weights[k] * clip)
                underflow |= subnormal(w)
                term = (-w if h.maximize else w) * Num(f, numbers[k][i].value)
                g, size_of_g = g + term, size_of_g + term.size()
            was = states[i]
            start = old[i]
            if case.masters and old[i].dtype in (torch.float16, torch.bfloat16):
                master = was.get("master", old[i].float())
                follows = master.to(old[i].dtype).view(torch.int16) == old[i].view(torch.int16)
                start = torch.where(follows, master, old[i].float())
            names = RULES[case.rule].moment_names(h)
            moments = {n: Num.given(f, was[n]) if n in was else Num(f, np.zeros(shapes[i], EXACT)) for n in names}
            steps = int(was["step"]) if "step" in was else 0
            p = Num.given(f, start)
            if case.rule == "sgd":
                new, out, size = sgd(f, h, steps == 0, p, g, size_of_g, moments)
            else:
                new, out, size = adam(f, h, steps, p, g, size_of_g, moments)
            for number in (g, *out.values()):
                underflow |= subnormal(number)
            if case.rule != "sgd" or h.momentum != 0:
                assert float(state["step"]) == steps + 1
        within(f"params[{i}]", param.view, new)
        for name, value in out.items():
            within(f"state of params[{i}]['{name}']", state[name], value)
        if start is not old[i]:
            within(f"state of params[{i}]['master']", state["master"], new)
            assert bits(state["master"].to(old[i].dtype)) == bits(param.view) or bool(param.view.isnan().any())
        if old[i].dtype == torch.float32 and not wide:
            check_two_ulps(f"params[{i}]", param.view, new, p, size, ~underflow)


def run(case: Case, backend: Any, threads: int, check: bool = False) -> list[bytes]:
    """All bits that the steps of a case leave."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        problem = Problem.make(case)
        stepper = stepper_of(case, problem, backend)
        for step in range(case.steps):
            problem.draw_gradients(case, step)
            if check:
                check_step(case, problem, stepper)
            else:
                main, *aux = problem.views()
                stepper.step(main, aux, problem.hypers)
        return problem.snapshot()
    finally:
        torch.set_num_threads(before)


def check_case(case: Case, target: str, backend: Any) -> None:
    first = run(case, backend, 1, check=True)
    assert run(case, backend, 1) == first, "another run ends with other bits"
    if target == "cpu" and sum(int(np.prod(s)) for s in case.shapes) > 2 * 32_768:
        for threads in (2, 3):
            assert run(case, backend, threads) == first, f"{threads} threads end with other bits"


@pytest.mark.parametrize("target", CASES)
def test_a_step_is_the_exact_one_within_its_roundings(target: str) -> None:
    if target not in [getattr(t, "values", [t])[0] for t in targets.TARGETS]:
        pytest.skip(f"{target} does not run on this machine")
    profile = settings.get_current_profile_name()
    with targets.running(target) as backend:

        @settings(
            max_examples=settings().max_examples if profile in ("fuzz", "few") else CASES[target],
            deadline=None,
            derandomize=profile != "fuzz",
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(tiny=target == "triton-interpreter"))
        def check(case: Case) -> None:
            check_case(case, target, backend)

        check()
