"""The CUDA scheduler and its kernels without a GPU: compiled as host C++ against tests/cuda_host, which plays blocks,
threads, shuffles and barriers, and put in the place of the CPU kernels.

Every test of the library's semantics runs on them, and those below look into their own corners. What a GPU alone can
show (speed, the memory model, streams, graphs) is in the tests marked ``gpu``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradprom_ext as gp
from gradprom_ext import backends

from . import test_device_numbers, test_gate, test_layout, test_master_weights, test_optim, test_semantics, test_step
from .test_semantics import bits

ROOT = Path(__file__).resolve().parents[2]

for _module in (
    test_gate,
    test_layout,
    test_optim,
    test_semantics,
    test_master_weights,
    test_device_numbers,
    test_step,
):
    globals().update({name: test for name, test in vars(_module).items() if name.startswith("test_")})


def find_tool(name: str) -> str:
    path = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if path is None:
        pytest.skip(f"{name} was not found")
    return path


@pytest.fixture(scope="session")
def cuda_on_host() -> ModuleType:
    """``gradprom_ext._C`` with the CUDA scheduler working on host memory: 4 multiprocessors, blocks of 64 threads,
    23 KB of shared memory for gradients in each."""
    if importlib.util.find_spec("pybind11") is None:
        pytest.skip("the Python package pybind11 is not installed")
    cmake, ninja = find_tool("cmake"), find_tool("ninja")
    build = ROOT / "build" / "cuda_on_host"
    configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}",
                 f"-DPython_EXECUTABLE={sys.executable}", "-DGRADPROM_CUDA=OFF"]  # fmt: skip
    for command in (configure, [cmake, "--build", str(build), "--target", "cuda_on_host"]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (build / "cuda_on_host").glob("_C*")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_place_of_the_cpu_kernels(cuda_on_host: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "extension", lambda: (cuda_on_host, None))
    backends.choose.cache_clear()  # it warns once
    yield
    backends.choose.cache_clear()
    cuda_on_host.cuda_configure()


@pytest.fixture
def backend() -> str:
    return "cpu"


RULES = {
    "sgd": lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, **kw),
    "momentum": lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, **kw),
    "adam": lambda ps, **kw: gp.GradPromAdam(ps, lr=0.1, weight_decay=0.1, maximize=True, **kw),
    "adamw": lambda ps, **kw: gp.GradPromAdamW(ps, lr=0.1, **kw),
    "amsgrad": lambda ps, **kw: gp.GradPromAdam(ps, lr=0.1, amsgrad=True, **kw),
}


def train(rule, shapes, *, dtypes=(torch.float32,), num_aux=1, steps=3, seed=0, missing=0.0, backend="cpu", **kwargs):
    """The parameters, states and statistics after a few steps on random gradients."""
    g = torch.Generator().manual_seed(seed)
    dtype_of = itertools.cycle(dtypes)
    params = [torch.nn.Parameter(torch.randn(s, generator=g).to(next(dtype_of))) for s in shapes]
    opt = RULES[rule](params, backend=backend, **kwargs)
    packed = []
    for _ in range(steps):
        grads = [[torch.randn(p.shape, generator=g).to(p.dtype) for p in params] for _ in range(1 + num_aux)]
        for gs in grads:
            for i in range(len(gs)):
                if float(torch.rand((), generator=g)) < missing:
                    gs[i] = None
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = grad
        opt.aux_grads = grads[1:]
        opt.step()
        packed.append(opt.stats.packed)
    states = [opt.state[p][name] for p in params for name in sorted(opt.state[p])]
    return [p.detach() for p in params], states, packed


def same_bits(a, b) -> bool:
    return [bits(t) for group in a for t in group] == [bits(t) for group in b for t in group]


# One tile is 512 elements, a share ends at a multiple of 1024, and a block keeps 2.9 thousand pairs of fp32.
SHAPES = [(7001,), (1,), (3, 5), (12_345,), (512,), (64,), (0,), (), (2049,)]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_every_form_gives_the_same_bits(cuda_on_host, rule, granularity):
    """One launch or one per stage, gradients on chip, half of them, or none: the same sums in the same order."""
    results = []
    for options in ({}, {"cooperative": False}, {"max_shared_bytes": 0}, {"max_shared_bytes": 5000}):
        cuda_on_host.cuda_configure(**options)
        results.append(train(rule, SHAPES, granularity=granularity, max_grad_norm=1.0, missing=0.1))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_number_of_blocks_moves_rounding_errors_only(cuda_on_host, blocks):
    expected = train("adamw", SHAPES, num_aux=2, gate="soft")
    cuda_on_host.cuda_configure(max_blocks=blocks)
    actual = train("adamw", SHAPES, num_aux=2, gate="soft")
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    shapes=st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple) | st.tuples(st.integers(1, 9000)), min_size=1),
    dtypes=st.lists(st.sampled_from(test_semantics.FLOATS), min_size=1, max_size=4),
    num_aux=st.integers(0, 4),
    per_tensor=st.booleans(),
    clip=st.booleans(),
    gate=st.sampled_from(["hard", "soft", "always", "never", "project"]),
    seed=st.integers(0, 1000),
)
def test_any_model_gives_what_the_reference_gives(rule, shapes, dtypes, num_aux, per_tensor, clip, gate, seed):
    kwargs = {"dtypes": dtypes, "num_aux": num_aux, "granularity": "tensor" if per_tensor else "global", "gate": gate,
              "max_grad_norm": 0.5 if clip else None, "seed": seed, "missing": 0.2, "steps": 1}  # fmt: skip
    actual, expected = train(rule, shapes, **kwargs), train(rule, shapes, backend="reference", **kwargs)
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-9, atol=1e-9)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e)


def test_more_metadata_than_one_upload_holds():
    """3,000 tensors in both granularities: far more than the arguments of one launch, far more tensors than blocks."""
    shapes = [(1 + i % 23,) for i in range(3000)]
    for granularity in ("global", "tensor"):
        actual = train("sgd", shapes, steps=1, granularity=granularity)
        expected = train("sgd", shapes, steps=1, granularity=granularity, backend="reference")
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(actual[2], expected[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", ["momentum", "amsgrad"])
def test_nan_in_the_very_last_element(rule, granularity):
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    opt = RULES[rule](params, granularity=granularity, backend="cpu")

    def step(value):
        for p in params:
            p.grad = torch.randn(p.shape)
        opt.aux_grads = [[torch.randn(p.shape) for p in params]]
        opt.aux_grads[0][-1].view(-1)[-1] = value
        opt.step()
        return [bits(p) for p in params] + [bits(t) for s in opt.state.values() for t in s.values()]

    before = step(0.0)
    assert step(float("nan")) == before
    assert bool(opt.stats.skipped)
    assert step(0.0) != before
    assert {float(s["step"]) for p, s in opt.state.items() if p.numel()} == {2.0}


@pytest.mark.parametrize("dtype", test_semantics.FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("n", [1, 3, 4, 7, 8, 9, 511, 513, 1025, 5000])
def test_nothing_beside_a_tensor_is_written(n, offset, dtype):
    """Tensors as views into larger buffers, at addresses that vectors may and may not be loaded from."""
    buffers = [torch.full((n + 32,), 7.0, dtype=dtype) for _ in range(4)]
    param, main, aux, momentum = (b[8 + offset : 8 + offset + n] for b in buffers)
    for t in (main, aux):
        t.copy_(torch.randn(n))
    before, param = param.clone(), torch.nn.Parameter(param)
    opt = gp.GradPromSGD([param], lr=0.5, momentum=0.5, gate="always", backend="cpu")
    opt.state[param] = {"step": torch.ones(()), "momentum_buffer": momentum}
    param.grad, opt.aux_grads = main, [[aux]]
    opt.step()
    # Rounded once, to the type of the tensor; the arithmetic is in fp32 or fp64.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    buffer = 0.5 * 7.0 + (main.to(wide) + aux.to(wide))
    torch.testing.assert_close(momentum, buffer.to(dtype))
    torch.testing.assert_close(param.detach(), (before.to(wide) - 0.5 * buffer).to(dtype))
    for b in (buffers[0], buffers[3]):
        assert torch.all(b[: 8 + offset] == 7)
        assert torch.all(b[8 + offset + n :] == 7)


def test_gradients_in_other_types_than_the_parameters():
    """Octets: 16-bit gradients of fp32 parameters and the other way round, whole vectors and a rest."""
    for p_dtype, g_dtype, a_dtype in itertools.product(test_semantics.FLOATS[:1] + test_semantics.FLOATS[2:], repeat=3):
        param, main, aux = (torch.randn(9013).to(d) for d in (p_dtype, g_dtype, a_dtype))
        exact = param.float() - 0.5 * (main.float() + aux.float())
        stats = gp.gradprom_([param], [main], [aux], lr=0.5, gate="always", backend="cpu")
        torch.testing.assert_close(param, exact.to(p_dtype))
        cosine = main.double() @ aux.double() / main.double().norm() / aux.double().norm()
        assert float(stats.cosine) == pytest.approx(float(cosine), rel=1e-12, abs=1e-15)


def test_unchanged_addresses_do_not_hide_changed_numbers():
    """What the kernel knows of the tensors is sent only when it changes: the learning rate is part of it."""
    p, g = torch.nn.Parameter(torch.zeros(5)), torch.ones(5)
    opt = gp.GradPromSGD([p], lr=1.0, backend="cpu")
    for lr in (1.0, 1.0, 0.5, 2.0):
        opt.param_groups[0]["lr"] = lr
        p.grad = g
        opt.step()
    assert p.tolist() == [-4.5] * 5


def test_gram_and_update_apart():
    """A policy in Python: the two halves in two launches, the flag that skips left on the device."""
    params, main, aux = test_gate.problem(2, seed=3)
    together = [p.clone() for p in params]
    gp.gradprom_(together, main, aux, lr=0.1, gate="always", backend="cpu")

    class Everything(gp.GatePolicy):
        def __call__(self, gram, aux_weight):
            return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])

    gp.gradprom_(params, main, aux, lr=0.1, gate=Everything(), backend="cpu")
    assert [bits(p) for p in params] == [bits(p) for p in together]
    main[0].view(-1)[0] = float("inf")
    assert bool(gp.gradprom_(params, main, aux, lr=0.1, gate=Everything(), backend="cpu").skipped)
    assert [bits(p) for p in params] == [bits(p) for p in together]


def test_more_groups_than_the_arguments_hold():
    """Hyper-parameters of the first sixteen groups travel in the arguments of the kernel."""
    outcomes = []
    for backend in ("cpu", "reference"):
        params = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(40)]
        opt = gp.GradPromSGD([{"params": [p], "lr": 0.01 * i} for i, p in enumerate(params)], lr=1.0, backend=backend)
        for factor in (1.0, 1.0, 0.5):
            for group, p in zip(opt.param_groups, params, strict=True):
                group["lr"] *= factor
                p.grad = torch.ones(3)
            opt.step()
        outcomes.append(params)
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cooperative", [True, False])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_a_captured_step_replays(cuda_on_host, monkeypatch, rule, granularity, cooperative):
    """A graph remembers launches with their arguments. Replayed, it sees today's gradients, learning rate, lambda and
    step counters, its gate opens and closes, it counts what it skips, and steps in between do not disturb it."""
    cuda_on_host.cuda_configure(cooperative=cooperative)
    host = ctypes.CDLL(cuda_on_host.__file__)
    shapes = [(700,), (3, 4), (), (65,)]

    def make(backend):
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        opt = RULES[rule](params, backend=backend, capturable=True, granularity=granularity, max_grad_norm=3.0)
        for p in params:
            p.grad = torch.zeros(p.shape)
        opt.aux_grads = [[torch.zeros(p.shape) for p in params]]
        return opt, params

    def fill(opt, params, seed, value=1.0):
        g = torch.Generator().manual_seed(seed)
        for p, a in zip(params, opt.aux_grads[0], strict=True):
            p.grad.copy_(torch.randn(p.shape, generator=g))
            a.copy_(torch.randn(p.shape, generator=g))
        params[-1].grad[-1] *= value
        opt.param_groups[0]["lr"].fill_(0.1 / (1 + seed))
        opt.aux_weight.fill_(0.5 * seed)

    (opt, params), (twin, twins), (other, others) = make("cpu"), make("reference"), make("cpu")
    for o in (opt, twin, other):
        o.step()  # creates the state, outside of the capture

    pool, empty = [], torch.empty  # memory of a graph lives as long as the graph does

    def keep(*args, **kwargs):
        pool.append(empty(*args, **kwargs))
        return pool[-1]

    monkeypatch.setattr(torch, "empty", keep)
    host.cuda_host_begin_capture()
    opt.step()
    launches = host.cuda_host_end_capture()
    monkeypatch.undo()
    stages = 1 if cooperative else 3 if granularity == "tensor" else 2
    assert launches == stages + 1, "the table of tensors, and the step"

    gates, halves = set(), [torch.full(s, 0.5) for s in shapes]
    for seed in range(1, 9):
        value = float("nan") if seed == 5 else 1.0
        fill(opt, params, seed, value)
        fill(twin, twins, seed, value)
        fill(other, others, seed + 1)
        host.cuda_host_replay()
        twin.step()
        other.step()
        assert bool(opt.stats.skipped) == bool(twin.stats.skipped) == (seed == 5)
        if seed != 5:
            torch.testing.assert_close(opt.stats.packed, twin.stats.packed, rtol=1e-6, atol=1e-6)
            gates |= set(opt.stats.gate.flatten().tolist())
        captured = opt.stats
        if seed % 3 == 0:  # a step outside of the graph, with gradients of its own
            for o, ps in ((opt, params), (twin, twins)):
                static = [p.grad for p in ps]
                for p, g in zip(ps, halves, strict=True):
                    p.grad = g
                o.step()
                for p, g in zip(ps, static, strict=True):
                    p.grad = g
        opt.stats = captured
    assert gates == {0.0, 1.0}
    assert float(opt.skipped_steps) == float(twin.skipped_steps) == 1
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name, value in twin.state[q].items():
            torch.testing.assert_close(opt.state[p][name], value, rtol=1e-5, atol=1e-6)
