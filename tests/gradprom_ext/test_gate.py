"""The gates and their statistics against the NumPy oracle, on every backend."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import backends, policy

from . import oracle, targets
from .problems import GATES, HalfGate, problem


def check_step(params, main, aux, backend, *, lr=0.1, **kwargs):
    before = [p.clone() for p in params]
    expected = oracle.decide(
        before,
        main,
        aux,
        kwargs.get("gate", "hard"),
        kwargs.get("aux_weight", 1.0),
        kwargs.get("threshold", 0.0),
        kwargs.get("aux_cap"),
    )
    stats = gp.gradprom_(params, main, aux, lr=lr, backend=backend, **kwargs)
    np.testing.assert_allclose(stats.cosine.numpy(), expected.cosine, rtol=0, atol=1e-9)
    np.testing.assert_allclose(stats.gate.numpy(), expected.gate, rtol=0, atol=1e-9)
    np.testing.assert_allclose(stats.cap.numpy(), expected.cap, rtol=1e-9)
    for i, (p, old, c) in enumerate(zip(params, before, expected.combined, strict=True)):
        exact = oracle.to_numpy(old) - (0 if c is None else lr * c)
        # The classical bound for a sum in float32: one rounding of at most 2^-24 per operation, of what it adds up.
        aux_weight = stats.gate * stats.cap * torch.tensor(kwargs.get("aux_weight", 1.0))
        weights = [float(stats.main_weight), *aux_weight.tolist()]
        terms = [lr * w * oracle.to_numpy(g[i]) for w, g in zip(weights, [main, *aux], strict=True) if g[i] is not None]
        magnitude = np.abs(oracle.to_numpy(old)) + np.abs(terms).sum(0)
        assert np.all(np.abs(oracle.to_numpy(p) - exact) <= (len(aux) + 3) * 2.0**-24 * magnitude)
    return stats


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lean", [-0.5, 0.5])
@pytest.mark.parametrize("num_aux", [1, 2, 4])
def test_gates_match_the_oracle(backend, gate, lean, num_aux):
    params, main, aux = problem(num_aux, seed=num_aux, lean=lean)
    check_step(params, main, aux, backend, gate=gate, aux_weight=[0.3 + k for k in range(num_aux)])


@pytest.mark.parametrize("threshold", [-0.6, 0.3, 0.6])
@pytest.mark.parametrize("gate", ["hard", "soft"])
def test_threshold_is_a_cosine(backend, gate, threshold):
    params, main, aux = problem(seed=3, lean=0.5)  # cosine about 0.45
    stats = check_step(params, main, aux, backend, gate=gate, threshold=threshold)
    assert 0.4 < float(stats.cosine) < 0.5
    assert (float(stats.gate) > 0) == (threshold < 0.4)


def test_several_auxiliaries_have_a_gate_each(backend):
    params, main, _ = problem(seed=4)
    aux = [[-g for g in main], [g.clone() for g in main], [torch.zeros_like(g) for g in main]]
    stats = check_step(params, main, aux, backend, aux_weight=[2.0, 3.0, 4.0])
    assert stats.gate.tolist() == [0.0, 1.0, 1.0]
    np.testing.assert_allclose(stats.cosine.numpy(), [-1.0, 1.0, 0.0], atol=1e-12)


def test_hand_worked_example(backend):
    """main (3, 4), aux (4, -3): orthogonal, so s = 0 and the hard gate is open; aux (-4, -3): s = -24/25, closed."""
    theta = [torch.tensor([1.0, 1.0])]
    stats = gp.gradprom_(theta, [torch.tensor([3.0, 4.0])], [torch.tensor([4.0, -3.0])], lr=0.5, backend=backend)
    assert theta[0].tolist() == [1 - 0.5 * 7, 1 - 0.5 * 1]
    assert (float(stats.cosine), float(stats.gate), float(stats.main_norm), float(stats.aux_norm)) == (0, 1, 5, 5)
    theta = [torch.tensor([1.0, 1.0])]
    stats = gp.gradprom_(theta, [torch.tensor([3.0, 4.0])], [torch.tensor([-4.0, -3.0])], lr=0.5, backend=backend)
    assert theta[0].tolist() == [1 - 0.5 * 3, 1 - 0.5 * 4]
    assert float(stats.cosine) == pytest.approx(-24 / 25, abs=1e-15)
    assert float(stats.gate) == 0


def test_projection_is_orthogonal_to_the_main_gradient(backend):
    """main (1, 0), aux (-1, 1): the conflicting part (-1, 0) goes, (0, 1) stays."""
    theta = [torch.zeros(2)]
    stats = gp.gradprom_(
        theta, [torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])], lr=1.0, gate="project", backend=backend
    )
    assert theta[0].tolist() == [-1.0, -1.0]
    assert float(stats.main_weight) == 2.0


def test_granularity_tensor_gates_each_parameter_alone(backend):
    params, main, aux = problem(2, seed=5)
    before = [p.clone() for p in params]
    stats = gp.gradprom_(params, main, aux, lr=0.1, granularity="tensor", aux_weight=[0.5, 2.0], backend=backend)
    assert stats.cosine.shape == stats.gate.shape == stats.aux_norm.shape == (len(params), 2)
    assert stats.main_norm.shape == (len(params),)
    seen = set()
    for i, p in enumerate(params):
        one = oracle.decide([before[i]], [main[i]], [[g[i]] for g in aux], "hard", [0.5, 2.0])
        np.testing.assert_allclose(stats.cosine[i].numpy(), one.cosine, atol=1e-9)
        np.testing.assert_array_equal(stats.gate[i].numpy(), one.gate)
        np.testing.assert_allclose(oracle.to_numpy(p), oracle.to_numpy(before[i]) - 0.1 * one.combined[0], atol=1e-6)
        seen |= set(one.gate)
    assert seen == {0.0, 1.0}, "the example must have open and closed gates"


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("gate", ["hard", "always", "project"])
def test_clipping_matches_clip_grad_norm(backend, gate, granularity):
    params, main, aux = problem(2, seed=6, lean=-0.2)
    before = [p.clone() for p in params]
    stats = gp.gradprom_(
        params, main, aux, lr=1.0, gate=gate, granularity=granularity, max_grad_norm=0.5, backend=backend
    )
    if granularity == "global":
        combined = oracle.decide(before, main, aux, gate).combined
    else:
        combined = [
            oracle.decide([b], [m], [[a[i]] for a in aux], gate).combined[0]
            for i, (b, m) in enumerate(zip(before, main, strict=True))
        ]
    leaves = [torch.nn.Parameter(torch.zeros(c.shape, dtype=torch.float64)) for c in combined]
    for leaf, c in zip(leaves, combined, strict=True):
        leaf.grad = torch.from_numpy(np.array(c))
    norm = torch.nn.utils.clip_grad_norm_(leaves, 0.5)
    assert float(stats.combined_norm) == pytest.approx(float(norm), rel=1e-9)
    for p, b, leaf in zip(params, before, leaves, strict=True):
        torch.testing.assert_close(p, b - leaf.grad.float(), rtol=1e-5, atol=1e-6)


def test_no_clipping_below_the_limit(backend):
    params, main, aux = problem(seed=7)
    clipped = [p.clone() for p in params]
    gp.gradprom_(params, main, aux, lr=0.1, backend=backend)
    stats = gp.gradprom_(clipped, main, aux, lr=0.1, max_grad_norm=1e9, backend=backend)
    assert float(stats.clip_coefficient) == 1.0
    assert all(torch.equal(a, b) for a, b in zip(params, clipped, strict=True))


def test_a_policy_of_ones_own_runs_on_every_backend(backend):
    params, main, aux = problem(2, seed=8)
    before = [p.clone() for p in params]
    stats = gp.gradprom_(params, main, aux, lr=0.1, gate=HalfGate(), aux_weight=3.0, backend=backend)
    assert stats.gate.tolist() == [0.5, 0.5]
    for i, (p, b) in enumerate(zip(params, before, strict=True)):
        exact = oracle.to_numpy(b) - 0.1 * (
            0.25 * oracle.to_numpy(main[i]) + 1.5 * (oracle.to_numpy(aux[0][i]) + oracle.to_numpy(aux[1][i]))
        )
        np.testing.assert_allclose(oracle.to_numpy(p), exact, atol=2e-6)


def test_gradient_stats_measures_without_stepping(backend):
    params, main, aux = problem(2, seed=9, lean=0.3)
    main[1], aux[0][1], aux[1][1] = None, None, None
    main[3] = None
    copies = [None if g is None else g.clone() for g in main]
    expected = oracle.decide(params, main, aux, "hard")
    stats = gp.gradient_stats(main, aux, backend=backend)
    np.testing.assert_allclose(stats.cosine.numpy(), expected.cosine, atol=1e-9)
    np.testing.assert_allclose(float(stats.main_norm), np.linalg.norm(oracle.flat(main, params)), rtol=1e-12)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(main, copies, strict=True))


def test_more_auxiliaries_than_the_kernels_take_fall_back_to_the_reference():
    params, main, aux = problem(6, seed=10, shapes=[(5,), (3, 4)])
    if "cpu" in gp.available_backends():
        with pytest.warns(UserWarning, match="takes up to 4 auxiliaries, not 6"):
            check_step(params, main, aux, "auto")
        with pytest.raises(ValueError, match="takes up to 4 auxiliaries, not 6"):
            gp.gradprom_(params, main, aux, backend="cpu")
    else:
        check_step(params, main, aux, "reference")


# The one table of gates ----------------------------------------------------------------------------------------------


def test_every_gate_has_a_class_a_case_in_the_core_and_one_in_triton():
    """A gate that was forgotten in one place is named here."""
    table = set(policy.GATES)
    triton_source = Path(policy.__file__).with_name("triton_kernels.py").read_text()
    in_triton = set(re.findall(r'\bGATE == "(\w+)"', triton_source))
    assert in_triton == table, f"in one of policy.GATES and triton_kernels.gate_rows only: {in_triton ^ table}"
    module, problem = backends.extension()
    if module is None:
        pytest.skip(problem)
    in_core = set(module.Gate.__members__)
    assert in_core == table, f"in one of policy.GATES and csrc/gradprom/policy.h only: {in_core ^ table}"


class Quarter(gp.HardGate):
    def __call__(self, gram, aux_weight):
        return torch.ones_like(gram[..., 0, 0]), torch.full_like(gram[..., 0, 1:], 0.25)


class Renamed(gp.SoftGate):
    """Overrides nothing: the parent's decisions."""


class Moving(gp.HardGate):
    """Overrides what the parent's constructor sets."""

    @property
    def threshold(self):
        return 0.9

    @threshold.setter
    def threshold(self, value):
        pass


@pytest.mark.parametrize(
    ("gate", "expected"),
    [(Quarter(), 0.25), (Renamed(), math.sqrt(0.5)), (Moving(), 0.0), (gp.HardGate(), 1.0), (gp.SoftGate(), 0.5**0.5)],
)
def test_a_subclass_of_a_gate_runs_as_it_is_written(backend, gate, expected):
    p = torch.zeros(2)
    main, aux = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])  # cosine 0.707
    stats = gp.gradprom_([p], [main], [aux], lr=1.0, gate=gate, backend=backend)
    assert float(stats.gate) == pytest.approx(expected)
    torch.testing.assert_close(p, -(main + expected * aux))
    opt = gp.GradPromSGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0, gate=gate, backend=backend)
    (q,) = opt.param_groups[0]["params"]
    q.grad, opt.aux_grads = main, [[aux]]
    opt.step()
    torch.testing.assert_close(q.detach(), p)


def test_triton_refuses_a_gate_that_it_does_not_have(monkeypatch):
    """When it compiles, not as whatever stands last in its cases."""
    with targets.quick_interpreter():
        monkeypatch.setitem(policy._KERNELS, Quarter, "quarter")
        with pytest.raises(Exception, match="the kernels have no such gate"):
            gp.gradprom_(
                [torch.zeros(2)], [torch.ones(2)], [torch.ones(2)], gate=Quarter(), backend=targets.HostTriton()
            )
