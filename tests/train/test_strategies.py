from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from train.batches import Batch

import gradprom_ext as gp
from models import IP
from train.strategies import STRATEGIES, strategy_class
from train.strategies.base import Learner

from .tiny import tiny_vr

LR = 1e-2
ADVISED = [name for name in STRATEGIES if strategy_class(name).uses_vr]


def batches(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(n):
        clean = torch.rand(4, 1, 8, 8, generator=generator, dtype=torch.float64)
        degraded = clean + 0.1 * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        made.append(Batch(clean, degraded, torch.randint(2, (4,), generator=generator)))
    return made


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    ip = IP.build("srresnet", channels=1, blocks=1, features=4).double()
    nn.init.normal_(ip.tail.weight, std=0.05)  # a head start: at zero, the first cosine speaks of the last layer alone
    vr = tiny_vr(channels=1, num_classes=2).double()
    vr[5] = nn.Identity()  # without dropout, so that two computations can be compared
    return ip, vr


def build(name: str, ip: nn.Module, vr: nn.Module, *, aux_weight: float = 1.0, phase: str = "train"):
    kind = strategy_class(name)

    def learner(network, optimizer):
        return Learner(network, optimizer, LambdaLR(optimizer, lambda step: 1.0))

    advisor = learner(vr, torch.optim.Adam(vr.parameters(), lr=LR)) if kind.uses_vr else None
    optimizer = gp.GradPromAdam(ip.parameters(), lr=LR, gate=kind.gate, aux_weight=aux_weight)
    strategy = kind(learner(ip, optimizer), advisor)
    strategy.enter(phase)
    return strategy


def assert_same_weights(one: nn.Module, other: nn.Module, **tolerance) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("name", ADVISED)
def test_step_is_the_definition(name):
    """Against autograd and torch.optim: the combination written out, the losses from two separate forward passes."""
    weight = 0.7
    ip, vr = networks()
    own_ip, own_vr = copy.deepcopy(ip), copy.deepcopy(vr)
    if name == "frozen":
        own_vr.eval()
    strategy = build(name, ip, vr, aux_weight=weight)
    theta, phi = list(own_ip.parameters()), list(own_vr.parameters())
    move_ip, move_vr = torch.optim.Adam(theta, lr=LR), torch.optim.Adam(phi, lr=LR)
    gates = []
    for batch in batches(12):
        log = strategy.step(batch)

        loss = F.mse_loss(own_ip(batch.degraded), batch.clean)
        main = torch.autograd.grad(loss, theta)
        aux_loss = F.cross_entropy(own_vr(own_ip(batch.degraded)), batch.labels)
        (*aux,) = torch.autograd.grad(aux_loss, theta + phi)
        aux, phi_grads = aux[: len(theta)], aux[len(theta) :]
        flat_main, flat_aux = (torch.cat([g.flatten() for g in grads]) for grads in (main, aux))
        cosine = (flat_main @ flat_aux / (flat_main.norm() * flat_aux.norm())).item()
        gate = {
            "joint": 1.0,
            "frozen": 1.0,
            "gradprom": 1.0 if cosine >= 0 else 0.0,
            "gradprom-soft": max(0.0, cosine),
        }[name]
        gates.append(gate)
        for p, m, a in zip(theta, main, aux, strict=True):
            p.grad = m + gate * weight * a
        for p, g in zip(phi, phi_grads, strict=True):
            p.grad = g
        move_ip.step()
        if name != "frozen":
            move_vr.step()

        assert log.loss.item() == pytest.approx(loss.item(), rel=1e-9)
        assert log.aux_loss.item() == pytest.approx(aux_loss.item(), rel=1e-9)
        assert log.cosine.item() == pytest.approx(cosine, abs=1e-8)
        assert log.gate.item() == pytest.approx(gate, abs=1e-8)
        assert not log.skipped
    assert_same_weights(ip, own_ip, rtol=1e-6, atol=1e-8)
    assert_same_weights(vr, own_vr, rtol=1e-6, atol=1e-8)
    if name.startswith("gradprom"):
        assert 0 < sum(gate > 0 for gate in gates) < len(gates), "the test must see the gate open and closed"


def test_joint_is_the_summed_loss():
    ip, vr = networks()
    own_ip, own_vr = copy.deepcopy(ip), copy.deepcopy(vr)
    strategy = build("joint", ip, vr, aux_weight=1.0)
    optimizer = torch.optim.Adam([*own_ip.parameters(), *own_vr.parameters()], lr=LR)
    for batch in batches(4):
        strategy.step(batch)
        optimizer.zero_grad()
        enhanced = own_ip(batch.degraded)
        (F.mse_loss(enhanced, batch.clean) + F.cross_entropy(own_vr(enhanced), batch.labels)).backward()
        optimizer.step()
    assert_same_weights(ip, own_ip, rtol=1e-6, atol=1e-8)
    assert_same_weights(vr, own_vr, rtol=1e-6, atol=1e-8)


def test_ip_only_is_plain_training():
    ip, vr = networks()
    own_ip, own_vr = copy.deepcopy(ip), copy.deepcopy(vr)
    strategy = build("ip-only", ip, vr)
    optimizer = torch.optim.Adam(own_ip.parameters(), lr=LR)
    for batch in batches(4):
        log = strategy.step(batch)
        optimizer.zero_grad()
        F.mse_loss(own_ip(batch.degraded), batch.clean).backward()
        optimizer.step()
    assert_same_weights(ip, own_ip, rtol=1e-6, atol=1e-8)
    assert_same_weights(vr, own_vr, rtol=0, atol=0)
    assert log.aux_loss is None and log.cosine is None and log.gate is None


def test_frozen_learns_first_and_then_never():
    ip, vr = networks()
    first_ip, first_vr = copy.deepcopy(ip), copy.deepcopy(vr)
    strategy = build("frozen", ip, vr, phase="pretrain")
    for batch in batches(3):
        strategy.pretrain_step(batch)
    assert_same_weights(ip, first_ip, rtol=0, atol=0)
    changed = [
        not torch.equal(a, b) for a, b in zip(vr.state_dict().values(), first_vr.state_dict().values(), strict=True)
    ]
    assert all(changed)

    learned = copy.deepcopy(vr)
    strategy.enter("train")
    for batch in batches(3):
        strategy.step(batch)
    assert_same_weights(vr, learned, rtol=0, atol=0)  # the batch statistics too
    assert all(p.grad is None for p in vr.parameters())
    assert not torch.equal(ip.tail.weight, first_ip.tail.weight)


@pytest.mark.parametrize("name", ADVISED)
def test_vr_advises_but_never_steps_ip_alone(name):
    """With lambda 0, IP is trained as if there were no VR."""
    ip, vr = networks()
    lonely = copy.deepcopy(ip)
    advised, alone = build(name, ip, vr, aux_weight=0.0), build("ip-only", lonely, vr)
    for batch in batches(4):
        advised.step(batch)
        alone.step(batch)
    assert_same_weights(ip, lonely, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ADVISED)
def test_a_step_with_nan_moves_no_ip(name):
    ip, vr = networks()
    strategy = build(name, ip, vr)
    batch = batches(1)[0]
    before = copy.deepcopy(ip)
    log = strategy.step(Batch(batch.clean, batch.degraded.clone().fill_(float("nan")), batch.labels))
    assert log.skipped
    assert_same_weights(ip, before, rtol=0, atol=0)
