"""Looks at validation images while networks are trained: what they find, that nothing else changes, and the best."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models import IP
from train.data import ImageData, Subset
from train.degradations import Gaussian
from train.degradations.base import fixed_seeds
from train.enhance import main as enhance
from train.errors import RunError
from train.evaluation.evaluate import evaluate
from train.evaluation.validate import at_rest, sample, validate
from train.experiment import do_run
from train.inference import BATCH
from train.interruption import Stop
from train.outputs.run_folder import RunFolder
from train.run import main
from train.strategies import STRATEGIES, strategy_class
from train.strategies.auxiliary import Diagnosis
from train.team import ALONE, Team
from train.training import validation as validation_file
from train.training.build import build
from train.training.engine import Cadence, Engine
from train.training.prepared import alone_settings, clean_settings, pretraining_settings
from train.training.progress import Display
from train.training.validation import Look, Validation

from .killing import count_events, die
from .test_engine import StopAfter, assert_same_run, weights
from .tiny import TinyIP, TinyIPOptions, arguments, config, image_data, subset, with_masks

CPU = torch.device("cpu")
SIGMA = 0.1


@IP.register("tiny-restless", TinyIPOptions)
class TinyRestless(TinyIP):
    """An IP with batch statistics and dropout, which draws random numbers in evaluation mode, too."""

    def __init__(self, options: TinyIPOptions, *, channels: int, scale: int = 1) -> None:
        super().__init__(options, channels=channels, scale=scale)
        self.norm = nn.BatchNorm2d(options.width)
        self.fixed = nn.BatchNorm2d(options.width)

    def train(self, mode: bool = True) -> TinyRestless:
        super().train(mode)
        self.fixed.eval()  # as those do whose statistics are those of a pre-training
        return self

    def forward(self, x: Tensor) -> Tensor:
        found = self.fixed(self.norm(self.first(x))).relu()
        found = nn.functional.dropout(found, 0.25, training=True)
        return x + self.last(found)


def make(folder: Path, data: ImageData | None = None, team: Team = ALONE, **changes: Any) -> Engine:
    """An engine that looks at validation images where the changes say so."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, run = config(**changes), RunFolder(folder)
    experiment = build(settings, data or image_data(), Gaussian(SIGMA), device=CPU, team=team)
    output, looks = settings.output, None
    if experiment.validation is not None:
        looks = Validation(
            experiment,
            every=settings.evaluation.validate_every,
            folder=run,
            settings={"a": 1},
        )
    cadence = Cadence(output.log_every, output.checkpoint_every)
    return Engine(experiment, run, cadence, begun=time.monotonic(), validation=looks)


def train(engine: Engine, stop: Stop | None = None) -> str:
    """:returns: what was shown; empty where it was stopped."""
    out = io.StringIO()
    finished = engine.train(Display(Console(file=out, width=1000)), stop or Stop())
    return out.getvalue() if finished else ""


def table(folder: Path) -> list[list[str]]:
    with (folder / "validation.csv").open(newline="") as file:
        return list(csv.reader(file))


def scripted(monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
    """What the looks find, one after the other."""
    left = iter(scores)
    monkeypatch.setattr(validation_file, "validate", lambda *_, **__: next(left))


def psnr_by_hand(enhanced: Tensor, clean: Tensor) -> float:
    """The mean over images of ``-10 log10`` of the mean squared error, in NumPy's double precision."""
    one, other = (each.double().numpy() for each in (enhanced.clamp(0, 1), clean))
    return float(np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(one, other, strict=True)]))


# ----------------------------------------------------------------------------------------------------------------------
# What a look finds


@pytest.mark.parametrize("most", [1, 3, 4, 64])
def test_the_images_are_always_the_same(most):
    images = subset("val", 4)
    chosen = sample(images, most)
    assert chosen.names == sample(images, most).names and len(chosen) == min(most, 4)
    assert list(chosen.names) == [name for name in images.names if name in chosen.names], "in their order"
    torch.manual_seed(5)
    assert build(
        config(validate_every=1, validation_images=most, seed=7), image_data(), Gaussian(SIGMA), device=CPU
    ).validation.names == chosen.names  # fmt: skip


def test_the_score_of_an_ip(tmp_path):
    data = dataclasses.replace(image_data(), val=subset("val", BATCH + 3))  # more than are enhanced at once
    engine = make(tmp_path / "run", data, validate_every=1, strategy="ip-only")
    train(engine)
    clean = data.val.tensor()
    degraded = Gaussian(SIGMA)(clean, fixed_seeds(Gaussian(SIGMA), data.val.names))
    network = engine.strategy.networks["ip"].eval()
    with torch.no_grad():
        by_hand = psnr_by_hand(network(degraded), clean)
    (_, _), (step, found) = ((each.step, each.score) for each in engine.validation.looks)
    assert step == 6 and found == pytest.approx(by_hand, abs=1e-5)
    assert abs(found - psnr_by_hand(degraded, clean)) > 1e-3
    evaluated = evaluate(engine.strategy, data.val, Gaussian(SIGMA), device=CPU).enhanced
    assert found == pytest.approx(evaluated.mean_psnr, abs=1e-5), "as an evaluation finds it"


@pytest.mark.parametrize("train_on", ["degraded", "clean"])
def test_the_score_of_a_vr(tmp_path, train_on):
    data = dataclasses.replace(image_data(), val=subset("val", 40))
    engine = make(tmp_path / "run", data, validate_every=1, strategy="vr-only", train_on=train_on, epochs=8, vr_lr=0.03)
    shown = train(engine)
    clean = data.val.tensor()
    degraded = Gaussian(SIGMA)(clean, fixed_seeds(Gaussian(SIGMA), data.val.names))
    network = engine.strategy.networks["vr"].eval()
    with torch.no_grad():
        right = {
            kind: float((network(images).argmax(1).numpy() == data.val.labels).mean())
            for kind, images in {"clean": clean, "degraded": degraded}.items()
        }
    assert engine.validation.looks[-1].score == pytest.approx(right[train_on])
    assert table(tmp_path / "run")[0] == ["step", "epoch", "accuracy"]
    assert f"diagnosis right {right[train_on]:.1%}" in shown


class Rough(nn.Module):
    """Takes images with noise for the second class, and smooth ones for the first."""

    def forward(self, x: Tensor) -> Tensor:
        rough = x.diff(dim=-1).abs().mean((1, 2, 3))
        return torch.stack([torch.full_like(rough, 0.1), rough], 1)


def test_which_images_a_vr_is_asked_about():
    data, network = image_data(), Rough()
    judge = Diagnosis(data)
    labels = np.array([0, 0, 0, 1])
    val = dataclasses.replace(data.val, labels=labels)
    trained = SimpleNamespace(
        trains_ip=False, validated_by="tasks", networks={"vr": network}, judges=[(judge, network)], enhance=None
    )
    found = {seen: validate(trained, val, Gaussian(SIGMA), device=CPU, seen=seen) for seen in ("clean", "degraded")}
    assert found == {"clean": 0.75, "degraded": 0.25}


def test_the_score_of_several_vrs_is_their_mean(tmp_path):
    data = with_masks(image_data())
    engine = make(tmp_path / "run", data, validate_every=2, strategy="vr-only", aux="dia,seg", seg="tiny")
    train(engine)
    found = evaluate(engine.strategy, data.val, Gaussian(SIGMA), device=CPU).scores["degraded"]
    assert engine.validation.looks[-1].score == pytest.approx((found["accuracy"] + found["miou"]) / 2)
    assert engine.strategy.score.word == "mean of diagnosis right and mIoU"


def test_the_score_of_a_pre_training(tmp_path):
    data = image_data()
    engine = make(tmp_path / "run", data, validate_every=2, strategy="masked")
    train(engine)
    clean = data.val.tensor()
    degraded = Gaussian(SIGMA)(clean, fixed_seeds(Gaussian(SIGMA), data.val.names))
    for network in engine.strategy.networks.values():
        network.eval()
    with torch.no_grad():
        by_hand = psnr_by_hand(engine.strategy.enhance(degraded), clean)
    assert engine.validation.looks[-1].score == pytest.approx(by_hand, abs=1e-5)
    # What the training leaves random is in neither file.
    assert not [name for name in load_file(tmp_path / "run" / "best.safetensors") if name.startswith("vr.last")]


def test_when_there_is_a_look(tmp_path):
    """At the end of every second epoch of three steps, and at the end, and never while VR learns its task first."""
    engine = make(tmp_path / "run", validate_every=2, strategy="frozen", epochs=5, max_steps=13)
    shown = train(engine)
    assert table(tmp_path / "run")[0] == ["step", "epoch", "psnr"]
    assert [row[:2] for row in table(tmp_path / "run")[1:]] == [["9", "2"], ["15", "4"], ["16", "4.33"]]
    for row, look in zip(table(tmp_path / "run")[1:], engine.validation.looks, strict=True):
        assert float(row[2]) == pytest.approx(look.score, rel=1e-8)
        assert f"validation after epoch {row[1]} (step {row[0]}): PSNR {look.score:.2f} dB" in shown


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_has_a_score_or_none(strategy):
    if strategy_class(strategy).guided:
        with pytest.raises(RunError, match=r"^--validate-every 2: strategy hqg.* no clean partners, .*; leave it out$"):
            config(strategy=strategy, validate_every=2)
        with pytest.raises(RunError, match=r"^--select best: strategy hqg.* no clean partners"):
            config(strategy=strategy, select="best")
    else:
        assert config(strategy=strategy, validate_every=2).evaluation.validate_every == 2


def test_what_cannot_be_looked_at_is_refused(tmp_path):
    data = image_data()

    def refusal(val: Subset, **changes: Any) -> str:
        with pytest.raises(RunError) as refused:
            make(tmp_path / "run", dataclasses.replace(data, val=val), validate_every=1, **changes)
        return str(refused.value)

    assert refusal(data.val.take([])) == "--validate-every 1: tiny has no validation images; leave it out"
    bare = dataclasses.replace(data.val, labels=None)
    assert "lack what --aux dia is compared with" in refusal(bare, strategy="vr-only")
    assert make(tmp_path / "run", dataclasses.replace(data, val=bare), validate_every=1).validation is not None
    with pytest.raises(RunError, match=r"^--select best has no scores to select by; give --validate-every 1, too$"):
        config(select="best")


@IP.register("tiny-choosy", TinyIPOptions)
class TinyChoosy(TinyIP):
    """An IP that does not take every image."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and bool(x.mean() > 0.85):
            raise RuntimeError("too bright")
        return super().forward(x)


def test_an_image_that_the_network_cannot_take_is_found_before_the_first_step(tmp_path):
    data = image_data()
    bright = dataclasses.replace(data.val, images=np.full_like(data.val.images, 250))
    with pytest.raises(RunError, match=r"a look at a validation image of 16 x 16 px does not work .*: too bright"):
        make(tmp_path / "run", dataclasses.replace(data, val=bright), ip="tiny-choosy", validate_every=1)


# ----------------------------------------------------------------------------------------------------------------------
# Nothing else changes


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "gradprom"},
        {"strategy": "gradprom", "ip": "tiny-restless"},
        {"strategy": "frozen", "precision": "fp16"},
        {"strategy": "gradprom", "vr_update": "ema", "precision": "bf16"},
        {"strategy": "vr-only"},
        {"strategy": "masked"},
    ],
    ids=lambda changes: "-".join(changes.values()),
)
def test_the_training_does_not_notice(tmp_path, changes):
    blind = make(tmp_path / "blind", **changes)
    train(blind)
    drawn = torch.rand(3)
    looking = make(tmp_path / "looking", validate_every=1, **changes)
    train(looking)
    assert torch.equal(torch.rand(3), drawn), "the generator is where it was"
    assert_same_run(looking, blind)
    for one, other in zip(looking._parts().values(), blind._parts().values(), strict=False):
        for a, b in zip(tensors(one.state_dict()), tensors(other.state_dict()), strict=True):
            assert torch.equal(a, b)
    assert len(looking.validation.looks) == 2


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [each for part in (state.values() if isinstance(state, dict) else ()) for each in tensors(part)]


def test_modes_come_back_even_after_an_error():
    network = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout()).train()
    network[0].eval()
    with contextlib.suppress(ValueError), at_rest([network], CPU):
        assert not any(module.training for module in network.modules())
        torch.rand(1)
        raise ValueError
    assert [module.training for module in network.modules()] == [True, False, True]


def test_trainings_that_a_run_stands_on_are_the_same():
    """Or they would be done again for a run that looks."""
    blind, looking = (config(size=64, vr_start="mae", validate_every=every) for every in (0, 1))
    for made in (alone_settings, lambda each: clean_settings(each, "dia", 0), lambda e: pretraining_settings(e, "dia")):
        assert made(looking) == made(blind)


# ----------------------------------------------------------------------------------------------------------------------
# The best


@pytest.mark.parametrize(
    "scores",
    [
        [1.0, 3.0, 2.0, 3.0],  # the earlier of equals
        [math.nan, 1.0, math.nan, 0.5],  # NaN first, which nothing would be greater than
        [-2.0, math.nan, -1.0, math.nan],
        [5.0, 4.0, 3.0, 2.0],
    ],
)
def test_the_best_is_the_first_of_the_greatest_and_never_nan(tmp_path, monkeypatch, scores):
    scripted(monkeypatch, *scores)
    engine = make(tmp_path / "run", validate_every=1, epochs=4, strategy="ip-only")
    seen: list[dict[str, Tensor]] = []
    note = engine.validation.note
    monkeypatch.setattr(engine.validation, "note", lambda look: (seen.append(clones(engine)), note(look))[1])
    shown = train(engine)
    place = int(np.nanargmax(scores))
    assert engine.validation.best == Look(3 * (place + 1), place + 1, scores[place])
    assert_equal(load_file(tmp_path / "run" / "best.safetensors"), seen[place])
    with safe_open(tmp_path / "run" / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == {"a": 1}
        found = json.loads(file.metadata()["validation"])
    assert found == {"step": 3 * (place + 1), "epoch": place + 1, "psnr": scores[place], "images": 4}
    assert [float(row[2]) for row in table(tmp_path / "run")[1:]] == pytest.approx(scores, nan_ok=True)
    lines = [line for line in shown.splitlines() if "epoch" in line]
    for score, line in zip(scores, lines, strict=True):
        assert line.startswith("Warning: after epoch") == math.isnan(score)
        assert ("not a number" in line) == math.isnan(score)
    assert "the best so far" in lines[place] and not any("best so far" in line for line in lines[place + 1 :])


def clones(engine: Engine) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights(engine).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_network_that_makes_nan_is_never_the_best(tmp_path):
    """A single image suffices: one that nothing can be made of must not be forgotten in a mean."""
    engine = make(tmp_path / "run", validate_every=1, strategy="ip-only")
    made = engine.strategy.enhance

    def spoiled(degraded: Tensor) -> Tensor:
        found = made(degraded)
        found[2, 0, 3, 3] = math.nan
        return found

    engine.strategy.enhance = spoiled
    assert "Warning: after epoch 1 (step 3) the PSNR of the validation images is not a number" in train(engine)
    assert engine.validation.best is None and not (tmp_path / "run" / "best.safetensors").exists()
    out = io.StringIO()
    before = clones(engine)
    engine.take_best(Display(Console(file=out, width=1000)))
    assert "--select best: no look at the validation images found a number" in out.getvalue()
    assert_equal(clones(engine), before)
    assert engine.validation.metrics["selected"] == "last" and engine.validation.metrics["validation_best"] is None


def test_a_training_that_diverges_says_what_is_left(tmp_path):
    engine = make(tmp_path / "run", validate_every=1)
    assert not train(engine, StopAfter(engine, 4))
    nn.init.constant_(engine.strategy.networks["ip"].tail.bias, math.nan)
    best = tmp_path / "run" / "best.safetensors"
    with pytest.raises(RunError, match=f"has diverged: .*{best} has the networks as they were after epoch 1, the best"):
        train(engine)
    assert all(value.isfinite().all() for value in load_file(best).values())


@pytest.mark.parametrize("select", ["last", "best"])
def test_which_networks_are_the_result(tmp_path, monkeypatch, select, capsys):
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    scripted(monkeypatch, 1.0, 24.5, 24.25)
    run = tmp_path / "run"
    assert main(arguments(out=run, epochs=3, lr=0.02, strategy="ip-only", validate_every=1, select=select)) == 0
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    last = {f"ip.{name}": value for name, value in checkpoint["ip"].items()}
    best, found = load_file(run / "best.safetensors"), load_file(run / "weights.safetensors")
    assert any(not torch.equal(best[name], last[name]) for name in last), "they are not the same"
    assert_equal(found, {"last": last, "best": best}[select])

    network = IP.build("srresnet", config().network.ip_options, channels=1, scale=1).eval()
    network.load_state_dict({name.removeprefix("ip."): value for name, value in found.items()})
    clean = image_data().test.tensor()
    with torch.no_grad():
        made = network(Gaussian(SIGMA)(clean, fixed_seeds(Gaussian(SIGMA), image_data().test.names)))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["psnr"] == pytest.approx(psnr_by_hand(made, clean), abs=1e-4)
    assert {name: value for name, value in metrics.items() if name.startswith("valid") or name == "selected"} == {
        "validated_by": "psnr",
        "validation_images": 4,
        "validation_best": 24.5,
        "validation_best_epoch": 2.0,
        "validation_last": 24.25,
        "validation_last_epoch": 3.0,
        "selected": select,
    }
    told = "best after epoch 2, PSNR 24.50 dB; after the last, 3, 24.25 dB, 0.25 dB less; the"
    assert f"{told} {select} networks are evaluated" in capsys.readouterr().out
    assert main(["--resume", str(run)]) == 0, "it is shown once more"
    assert told in capsys.readouterr().out


def test_the_last_may_be_the_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    scripted(monkeypatch, 1.0, 2.0)
    assert main(arguments(out=tmp_path / "run", strategy="vr-only", validate_every=1)) == 0
    assert "best after epoch 2, diagnosis right 200.0%, which is the last" in capsys.readouterr().out


def test_tensorboard_has_the_scores(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    scripted(monkeypatch, 1.5, math.nan, 2.5)
    run = tmp_path / "run"
    do_run(config(out=run, epochs=3, validate_every=1, tensorboard=True), display=Display(Console(quiet=True)))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(each.step, each.value) for each in events.Scalars("validation/psnr")] == [(3, 1.5), (9, 2.5)]


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions

LOOKING = {"strategy": "gradprom", "validate_every": 1, "epochs": 3, "checkpoint_every": 4}


def assert_same_looks(folder: Path, whole: Path) -> None:
    assert (folder / "validation.csv").read_bytes() == (whole / "validation.csv").read_bytes()
    assert_equal(load_file(folder / "best.safetensors"), load_file(whole / "best.safetensors"))


class StopInLook(Stop):
    """A signal arrives when the images are looked at for the nth time, before the first of them."""

    def __init__(self, engine: Engine, n: int) -> None:
        self.left, self.asked = n, False
        looked_at = engine.validation.score

        def score(device: torch.device, stopped: Any) -> float | None:
            self.left -= 1
            self.asked |= not self.left
            return looked_at(device, stopped)

        engine.validation.score = score

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.asked


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    engine = make(tmp_path_factory.mktemp("runs") / "whole", **LOOKING)
    train(engine)
    return engine


@pytest.mark.parametrize("moment", ["step 2", "step 3", "step 5", "step 9", "look 1", "look 3"])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path, whole, moment):
    """Between looks, right before one, and in one: a look that was due is made up for, and none is made twice."""
    what, number = moment.split()
    folder = tmp_path / "run"
    first = make(folder, **LOOKING)
    stop = StopAfter(first, int(number)) if what == "step" else StopInLook(first, int(number))
    assert not train(first, stop)
    looks = len(first.validation.looks)
    assert looks == {"step 2": 0, "step 3": 0, "step 5": 1, "step 9": 2, "look 1": 0, "look 3": 2}[moment]
    second = make(folder, **LOOKING)
    second.resume()
    assert second.step == first.step and second.validation.looks == whole.validation.looks[:looks]
    train(second)
    assert_same_run(second, whole)
    assert second.validation.looks == whole.validation.looks
    assert_same_looks(folder, whole.log.path.parent)


def test_a_run_that_was_ahead_of_its_checkpoint_goes_back(tmp_path, monkeypatch):
    """Both files are those of the checkpoint: a best that was written later may not come again on another machine."""
    scripted(monkeypatch, 1.0, 2.0)
    engine = make(tmp_path / "run", **LOOKING)
    with pytest.raises((StopIteration, RuntimeError)):
        train(engine)  # until the third look, with a checkpoint at step 8
    assert engine.step == 9
    before = load_file(tmp_path / "run" / "best.safetensors")
    scripted(monkeypatch, 9.0)
    engine.validation.note(Look(9, 3.0, 9.0))
    engine.validation.write()
    again = make(tmp_path / "run", **LOOKING)
    again.resume()
    assert again.step == 8 and again.validation.best == Look(6, 2.0, 2.0)
    assert [row[2] for row in table(tmp_path / "run")[1:]] == ["1", "2"]
    assert_equal(load_file(tmp_path / "run" / "best.safetensors"), before)
    shutil.copytree(tmp_path / "run", tmp_path / "early")
    (tmp_path / "early" / "checkpoint.pt").unlink()  # the one before is that of step 4
    early = make(tmp_path / "early", **LOOKING)
    early.resume()
    assert early.step == 4 and early.validation.best == Look(3, 1.0, 1.0)


def test_of_a_look_that_no_checkpoint_knows_nothing_stays(tmp_path):
    engine = make(tmp_path / "run", **LOOKING | {"checkpoint_every": 100})
    stop = StopAfter(engine, 4)
    monkey = engine.save
    engine.save = lambda display: monkey(display) if engine.step == 0 else die_softly()  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(engine, stop)
    assert (tmp_path / "run" / "best.safetensors").exists()
    again = make(tmp_path / "run", **LOOKING)
    again.resume()
    assert table(tmp_path / "run") == [["step", "epoch", "psnr"]]
    assert not (tmp_path / "run" / "best.safetensors").exists()


def die_softly() -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork, and no SIGKILL")
def test_killed_at_every_moment_of_a_look(tmp_path, whole):
    """In a forked process, before each thing that it does to the disk around the first and the second look."""
    begun, folder, told = tmp_path / "begun", tmp_path / "out", tmp_path / "told.txt"
    engine = make(begun, **LOOKING)
    assert not train(engine, StopAfter(engine, 2))

    def go_on(kill_at: int) -> int:
        """Up to step 7, in a process of its own; what it does to the disk is written down before it is done."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(begun, folder)
        first = make(folder, **LOOKING)
        pid = os.fork()
        if not pid:
            first.resume()
            with told.open("w") as file:
                count_events(
                    str(folder),
                    lambda number, name: die() if number == kill_at else print(name, file=file, flush=True),
                )
                train(first, StopAfter(first, 7))
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    assert go_on(0) == 0
    events = told.read_text().splitlines()
    looks = [number for number, name in enumerate(events, 1) if "validation.csv" in name]
    moments = [n for n in range(looks[0], len(events) + 1) if n <= looks[-1] + 12 and "steps.csv" not in events[n - 1]]
    assert len(moments) > 25 and any("best.safetensors" in events[n - 1] for n in moments), events
    for kill_at in moments:
        assert go_on(kill_at) == signal.SIGKILL
        again = make(folder, **LOOKING)
        again.resume()
        known = again.validation.looks
        assert known == whole.validation.looks[: len(known)]
        assert_equal_or_absent(folder, again.validation)
        train(again)
        assert_same_run(again, whole)
        assert_same_looks(folder, whole.log.path.parent)


def assert_equal_or_absent(folder: Path, known: Validation) -> None:
    best = folder / "best.safetensors"
    assert best.exists() == (known.best is not None)
    if known.best is not None:
        with safe_open(best, "pt") as file:
            assert json.loads(file.metadata()["validation"])["step"] == known.best.step


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    engine = make(tmp_path / "run", **LOOKING)
    (tmp_path / "run" / "best.safetensors").mkdir()  # nothing can take its place
    with pytest.raises(RunError, match=r"best.safetensors cannot be written"):
        train(engine)


def test_a_run_that_goes_on_looks_as_often(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    assert main(arguments(out=tmp_path / "run", validate_every=2)) == 0
    (tmp_path / "run" / "metrics.json").unlink()
    assert main(["--resume", str(tmp_path / "run"), "--validate-every", "1"]) == 2
    assert "--validate-every would change them" in capsys.readouterr().err
    looks = (tmp_path / "run" / "validation.csv").read_bytes()
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "validation.csv").read_bytes() == looks


# ----------------------------------------------------------------------------------------------------------------------
# To go on with the best


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first look."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADPROM_CACHE", str(folder.parent / "cache"))
        patch.setattr("train.experiment.evaluate", lambda *_, **__: die_softly())
        assert do_run(config(out=folder, validate_every=1, strategy="ip-only")).metrics is None
    assert (folder / "best.safetensors").exists() and not (folder / "metrics.json").exists()
    return folder


def test_an_unfinished_run_enhances_with_its_best(unfinished, tmp_path, capsys):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 255, (16, 20), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    best = unfinished / "best.safetensors"
    assert enhance(["--run", str(best), "--device", "cpu", str(tmp_path / "in.png"), str(tmp_path / "out.png")]) == 0
    with safe_open(best, "pt") as file:
        score = json.loads(file.metadata()["validation"])
        name = json.loads(file.metadata()["config"])["name"]
    told = f"mean PSNR of 4 of its validation images {score['psnr']:.2f} dB, after epoch {score['epoch']:g}"
    out = capsys.readouterr().out
    assert told in out and name in out
    network = IP.build("srresnet", config().network.ip_options, channels=1, scale=1).eval()
    network.load_state_dict({name.removeprefix("ip."): value for name, value in load_file(best).items()})
    with torch.no_grad():
        expected = network(torch.from_numpy(pixels)[None, None].float() / 255).clamp(0, 1)[0, 0] * 255
    found = np.asarray(Image.open(tmp_path / "out.png")).astype(float)
    assert np.abs(found - expected.numpy()).max() <= 0.51
    assert (
        enhance(["--run", str(unfinished), "--device", "cpu", str(tmp_path / "in.png"), str(tmp_path / "o.png")]) == 2
    )
    assert "has no weights.safetensors: the run is not finished" in capsys.readouterr().err


def test_best_weights_that_are_none(unfinished, tmp_path, capsys, monkeypatch):
    from PIL import Image

    from train.enhancement import network

    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "in.png")
    run = tmp_path / "run"
    shutil.copytree(unfinished, run)

    def refusal() -> str:
        given = ["--run", str(run / "best.safetensors"), "--device", "cpu", str(tmp_path / "in.png")]
        assert enhance([*given, str(tmp_path / "out.png")]) == 2
        return capsys.readouterr().err

    load = network.load_weights
    with monkeypatch.context() as patch:
        # The training writes the next best while the command begins.
        patch.setattr(
            network,
            "load_weights",
            lambda path, networks, flag: (load(path, networks, flag=flag), path.write_bytes(path.read_bytes()[:-4])),
        )
        assert "best.safetensors was written anew meanwhile" in refusal()
    assert "best.safetensors is damaged" in refusal()
    (run / "best.safetensors").unlink()
    assert "there is no such folder" in refusal()
    assert not (tmp_path / "out.png").exists()


def test_the_best_is_what_another_run_may_begin_with(unfinished, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    begun = build(
        config(ip_weights=unfinished / "best.safetensors", strategy="ip-only"),
        image_data(),
        Gaussian(SIGMA),
        device=CPU,
    )
    assert_equal(
        {f"ip.{name}": value for name, value in begun.strategy.networks["ip"].state_dict().items()},
        load_file(unfinished / "best.safetensors"),
    )
