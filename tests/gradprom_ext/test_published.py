"""The published policies against the papers' algorithms, written out on vectors in NumPy, and against TorchJD."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradprom_ext as gp
from gradprom_ext import policy, reference

from .problems import bits, problem

# The papers, on a matrix whose rows are the gradients of the tasks ------------------------------------------------


def pcgrad(h: np.ndarray) -> np.ndarray:
    total = np.zeros_like(h[0])
    for i in range(len(h)):
        v = h[i].copy()
        for j in range(len(h)):
            if j != i and v @ h[j] < 0:
                v -= (v @ h[j]) / (h[j] @ h[j]) * h[j]
        total += v
    return total


def gradvac(h: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """Writes the new targets into ``target``."""
    total = np.zeros_like(h[0])
    for i in range(len(h)):
        v = h[i].copy()
        for j in range(len(h)):
            if j == i or not v.any() or not h[j].any():
                continue
            phi = v @ h[j] / (np.linalg.norm(v) * np.linalg.norm(h[j]))
            wanted = target[i, j]
            if phi < wanted:
                numerator = np.linalg.norm(v) * (wanted * math.sqrt(1 - phi**2) - phi * math.sqrt(1 - wanted**2))
                v = v + numerator / (np.linalg.norm(h[j]) * math.sqrt(1 - wanted**2)) * h[j]
            target[i, j] = (1 - beta) * wanted + beta * phi
        total += v
    return total


def shortest_of_hull(h: np.ndarray) -> np.ndarray:
    """By going through the faces of the hull: on the right one the shortest vector of its plane lies inside."""
    best = None
    for size in range(1, len(h) + 1):
        for face in itertools.combinations(range(len(h)), size):
            origin, edges = h[face[0]], h[list(face[1:])] - h[face[0]]
            rest = np.linalg.lstsq(edges.T, -origin, rcond=None)[0]
            if (rest >= 0).all() and rest.sum() <= 1:
                c = origin + rest @ edges
                best = c if best is None or c @ c < best @ best else best
    assert best is not None
    return best


# -----------------------------------------------------------------------------------------------------------------


def draw(num_aux: int, seed: int, lean: float = 0.0) -> np.ndarray:
    """Gradients of different lengths that share a direction."""
    g = np.random.default_rng(seed)
    return (g.standard_normal((num_aux + 1, 12)) + lean * g.standard_normal(12)) * g.uniform(0.2, 3, (num_aux + 1, 1))


def combine(gate: gp.GatePolicy, g: np.ndarray, weights=None, aux_cap: float | None = None) -> np.ndarray:
    """What the policy makes of gradients in the rows of ``g``."""
    weights = [1.0] * (len(g) - 1) if weights is None else weights
    gram = torch.from_numpy(g @ g.T)[None]
    return reference.decide(gram, gate, tuple(weights), aux_cap, None, False)[0][0].numpy() @ g


WEIGHTS = [[1.0, 1.0, 1.0, 1.0], [0.3, 2.0, 0.7, 5.0], [-1.0, 0.5, -0.2, 3.0], [0.0, 1.0, 0.0, 2.0]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("num_aux", [1, 2, 3, 4])
def test_pcgrad(num_aux, weights):
    turned = 0
    for seed in range(20):
        g = draw(num_aux, seed, lean=0.3)
        h = np.concatenate([g[:1], np.array(weights[:num_aux])[:, None] * g[1:]])
        expected = pcgrad(h)
        np.testing.assert_allclose(combine(gp.PCGradGate(), g, weights[:num_aux]), expected, rtol=1e-11, atol=1e-12)
        turned += not np.allclose(expected, h.sum(0))
    assert turned > 0 or not any(weights[:num_aux])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("num_aux", [1, 2, 4])
def test_gradvac_from_step_to_step(num_aux, beta, weights):
    gate, target = gp.GradVacGate(beta), np.zeros((num_aux + 1, num_aux + 1))
    for seed in range(20):
        g = draw(num_aux, seed, lean=1.0)
        if seed == 7:
            g[1] = 0.0
        h = np.concatenate([g[:1], np.array(weights[:num_aux])[:, None] * g[1:]])
        expected = gradvac(h, target, beta)
        np.testing.assert_allclose(combine(gate, g, weights[:num_aux]), expected, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(gate.target[0].numpy(), target, rtol=1e-9, atol=1e-11)
    if beta == 0:
        assert not gate.target.any()


def test_gradvac_turns_a_gradient_to_its_target():
    gate = gp.GradVacGate(beta=1.0)  # the target is the cosine of the step before
    first, second = np.array([[1.0, 0.0], [0.6, 0.8]]), np.array([[3.0, 0.0], [0.0, 2.0]])
    combine(gate, first)
    c = combine(gate, second)
    # Each is turned to a cosine of 0.6 with the other one: (3, 9/4) and (3/2, 2).
    np.testing.assert_allclose(c, [4.5, 4.25], rtol=1e-12)


def test_gradvac_without_targets_is_pcgrad():
    for seed in range(5):
        g = draw(2, seed)
        np.testing.assert_allclose(
            combine(gp.GradVacGate(), g, [0.5, 2.0]), combine(gp.PCGradGate(), g, [0.5, 2.0]), rtol=1e-11
        )


@pytest.mark.parametrize("weights", WEIGHTS)
def test_mgda_of_two_has_the_closed_form(weights):
    for seed in range(30):
        g = draw(1, seed, lean=0.8)
        h = np.stack([g[0], weights[0] * g[1]])
        if weights[0] == 0:
            expected = h[0]
        else:
            difference = h[1] - h[0]
            share = np.clip(-(h[0] @ difference) / (difference @ difference), 0, 1)
            expected = h[0] + share * difference
            np.testing.assert_allclose(expected, shortest_of_hull(h), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(combine(gp.MGDAGate(), g, weights[:1]), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_aux", [2, 3, 4])
def test_mgda_of_several_is_as_near_as_it_says(num_aux):
    for iterations in (10, 100, 400):
        for seed in range(20):
            g = draw(num_aux, seed, lean=0.4)
            c, best = combine(gp.MGDAGate(iterations), g), shortest_of_hull(g)
            longest = max(np.sum((a - b) ** 2) for a, b in itertools.combinations(g, 2))
            assert -1e-12 <= c @ c - best @ best <= 4 * longest / (iterations + 2)
            if iterations >= 100:
                assert np.linalg.norm(c) <= 1.01 * np.linalg.norm(best)


def test_mgda_normalized():
    """The shortest vector between the main gradient and one of its length: half of their sum, whatever the lengths."""
    for seed in range(5):
        g = draw(1, seed)
        ratio = np.linalg.norm(g[0]) / np.linalg.norm(g[1])
        c = combine(gp.MGDAGate(normalize=True), g)
        np.testing.assert_allclose(c, (g[0] + ratio * g[1]) / 2, rtol=1e-11)
        g[1] *= 1e6
        np.testing.assert_allclose(combine(gp.MGDAGate(normalize=True), g), c, rtol=1e-11)
        # lambda 2: a gradient twice as long as the main one.
        h = np.stack([g[0], 2 * g[1] * np.linalg.norm(g[0]) / np.linalg.norm(g[1])])
        c = combine(gp.MGDAGate(normalize=True), g, [2.0])
        np.testing.assert_allclose(c, shortest_of_hull(h), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gate", [gp.PCGradGate, gp.GradVacGate, gp.MGDAGate, lambda: gp.MGDAGate(normalize=True)])
def test_a_gradient_of_zero_takes_no_part(gate):
    main, aux, zero = np.array([3.0, 4.0]), np.array([-1.0, 0.5]), np.zeros(2)
    with_zero = combine(gate(), np.stack([main, aux, zero]))
    np.testing.assert_allclose(with_zero, combine(gate(), np.stack([main, aux])), rtol=1e-12)
    np.testing.assert_allclose(combine(gate(), np.stack([main, zero])), main, rtol=1e-15)
    alone = combine(gate(), np.stack([zero, aux]))
    np.testing.assert_allclose(alone, zero if getattr(gate(), "normalize", False) else aux, rtol=1e-15)
    assert combine(gate(), np.stack([zero, zero])).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(combine(gate(), main[None]), main, rtol=1e-15)  # no auxiliary at all


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
@pytest.mark.parametrize("gate", [gp.PCGradGate, gp.GradVacGate, gp.MGDAGate])
def test_there_is_no_epsilon(gate, scale):
    """A common scale cancels, and one between the gradients is taken up by lambda."""
    for seed in range(5):
        g = draw(2, seed)
        expected = combine(gate(), g, [0.5, -2.0])
        np.testing.assert_allclose(combine(gate(), scale * g, [0.5, -2.0]) / scale, expected, rtol=1e-9, atol=1e-12)
        apart = g * np.array([[1.0], [scale], [1.0]])
        np.testing.assert_allclose(combine(gate(), apart, [0.5 / scale, -2.0]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("aux_cap", [None, 0.5])
@pytest.mark.parametrize("gate", [gp.PCGradGate, gp.GradVacGate, gp.MGDAGate])
def test_steps_on_every_backend(backend, gate, aux_cap, granularity):
    """The weights are those of the rows, lambda capped first; the step follows."""
    params, main, aux = problem(2, seed=1, lean=-0.4, shapes=[(5, 4), (7,), (3,)])
    before = [p.clone() for p in params]
    stats = gp.gradprom_(params, main, aux, lr=0.1, gate=gate(), granularity=granularity, aux_weight=[0.5, 3.0],
                         aux_cap=aux_cap, backend=backend)  # fmt: skip
    rows = [[i] for i in range(3)] if granularity == "tensor" else [[0, 1, 2]]
    for row in rows:
        g = np.stack([np.concatenate([gs[i].double().numpy().ravel() for i in row]) for gs in (main, *aux)])
        capped = [
            w if aux_cap is None else min(w, aux_cap * np.linalg.norm(g[0]) / np.linalg.norm(v))
            for w, v in zip([0.5, 3.0], g[1:], strict=True)
        ]
        expected = combine(gate(), g, capped)
        step = np.concatenate([((before[i] - params[i]) / 0.1).double().numpy().ravel() for i in row])
        np.testing.assert_allclose(step, expected, rtol=1e-4, atol=2e-5)
    assert stats.gate.shape == ((3, 2) if granularity == "tensor" else (2,))


def test_policies_do_not_read_values_back():
    """Fake tensors have none."""
    gates = [*(gate() for gate in policy.GATES.values()), gp.PCGradGate(), gp.GradVacGate(), gp.MGDAGate(iterations=3)]
    with FakeTensorMode():
        gram, weights = torch.ones(4, 3, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
        for gate in gates:
            for lambdas in (weights, policy.caps(gram, weights, 0.5)):
                main_weight, opening = gate(gram, lambdas)
                assert (main_weight.shape, opening.shape) == ((4,), (4, 2))


# The state of GradVac -------------------------------------------------------------------------------------------------


def optimizer(gate=None, **kwargs):
    params = [torch.nn.Parameter(torch.ones(4, dtype=torch.float64)), torch.nn.Parameter(torch.ones(3))]
    gate = gp.GradVacGate(beta=0.3) if gate is None else gate
    return gp.GradPromAdam(params, lr=0.1, gate=gate, backend="reference", **kwargs)


def take_steps(opt, seeds, spoil=None):
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        params = opt.param_groups[0]["params"]
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.aux_grads = [[torch.randn(p.shape, generator=g) for p in params] for _ in range(2)]
        if seed == spoil:
            opt.aux_grads[0][0][1] = math.nan
        opt.step()


def everything(opt) -> list[bytes]:
    params = opt.param_groups[0]["params"]
    states = [opt.state[p][name] for p in params for name in sorted(opt.state[p])]
    return [bits(t) for t in [*params, *states, opt._work.config.policy.target]]


@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_a_resumed_optimizer_goes_on_as_if_it_had_not_stopped(how, granularity):
    straight, stopped = optimizer(granularity=granularity), optimizer(granularity=granularity)
    take_steps(straight, range(6))
    take_steps(stopped, range(3))
    if how == "deepcopy":
        resumed = copy.deepcopy(stopped)
    elif how == "pickle":
        resumed = pickle.loads(pickle.dumps(stopped))
    else:
        file = io.BytesIO()
        params = stopped.param_groups[0]["params"]
        torch.save({"params": params, "opt": stopped.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = optimizer(granularity=granularity)
        resumed.load_state_dict(saved["opt"])
        for p, value in zip(resumed.param_groups[0]["params"], saved["params"], strict=True):
            p.data.copy_(value)
    take_steps(stopped, [77])  # the copy is one: this does not move its targets
    take_steps(resumed, range(3, 6))
    assert everything(resumed) == everything(straight)


def test_a_state_dict_without_targets_begins_anew():
    """Of torch.optim, or of a run with another gate; and targets are of no use to another gate."""
    opt, plain = optimizer(), optimizer(gate="hard")
    take_steps(opt, range(2))
    take_steps(plain, range(2))
    assert "gate" in opt.state_dict()
    assert "gate" not in plain.state_dict()
    assert "gate" not in optimizer().state_dict()
    plain.load_state_dict(opt.state_dict())
    assert "gate" not in plain.state_dict()
    opt.load_state_dict(plain.state_dict())
    assert opt._work.config.policy.target is None


def test_a_skipped_step_does_not_move_the_targets():
    spoilt, clean = optimizer(), optimizer()
    take_steps(spoilt, range(4), spoil=2)
    take_steps(clean, [0, 1, 3])
    assert float(spoilt.skipped_steps) == 1
    assert everything(spoilt) == everything(clean)


def test_another_number_of_auxiliaries_is_refused():
    opt = optimizer()
    take_steps(opt, [0])
    opt.aux_grads = opt.aux_grads[:1]
    with pytest.raises(ValueError, match="has targets for 2 auxiliaries and 1 Gram matrices, and this step has 1 aux"):
        opt.step()


def test_arguments():
    for beta in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got"):
            gp.GradVacGate(beta)
    with pytest.raises(ValueError, match="iterations must be a positive number, got 0"):
        gp.MGDAGate(0)
    assert repr(gp.GradVacGate()) == "GradVacGate(beta=0.01)"
    assert repr(gp.MGDAGate()) == "MGDAGate(iterations=100, normalize=False)"


# TorchJD --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torchjd(monkeypatch):
    """Its aggregators, which draw their orders from ``torch.randperm``: here in our order."""
    module = pytest.importorskip("torchjd.aggregation", reason="TorchJD is not installed")
    monkeypatch.setattr(torch, "randperm", torch.arange)
    return module


@pytest.mark.parametrize("num_aux", [1, 2, 4])
def test_pcgrad_of_torchjd(torchjd, num_aux):
    for seed in range(10):
        g = draw(num_aux, seed)
        theirs = torchjd.PCGrad()(torch.from_numpy(g)).numpy()
        np.testing.assert_allclose(combine(gp.PCGradGate(), g), theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("num_aux", [1, 2, 4])
def test_gradvac_of_torchjd(torchjd, num_aux):
    if not hasattr(torchjd, "GradVac"):
        pytest.skip("this TorchJD has no GradVac")
    gate, theirs = gp.GradVacGate(0.1), torchjd.GradVac(beta=0.1, eps=0.0)
    for seed in range(10):
        g = draw(num_aux, seed, lean=1.0)
        np.testing.assert_allclose(combine(gate, g), theirs(torch.from_numpy(g)).numpy(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_aux", [1, 2, 4])
def test_mgda_of_torchjd(torchjd, num_aux):
    """Both are within their accuracy of the shortest vector."""
    for seed in range(10):
        g = draw(num_aux, seed, lean=0.4)
        theirs = torchjd.MGDA(epsilon=1e-9, max_iters=1000)(torch.from_numpy(g)).numpy()
        ours = combine(gp.MGDAGate(iterations=1000), g)
        assert np.linalg.norm(ours - theirs) <= 0.05 * np.linalg.norm(theirs)
