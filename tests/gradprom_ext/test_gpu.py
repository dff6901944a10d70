"""What a GPU alone can show. Marked ``gpu``, and skipped where there is none:

    pytest -m gpu tests/gradprom_ext/test_gpu.py

With ``GRADPROM_TEST_DEVICE=cpu`` everything here that does not speak of streams and the device's memory runs on the
host's kernels (``TRITON_INTERPRET=1``: on Triton's too), at smaller sizes; a graph's replay is then the step itself.
So the tests can be written without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp
from gradprom_ext import backends

from . import oracle
from .problems import CASES, FLOATS, RULES

DEVICE = torch.device(os.environ.get("GRADPROM_TEST_DEVICE", "cuda:0"))
CPU = torch.device("cpu")
ON_GPU = DEVICE.type == "cuda"
MILLION = 1_000_000 if ON_GPU else 10_000
KERNELS = ("cuda", "triton") if ON_GPU else ("cpu", "triton")
#: Enough to keep one multiprocessor busy for half a second or more.
SLEEP_CYCLES = 1_000_000_000

pytestmark = pytest.mark.gpu
gpu_only = pytest.mark.skipif(not ON_GPU, reason="speaks of streams, graphs or memory of a GPU")


@pytest.fixture(autouse=True, scope="module")
def _device() -> None:
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU here")


def usable(name: str) -> str:
    """The backend's name, or a skipped test where it does not take tensors of the device."""
    reason = backends.explain(DEVICE)[name]
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture(params=(*KERNELS, "reference"))
def backend(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest) -> str:
    return usable(request.param)


@pytest.fixture
def form() -> Callable[..., backends.Backend]:
    """The CUDA backend, launched in another way."""
    usable(KERNELS[0])
    if not ON_GPU:
        pytest.skip("the kernels of the host know one way")
    return backends.CudaBackend


# ----------------------------------------------------------------------------------------------------------------------
# Tools


def raw(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors' bytes, on their device."""
    return [t.detach().reshape(-1).contiguous().view(torch.uint8).clone() for t in tensors]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def everything(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and states."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [*params, *(opt.state[p][name] for p in params for name in sorted(opt.state[p]))]


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def optimizer(rule: str, params: Any, **kwargs: Any) -> Any:
    return CASES[rule].ours(params, lr=0.05, **{**CASES[rule].options, **kwargs})


def feed(opt: Any, main: Sequence[Tensor | None], aux: Sequence[Sequence[Tensor | None]]) -> None:
    """One step on given gradients."""
    for p, g in zip((p for group in opt.param_groups for p in group["params"]), main, strict=True):
        p.grad = g
    opt.aux_grads = [list(gs) for gs in aux]
    opt.step()


def draw(shapes: Sequence[tuple[int, ...]], seed: int, device: torch.device, dtypes=(torch.float32,)) -> list[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    types = itertools.cycle(dtypes)
    return [torch.randn(shape, generator=g, device=device).to(next(types)) for shape in shapes]


class Fed:
    """Parameters under an optimizer that steps on random gradients."""

    def __init__(
        self, rule: str, shapes, *, dtypes=(torch.float32,), num_aux: int = 1, device=DEVICE, **kwargs
    ) -> None:
        self.shapes, self.dtypes, self.num_aux, self.device = shapes, dtypes, num_aux, device
        self.params = [nn.Parameter(p) for p in draw(shapes, 0, device, dtypes)]
        self.opt = optimizer(rule, self.params, **kwargs)
        self.main, *self.aux = self.gradients(1)

    def gradients(self, seed: int) -> list[list[Tensor]]:
        return [draw(self.shapes, 10 * seed + k, self.device, self.dtypes) for k in range(1 + self.num_aux)]

    def load(self, seed: int) -> None:
        """Other gradients in the same tensors."""
        for old, new in zip((self.main, *self.aux), self.gradients(seed), strict=True):
            for to, values in zip(old, new, strict=True):
                to.copy_(values)

    def step(self) -> None:
        feed(self.opt, self.main, self.aux)


class Training:
    """A small network under GradProm, a recognition network, and all that one training step needs.

    The auxiliary loss agrees with the main one or conflicts with it, as the static input ``agreement`` says.
    """

    def __init__(self, rule: str, *, dtype=torch.float64, train_vr: bool = False, device=DEVICE, **kwargs: Any) -> None:
        torch.manual_seed(0)
        make = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.ip = nn.Sequential(make(2, 6), nn.Tanh(), make(6, 6), nn.Tanh(), make(6, 2)).to(device, dtype)
        self.vr = nn.Linear(2, 3).to(device, dtype).requires_grad_(train_vr)
        self.opt = optimizer(rule, self.ip.parameters(), **kwargs)
        self.vr_opt = torch.optim.SGD(self.vr.parameters(), lr=0.01) if train_vr else None
        self.x, self.clean = (torch.zeros(4, 2, 8, 8, device=device, dtype=dtype) for _ in range(2))
        self.label = torch.zeros(4, dtype=torch.int64, device=device)
        self.agreement = torch.zeros((), device=device, dtype=dtype)
        self.load(0)

    def load(self, seed: int, agreement: float = 1.0) -> None:
        """A new batch in the static inputs."""
        g = torch.Generator().manual_seed(seed)
        for to in (self.x, self.clean):
            to.copy_(torch.randn(to.shape, generator=g, dtype=to.dtype))
        self.label.copy_(torch.randint(3, (4,), generator=g))
        self.agreement.fill_(agreement)

    def step(self) -> None:
        y = self.ip(self.x)
        error = mse_loss(y, self.clean)
        recognition = cross_entropy(self.vr(y.mean((2, 3))), self.label)
        self.opt.backward(error, self.agreement * mse_loss(y, self.clean) + 0.1 * recognition)
        self.opt.step()
        self.opt.zero_grad()
        if self.vr_opt is not None:
            self.vr_opt.step()
            self.vr_opt.zero_grad()

    def set(self, *, lr: float | None = None, aux_weight: float | None = None) -> None:
        """Writes into the tensors that ``capturable=True`` made of the numbers."""
        if lr is not None:
            self.opt.param_groups[0]["lr"].fill_(lr)
        if aux_weight is not None:
            self.opt.aux_weight.fill_(aux_weight)

    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.ip.parameters()]


class PythonPolicy(gp.GatePolicy):
    """Runs as the Gram matrix and the update apart."""

    def __call__(self, gram: Tensor, aux_weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gram[..., 0, 0]), (gram[..., 0, 1:] >= 0).to(gram.dtype)


def test_auto_takes_the_kernels_here():
    first = next(name for name in (*KERNELS, "reference") if backends.explain(DEVICE)[name] is None)
    assert gp.GradPromSGD([nn.Parameter(torch.ones(2, device=DEVICE))]).backend == first


# ----------------------------------------------------------------------------------------------------------------------
# Numbers: every backend against NumPy and torch.optim in float64


SHAPES: dict[str, Callable[[random.Random], list[tuple[int, ...]]]] = {
    # One after the other: more than a GPU's chips hold of gradients, in one tensor, in a network's, in thousands.
    "one tensor": lambda r: [(8 * MILLION + r.randrange(1, 9),)],
    "a network": lambda r: [
        s for c in (64, 128, 256, 512) for s in ((c, c // 2, 3, 3), (c,), (), (c, 7), (0,), (MILLION + c + 1,))
    ],
    "thousands": lambda r: [(r.randrange(1, MILLION // 300),) for _ in range(3000)],
    "on chip": lambda r: [(MILLION // 2 + 3,), (r.randrange(1, 2000), 17), (1,), (5, 1)],
}


class Case(NamedTuple):
    """A step: what goes in, in host memory, and what comes out in float64."""

    rule: str
    kwargs: dict[str, Any]
    params: list[Tensor]
    main: list[Tensor | None]
    aux: list[list[Tensor | None]]
    states: list[dict[str, Tensor]]
    cosine: np.ndarray
    gate: np.ndarray
    combined_norm: float
    new_params: list[Tensor]
    new_states: list[dict[str, Tensor]]


def first_states(rule: str, params: Sequence[Tensor], g: torch.Generator) -> list[dict[str, Tensor]]:
    """As after some steps: moments that matter, in the parameters' types."""
    options = CASES[rule].options
    names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * options.get("amsgrad", False)
    if CASES[rule].ours is gp.GradPromSGD:
        names = ["momentum_buffer"] if "momentum" in options else []
    states = []
    for p in params:
        state = {"step": torch.tensor(3.0)} if names else {}
        for name in names:
            values = (
                torch.rand(p.shape, generator=g) + 0.5 if name.endswith("sq") else torch.randn(p.shape, generator=g)
            )
            state[name] = values.to(p.dtype)
        states.append(state)
    return states


def oracle_decision(case_params, main, aux, gate, weights, granularity, aux_cap):
    """Cosines, gates and combined gradients, one row per parameter or one for all."""
    if granularity == "global":
        one = oracle.decide(case_params, main, aux, gate, weights, aux_cap=aux_cap)
        return one.cosine, one.gate, one.combined
    rows = [
        oracle.decide([p], [m], [[gs[i]] for gs in aux], gate, weights, aux_cap=aux_cap)
        for i, (p, m) in enumerate(zip(case_params, main, strict=True))
    ]
    combined = [row.combined[0] for row in rows]
    return np.array([row.cosine for row in rows]), np.array([row.gate for row in rows]), combined


@functools.lru_cache(maxsize=1)  # the backends take turns at one case
def case(kind: str, seed: int) -> Case:
    r, g = random.Random(f"{kind} {seed}"), torch.Generator().manual_seed(seed)
    shapes = SHAPES[kind](r)
    rule = r.choice(sorted(RULES))
    num_aux = r.choice((1, 1, 2, 4))
    weights = [r.uniform(0.3, 1.5) for _ in range(num_aux)]
    gate = r.choice(("hard", "soft", "always", "never", "project"))
    granularity = r.choice(("global", "global", "tensor"))
    clip = r.choice((None, 1.0))
    aux_cap = None if seed % 2 else 0.4
    types = r.choice(([torch.float32], [torch.bfloat16], [torch.float16], FLOATS))
    # Auxiliary gradients may be of other types than the parameters. Triton compiles a kernel for every combination, so
    # there are no more of them than there are types.
    mixed = r.random() < 0.3
    aux_types = dict(zip(types, types[1:] + types[:1] if mixed else types, strict=True))
    lean = r.choice((-0.4, 0.4))

    def gradient(p: Tensor, along: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if len(shapes) > 1 and not mixed and r.random() < 0.05:
            return None
        values = torch.randn(p.shape, generator=g)
        return (values if along is None else values + lean * along.float()).to(dtype)

    params = draw(shapes, seed, CPU, types)
    main = [gradient(p, None, p.dtype) for p in params]  # PyTorch wants .grad to have the parameter's type
    aux = [[gradient(p, m, aux_types[p.dtype]) for p, m in zip(params, main, strict=True)] for _ in range(num_aux)]
    states = first_states(rule, params, g)
    cosine, gates, combined = oracle_decision(params, main, aux, gate, weights, granularity, aux_cap)
    norm = float(np.sqrt(sum(float(np.sum(np.square(c))) for c in combined if c is not None)))
    factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))

    wide = [nn.Parameter(p.to(torch.float64, copy=True)) for p in params]
    other = CASES[rule].theirs(wide, lr=0.05, foreach=False, **CASES[rule].options)
    for p, c, state in zip(wide, combined, states, strict=True):
        p.grad = None if c is None else torch.from_numpy(np.array(c)) * factor
        if state and c is not None:
            types_of = {k: v.dtype if k == "step" else torch.float64 for k, v in state.items()}
            other.state[p].update({k: v.to(types_of[k], copy=True) for k, v in state.items()})
    other.step()
    kwargs = {
        "gate": gate,
        "aux_weight": weights,
        "granularity": granularity,
        "aux_cap": aux_cap,
        "max_grad_norm": clip,
    }
    return Case(rule, kwargs, params, main, aux, states, cosine, gates, norm, [p.detach() for p in wide],
                [dict(other.state[p]) for p in wide])  # fmt: skip


def assert_rounded(actual: Tensor, exact: Tensor, single: bool, what: str) -> None:
    """``exact``, computed in float32 or float64, rounded once to the type of ``actual``."""
    info = torch.finfo(actual.dtype)
    actual = actual.detach().cpu().double()
    arithmetic = 1e-5 if single else 1e-11  # some units of the last place of the largest terms
    allowed = 1.01 * info.eps / 2 * exact.abs() + arithmetic * (1 + exact.abs()) + info.smallest_normal * info.eps
    excess = (actual - exact).abs() - allowed
    # Not excess.max() <= 0: that would let NaN pass.
    if not bool((excess <= 0).all()):
        i = int(torch.where(excess <= 0, -1.0, torch.nan_to_num(excess, nan=torch.inf)).argmax())
        got, wanted = float(actual.reshape(-1)[i]), float(exact.reshape(-1)[i])
        raise AssertionError(f"{what}: element {i} of {exact.numel()} is {got!r}, not {wanted!r}")


@pytest.mark.parametrize("backend", (*KERNELS, "reference"), indirect=True)  # first, so that it varies fastest
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", SHAPES)
def test_parity_with_float64(backend, kind, seed):
    c = case(kind, seed)
    to_device = lambda ts: [None if t is None else t.to(DEVICE, copy=True) for t in ts]  # noqa: E731
    params = [nn.Parameter(p) for p in to_device(c.params)]
    opt = optimizer(c.rule, params, backend=backend, **c.kwargs)
    for p, state in zip(params, c.states, strict=True):
        if state:
            opt.state[p] = {k: v.to(DEVICE, copy=True) for k, v in state.items()}
    feed(opt, to_device(c.main), [to_device(gs) for gs in c.aux])

    stats = opt.stats
    np.testing.assert_allclose(stats.cosine.cpu().numpy(), c.cosine, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(stats.gate.cpu().numpy(), c.gate, rtol=1e-9, atol=1e-11)
    assert float(stats.combined_norm) == pytest.approx(c.combined_norm, rel=1e-9)
    assert not bool(stats.skipped)
    for i, (p, exact, new_state) in enumerate(zip(params, c.new_params, c.new_states, strict=True)):
        tensors = [c.params[i], c.main[i], *(gs[i] for gs in c.aux)]
        single = all(t is None or t.dtype != torch.float64 for t in tensors)
        assert_rounded(p, exact, single, f"params[{i}] {tuple(p.shape)} {p.dtype} by {c.rule}")
        if new_state:
            assert float(opt.state[p]["step"]) == 4
        for name in new_state.keys() - {"step"}:
            assert_rounded(opt.state[p][name], new_state[name], single, f"{name} of params[{i}] by {c.rule}")


# ----------------------------------------------------------------------------------------------------------------------
# The same bits


LARGE = [(6 * MILLION + 5,), (64, 32, 3, 3), (1,), (), (2 * MILLION,), *((17 + i,) for i in range(200))]
MIXED = (torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_every_form_gives_the_same_bits(form, rule, granularity):
    """One launch or one per stage, gradients on chip, some of them or none."""
    outcomes = []
    for options in ({}, {"cooperative": False}, {"max_shared_bytes": 0}, {"max_shared_bytes": 20_000}):
        fed = Fed(rule, LARGE, dtypes=MIXED, num_aux=2, gate="soft", granularity=granularity, max_grad_norm=1.0,
                  backend=form(**options))  # fmt: skip
        for seed in range(3):
            fed.load(seed)
            fed.step()
        outcomes.append(raw([*everything(fed.opt), fed.opt.stats.packed]))
    assert all(same(outcomes[0], other) for other in outcomes[1:])


@pytest.mark.parametrize("blocks", [1, 7, 60])
def test_the_number_of_blocks_moves_rounding_errors_only(form, blocks):
    outcomes = []
    for limit in (0, blocks):
        fed = Fed("adamw", [(MILLION + 1,), (300,)], num_aux=2, gate="soft", backend=form(max_blocks=limit))
        fed.step()
        outcomes.append((fed.opt.stats.packed, [p.detach() for p in fed.params]))
    torch.testing.assert_close(outcomes[1][0], outcomes[0][0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(outcomes[1][1], outcomes[0][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-decay-amsgrad"])
def test_bitwise_repeatable_over_fifty_runs(kernels, rule, granularity):
    fed = Fed(rule, LARGE, dtypes=MIXED, num_aux=2, gate="soft", granularity=granularity, max_grad_norm=1.0,
              backend=kernels)  # fmt: skip
    fed.step()
    start = [t.detach().clone() for t in everything(fed.opt)]
    first: list[Tensor] | None = None
    for _ in range(50):
        with torch.no_grad():
            for t, value in zip(everything(fed.opt), start, strict=True):
                t.copy_(value)
        fed.step()
        outcome = raw([*everything(fed.opt), fed.opt.stats.packed])
        first = first or outcome
        assert same(first, outcome)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing waits for the device


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "momentum, clipped": ("sgd-momentum", {"max_grad_norm": 0.5}),
    "amsgrad, per tensor": ("adamw-decay-amsgrad", {"granularity": "tensor", "nonfinite": "skip"}),
    "adamw, numbers on the device": ("adamw", {"capturable": True, "gate": "project"}),
    "adam, a policy in Python": ("adam-decay", {"gate": PythonPolicy(), "max_grad_norm": 0.5}),
}


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """PyTorch raises where one of its functions would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_training_step_never_waits(backend, variant):
    rule, kwargs = VARIANTS[variant]
    training = Training(rule, dtype=torch.float32, train_vr=True, backend=backend, **kwargs)
    for _ in range(3):
        training.step()
    with no_waiting():
        for _ in range(3):
            training.step()
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():  # the tool itself works
        training.opt.stats.gate.tolist()


@gpu_only
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_returns_while_the_device_is_busy(backend, variant):
    """PyTorch does not see what the compiled module does; the clock of the device does."""
    rule, kwargs = VARIANTS[variant]
    fed = Fed(rule, [(1000,), (33, 17)], backend=backend, **kwargs)
    for _ in range(3):  # memory is allocated, kernels are loaded
        fed.step()
    synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    asleep = torch.cuda.current_stream().record_event()
    fed.step()
    assert not asleep.query(), "opt.step() came back only when the device had nothing left to do"


# ----------------------------------------------------------------------------------------------------------------------
# CUDA graphs


def warm_up(step: Callable[[], None], times: int) -> None:
    """As PyTorch asks for before a capture: on a side stream."""
    side = torch.cuda.Stream() if ON_GPU else None
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # of None: where we are
        for _ in range(times):
            step()
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a CUDA graph; on the host, as it is."""
    if not ON_GPU:
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize(
    "variant", ["sgd-momentum", "adamw", "adam-decay, clipped", "sgd, per tensor", "adam-decay, a policy in Python"]
)
def test_a_graph_of_a_whole_training_step(backend, variant):
    """Forward, two backwards and the step, replayed: the batch changes and with it the gate, lr and lambda change, one
    batch is broken. Eager steps of the reference do the same."""
    kwargs = {
        "adam-decay, clipped": {"max_grad_norm": 0.05},
        "sgd, per tensor": {"granularity": "tensor"},
        "adam-decay, a policy in Python": {"gate": PythonPolicy()},
    }.get(variant, {})
    graphed, eager = (
        Training(variant.split(",")[0], capturable=True, aux_weight=0.7, backend=name, **kwargs)
        for name in (backend, "reference")
    )
    warm_up(graphed.step, 3)
    warm_up(eager.step, 3)
    replay = captured(graphed.step)

    gates = []
    for i in range(12):
        changes = {4: {"lr": 0.02}, 6: {"aux_weight": 0.2}, 9: {"lr": 0.1, "aux_weight": 1.5}}.get(i, {})
        for training in (graphed, eager):
            training.load(100 + i, agreement=-1.0 if i % 3 == 1 else 1.0)
            training.set(**changes)
            if i == 7:
                training.x[0, 0, 0, 0] = float("nan")
        before = raw(everything(graphed.opt))
        replay()
        eager.step()
        assert bool(graphed.opt.stats.skipped) == (i == 7)
        assert same(before, raw(everything(graphed.opt))) == (i == 7)
        if i != 7:
            gates.append(graphed.opt.stats.gate.flatten().tolist())
            torch.testing.assert_close(graphed.opt.stats.packed, eager.opt.stats.packed, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(graphed.parameters(), eager.parameters(), rtol=1e-8, atol=1e-9)
    assert {0.0, 1.0} <= {gate for row in gates for gate in row}, "the gate must flip between replays"
    assert float(graphed.opt.skipped_steps) == float(eager.opt.skipped_steps) == 1


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("rule", ["sgd-nesterov", "adamw-decay-amsgrad"])
def test_a_graph_of_the_step_alone_gives_the_bits_of_eager_steps(kernels, rule, master_weights):
    """In every type, where a training in float64 leads the kernels along one path only."""
    shapes = [(MILLION + 3,), (17, 33), (5,), (), (700,)] * 2
    graphed, eager = (
        Fed(rule, shapes, dtypes=MIXED, gate="soft", capturable=True, master_weights=master_weights, backend=kernels)
        for _ in range(2)
    )
    warm_up(graphed.step, 2)
    warm_up(eager.step, 2)
    replay = captured(graphed.step)
    for seed in range(5):
        graphed.load(seed)
        eager.load(seed)
        replay()
        eager.step()
        ours = raw([*everything(graphed.opt), graphed.opt.stats.packed])
        assert same(ours, raw([*everything(eager.opt), eager.opt.stats.packed]))


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20),
    "one cycle": lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=20, cycle_momentum=False),
    "lambda": lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.7**epoch),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_reach_into_a_graph(backend, name):
    """A scheduler writes into the learning rate that is a tensor, between replays; its twin has a plain number."""
    graphed = Training("sgd-momentum", capturable=True, backend=backend)
    eager = Training("sgd-momentum", backend="reference")
    schedulers = [SCHEDULERS[name](training.opt) for training in (graphed, eager)]
    warm_up(graphed.step, 2)
    warm_up(eager.step, 2)
    replay = captured(graphed.step)
    rates = []
    for i in range(8):
        for training in (graphed, eager):
            training.load(i)
        replay()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
        rates.append([float(training.opt.param_groups[0]["lr"]) for training in (graphed, eager)])
        torch.testing.assert_close(graphed.parameters(), eager.parameters(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(*zip(*rates, strict=True), rtol=1e-12)
    assert len({rate for rate, _ in rates}) == 8


# ----------------------------------------------------------------------------------------------------------------------
# Streams and devices


@gpu_only
def test_a_step_runs_on_the_current_stream(backend):
    """After what the stream did before, whatever other streams do. Tensors so small that the kernel's blocks find room
    beside the one that sleeps: those of a cooperative launch start together or not at all."""
    fed, twin = (Fed("sgd-momentum", [(700,), (33, 17), (3,)], backend=name) for name in (backend, "reference"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fed.step()
    fresh = fed.gradients(7)
    twin.step()
    synchronize()

    torch.cuda._sleep(SLEEP_CYCLES)  # the default stream has other things to do
    busy = torch.cuda.current_stream().record_event()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP_CYCLES // 8)  # the gradients come late
        for old, new in zip((fed.main, *fed.aux), fresh, strict=True):
            for to, values in zip(old, new, strict=True):
                to.copy_(values)
        fed.step()
    side.synchronize()
    assert not busy.query(), "the step waited for another stream"
    twin.load(7)
    twin.step()
    torch.testing.assert_close(fed.params, twin.params, rtol=1e-5, atol=1e-6)


@gpu_only
def test_two_optimizers_on_two_streams(backend):
    make = lambda: [Fed(rule, [(2 * MILLION + 1,), (900,)], backend=backend) for rule in ("sgd-momentum", "adamw")]  # noqa: E731
    serial, at_once = make(), make()
    streams = [torch.cuda.Stream() for _ in at_once]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(20):
        for fed, stream in zip(at_once, streams, strict=True):
            with torch.cuda.stream(stream):
                fed.step()
        for fed in serial:
            fed.step()
    synchronize()
    for a, b in zip(serial, at_once, strict=True):
        assert same(raw(everything(a.opt)), raw(everything(b.opt)))


@gpu_only
def test_a_training_step_on_a_side_stream(backend):
    here, there = (Training("adamw", backend=backend) for _ in range(2))
    side = torch.cuda.Stream()
    for seed in range(5):
        for training in (here, there):
            training.load(seed, agreement=-1.0 if seed % 2 else 1.0)
        here.step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there.step()
        torch.cuda.current_stream().wait_stream(side)
    torch.testing.assert_close(here.parameters(), there.parameters(), rtol=1e-9, atol=1e-10)


def slowly(device: torch.device, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The gradients on their device, where they arrive late; what reads them too early reads zeros."""
    on_device = [torch.zeros_like(g, device=device) for g in gradients]
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda._sleep(SLEEP_CYCLES // 10)
    for to, g in zip(on_device, gradients, strict=True):
        to.copy_(g, non_blocking=True)
    return on_device


def check_one_gate(devices: Sequence[torch.device], granularity: str, backend: str) -> None:
    """Parameters on several devices under one optimizer, against the same ones on the host under the reference."""
    shapes, dtypes = [(7, 5), (300,), (), (64,)], (torch.float64,)
    place = [devices[i % len(devices)] for i in range(len(shapes))]
    host = Fed("adamw", shapes, dtypes=dtypes, device=CPU, granularity=granularity, max_grad_norm=0.5,
               backend="reference")  # fmt: skip
    params = [nn.Parameter(p.detach().to(d, copy=True)) for p, d in zip(host.params, place, strict=True)]
    spread = optimizer("adamw", params, granularity=granularity, max_grad_norm=0.5, backend=backend)
    gates: set[float] = set()
    for step in range(6):
        main, aux = host.gradients(step)
        aux = [a + (1.0 if step % 2 else -1.0) * m for a, m in zip(aux, main, strict=True)]
        if step == 3:
            aux[1][5] = float("nan")  # on one device; no parameter moves
        arrived = []
        for grads in (main, aux):
            by_device = {
                d: iter(slowly(d, [g for g, at in zip(grads, place, strict=True) if at == d])) for d in set(place)
            }
            arrived.append([next(by_device[d]) for d in place])
        feed(host.opt, main, [aux])
        feed(spread, arrived[0], [arrived[1]])
        assert bool(spread.stats.skipped) == (step == 3)
        if step != 3:
            torch.testing.assert_close(spread.stats.packed.cpu(), host.opt.stats.packed, rtol=1e-9, atol=1e-11)
            gates |= set(spread.stats.gate.flatten().tolist())
        for a, b in zip(everything(spread), everything(host.opt), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-11)
    assert gates == {0.0, 1.0}
    assert float(spread.skipped_steps) == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_one_gate_over_a_gpu_and_the_host(first, granularity, backend):
    check_one_gate([DEVICE, CPU] if first == "gpu" else [CPU, DEVICE], granularity, backend)


@pytest.fixture
def second_gpu() -> torch.device:
    if not ON_GPU or torch.cuda.device_count() < 2:
        pytest.skip("there is no second GPU")
    return torch.device("cuda", 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_one_gate_over_two_gpus(second_gpu, granularity, backend):
    check_one_gate([DEVICE, second_gpu], granularity, backend)
    check_one_gate([second_gpu, DEVICE, CPU], granularity, backend)


def test_a_gpu_that_is_not_the_current_one(second_gpu, backend):
    assert torch.cuda.current_device() == 0
    far, near = (Fed("adamw", [(MILLION + 1,), (5,)], device=d, backend=backend) for d in (second_gpu, DEVICE))
    for t, value in zip((*far.params, *far.main, *far.aux[0]), (*near.params, *near.main, *near.aux[0]), strict=True):
        t.data.copy_(value.data)
    for _ in range(3):
        far.step()
        near.step()
    assert torch.cuda.current_device() == 0
    assert far.opt.stats.packed.device == second_gpu
    torch.testing.assert_close([p.cpu() for p in far.params], [p.cpu() for p in near.params])


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-decay-amsgrad"])
def test_nonfinite_in_the_very_last_element_of_a_large_model(backend, rule, value):
    fed = Fed(rule, [(20 * MILLION + 3,), (512, 512, 3, 3), (7 * MILLION,), (1001,)], backend=backend)
    fed.step()
    before = raw(everything(fed.opt))
    last = fed.aux[0][-1]
    good, last[-1] = float(last[-1]), value
    fed.step()
    assert bool(fed.opt.stats.skipped)
    assert same(before, raw(everything(fed.opt)))
    last[-1] = good
    fed.step()
    assert not bool(fed.opt.stats.skipped)
    assert float(fed.opt.skipped_steps) == 1
    assert all(float(fed.opt.state[p]["step"]) == 2 for p in fed.params)


def test_three_billion_elements(kernels):
    """More than 32 bits count, signed or not in bytes: every element is stepped exactly once, with its own gradients.
    Every number is exact in bfloat16, and every sum in float64."""
    n = 3 * 1000 * MILLION + 17
    if ON_GPU:
        gc.collect()
        torch.cuda.empty_cache()
        free, wanted = torch.cuda.mem_get_info()[0], 3 * 2 * n + 2**30
        if free < wanted:
            pytest.skip(f"needs {wanted / 1e9:.0f} GB of free memory on the GPU, there are {free / 1e9:.0f}")
    full = functools.partial(torch.full, (n,), dtype=torch.bfloat16, device=DEVICE)
    param, main, aux = full(1.0), full(0.5), full(0.25)
    marks = [i for i in (0, 1, n // 3, 2**31 - 1, 2**31, 2**31 + 1, n - 2, n - 1) if i < n]
    for i in marks:
        main[i], aux[i] = 1.5, -0.25

    def check() -> None:
        for i in marks:
            assert float(param[i]) == 1 - (1.5 - 0.25), f"element {i}"
            param[i] = 0.25  # as all others, for a moment
        for start in range(0, n, 2**28):
            assert bool((param[start : start + 2**28] == 1 - (0.5 + 0.25)).all()), f"elements from {start}"
        for i in marks:
            param[i] = -0.25

    stats = gp.gradprom_([param], [main], [aux], lr=1.0, backend=kernels)
    dot = (n - len(marks)) * 0.125 - len(marks) * 0.375
    squares = (n - len(marks)) * 0.25 + len(marks) * 2.25, n * 0.0625
    assert float(stats.main_norm) == pytest.approx(squares[0] ** 0.5, rel=1e-14)
    assert float(stats.aux_norm) == pytest.approx(squares[1] ** 0.5, rel=1e-14)
    assert float(stats.cosine) == pytest.approx(dot / (squares[0] * squares[1]) ** 0.5, rel=1e-13)
    check()
    aux[-1] = float("nan")
    assert bool(gp.gradprom_([param], [main], [aux], lr=1.0, backend=kernels).skipped)
    check()


# ----------------------------------------------------------------------------------------------------------------------
# Long runs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_master_weights_follow_float32_training(backend, rule, dtype):
    """300 steps on the same rounded gradients; the parameters are the masters, rounded."""
    shapes = [(20_001,), (33, 17), ()]
    fed = Fed(rule, shapes, dtypes=(dtype,), gate="always", aux_weight=0.5, master_weights=True, backend=backend)
    wide = [nn.Parameter(p.detach().float()) for p in fed.params]
    other = CASES[rule].theirs(wide, lr=0.05, foreach=False, **CASES[rule].options)
    for group in (fed.opt.param_groups[0], other.param_groups[0]):
        group["lr"] = 1e-3
        if "eps" in group:
            group["eps"] = 1e-3  # else Adam makes a large step of the rounding error of a tiny gradient
    for seed in range(300):
        fed.load(seed % 7)
        fed.step()
        for q, m, a in zip(wide, fed.main, fed.aux[0], strict=True):
            q.grad = m.float() + 0.5 * a.float()
        other.step()
    for p, q in zip(fed.params, wide, strict=True):
        master = fed.opt.state[p]["master"]
        torch.testing.assert_close(master, q.detach(), rtol=1e-4, atol=1e-5)
        assert same(raw([p]), raw([master.to(dtype)]))


@gpu_only
@pytest.mark.parametrize("variant", ["momentum, clipped", "amsgrad, per tensor"])
def test_memory_does_not_grow(backend, variant):
    rule, kwargs = VARIANTS[variant]
    training = Training(rule, dtype=torch.float32, train_vr=True, backend=backend, **kwargs)
    used = []
    for i in range(1000):
        training.step()
        if i % 100 == 99:
            gc.collect()
            synchronize()
            used.append(torch.cuda.memory_allocated())
    assert set(used) == {used[0]}


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile


def test_the_function_compiles_without_a_break(kernels):
    def update(params: list[Tensor], main: list[Tensor], aux: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        stats = gp.gradprom_(params, [2 * g for g in main], [g + 1 for g in aux], lr=0.25, backend=kernels)
        return stats.cosine, stats.gate, params[0].sum()

    torch._dynamo.reset()
    compiled = torch.compile(update, fullgraph=True)
    gates = set()
    for seed, lean in enumerate((1.0, -1.0, 1.0)):
        params, main, noise = (draw([(1000,), (33, 17), ()], 10 * seed + k, DEVICE) for k in range(3))
        aux = [lean * m + 0.1 * x for m, x in zip(main, noise, strict=True)]
        twins = [p.clone() for p in params]
        actual, expected = compiled(params, main, aux), update(twins, main, aux)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(params, twins, rtol=1e-6, atol=1e-6)
        assert not torch.equal(params[0], draw([(1000,)], 10 * seed, DEVICE)[0]), "the parameters were updated"
        gates.add(float(actual[1]))
    assert gates == {0.0, 1.0}


def test_a_compiled_training_step(kernels):
    plain, compiled = (Training("adamw", capturable=True, backend=kernels) for _ in range(2))
    torch._dynamo.reset()
    step = torch.compile(compiled.step, backend="aot_eager")  # what is generated for the networks is not the question
    for seed in range(6):
        for training in (plain, compiled):
            training.load(seed, agreement=-1.0 if seed % 2 else 1.0)
        plain.step()
        step()
        torch.testing.assert_close(compiled.opt.stats.gate, plain.opt.stats.gate)
        torch.testing.assert_close(compiled.parameters(), plain.parameters(), rtol=1e-7, atol=1e-9)
