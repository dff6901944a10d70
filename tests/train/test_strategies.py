"""What is peculiar to one strategy; what all have in common is their contract (``contracts.check_strategy``)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from train.errors import RunError
from train.strategies import STRATEGIES, strategy_class
from train.strategies.base import Strategy, Terms
from train.training.build import build_strategy

from .contracts import LR, RECOGNIZING, batches, fresh_networks, make_strategy
from .tiny import config, image_data


def enter(strategy: Strategy, phase: str = "train") -> Strategy:
    strategy.enter(next(each for each in strategy.phases(1) if each.name == phase))
    return strategy


def step(strategy: Strategy, batch) -> dict[str, torch.Tensor]:
    return strategy.update(strategy.losses(batch))


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module, **tolerance) -> None:
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_joint_is_the_summed_loss():
    networks = fresh_networks(["dia"])
    own = copy.deepcopy(networks)
    strategy = enter(make_strategy("joint", networks, weights=[1.0]))
    optimizer = torch.optim.Adam([*own["ip"].parameters(), *own["vr"].parameters()], lr=LR)
    for batch in batches(4):
        step(strategy, batch)
        optimizer.zero_grad()
        enhanced = own["ip"](batch.degraded)
        (F.mse_loss(enhanced, batch.clean) + F.cross_entropy(own["vr"](enhanced), batch.labels)).backward()
        optimizer.step()
    for key, network in networks.items():
        assert_same_weights(network, own[key], rtol=1e-6, atol=1e-8)


def test_ip_only_is_plain_training():
    networks = fresh_networks(["dia"])
    own = copy.deepcopy(networks)
    strategy = enter(make_strategy("ip-only", networks))
    optimizer = torch.optim.Adam(own["ip"].parameters(), lr=LR)
    for batch in batches(4):
        found = step(strategy, batch)
        optimizer.zero_grad()
        F.mse_loss(own["ip"](batch.degraded), batch.clean).backward()
        optimizer.step()
    assert_same_weights(networks["ip"], own["ip"], rtol=1e-6, atol=1e-8)
    assert_same_weights(networks["vr"], own["vr"], rtol=0, atol=0)
    assert set(found) == {"loss", "psnr", "main_norm", "skipped"}


@pytest.mark.parametrize("auxiliaries", [("dia",), ("seg",), ("dia", "seg")])
def test_frozen_learns_first_and_then_never(auxiliaries):
    networks = fresh_networks(auxiliaries)
    first = copy.deepcopy(networks)
    advisors = [key for key in networks if key != "ip"]
    strategy = enter(make_strategy("frozen", networks, auxiliaries, terms=Terms(pretrain_epochs=1)), "pretrain")
    for batch in batches(3):
        step(strategy, batch)
    assert_same_weights(networks["ip"], first["ip"], rtol=0, atol=0)
    for key in advisors:
        pairs = zip(networks[key].state_dict().values(), first[key].state_dict().values(), strict=True)
        assert not any(torch.equal(a, b) for a, b in pairs)

    learned = copy.deepcopy(networks)
    enter(strategy)
    for batch in batches(3):
        step(strategy, batch)
    for key in advisors:
        assert_same_weights(networks[key], learned[key], rtol=0, atol=0)  # the batch statistics too
        assert all(p.grad is None for p in networks[key].parameters())
    assert not torch.equal(networks["ip"].tail.weight, first["ip"].tail.weight)


def test_vr_only_has_no_ip():
    networks = fresh_networks(["dia", "seg"])
    first = copy.deepcopy(networks["ip"])
    strategy = enter(make_strategy("vr-only", networks, ["dia", "seg"]))
    for batch in batches(2):
        found = step(strategy, batch)
    assert [role.key for role in strategy.roles] == ["vr", "seg"]
    assert set(found) == {"aux_loss_dia", "accuracy_dia", "aux_loss_seg", "dice_seg", "skipped"}
    assert_same_weights(networks["ip"], first, rtol=0, atol=0)


def test_a_gate_of_the_users():
    """Closed for good, GradProm is IP alone."""
    gated, alone = fresh_networks(["dia"]), fresh_networks(["dia"])
    one, other = enter(make_strategy("gradprom", gated, gate="never")), enter(make_strategy("ip-only", alone))
    for batch in batches(3):
        assert step(one, batch)["gate"] == 0
        step(other, batch)
    assert_same_weights(gated["ip"], alone["ip"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if strategy_class(name).uses_auxiliaries])
def test_an_auxiliary_that_the_data_cannot_serve(name):
    with pytest.raises(RunError, match=f"^--strategy {name} needs masks for --aux seg, and tiny has none"):
        build_strategy(config(strategy=name, aux="seg", seg="tiny"), image_data())


def test_phases_say_what_they_move():
    moves = {}
    for name in RECOGNIZING:
        strategy = make_strategy(name, fresh_networks(["dia", "seg"], name), ["dia", "seg"], terms=Terms(2, 5, 3))
        moves[name] = [(phase.name, phase.iterations, phase.moves) for phase in strategy.phases(4)]
    everything = [("train", 5, ("ip", "vr", "seg"))]
    others = {
        "frozen": [("pretrain", 12, ("vr", "seg")), ("train", 5, ("ip",))],
        "hqg": [("train", 5, ("ip", "vr", "seg", "critic"))],
        "hqg-only": [("train", 5, ("ip", "critic"))],
        "ip-only": [("train", 5, ("ip",))],
        "vr-only": [("train", 5, ("vr", "seg"))],
    }
    assert moves == dict.fromkeys(RECOGNIZING, everything) | others


@pytest.mark.parametrize(
    ("terms", "phases"),
    [
        (Terms(vr_update="train"), ["train"]),
        (Terms(vr_update="train", vr_loss="unsupervised"), ["pretrain", "train"]),
        (Terms(vr_update="fixed"), ["pretrain", "train"]),
        (Terms(vr_update="ema"), ["pretrain", "train"]),
        (Terms(vr_update="fixed", vr_start="clean"), ["train"]),
        (Terms(vr_update="ema", vr_loss="unsupervised", vr_start="clean"), ["train"]),
    ],
)
def test_a_vr_that_must_know_its_task_learns_it_first(terms, phases):
    strategy = make_strategy("gradprom", fresh_networks(["dia"]), terms=terms._replace(pretrain_epochs=1))
    assert [phase.name for phase in strategy.phases(4)] == phases
    assert strategy.phases(4)[-1].moves == (("ip",) if terms.vr_update == "fixed" else ("ip", "vr"))


def test_a_target_network_is_vr_as_it_was(tmp_path):
    """And not what VR becomes: the two branches cannot agree on saying the same of everything."""
    networks = fresh_networks(["dia"])
    first = copy.deepcopy(networks["vr"])
    terms = Terms(vr_loss="unsupervised", vr_start="clean")
    strategy = make_strategy("gradprom", networks, terms=terms)
    (phase,) = strategy.phases(4)
    strategy.begin(phase)
    strategy.enter(phase)
    for batch in batches(3):
        step(strategy, batch)
    assert_same_weights(strategy.companions["vr_teacher"], first, rtol=0, atol=0)
    assert not torch.equal(networks["vr"][0].weight, first[0].weight)


def test_labels_that_are_not_known_take_no_part():
    """Half of a batch is unlabeled: its loss is that of the other half, also where nothing is known at all."""
    from train import losses

    logits = torch.randn(6, 3, requires_grad=True)
    labels = torch.tensor([2, -1, 0, -1, -1, 1])
    known = labels >= 0
    loss = losses.diagnosis_loss(logits, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits[known], labels[known]))
    smooth = losses.diagnosis_loss(logits, labels, smoothing=0.2)
    torch.testing.assert_close(smooth, F.cross_entropy(logits[known], labels[known], label_smoothing=0.2))
    nothing = losses.diagnosis_loss(logits, torch.full((6,), -1))
    assert nothing == 0
    (grad,) = torch.autograd.grad(nothing, logits)
    assert not grad.any()
