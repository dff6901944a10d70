"""The CUDA scheduler and its kernels without a GPU: compiled as host C++ against tests/cuda_host, which plays blocks,
threads, shuffles and barriers.

Every test of the library's semantics runs on them (target ``cuda-on-host``); those below look into their own corners.
What a GPU alone can show (speed, the memory model, streams, graphs) is in the tests marked ``gpu``.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradprom_ext as gp

from .problems import FLOATS, GATES, RULES, HalfGate, bits, make, problem, same_bits, train
from .targets import HostCuda, built, cuda_on_host


@pytest.fixture(autouse=True, scope="module")
def _built() -> None:
    cuda_on_host()


# One tile is 512 elements, a share ends at a multiple of 1024, and a block keeps 2.9 thousand pairs of fp32.
SHAPES = [(7001,), (1,), (3, 5), (12_345,), (512,), (64,), (0,), (), (2049,)]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_every_form_gives_the_same_bits(rule, granularity):
    """One launch or one per stage, gradients on chip, half of them, or none: the same sums in the same order."""
    results = []
    for options in ({}, {"cooperative": False}, {"max_shared_bytes": 0}, {"max_shared_bytes": 5000}):
        backend = HostCuda(**options)
        results.append(train(rule, SHAPES, granularity=granularity, max_grad_norm=1.0, missing=0.1, backend=backend))
    assert all(same_bits(results[0], other) for other in results[1:])


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_number_of_blocks_moves_rounding_errors_only(blocks):
    expected = train("adamw", SHAPES, num_aux=2, gate="soft", backend=HostCuda())
    actual = train("adamw", SHAPES, num_aux=2, gate="soft", backend=HostCuda(max_blocks=blocks))
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    shapes=st.lists(st.lists(st.integers(1, 40), max_size=3).map(tuple) | st.tuples(st.integers(1, 9000)), min_size=1),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=4),
    num_aux=st.integers(0, 4),
    per_tensor=st.booleans(),
    clip=st.booleans(),
    gate=st.sampled_from(GATES),
    seed=st.integers(0, 1000),
)
def test_any_model_gives_what_the_reference_gives(rule, shapes, dtypes, num_aux, per_tensor, clip, gate, seed):
    kwargs = {"dtypes": dtypes, "num_aux": num_aux, "granularity": "tensor" if per_tensor else "global", "gate": gate,
              "max_grad_norm": 0.5 if clip else None, "seed": seed, "missing": 0.2, "steps": 1}  # fmt: skip
    actual, expected = (train(rule, shapes, backend=b, **kwargs) for b in (HostCuda(), "reference"))
    torch.testing.assert_close(actual[2], expected[2], rtol=1e-9, atol=1e-9)
    for a, e in zip([*actual[0], *actual[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, e)


def test_more_metadata_than_one_upload_holds():
    """3,000 tensors in both granularities: far more than the arguments of one launch, far more tensors than blocks."""
    shapes = [(1 + i % 23,) for i in range(3000)]
    for granularity in ("global", "tensor"):
        actual = train("sgd", shapes, steps=1, granularity=granularity, backend=HostCuda())
        expected = train("sgd", shapes, steps=1, granularity=granularity, backend="reference")
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(actual[2], expected[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", ["sgd-momentum", "adamw-decay-amsgrad"])
def test_nan_in_the_very_last_element(rule, granularity):
    params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
    opt = make(rule, params, granularity=granularity, backend=HostCuda())

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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("n", [1, 3, 4, 7, 8, 9, 511, 513, 1025, 5000])
def test_nothing_beside_a_tensor_is_written(n, offset, dtype):
    """Tensors as views into larger buffers, at addresses that vectors may and may not be loaded from."""
    buffers = [torch.full((n + 32,), 7.0, dtype=dtype) for _ in range(4)]
    param, main, aux, momentum = (b[8 + offset : 8 + offset + n] for b in buffers)
    for t in (main, aux):
        t.copy_(torch.randn(n))
    before, param = param.clone(), torch.nn.Parameter(param)
    opt = gp.GradPromSGD([param], lr=0.5, momentum=0.5, gate="always", backend=HostCuda())
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
    for p_dtype, g_dtype, a_dtype in itertools.product(FLOATS[:1] + FLOATS[2:], repeat=3):
        param, main, aux = (torch.randn(9013).to(d) for d in (p_dtype, g_dtype, a_dtype))
        exact = param.float() - 0.5 * (main.float() + aux.float())
        stats = gp.gradprom_([param], [main], [aux], lr=0.5, gate="always", backend=HostCuda())
        torch.testing.assert_close(param, exact.to(p_dtype))
        cosine = main.double() @ aux.double() / main.double().norm() / aux.double().norm()
        assert float(stats.cosine) == pytest.approx(float(cosine), rel=1e-12, abs=1e-15)


def test_unchanged_addresses_do_not_hide_changed_numbers():
    """What the kernel knows of the tensors is sent only when it changes: the learning rate is part of it."""
    p, g = torch.nn.Parameter(torch.zeros(5)), torch.ones(5)
    opt = gp.GradPromSGD([p], lr=1.0, backend=HostCuda())
    for lr in (1.0, 1.0, 0.5, 2.0):
        opt.param_groups[0]["lr"] = lr
        p.grad = g
        opt.step()
    assert p.tolist() == [-4.5] * 5


def test_gram_and_update_apart():
    """A policy in Python: the two halves in two launches, the flag that skips left on the device."""
    params, main, aux = problem(2, seed=3)
    together = [p.clone() for p in params]
    gp.gradprom_(together, main, aux, lr=0.1, gate="always", backend=HostCuda())

    class Everything(HalfGate):
        def __call__(self, gram, aux_weight):
            return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])

    gp.gradprom_(params, main, aux, lr=0.1, gate=Everything(), backend=HostCuda())
    assert [bits(p) for p in params] == [bits(p) for p in together]
    main[0].view(-1)[0] = float("inf")
    assert bool(gp.gradprom_(params, main, aux, lr=0.1, gate=Everything(), backend=HostCuda()).skipped)
    assert [bits(p) for p in params] == [bits(p) for p in together]


def test_more_groups_than_the_arguments_hold():
    """Hyper-parameters of the first sixteen groups travel in the arguments of the kernel."""
    outcomes = []
    for backend in (HostCuda(), "reference"):
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
def test_a_captured_step_replays(monkeypatch, rule, granularity, cooperative):
    """A graph remembers launches with their arguments. Replayed, it sees today's gradients, learning rate, lambda and
    step counters, its gate opens and closes, it counts what it skips, and steps in between do not disturb it."""
    host = ctypes.CDLL(cuda_on_host().__file__)
    cuda = HostCuda(cooperative=cooperative)
    shapes = [(700,), (3, 4), (), (65,)]

    def optimizer(backend):
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes]
        opt = make(rule, params, lr=0.1, backend=backend, capturable=True, granularity=granularity, max_grad_norm=3.0)
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

    (opt, params), (twin, twins), (other, others) = optimizer(cuda), optimizer("reference"), optimizer(cuda)
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
        opt._work.stats = captured
    assert gates == {0.0, 1.0}
    assert float(opt.skipped_steps) == float(twin.skipped_steps) == 1
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for name, value in twin.state[q].items():
            torch.testing.assert_close(opt.state[p][name], value, rtol=1e-5, atol=1e-6)


def test_the_layout_of_a_job():
    """Plain C++ about plain C++; tests/cuda_host/layout_test.cpp."""
    run = subprocess.run([str(built("layout_test") / "layout_test")], capture_output=True, text=True)
    assert (run.stdout, run.returncode) == ("ok\n", 0), run.stdout
