"""The table of corner cases that hold in every backend, a test for each row."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradprom_ext as gp
from gradprom_ext import rules
from gradprom_ext.plan import PlanSpec

from . import oracle
from .problems import FLOATS, bits, problem

# Scope of s ----------------------------------------------------------------------------------------------------------


def test_one_cosine_over_all_groups_and_dtypes(backend):
    """Gradients agree in one group and conflict more strongly in the other: one global gate is closed for both."""
    a, b = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt = gp.GradPromSGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.5}], backend=backend)
    main = a.sum() + b.sum()
    aux = a.sum() - 2 * b.sum()
    opt.backward(main, aux)
    opt.step()
    assert float(opt.stats.cosine) == pytest.approx((3 - 6) / (np.sqrt(6) * np.sqrt(3 + 12)))
    assert a.tolist() == [-1.0] * 3
    assert b.tolist() == [-0.5] * 3


@pytest.mark.every_type
def test_every_pair_of_dtypes(backend):
    """Any parameter dtype with any gradient dtypes; the result is the exact one rounded to the parameter's dtype."""
    for p_dtype, m_dtype, a_dtype in itertools.product(FLOATS, FLOATS, FLOATS):
        shape = (1037,)
        p = torch.randn(shape).to(p_dtype)
        main, aux = torch.randn(shape).to(m_dtype), torch.randn(shape).to(a_dtype)
        before = p.clone()
        stats = gp.gradprom_([p], [main], [aux], lr=0.25, gate="always", backend=backend)
        exact = oracle.to_numpy(before) - 0.25 * (oracle.to_numpy(main) + oracle.to_numpy(aux))
        eps = max(torch.finfo(p_dtype).eps / 2, 4 * 2.0**-24 if p_dtype != torch.float64 else 0)
        scale = (
            np.abs(oracle.to_numpy(before)) + 0.25 * np.abs(oracle.to_numpy(main)) + 0.25 * np.abs(oracle.to_numpy(aux))
        )
        assert np.all(np.abs(oracle.to_numpy(p) - exact) <= 1.01 * eps * scale + 1e-7 * (p_dtype != torch.float64))
        expected = oracle.decide([before], [main], [[aux]], "always")
        np.testing.assert_allclose(stats.cosine.numpy(), expected.cosine, atol=1e-12)


# Accumulation --------------------------------------------------------------------------------------------------------


def test_near_orthogonal_gradients_get_the_sign_of_fp64(backend):
    """A million products that cancel to 1e-7 of their size: float32 accumulation gets this sign wrong half the time."""
    n = 500_000
    half = torch.randn(n)
    for sign in (1.0, -1.0):
        main = torch.cat([half, half, torch.tensor([1e-2])])
        aux = torch.cat([half, -half, torch.tensor([sign * 1e-2])])
        perm = torch.randperm(2 * n + 1)
        stats = gp.gradient_stats([main[perm]], [aux[perm]], backend=backend)
        exact = sign * 1e-4 / (float(main.double().norm()) * float(aux.double().norm()))
        assert float(stats.cosine) == pytest.approx(exact, rel=1e-3)


def test_fp16_norms_do_not_overflow(backend):
    g = torch.full((100_000,), 300.0, dtype=torch.float16)  # its square overflows float16, its norm float16 too
    stats = gp.gradient_stats([g], [g], backend=backend)
    assert float(stats.main_norm) == pytest.approx(300 * np.sqrt(100_000), rel=1e-12)
    assert float(stats.cosine) == pytest.approx(1.0, abs=1e-15)


@pytest.mark.slow_in_interpreter
def test_bitwise_repeatable(backend):
    def run(threads: int) -> bytes:
        torch.set_num_threads(threads)
        params, main, aux = problem(2, seed=1, shapes=[(3, 5, 7), (70_001,), (), (128, 257)])
        stats = gp.gradprom_(params, main, aux, lr=0.1, gate="soft", max_grad_norm=1.0, backend=backend)
        return b"".join(map(bits, [*params, stats.packed]))

    threads = torch.get_num_threads()
    try:
        assert len({run(2) for _ in range(20)}) == 1
        # The kernels promise more: the order of the sums does not depend on the number of threads.
        if backend != "reference":
            assert len({run(n) for n in (1, 2, 3, 8)}) == 1
    finally:
        torch.set_num_threads(threads)


# Scale ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(a=st.floats(-30, 30), b=st.floats(-30, 30))
def test_cosine_does_not_depend_on_scale(backend, a, b):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(513, generator=g).clamp(-3, 3)
    y = torch.randn(513, generator=g).clamp(-3, 3) + 0.3 * x
    x, y = torch.where(x.abs() < 0.1, 0.1, x), torch.where(y.abs() < 0.1, 0.1, y)
    # float32 holds 1e+-30 times such values as normal numbers; scaling by a power of two keeps the digits.
    sa, sb = 2.0 ** round(a / np.log10(2)), 2.0 ** round(b / np.log10(2))
    plain = gp.gradient_stats([x], [y], backend=backend)
    scaled = gp.gradient_stats([x * sa], [y * sb], backend=backend)
    assert float(scaled.cosine) == pytest.approx(float(plain.cosine), rel=1e-14)
    assert float(scaled.main_norm) == pytest.approx(sa * float(plain.main_norm), rel=1e-14)


@pytest.mark.parametrize("scale", [1e160, 1e155])
def test_squares_that_leave_float64_are_named(backend, scale):
    """Finite float64 gradients longer than 1e154 are skipped as infinite ones are, and the message says why."""
    p, g = torch.ones(3, dtype=torch.float64), torch.full((3,), scale, dtype=torch.float64)
    assert bool(gp.gradprom_([p], [g], [torch.ones(3)], backend=backend).skipped)
    with pytest.raises(
        gp.NonFiniteGradientError, match=r"squared norm of main_grads leaves float64: .* longer than 1e154"
    ):
        gp.gradprom_([p], [g], [torch.ones(3)], nonfinite="raise", backend=backend)
    with pytest.raises(gp.NonFiniteGradientError, match=r"squared norm of aux_grads\[0\] leaves float64"):
        gp.gradient_stats([torch.ones(3)], [g], nonfinite="raise", backend=backend)
    assert p.tolist() == [1.0] * 3


def test_gradients_below_the_squares_of_float64_count_as_zero(backend):
    tiny, one = torch.full((3,), 1e-170, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    stats = gp.gradient_stats([tiny], [one], backend=backend)
    assert (float(stats.main_norm), float(stats.cosine), float(stats.gate)) == (0.0, 0.0, 1.0)
    assert float(gp.gradient_stats([one * 1e150], [one * 1e-150], backend=backend).cosine) == pytest.approx(1.0)


# A zero gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ["main", "aux", "both"])
def test_zero_gradients(backend, zero):
    main = torch.zeros(5) if zero in ("main", "both") else torch.ones(5)
    aux = torch.zeros(5) if zero in ("aux", "both") else torch.ones(5)
    for gate, weight in (("hard", 1.0), ("soft", 0.0)):
        p = torch.zeros(5)
        stats = gp.gradprom_([p], [main], [aux], lr=1.0, gate=gate, backend=backend)
        assert (float(stats.cosine), float(stats.gate)) == (0.0, weight)
        assert torch.equal(p, -(main + weight * aux))


# A closed gate -------------------------------------------------------------------------------------------------------


def test_closed_gate_selects(backend):
    """The product of lambda and a finite gradient may overflow: behind a closed gate it must not even be formed."""
    p = torch.zeros(2)
    gp.gradprom_(
        [p], [torch.tensor([1.0, 1.0])], [torch.tensor([-3e38, -3e38])], lr=1.0, aux_weight=1e30, backend=backend
    )
    assert p.tolist() == [-1.0, -1.0]
    p = torch.zeros(2)
    gp.gradprom_([p], [torch.ones(2)], [torch.ones(2)], lr=1.0, aux_weight=0.0, gate="always", backend=backend)
    assert p.tolist() == [-1.0, -1.0]


def test_a_weight_of_zero_is_not_multiplied(backend):
    """Underneath the gate, where infinities have not been looked for: 0 * inf would be NaN."""
    p, main, aux = torch.zeros(1029), [torch.ones(1029)], [[torch.full((1029,), float("inf"))]]
    spec = PlanSpec(rules.SGD, [p], [0], [{}], num_aux=1, per_tensor=False)
    plan = gp.backends.choose(backend, p.device, 1).plan(spec)
    plan.bind_gradients(main, aux)
    plan.update([rules.Hyper(lr=1.0)], torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor(False))
    assert torch.equal(p, -torch.ones(1029))


# NaN and infinity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["main", "aux0", "aux1"])
@pytest.mark.parametrize(
    "make",
    [
        lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, **kw),
        lambda ps, **kw: gp.GradPromAdamW(ps, lr=0.1, amsgrad=True, **kw),
    ],
)
def test_nonfinite_skips_bit_for_bit(backend, make, where, value):
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(40, 41), (7,), (1,)]]
    opt = make(params, backend=backend)
    grads = lambda: [torch.randn(p.shape) for p in params]  # noqa: E731

    def step(poison):
        losses = [sum((p * g).sum() for p, g in zip(params, grads(), strict=True)) for _ in range(3)]
        opt.backward(*losses)
        if poison:
            target = {"main": [p.grad for p in params], "aux0": opt.aux_grads[0], "aux1": opt.aux_grads[1]}[where]
            target[-1].reshape(-1)[-1] = value  # last element of the last tensor
        opt.step()
        opt.zero_grad()

    step(False)
    frozen = [bits(p) for p in params] + [bits(t) for s in opt.state.values() for t in s.values()]
    step(True)
    assert bool(opt.stats.skipped)
    assert frozen == [bits(p) for p in params] + [bits(t) for s in opt.state.values() for t in s.values()]
    assert float(opt.skipped_steps) == 1
    step(False)
    assert not bool(opt.stats.skipped)
    assert float(opt.skipped_steps) == 1
    assert all(float(s["step"]) == 2 for s in opt.state.values()), "a skipped step does not count"
    assert frozen[0] != bits(params[0])


def test_nonfinite_on_the_very_first_step(backend):
    """The first step of SGD with dampening starts the buffer; a skipped one must not have started it."""
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    opt = gp.GradPromSGD([p], lr=0.1, momentum=0.9, dampening=0.5, backend=backend)
    oracle_opt = torch.optim.SGD([q], lr=0.1, momentum=0.9, dampening=0.5)
    opt.backward(p.sum() * float("inf"))
    opt.step()
    opt.zero_grad()
    assert torch.equal(p, torch.ones(3))
    for _ in range(2):
        opt.backward((p * p).sum())
        (q * q).sum().backward()
        for o in (opt, oracle_opt):
            o.step()
            o.zero_grad()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


def test_nonfinite_raise_names_the_gradient_and_changes_nothing(backend):
    params, main, aux = problem(2, seed=2)
    aux[1][2][0] = float("nan")
    before = [bits(p) for p in params]
    with pytest.raises(gp.NonFiniteGradientError, match=r"aux_grads\[1\]\[2\] holds NaN or infinity; nothing was"):
        gp.gradprom_(params, main, aux, nonfinite="raise", backend=backend)
    assert before == [bits(p) for p in params]


def test_a_nonfinite_gradient_behind_a_closed_gate_skips_too(backend):
    p = torch.ones(2)
    stats = gp.gradprom_([p], [torch.ones(2)], [torch.tensor([float("inf"), 0.0])], gate="never", backend=backend)
    assert bool(stats.skipped)
    assert p.tolist() == [1.0, 1.0]


# Missing gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["hard", "never"])
def test_missing_gradients_are_zero_and_missing_in_all_is_left_alone(backend, gate):
    params = [torch.randn(5) for _ in range(4)]
    main = [torch.randn(5), None, torch.randn(5), None]
    aux = [main[0].clone(), torch.randn(5), None, None]
    before = [p.clone() for p in params]
    stats = gp.gradprom_(params, main, aux, lr=0.5, gate=gate, backend=backend)
    expected = oracle.decide(before, main, [aux], gate)
    np.testing.assert_allclose(stats.cosine.numpy(), expected.cosine, atol=1e-12)
    for p, b, c in zip(params, before, expected.combined, strict=True):
        np.testing.assert_allclose(oracle.to_numpy(p), oracle.to_numpy(b) - 0.5 * (0 if c is None else c), atol=1e-6)
    assert torch.equal(params[3], before[3])


def test_a_parameter_missing_in_all_sees_no_decay_and_no_step(backend):
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromAdamW([used, unused], lr=0.1, weight_decay=0.5, backend=backend)
    opt.backward(used.sum(), used.sum())
    opt.step()
    assert torch.equal(unused, torch.ones(3))
    assert not opt.state[unused]
    assert float(opt.state[used]["step"]) == 1


def test_only_an_auxiliary_gradient_and_a_closed_gate_is_a_zero_gradient(backend):
    """As torch.optim treats a gradient of zeros: decay and momentum go on."""
    p, q, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    opt = gp.GradPromSGD([p, other], lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend)
    plain = torch.optim.SGD([q], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        opt.backward(other.sum(), p.sum() - 2 * other.sum())
        opt.step()
        assert float(opt.stats.gate) == 0
        opt.zero_grad()
        q.grad = torch.zeros(3)
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


# Sizes ---------------------------------------------------------------------------------------------------------------


def test_empty_scalar_and_no_tensors(backend):
    p = [torch.zeros(0, 3), torch.tensor(1.0)]
    stats = gp.gradprom_(
        p, [torch.zeros(0, 3), torch.tensor(2.0)], [torch.zeros(0, 3), torch.tensor(1.0)], lr=1.0, backend=backend
    )
    assert p[1].item() == -2.0
    assert float(stats.cosine) == 1.0
    stats = gp.gradprom_([], [], [], backend=backend)
    assert float(stats.cosine) == 0.0
    assert not bool(stats.skipped)


@pytest.mark.parametrize("n", [1, 7, 15, 16, 17, 31, 33, 1023, 1024, 1025, 16_383, 16_384, 16_385, 32_769])
def test_sizes_around_lanes_blocks_and_chunks(backend, n):
    params, main, aux = problem(1, seed=n, shapes=[(n,), (3,)])
    before = [p.clone() for p in params]
    stats = gp.gradprom_(params, main, aux, lr=0.5, gate="always", backend=backend)
    expected = oracle.decide(before, main, aux, "always")
    np.testing.assert_allclose(stats.cosine.numpy(), expected.cosine, atol=1e-12)
    for p, b, c in zip(params, before, expected.combined, strict=True):
        np.testing.assert_allclose(oracle.to_numpy(p), oracle.to_numpy(b) - 0.5 * c, atol=2e-6)


@pytest.mark.slow_in_interpreter
def test_thousands_of_small_tensors(backend):
    params, main, aux = problem(1, seed=3, shapes=[(1 + i % 13,) for i in range(3000)])
    before = [p.clone() for p in params]
    stats = gp.gradprom_(params, main, aux, lr=0.5, gate="soft", backend=backend)
    expected = oracle.decide(before, main, aux, "soft")
    np.testing.assert_allclose(stats.gate.numpy(), expected.gate, atol=1e-12)
    for p, b, c in zip(params, before, expected.combined, strict=True):
        np.testing.assert_allclose(oracle.to_numpy(p), oracle.to_numpy(b) - 0.5 * c, atol=2e-6)


# Nothing is touched that should not be -------------------------------------------------------------------------------


def test_gradients_are_never_written(backend):
    params, main, aux = problem(2, seed=4)
    frozen = [bits(g) for gs in (main, *aux) for g in gs]
    gp.gradprom_(params, main, aux, max_grad_norm=0.1, gate="project", backend=backend)
    assert frozen == [bits(g) for gs in (main, *aux) for g in gs]


def test_autograd_notices_the_update(backend):
    """A graph that saved a parameter must refuse to run after the step, as with torch.optim."""
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    gp.gradprom_([p], [torch.ones(3)], [torch.ones(3)], backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
