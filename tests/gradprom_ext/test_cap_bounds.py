"""The inequalities of docs/capped-gate.md, on random gradients and where they are tight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gradprom_ext import policy, reference

#: Weights in [0, 1], or a projection: what is added is no longer than the cap allows.
BOUNDED = ["hard", "soft", "always", "never", "project"]
#: What is added does not point against the main gradient, where the lambdas are positive.
ACUTE = ["hard", "soft", "project"]
KAPPAS = [0.05, 0.3, 0.9, 1.0, 3.0]


def sums(grads: Tensor, gate: str, weights: list[float], kappa: float | None) -> Tensor:
    """The combined gradients ``[rows, d]`` of ``grads`` ``[rows, K + 1, d]``."""
    gram = grads @ grads.transpose(1, 2)
    chosen = reference.decide(gram, policy.GATES[gate](), tuple(weights), kappa, None, True)[0]
    return torch.einsum("rk,rkd->rd", chosen, grads)


def draw(num_aux: int, dimension: int, rows: int = 4000) -> Tensor:
    """Lengths apart by up to six orders of magnitude."""
    g = torch.Generator().manual_seed(num_aux * 10 + dimension)
    grads = torch.randn(rows, num_aux + 1, dimension, generator=g, dtype=torch.float64)
    return grads * 10 ** (6 * torch.rand(rows, num_aux + 1, 1, generator=g, dtype=torch.float64) - 3)


def circle(kappa: float, length: float, steps: int = 20001) -> Tensor:
    """A main gradient of length 1 and auxiliary ones of one length all around it."""
    angle = torch.linspace(0, 2 * math.pi, steps, dtype=torch.float64)
    aux = length * torch.stack([angle.cos(), angle.sin()], 1)
    return torch.stack([torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(aux), aux], 1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=0.0)


def tangent(c: Tensor, main: Tensor) -> Tensor:
    along = (c * main).sum(-1) / main.norm(dim=-1)
    across = (c - along[:, None] * main / main.norm(dim=-1, keepdim=True)).norm(dim=-1)
    return across / along


CASES = [(1, 2), (1, 5), (2, 3), (4, 6)]


@pytest.mark.parametrize(("num_aux", "dimension"), CASES)
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("gate", BOUNDED)
def test_length_and_angle_with_lambdas_of_either_sign(gate, kappa, num_aux, dimension):
    grads, rho = draw(num_aux, dimension), num_aux * kappa
    c, main = sums(grads, gate, [3.0, -2.0, 0.1, 7.0][:num_aux], kappa), grads[:, 0]
    length = c.norm(dim=-1) / main.norm(dim=-1)
    assert bool((length <= 1 + rho + 1e-9).all())
    assert bool((length >= 1 - rho - 1e-9).all())
    if rho < 1:
        assert bool((cosine(c, main) >= math.sqrt(1 - rho**2) - 1e-9).all())


@pytest.mark.parametrize(("num_aux", "dimension"), CASES)
@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("gate", ACUTE)
def test_length_and_angle_without_conflicts(gate, kappa, num_aux, dimension):
    grads, rho = draw(num_aux, dimension), num_aux * kappa
    c, main = sums(grads, gate, [3.0, 2.0, 0.1, 7.0][:num_aux], kappa), grads[:, 0]
    assert bool((c.norm(dim=-1) >= main.norm(dim=-1) * (1 - 1e-9)).all())
    assert bool((cosine(c, main) >= 1 / math.sqrt(1 + rho**2) - 1e-9).all())
    if gate == "soft" and num_aux == 1:
        assert bool((tangent(c, main) <= kappa / (2 * math.sqrt(1 + kappa)) + 1e-9).all())


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_angles_are_reached(kappa):
    grads = circle(kappa, length=10.0)
    main = grads[:, 0]
    if kappa < 1:
        worst = float(cosine(sums(grads, "always", [1.0], kappa), main).min())
        assert worst == pytest.approx(math.sqrt(1 - kappa**2), abs=1e-4)
    for gate in ("hard", "project"):
        worst = float(cosine(sums(grads, gate, [1.0], kappa), main).min())
        assert worst == pytest.approx(1 / math.sqrt(1 + kappa**2), abs=1e-3)
    worst = float(tangent(sums(grads, "soft", [1.0], kappa), main).max())
    assert worst == pytest.approx(kappa / (2 * math.sqrt(1 + kappa)), rel=1e-4)


def test_without_the_cap_no_angle_is_kept():
    """What the tests above would say if the cap did nothing."""
    grads = circle(1.0, length=1e4)
    for gate in ACUTE:
        assert float(cosine(sums(grads, gate, [1.0], None), grads[:, 0]).min()) < 0.1


def change(theta: Tensor, c: Tensor, eta: float, curvature: float) -> Tensor:
    """Of ``curvature |theta|^2 / 2``, for which the descent lemma is an equality."""
    return curvature / 2 * ((theta - eta * c).square().sum(-1) - theta.square().sum(-1))


@pytest.mark.parametrize(("num_aux", "dimension"), CASES)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_every_capped_step_descends(kappa, num_aux, dimension):
    grads, rho, curvature = draw(num_aux, dimension), num_aux * kappa, 2.5
    main = grads[:, 0]
    theta, squared = main / curvature, main.square().sum(-1)
    for share in (0.1, 0.5, 0.99):
        eta = share * min(1 / curvature, 2 / (curvature * (1 + rho**2)))
        promised = -eta * squared * (1 - curvature * eta * (1 + rho**2) / 2)
        for gate in ACUTE:
            c = sums(grads, gate, [3.0, 2.0, 0.1, 7.0][:num_aux], kappa)
            assert bool((change(theta, c, eta, curvature) <= promised * (1 - 1e-9)).all())
            assert bool((promised < 0).all())
        if rho < 1:
            eta = share * 2 * (1 - rho) / (curvature * (1 + rho) ** 2)
            promised = -eta * squared * (1 - rho - curvature * eta * (1 + rho) ** 2 / 2)
            c = sums(grads, "always", [3.0, -2.0, 0.1, 7.0][:num_aux], kappa)
            assert bool((change(theta, c, eta, curvature) <= promised * (1 - 1e-9)).all())


def test_an_uncapped_step_at_a_right_angle_ascends_from_a_certain_lambda_on():
    eta, curvature = 0.3, 2.5
    edge = math.sqrt(2 / (curvature * eta) - 1)
    grads = torch.eye(2, dtype=torch.float64)[None]
    theta = grads[:, 0] / curvature
    for weight, ascends in [(0.99 * edge, False), (1.01 * edge, True)]:
        c = sums(grads, "hard", [weight], None)
        assert (float(change(theta, c, eta, curvature)) > 0) == ascends
    assert float(change(theta, sums(grads, "hard", [100.0], 1.0), eta, curvature)) < 0


@pytest.mark.parametrize("weight", [0.2, 30.0])
def test_the_expected_change_under_noise(weight):
    """Gaussian noise as the auxiliary gradient: the bound is the change on average, and the cap takes lambda out."""
    rows, dimension, eta, curvature, kappa = 100_000, 8, 0.1, 2.0, 0.7
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, dimension, generator=g, dtype=torch.float64)
    noise = torch.cat([noise, noise * torch.tensor([-1.0] + [1.0] * (dimension - 1))])  # symmetric
    main = torch.zeros_like(noise)
    main[:, 0] = 0.5
    grads, squared = torch.stack([main, noise], 1), 0.25
    theta = main / curvature
    positive = float((main * noise).sum(-1).clamp_min(0.0).mean())
    expected = (
        -eta * squared * (1 - curvature * eta / 2)
        - eta * weight * positive * (1 - curvature * eta)
        + curvature * eta**2 / 4 * weight**2 * float(noise.square().sum(-1).mean())
    )
    uncapped = float(change(theta, sums(grads, "hard", [weight], None), eta, curvature).mean())
    assert uncapped == pytest.approx(expected, rel=1e-6)
    assert (uncapped > 0) == (weight == 30.0)
    capped = float(change(theta, sums(grads, "hard", [weight], kappa), eta, curvature).mean())
    assert capped <= -eta * squared * (1 - curvature * eta * (1 + kappa**2 / 2) / 2)
