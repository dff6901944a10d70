"""An IP that owns its loss: what the command line takes, what the optimizer is given, what a run leaves behind. The
steps themselves are compared with autograd in ``contracts.check_strategy``."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch
import torch.nn.functional as F

import gradprom_ext as gp
from models.training import Term, TrainingLoss
from train.errors import RunError
from train.experiment import do_run
from train.settings.command_line import parse
from train.settings.naming import computed
from train.strategies import STRATEGIES, strategy_class
from train.strategies.base import Terms
from train.training.build import build_strategy, gate_of
from train.training.step_log import PERFORMANCE

from . import tiny
from .contracts import LR, batches, fresh_networks, make_strategy, own_losses, target_loss
from .tiny import config, image_data

WITH_PAIRS = [name for name in STRATEGIES if strategy_class(name).trains_ip and not strategy_class(name).guided]


def test_the_sum_of_the_parts():
    one, two, four = (torch.tensor(float(value)) for value in (1, 2, 4))
    loss = TrainingLoss(one, one, {"rec": Term(0.25, two), "flat": Term(0.5, four)})
    assert loss.total() == 1 + 0.5 + 2
    assert loss.total(without=("flat",)) == 1.5
    assert loss.total(without=("flat", "rec")) == 1
    assert TrainingLoss(one, one).total() == 1


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "mgda"])
def test_gates_that_compare_all_gradients_at_once(name):
    """They get IP's own loss like any other auxiliary: in front of VR's, with its own weight."""
    networks = fresh_networks(["dia"], ip_aux=["rec"])
    own = copy.deepcopy(networks)
    strategy = make_strategy(name, networks, terms=Terms(ip_aux=("rec",)))
    strategy.enter(strategy.phases(1)[-1])
    ip_optimizer = gp.GradPromAdam(own["ip"].parameters(), lr=LR, gate=strategy.gate(), aux_weight=(0.25, 0.7))
    vr_optimizer = torch.optim.Adam(own["vr"].parameters(), lr=LR, fused=True)
    for batch in batches(4):
        found = strategy.update(strategy.losses(batch))
        for optimizer in (ip_optimizer, vr_optimizer):
            optimizer.zero_grad()
        parts = own_losses(own["ip"], batch)
        vr_loss = target_loss("dia", own["vr"](own["ip"](batch.degraded)), batch)
        ip_optimizer.backward(parts["main"] + parts["flat"], parts["rec"] / 0.25, vr_loss)
        ip_optimizer.step(), vr_optimizer.step()
        assert found["gate_rec"].item() == pytest.approx(float(ip_optimizer.stats.gate[0]))
        assert found["gate_dia"].item() == pytest.approx(float(ip_optimizer.stats.gate[1]))
    for key in ("ip", "vr"):
        for one, other in zip(networks[key].parameters(), own[key].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("strategy", WITH_PAIRS)
def test_each_loss_of_its_own_has_its_own_weight(strategy):
    settings = config(
        strategy=strategy, ip="tiny-staged", ip_aux="flat,rec", aux="dia,seg", seg="tiny", aux_weight=(3.0, 4.0)
    )
    gate = gate_of(settings, build_strategy(settings, tiny.with_masks(image_data())))
    kind = strategy_class(strategy)
    vrs = (3.0, 4.0) if kind.aux_weight is None else (kind.aux_weight,) * 2
    assert gate["aux_weight"] == (0.5, 0.25, *(vrs if kind.uses_auxiliaries else ()))
    one = config(strategy=strategy, ip="tiny-staged", ip_aux="rec", aux_weight=(3.0,))
    assert gate_of(one, build_strategy(one, image_data()))["aux_weight"] == (
        0.25,
        *(vrs[:1] if kind.uses_auxiliaries else ()),
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--ip", "tiny-staged", "--ip-aux", "wreck"], "tiny-staged has no loss 'wreck' of its own; it has rec, flat"),
        (["--ip-aux", "rec"], r"srresnet has no loss 'rec' of its own; networks that have any: iconet \(rec\)"),
        (["--ip", "tiny-staged", "--ip-aux", "rec,rec"], "--ip-aux rec,rec: a loss is named twice"),
        (["--ip", "tiny-staged", "--ip-aux", ""], "tiny-staged has no loss '' of its own"),
        (
            ["--ip", "tiny-staged", "--ip-aux", "rec", "--strategy", "hqg-only"],
            "--ip-aux rec: strategy hqg-only has no pairs",
        ),
    ],
)
def test_a_loss_that_there_is_not(flags, said):
    with pytest.raises(RunError, match=said):
        parse([*flags, "--preset", "quick"])


def test_it_counts_as_a_setting_only_where_a_network_has_terms():
    assert "ip_aux" not in computed(config())
    assert computed(config(ip="tiny-staged", ip_aux="rec"))["ip_aux"] == "rec"
    assert "ip_aux" not in computed(config(ip="tiny-staged", strategy="vr-only"))


@pytest.mark.parametrize(
    ("strategy", "ip_aux", "columns"),
    [
        ("ip-only", None, ["aux_loss", "accuracy", "cosine", "gate", "aux_norm"]),
        ("ip-only", "rec", ["aux_loss_rec", "cosine_rec", "gate_rec", "aux_norm_rec"]),
        (
            "gradprom",
            "rec",
            [
                *("aux_loss_rec", "cosine_rec", "gate_rec", "aux_norm_rec"),
                *("aux_loss_dia", "accuracy_dia", "cosine_dia", "gate_dia", "aux_norm_dia"),
            ],
        ),
    ],
)  # fmt: skip
def test_what_a_run_leaves_behind(strategy, ip_aux, columns, tmp_path):
    folder = tmp_path / "run"
    settings = config(strategy=strategy, ip="tiny-staged", ip_aux=ip_aux, out=folder, max_steps=2)
    metrics = do_run(settings).metrics
    rows = list(csv.DictReader((folder / "steps.csv").open()))
    assert list(rows[0]) == ["step", "phase", "loss", "psnr", *columns, "main_norm", "skipped", "lr", *PERFORMANCE]
    shares = {name for name in metrics if name.startswith("gate_open_share")}
    assert shares == {f"gate_open_share{name.removeprefix('gate')}" for name in columns if name.startswith("gate")}
    if ip_aux:
        assert metrics["gate_open_share_rec"] == sum(float(row["gate_rec"]) > 0 for row in rows) / 2
        assert (folder / "gate-rec.png").is_file()
        assert json.loads((folder / "config.json").read_text())["network"]["ip_aux"] == "rec"
        assert "ip-auxrec" in metrics["run"]


def test_what_is_not_an_auxiliary_is_a_part_of_the_main_loss():
    (batch,) = batches(1)
    for ip_aux in ((), ("rec",)):
        networks = fresh_networks(["dia"], ip_aux=ip_aux)
        strategy = make_strategy("ip-only", networks, terms=Terms(ip_aux=ip_aux))
        strategy.enter(strategy.phases(1)[-1])
        found = strategy.losses(batch)
        parts = own_losses(networks["ip"], batch)
        expected = sum(part for name, part in parts.items() if name not in ip_aux)
        torch.testing.assert_close(found.main, expected)
        assert len(found.auxiliary) == len(ip_aux)


def test_an_ip_without_a_loss_of_its_own_has_the_mean_squared_error():
    (batch,) = batches(1)
    networks = fresh_networks(["dia"])
    strategy = make_strategy("ip-only", networks)
    strategy.enter(strategy.phases(1)[-1])
    torch.testing.assert_close(strategy.losses(batch).main, F.mse_loss(networks["ip"](batch.degraded), batch.clean))


def test_ip_only_has_the_hard_gate():
    """Its own loss takes part where it does not conflict; behind an open gate, it would take part anyway."""
    settings = config(strategy="ip-only", ip="tiny-staged", ip_aux="rec")
    assert gate_of(settings, build_strategy(settings, image_data()))["gate"] == "hard"


def test_the_picture_of_its_gate(monkeypatch, tmp_path):
    """It is drawn from the columns of its own loss, whether there is a VR or not."""
    drawn = {}
    monkeypatch.setattr("train.experiment.save_gate", lambda path, **about: drawn.update({path.name: about}))
    do_run(config(strategy="ip-only", ip="tiny-staged", ip_aux="rec", out=tmp_path / "run", max_steps=2))
    rows = list(csv.DictReader((tmp_path / "run" / "steps.csv").open()))
    assert list(drawn) == ["gate-rec.png"]
    assert drawn["gate-rec.png"]["cosine"].tolist() == [float(row["cosine_rec"]) for row in rows]
