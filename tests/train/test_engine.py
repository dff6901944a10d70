from __future__ import annotations

import csv
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models import VR, UnknownNameError
from train import engine as engine_file
from train.data import ImageData, Subset
from train.degradations import DEGRADATIONS, Gaussian
from train.engine import Engine, course
from train.errors import RunError
from train.progress import Display, Stop
from train.steps import COLUMNS, StepTable
from train.strategies import STRATEGIES
from train.strategies.base import StepLog

from .tiny import config, image_data


def make(folder, data: ImageData | None = None, degrade=None, **changes) -> Engine:
    folder.mkdir(exist_ok=True)
    return Engine(
        config(**changes),
        data or image_data(),
        degrade or Gaussian(0.1),
        folder=folder,
        device=torch.device("cpu"),
        begun=time.monotonic(),
    )


def train(engine: Engine, stop: Stop | None = None) -> bool:
    from rich.console import Console

    return engine.train(Display(Console(quiet=True), batch_size=4), stop or Stop())


def rows(engine: Engine) -> list[dict[str, str]]:
    with engine.table.path.open(newline="") as file:
        return list(csv.DictReader(file))


class StopAfter(Stop):
    """Asks to stop while step ``n`` is being taken."""

    def __init__(self, engine: Engine, n: int) -> None:
        self.engine, self.n = engine, n

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.engine.step >= self.n


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    ip, vr = engine.networks
    return {
        f"{n}.{k}": v for n, net in (("ip", ip), ("vr", vr)) if net is not None for k, v in net.state_dict().items()
    }


def assert_same_run(one: Engine, other: Engine) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert one.table.path.read_bytes() == other.table.path.read_bytes()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_run_writes_its_steps(tmp_path, strategy):
    engine = make(tmp_path / "run", strategy=strategy)
    assert train(engine)
    pretraining = 3 if strategy == "frozen" else 0
    assert engine.step == engine.steps == pretraining + 6
    table = rows(engine)
    assert list(table[0]) == list(COLUMNS)
    assert [int(row["step"]) for row in table] == list(range(1, engine.steps + 1))
    assert [row["phase"] for row in table] == ["pretrain"] * pretraining + ["train"] * 6
    for row in table[pretraining:]:
        assert float(row["psnr"]) == pytest.approx(-10 * math.log10(float(row["loss"])), abs=1.0)  # clamping aside
        assert bool(row["cosine"]) == bool(row["gate"]) == bool(row["aux_loss"]) == (strategy != "ip-only")
        assert row["skipped"] == "0"


def test_psnr_of_the_log_is_that_of_the_definition():
    clean = torch.rand(2, 1, 4, 4)
    enhanced = clean + 0.3
    error = (enhanced.clamp(0, 1) - clean).square().mean()
    psnr = engine_file.batch_psnr(enhanced, clean)
    torch.testing.assert_close(psnr, -10 * torch.log10(error), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["gradprom", "frozen", "ip-only"])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, strategy, stop_at):
    whole = make(tmp_path / "whole", strategy=strategy)
    assert train(whole)

    first = make(tmp_path / "parts", strategy=strategy)
    assert not train(first, StopAfter(first, stop_at))
    assert first.step == stop_at
    torch.manual_seed(99)  # another process would be in another random state
    second = make(tmp_path / "parts", strategy=strategy)
    second.resume()
    assert train(second)
    assert_same_run(second, whole)


class StopOnSecondLook(Stop):
    """Somebody presses Ctrl-C between two looks at the request."""

    looks = 0

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.looks += 1
        return self.looks >= 2


def test_no_stop_without_a_checkpoint(tmp_path):
    engine = make(tmp_path / "run", checkpoint_every=1000)
    assert not train(engine, StopOnSecondLook())
    again = make(tmp_path / "run")
    again.resume()
    assert again.step == engine.step


def test_steps_after_the_checkpoint_are_done_again(tmp_path):
    """What a killed run leaves: a step log that is ahead of the checkpoint, its last line cut off."""
    whole = make(tmp_path / "whole")
    train(whole)
    killed = make(tmp_path / "killed")
    train(killed, StopAfter(killed, 2))
    with killed.table.path.open("a") as file:
        file.write("3,train,0.5,,,,,,,\n1")  # of "10,train,...", say
    again = make(tmp_path / "killed")
    again.resume()
    train(again)
    assert_same_run(again, whole)


def test_workers_and_log_interval_change_nothing(tmp_path):
    one, other = make(tmp_path / "a"), make(tmp_path / "b", num_workers=2, log_every=4, checkpoint_every=3)
    train(one)
    train(other)
    assert_same_run(one, other)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(make(tmp_path / "run", max_steps=1))
    content = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    other = make(tmp_path / "run", features=5)
    with pytest.raises(RunError, match=r"checkpoint\.pt is that of another model: ip\.head"):
        other.resume()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == content


def test_seconds_add_up(tmp_path):
    first = make(tmp_path / "run", max_steps=1)
    first._begun -= 100
    train(first)
    second = make(tmp_path / "run", max_steps=1)
    second.resume()
    assert 100 <= second.seconds < 200


def test_all_strategies_see_the_same_first_weights_and_data(tmp_path):
    engines = [make(tmp_path / name, strategy=name, seed=4) for name in STRATEGIES]
    for engine in engines[1:]:
        for key, value in engine.networks[0].state_dict().items():
            assert torch.equal(value, engines[0].networks[0].state_dict()[key])
    others = make(tmp_path / "other", seed=5).networks[0]
    assert not torch.equal(others.head[0].weight, engines[0].networks[0].head[0].weight)


@pytest.mark.parametrize("task", [("downsample", {"scale": 2}), ("downsample", {"scale": 4})])
def test_super_resolution_trains(tmp_path, task):
    engine = make(tmp_path / "run", degrade=DEGRADATIONS.build(task[0], **task[1]), max_steps=2)
    assert train(engine)


def test_colour_and_optimizers(tmp_path):
    for optimizer in engine_file.OPTIMIZERS:
        assert train(make(tmp_path / optimizer, data=image_data(channels=3), optimizer=optimizer, max_steps=2))


def test_course_of_the_learning_rate():
    shares = [course(1000, step) for step in range(1000)]
    assert shares[0] == pytest.approx(1 / 30)
    assert shares[29] == shares[30] == 1.0
    assert shares[515] == pytest.approx(0.5)
    assert shares[999] < 1e-5
    assert shares[30:] == sorted(shares[30:], reverse=True)
    assert [course(1, step) for step in (0, 1)] == [1.0, 1.0]


def test_a_batch_larger_than_the_training_set(tmp_path):
    with pytest.raises(RunError, match="--batch-size 14 exceeds the 13 training images of tiny"):
        make(tmp_path / "run", batch_size=14)


def test_a_gate_for_a_strategy_that_has_its_own(tmp_path):
    with pytest.raises(RunError, match="--strategy joint fixes its own gate; --gate hard goes with: gradprom"):
        make(tmp_path / "run", strategy="joint", gate="hard")
    assert make(tmp_path / "run", strategy="gradprom", gate="project").steps == 6


@pytest.mark.parametrize("labels", [None, "one class"])
def test_no_diagnosis_to_learn(tmp_path, labels):
    data = image_data()
    images = data.train.images
    train_set = Subset(images, None if labels is None else np.zeros(len(images), np.int64), None, data.train.names)
    poor = ImageData("poor", "real", ("only",), train_set, data.val, data.test)
    with pytest.raises(RunError, match="needs a diagnosis, and poor has no two classes; use ip-only"):
        make(tmp_path / "run", data=poor)
    assert train(make(tmp_path / "run", data=poor, strategy="ip-only", max_steps=1))


def test_unknown_names(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown strategy 'list'; choose from: frozen, gradprom"):
        make(tmp_path / "run", strategy="list")
    with pytest.raises(UnknownNameError, match="unknown VR network 'list'"):
        make(tmp_path / "run", vr="list")


def test_divergence_is_an_error_and_leaves_the_checkpoint(tmp_path):
    engine = make(tmp_path / "run")
    assert not train(engine, StopAfter(engine, 2))
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    nn.init.constant_(engine.networks[0].tail.bias, math.nan)
    with pytest.raises(RunError, match=r"the training has diverged: loss and aux_loss .*lower --lr"):
        train(engine)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == checkpoint


def test_step_table_reads_back_what_it_was_told(tmp_path):
    table = StepTable(tmp_path / "steps.csv")
    assert table.flush() == {}
    value = torch.tensor
    table.add(1, "pretrain", StepLog(aux_loss=value(0.5), accuracy=value(1.0)), None, lr=0.1)
    table.add(2, "train", StepLog(loss=value(0.1), cosine=value(-0.25), skipped=value(True)), value(30.0), lr=0.2)
    table.add(3, "train", StepLog(loss=value(math.nan), cosine=value(0.75), skipped=value(False)), value(20.0), lr=0.3)
    row = table.flush()
    assert row == pytest.approx(
        {"aux_loss": 0.5, "accuracy": 1.0, "loss": 0.1, "cosine": 0.25, "skipped": 0.5, "psnr": 25.0}
    )
    columns = table.columns()
    np.testing.assert_array_equal(columns["step"], [1, 2, 3])
    np.testing.assert_array_equal(columns["cosine"], [math.nan, -0.25, 0.75])
    np.testing.assert_array_equal(columns["skipped"], [math.nan, 1, 0])
    table.truncate(2)
    np.testing.assert_array_equal(table.columns()["step"], [1, 2])


def test_steps_wait_for_nobody(tmp_path, monkeypatch):
    """Numbers are read back when the log is flushed and at no other time."""
    engine = make(tmp_path / "run", log_every=6, checkpoint_every=6)
    reads = SimpleNamespace(steps=[])
    for name in ("item", "tolist", "cpu", "__bool__", "__float__"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, *args, original=original, name=name, **kwargs):
            if tensor.is_floating_point() and tensor.numel() < 100:
                reads.steps.append((engine.step, name))
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    train(engine)
    assert {step for step, _ in reads.steps} <= {6}, reads.steps


def test_tiny_vr_is_registered():
    assert "tiny" in VR


# ----------------------------------------------------------------------------------------------------------------------
# The rehearsal


def test_the_rehearsal_changes_no_digit(tmp_path, monkeypatch):
    """Against engines without one: first weights, random state, and every digit of a run."""
    for strategy in ("gradprom", "frozen"):
        torch.manual_seed(7)
        rehearsed = make(tmp_path / f"a {strategy}", strategy=strategy)
        after = torch.get_rng_state()
        with monkeypatch.context() as patch:
            patch.setattr(engine_file, "rehearse", lambda *args, **kwargs: None)
            torch.manual_seed(7)
            other = make(tmp_path / f"b {strategy}", strategy=strategy)
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(value, weights(other)[key]) for key, value in weights(rehearsed).items())
        assert rehearsed.networks[1][1].num_batches_tracked == 0
        assert train(rehearsed) and train(other)
        assert_same_run(rehearsed, other)


class Flat(nn.Sequential):
    """Diagnoses crops of 8 x 8 pixels and nothing else."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64 * channels, num_classes))


class NoMemory(Flat):
    def forward(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB.")


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (
            None,
            {"vr": "resnet18", "batch_size": 1},
            "with --batch-size 1 and --crop 8 .* --vr resnet18: Expected",
        ),
        (None, {"crop": 2}, "a step with --batch-size 4 and --crop 2 .* a larger --batch-size or --crop"),
        (Flat, {}, r"the evaluation of an image of 16 x 16 px .* another --size"),
        (NoMemory, {}, "out of memory.* give a smaller --batch-size or --crop"),
    ],
)
def test_what_would_fail_in_a_run_fails_before_it(tmp_path, monkeypatch, network, changes, message):
    if network is not None:
        monkeypatch.setitem(VR._factories, "tiny", network)
    with pytest.raises(RunError, match=message) as error:
        make(tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run").iterdir())


def test_a_batch_of_one_trains_where_the_networks_allow_it(tmp_path):
    """And an incomplete last batch, of one image, is none: 13 images in batches of 12."""
    assert train(make(tmp_path / "one", batch_size=1, max_steps=2))
    assert train(make(tmp_path / "none", strategy="ip-only", batch_size=1, crop=2, max_steps=2))
    engine = make(tmp_path / "twelve", batch_size=12, vr="resnet18")
    assert train(engine) and engine.steps == 2


def test_frozen_without_pretraining(tmp_path):
    assert train(make(tmp_path / "run", strategy="frozen", pretrain_epochs=0, max_steps=1))


def test_a_test_split_without_labels(tmp_path):
    data = image_data()
    test_set = Subset(data.test.images, None, None, data.test.names)
    poor = ImageData("poor", "real", data.class_names, data.train, data.val, test_set)
    with pytest.raises(RunError, match="needs a diagnosis"):
        make(tmp_path / "run", data=poor)
