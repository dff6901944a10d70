"""``aux_cap``: an auxiliary gradient is added with at most kappa times the length of the main one."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import policy, reference

from . import oracle
from .problems import GATES, RULES, HalfGate, bits, make, problem, train
from .test_gate import check_step

#: Of auxiliary gradients about as long as the main one: a lambda far above and one below a cap of a half, and one of
#: the other sign.
WEIGHTS = [3.0, 0.25, -2.0]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lean", [-0.5, 0.5])
def test_a_capped_step_matches_the_oracle(backend, gate, lean):
    params, main, aux = problem(3, seed=1, lean=lean)
    stats = check_step(params, main, aux, backend, gate=gate, aux_weight=WEIGHTS, aux_cap=0.5)
    cap = stats.cap.tolist()
    assert cap[0] < 0.2
    assert cap[1] == 1.0
    assert cap[2] < 0.3


@pytest.mark.parametrize("gate", GATES)
def test_each_parameter_has_its_own_cap(backend, gate):
    params, main, aux = problem(2, seed=2, lean=-0.2)
    aux[0] = [g * 10.0 ** (i - 3) for i, g in enumerate(aux[0])]
    before = [p.clone() for p in params]
    stats = gp.gradprom_(
        params, main, aux, lr=0.1, gate=gate, granularity="tensor", aux_weight=[0.7, -2.0], aux_cap=0.5, backend=backend
    )
    assert stats.cap.shape == (len(params), 2)
    for i, p in enumerate(params):
        one = oracle.decide([before[i]], [main[i]], [[g[i]] for g in aux], gate, [0.7, -2.0], aux_cap=0.5)
        np.testing.assert_allclose(stats.cap[i].numpy(), one.cap, rtol=1e-9)
        np.testing.assert_allclose(oracle.to_numpy(p), oracle.to_numpy(before[i]) - 0.1 * one.combined[0], atol=1e-6)
    assert {0 < c < 1 for c in stats.cap[:, 0].tolist()} == {True, False}


def test_hand_worked_example(backend):
    """main (3, 4) of length 5, aux (8, 0): half of 5 are left of lambda 2 times 8; the soft gate then takes 3/5."""
    for gate, added in [("hard", 2.5), ("soft", 1.5), ("project", 2.5)]:
        theta = [torch.zeros(2, dtype=torch.float64)]
        stats = gp.gradprom_(
            theta,
            [torch.tensor([3.0, 4.0])],
            [torch.tensor([8.0, 0.0])],
            lr=1.0,
            gate=gate,
            aux_weight=2.0,
            aux_cap=0.5,
            backend=backend,
        )
        assert float(stats.cap) == 2.5 / 16
        torch.testing.assert_close(theta[0], torch.tensor([-3.0 - added, -4.0], dtype=torch.float64))
        assert float(stats.combined_norm) == pytest.approx(math.hypot(3 + added, 4), rel=1e-14)


def test_what_is_projected_is_the_capped_gradient(backend):
    """main (1, 0), aux (-3, 4) of length 5: lambda becomes 2/5, and (0, 4) is left of the gradient. What is added is
    then shorter than the cap allows, since the cap goes by the length of the gradient before the projection."""
    theta = [torch.zeros(2, dtype=torch.float64)]
    main, aux = [torch.tensor([1.0, 0.0])], [torch.tensor([-3.0, 4.0])]
    stats = gp.gradprom_(theta, main, aux, lr=1.0, gate="project", aux_cap=2.0, backend=backend)
    torch.testing.assert_close(theta[0], torch.tensor([-1.0, -1.6], dtype=torch.float64))
    assert float(stats.main_weight) == pytest.approx(1 + 0.4 * 3, rel=1e-15)
    assert float(stats.cap) == pytest.approx(0.4, rel=1e-15)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_no_auxiliary_is_added_with_more_than_kappa_times_the_main_norm(backend, gate, granularity):
    for kappa, lean in itertools.product([1e-3, 0.5, 3.0], [-1.0, 0.0, 1.0]):
        _, main, aux = problem(2, seed=3, lean=lean, shapes=[(5, 4), (7,), ()])
        aux = [[10.0 ** (k - i) * g for i, g in enumerate(gs)] for k, gs in enumerate(aux)]
        params = [torch.zeros(g.shape) for g in main]
        stats = gp.gradprom_(
            params,
            main,
            aux,
            gate=gate,
            granularity=granularity,
            aux_weight=[1e3, -1.0],
            aux_cap=kappa,
            backend=backend,
        )
        added = stats.gate * stats.cap * torch.tensor([1e3, 1.0], dtype=torch.float64) * stats.aux_norm
        assert bool((added <= kappa * (1 + 1e-12) * stats.main_norm[..., None]).all())


def test_a_main_gradient_of_zero_leaves_no_room(backend):
    """Whereas the hard gate alone is open: a cosine with zero is 0."""
    zero, aux = [torch.zeros(3)], [[torch.tensor([1.0, 2.0, 2.0])], [torch.zeros(3)]]
    for gate in GATES:
        theta = [torch.ones(3)]
        stats = gp.gradprom_(theta, zero, aux, lr=1.0, gate=gate, aux_weight=2.0, aux_cap=1e9, backend=backend)
        assert theta[0].tolist() == [1.0] * 3
        assert stats.cap.tolist() == [0.0, 1.0]
        assert float(stats.main_weight) == 1.0


def test_nothing_is_reduced_where_there_is_nothing(backend):
    """An auxiliary gradient of zero, and a lambda of zero."""
    main, zero = [torch.tensor([3.0, 4.0])], [torch.zeros(2)]
    theta = [torch.zeros(2)]
    stats = gp.gradprom_(theta, main, [zero, main], lr=1.0, aux_weight=[1e30, 0.0], aux_cap=1e-300, backend=backend)
    assert stats.cap.tolist() == [1.0, 1.0]
    assert theta[0].tolist() == [-3.0, -4.0]


@pytest.mark.parametrize("gate", ["hard", "soft", "project"])
@pytest.mark.parametrize("weight", [0.7, -0.7, 1e-200, 1e200])
def test_the_cap_has_no_scale(backend, weight, gate):
    """From 1e-150 to 1e150, in fp64: the cap, the gate and the sum in units of the main gradient."""
    main, aux = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    ratio = 5 / math.sqrt(5)
    for a, b in itertools.product([1e-150, 1e-30, 1.0, 1e30, 1e150], repeat=2):
        theta = [torch.zeros(2, dtype=torch.float64)]
        stats = gp.gradprom_(
            theta, [a * main], [b * aux], lr=1.0, gate=gate, aux_weight=weight, aux_cap=0.5, backend=backend
        )
        exponent = math.log10(0.5 * ratio / abs(weight)) + math.log10(a) - math.log10(b)
        if exponent > 1e-9:
            assert float(stats.cap) == 1.0
        elif exponent > -300:  # below, the factor leaves float64
            assert float(stats.cap) == pytest.approx(0.5 * ratio / abs(weight) * (a / b), rel=1e-13)
            unit = main + float(stats.gate) * math.copysign(0.5 * ratio, weight) * aux
            torch.testing.assert_close(-theta[0] / a, unit, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["hard", "soft", "project"])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("rule", RULES)
def test_a_cap_that_does_not_bind_changes_no_bit(backend, rule, granularity, gate):
    shapes = [(7, 5), (300,), (), (3, 3)]
    outcomes = [
        train(rule, shapes, num_aux=2, gate=gate, granularity=granularity, aux_weight=[0.5, -2.0], max_grad_norm=3.0,
              aux_cap=kappa, backend=backend)
        for kappa in (None, 1e6)
    ]  # fmt: skip
    flat = [[bits(t) for group in outcome for t in group] for outcome in outcomes]
    assert flat[0] == flat[1]


def test_without_a_cap_its_statistic_is_one(backend):
    _, main, aux = problem(2, seed=4, shapes=[(3,), (2, 2)])
    assert gp.gradient_stats(main, aux, backend=backend).cap.tolist() == [1.0, 1.0]
    assert gp.gradient_stats(main, aux, granularity="tensor", backend=backend).cap.tolist() == [[1.0, 1.0]] * 2
    assert gp.gradient_stats([], [[]], aux_cap=0.5, backend=backend).cap.tolist() == [1.0]
    assert "cap=[1.0, 1.0]" in repr(gp.gradient_stats(main, aux, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entries", [0, 1, 2])
def test_lambdas_in_a_tensor_are_capped_as_they_are_when_the_step_runs(backend, dtype, entries):
    _, main, aux = problem(2, seed=5, shapes=[(5,), (3, 4)])
    params = [torch.nn.Parameter(torch.zeros(g.shape)) for g in main]
    weight = torch.tensor(0.0) if entries == 0 else torch.zeros(entries)
    weight = weight.to(dtype)
    opt = gp.GradPromSGD(params, lr=1.0, gate="always", aux_weight=weight, aux_cap=0.5, backend=backend)
    for value in (0.125, -4.0):
        weight.fill_(value)
        for p, g in zip(params, main, strict=True):
            p.data.zero_()
            p.grad = g
        opt.aux_grads = aux
        opt.step()
        expected = oracle.decide(params, main, aux, "always", [value] * 2, aux_cap=0.5)
        np.testing.assert_allclose(opt.stats.cap.numpy(), expected.cap, rtol=1e-9)
        assert (expected.cap < 1).all() == (value == -4.0)
        for p, c in zip(params, expected.combined, strict=True):
            np.testing.assert_allclose(oracle.to_numpy(p), -c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_a_gradient_that_is_not_finite_still_skips_the_step(backend, granularity):
    for value in (math.nan, math.inf):
        for which in (0, 1):
            grads = [[torch.ones(3), torch.ones(2)] for _ in range(2)]
            grads[which][0][1] = value
            params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))]
            opt = gp.GradPromAdam(params, aux_cap=0.5, aux_weight=3.0, granularity=granularity, backend=backend)
            params[0].grad, params[1].grad = grads[0]
            opt.aux_grads = [grads[1]]
            opt.step()
            assert bool(opt.stats.skipped)
            assert [p.tolist() for p in params] == [[1.0] * 3, [1.0] * 2]


class Looking(gp.GatePolicy):
    """Remembers the lambdas that it was given."""

    def __call__(self, gram, aux_weight):
        self.aux_weight = aux_weight
        return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])


def test_a_policy_of_ones_own_sees_the_capped_lambdas(backend):
    _, main, aux = problem(2, seed=6, shapes=[(5,), (3, 4), (2,)])
    look = Looking()
    for aux_cap, granularity, shape in [
        (None, "global", (2,)),
        (None, "tensor", (2,)),
        (0.5, "global", (2,)),
        (0.5, "tensor", (3, 2)),
    ]:
        kwargs = {"aux_weight": [3.0, 0.01], "granularity": granularity, "aux_cap": aux_cap, "backend": backend}
        params = [torch.zeros(g.shape) for g in main]
        stats = gp.gradprom_(params, main, aux, gate=look, **kwargs)
        assert look.aux_weight.shape == shape
        seen = look.aux_weight.expand(stats.cap.shape)
        torch.testing.assert_close(seen, stats.cap * torch.tensor([3.0, 0.01], dtype=torch.float64))
        built_in = [torch.zeros(g.shape) for g in main]
        gp.gradprom_(built_in, main, aux, gate="always", **kwargs)
        torch.testing.assert_close(params, built_in)


def test_a_policy_with_weights_of_its_own_is_capped_by_lambda(backend):
    """Its gate multiplies what the cap has left, as the soft gate's does."""
    theta, main, aux = [torch.zeros(2)], [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 8.0])]
    gp.gradprom_(theta, main, aux, lr=1.0, gate=HalfGate(), aux_cap=0.5, backend=backend)
    assert theta[0].tolist() == [-0.25, -0.25]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "load_state_dict"])
def test_the_cap_belongs_to_the_optimizer(how):
    """As its gate does: a copy has it, and a state dict leaves it alone."""
    opt = gp.GradPromSGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0, aux_weight=4.0, aux_cap=0.5, backend="reference")
    if how == "deepcopy":
        opt = copy.deepcopy(opt)
    elif how == "pickle":
        opt = pickle.loads(pickle.dumps(opt))
    else:
        other = gp.GradPromSGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0)
        opt.load_state_dict(other.state_dict())
    (p,) = opt.param_groups[0]["params"]
    p.grad, opt.aux_grads = torch.tensor([1.0, 0.0]), [[torch.tensor([0.0, 1.0])]]
    opt.step()
    assert p.tolist() == [-1.0, -0.5]


def test_optimizers_apply_it_to_what_the_moments_see(backend):
    p = torch.nn.Parameter(torch.zeros(2))
    opt = make("adam", [p], aux_weight=4.0, aux_cap=0.5, betas=(0.5, 0.5), backend=backend)
    p.grad, opt.aux_grads = torch.tensor([1.0, 0.0]), [[torch.tensor([0.0, 1.0])]]
    opt.step()
    assert opt.state[p]["exp_avg"].tolist() == [0.5, 0.25]


def test_the_reference_equals_its_definition():
    """Against Python's own numbers, on random matrices."""
    g = torch.Generator().manual_seed(0)
    grads = torch.randn(50, 3, 4, generator=g, dtype=torch.float64) * torch.tensor([1.0, 0.3, 3.0])[:, None]
    gram = grads @ grads.transpose(1, 2)
    weights, stats = reference.decide(gram, gp.AlwaysGate(), (0.5, -0.5), 0.75, None, True)
    for row in range(50):
        main, *aux = (math.sqrt(sum(x * x for x in v)) for v in grads[row].tolist())
        for k, (norm, weight) in enumerate(zip(aux, (0.5, -0.5), strict=True)):
            allowed = math.copysign(min(abs(weight), 0.75 * main / norm), weight)
            assert float(weights[row, 1 + k]) == pytest.approx(allowed, rel=1e-12)
            assert float(stats.cap[row, k]) == pytest.approx(allowed / weight, rel=1e-12)
    assert torch.equal(stats.cap, policy.caps(gram, torch.tensor([0.5, -0.5], dtype=torch.float64), 0.75))
