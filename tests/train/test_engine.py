from __future__ import annotations

import csv
import dataclasses
import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from models import VR
from train.data import ImageData, Subset
from train.data.base import Ragged
from train.degradations import DEGRADATIONS, Gaussian, parse
from train.errors import RunError
from train.evaluation.evaluate import evaluate
from train.interruption import Stop
from train.outputs.run_folder import RunFolder
from train.strategies import strategy_class
from train.strategies.auxiliary import Diagnosis
from train.strategies.base import LOSS, advised_measures, batch_psnr
from train.training import build as build_file
from train.training.build import OPTIMIZERS, build
from train.training.engine import Cadence, Engine
from train.training.progress import Display
from train.training.schedule import course
from train.training.step_log import PERFORMANCE, StepLog, means, read_steps

from .contracts import RECOGNIZING
from .tiny import TinyIP, config, digits, image_data, with_masks

GATED = ["cosine", "gate", "aux_norm"]
COLUMNS = ["step", "phase", "loss", "psnr", "aux_loss", "accuracy", *GATED, "main_norm", "skipped", "lr", *PERFORMANCE]


def make(folder, data: ImageData | None = None, degrade=None, **changes) -> Engine:
    folder.mkdir(exist_ok=True)
    settings = config(**changes)
    experiment = build(settings, data or image_data(), degrade or Gaussian(0.1), device=torch.device("cpu"))
    output = settings.output
    cadence = Cadence(output.log_every, output.checkpoint_every, settings.training.num_workers)
    return Engine(experiment, RunFolder(folder), cadence, begun=time.monotonic())


def train(engine: Engine, stop: Stop | None = None) -> bool:
    from rich.console import Console

    return engine.train(Display(Console(quiet=True)), stop or Stop())


def rows(engine: Engine) -> list[dict[str, str]]:
    with engine.log.path.open(newline="") as file:
        return list(csv.DictReader(file))


class StopAfter(Stop):
    """Asks to stop while step ``n`` is being taken."""

    def __init__(self, engine: Engine, n: int) -> None:
        self.engine, self.n = engine, n

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.engine.step >= self.n


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v for n, net in engine.strategy.networks.items() for k, v in net.state_dict().items()}


def assert_same_run(one: Engine, other: Engine) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert digits(one.log.path) == digits(other.log.path)


@pytest.mark.parametrize("strategy", [name for name in RECOGNIZING if not strategy_class(name).guided])
def test_a_run_writes_its_steps(tmp_path, strategy):
    engine = make(tmp_path / "run", strategy=strategy)
    assert train(engine)
    pretraining = 3 if strategy == "frozen" else 0
    assert engine.step == engine.steps == pretraining + 6
    table = rows(engine)
    if strategy == "vr-only":
        assert list(table[0]) == ["step", "phase", "aux_loss", "accuracy", "skipped", "lr", *PERFORMANCE]
    else:
        assert list(table[0]) == COLUMNS
    assert [int(row["step"]) for row in table] == list(range(1, engine.steps + 1))
    assert [row["phase"] for row in table] == ["pretrain"] * pretraining + ["train"] * 6
    for row in table[pretraining:]:
        assert row["skipped"] == "0"
        if strategy == "vr-only":
            assert row["aux_loss"]
            continue
        assert float(row["psnr"]) == pytest.approx(-10 * math.log10(float(row["loss"])), abs=1.0)  # clamping aside
        assert bool(row["cosine"]) == bool(row["gate"]) == bool(row["aux_loss"]) == (strategy != "ip-only")


def test_psnr_of_the_log_is_that_of_the_definition():
    clean = torch.rand(2, 1, 4, 4)
    enhanced = clean + 0.3
    error = (enhanced.clamp(0, 1) - clean).square().mean()
    psnr = batch_psnr(enhanced, clean)
    torch.testing.assert_close(psnr, -10 * torch.log10(error), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", ["gradprom", "frozen", "ip-only", "vr-only"])
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
    """The user presses Ctrl-C between two looks at the request."""

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


@pytest.mark.parametrize(("minutes", "steps"), [(1.0, [0, 2, 4, 6]), (1e6, [0, 6])])
def test_a_checkpoint_is_due_after_some_minutes_whatever_the_steps_take(tmp_path, monkeypatch, minutes, steps):
    from train.training import checkpoint

    engine = make(tmp_path / "run", checkpoint_every=1000)
    engine.cadence = engine.cadence._replace(checkpoint_minutes=minutes, keep_checkpoints=1)
    saved: list[int] = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state, keep: saved.append(state["step"]))
    begun = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: begun + 40 * engine.step)  # a step takes 40 seconds
    assert train(engine)
    assert saved == steps


def test_steps_after_the_checkpoint_are_done_again(tmp_path):
    """What a killed run leaves: a step log that is ahead of the checkpoint, its last line cut off."""
    whole = make(tmp_path / "whole")
    train(whole)
    killed = make(tmp_path / "killed")
    train(killed, StopAfter(killed, 2))
    with killed.log.path.open("a") as file:
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
    other = make(tmp_path / "run", **{"ip.features": 5})
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
    engines = {name: make(tmp_path / name, strategy=name, seed=4).strategy.networks for name in RECOGNIZING}
    for key, without in (("ip", {"vr-only"}), ("vr", {"ip-only", "hqg-only"})):
        networks = [each[key].state_dict() for each in engines.values() if key in each]
        assert {name for name, each in engines.items() if key not in each} == without
        for other in networks[1:]:
            assert all(torch.equal(value, other[name]) for name, value in networks[0].items())
    others = make(tmp_path / "other", seed=5).strategy.networks["ip"]
    assert not torch.equal(others.head[0].weight, engines["joint"]["ip"].head[0].weight)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("strategy", ["gradprom", "vr-only"])
def test_super_resolution_trains(tmp_path, scale, strategy):
    degrade = DEGRADATIONS.build("downsample", scale=scale)
    engine = make(tmp_path / "run", degrade=degrade, strategy=strategy, max_steps=2)
    assert train(engine)


def test_a_test_image_that_cannot_be_reduced(tmp_path):
    data = image_data()
    images = list(data.test.images)
    images[3] = np.repeat(images[3], 2, axis=0)[:21]
    ragged = dataclasses.replace(data.test, images=Ragged.of(images, dtype=np.dtype(np.uint8), ndim=3))
    with pytest.raises(RunError, match=r"test image test-3\.png has 21 x 16 px, no multiples of 2, which --task sr2"):
        make(tmp_path / "run", dataclasses.replace(data, test=ragged), parse("sr2"), task="sr2", size=None)


def test_color_and_optimizers(tmp_path):
    for optimizer in OPTIMIZERS:
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
    with pytest.raises(RunError, match="--strategy joint fixes its own gate; --gate hard goes with: gradprom, hqg"):
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
    with pytest.raises(RunError, match="--strategy: unknown strategy 'list'; choose from: frozen, gradprom"):
        make(tmp_path / "run", strategy="list")
    with pytest.raises(RunError, match="--vr: unknown VR network 'list'"):
        make(tmp_path / "run", vr="list")


def test_every_network_gets_its_own_options(tmp_path):
    """The engine once handed SR-ResNet's to every IP."""
    engine = make(tmp_path / "run", ip="tiny", max_steps=2, **{"ip.width": 3})
    network = engine.strategy.networks["ip"]
    assert isinstance(network, TinyIP) and network.first.out_channels == 3
    assert train(engine)
    with pytest.raises(RunError, match=r"--ip\.blocks: tiny has no such option; it has width"):
        make(tmp_path / "other", ip="tiny", **{"ip.blocks": 3})


@pytest.mark.parametrize("strategy", ["gradprom", "joint", "frozen", "vr-only"])
@pytest.mark.parametrize("aux", ["seg", "dia,seg", "seg,dia"])
def test_auxiliaries_have_columns_of_their_own(tmp_path, strategy, aux):
    engine = make(tmp_path / "run", with_masks(image_data()), strategy=strategy, aux=aux, seg="tiny", max_steps=2)
    assert train(engine)
    own = {"dia": ["aux_loss", "accuracy"], "seg": ["aux_loss", "dice"]}
    gates, norm = ([], []) if strategy == "vr-only" else (GATED, ["main_norm"])
    columns = [f"{name}{'_' + each if ',' in aux else ''}" for each in aux.split(",") for name in own[each] + gates]
    image = [] if strategy == "vr-only" else ["loss", "psnr"]
    assert list(rows(engine)[0]) == ["step", "phase", *image, *columns, *norm, "skipped", "lr", *PERFORMANCE]
    for row in rows(engine)[-2:]:
        assert all(row[name] for name in columns)
        assert all(0 <= float(row[name]) <= 1 for name in columns if name.startswith(("accuracy", "dice", "gate")))


def test_a_segmentation_without_masks(tmp_path):
    with pytest.raises(RunError, match="--strategy gradprom needs masks for --aux seg, and tiny has none"):
        make(tmp_path / "run", aux="seg", seg="tiny")
    assert not list((tmp_path / "run").iterdir())


def test_every_auxiliary_has_its_weight(tmp_path):
    """A weight of 0 for one of two: IP is trained as with the other one alone."""
    data = with_masks(image_data())
    both = make(tmp_path / "both", data, aux="dia,seg", seg="tiny", aux_weight=(0.0, 0.5), max_steps=3)
    alone = make(tmp_path / "alone", data, aux="seg", seg="tiny", aux_weight=(0.5,), max_steps=3)
    for engine in (both, alone):
        engine.strategy.enter(engine.experiment.phases[0])
        engine.strategy.learners["seg"].network.eval()  # batch statistics differ in nothing, but dropout would
        for keys in engine.experiment.order(engine.experiment.phases[0]):
            engine.strategy.update(engine.strategy.losses(engine.experiment.crops.__getitems__(keys)))
    one, other = (engine.strategy.networks["ip"].state_dict() for engine in (both, alone))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-6)


def test_masks_are_cut_like_their_images(tmp_path):
    data = with_masks(image_data())
    engine = make(tmp_path / "run", data, aux="seg", seg="tiny")
    (keys, *_) = engine.experiment.order(engine.experiment.phases[0])
    batch = engine.experiment.crops.__getitems__(keys)
    assert batch.masks.shape == (4, 8, 8)
    for key, clean, mask in zip(keys, batch.clean, batch.masks, strict=True):
        whole = data.train.images[key.image, ..., 0].astype(float)
        assert torch.equal(mask, (clean[0] * 255 > whole.mean()).long())
    assert make(tmp_path / "other", data).experiment.crops.__getitems__(keys).masks is None, "not read for nothing"


def test_images_of_different_sizes(tmp_path):
    """What a crop does not fit into is named before anything is made."""
    data = image_data()
    images = list(data.train.images)
    images[5] = np.repeat(images[5], 2, axis=0)
    ragged = dataclasses.replace(data.train, images=Ragged.of(images, dtype=np.dtype(np.uint8), ndim=3))
    engine = make(tmp_path / "run", dataclasses.replace(data, train=ragged), strategy="ip-only")
    assert train(engine)
    with pytest.raises(RunError, match=r"--crop 32 does not fit into the training image train-0\.png of 16 x 16 px"):
        make(tmp_path / "small", dataclasses.replace(data, train=ragged), crop=32, size=32)


def test_divergence_is_an_error_and_leaves_the_checkpoint(tmp_path):
    engine = make(tmp_path / "run")
    assert not train(engine, StopAfter(engine, 2))
    checkpoint = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    nn.init.constant_(engine.strategy.networks["ip"].tail.bias, math.nan)
    with pytest.raises(RunError, match=r"the training has diverged: loss and aux_loss .*lower --lr"):
        train(engine)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == checkpoint


def test_step_log_reads_back_what_it_was_told(tmp_path):
    log = StepLog(tmp_path / "steps.csv", advised_measures([("dia", Diagnosis.measures)]))
    assert log.flush() == []
    value = torch.tensor
    log.add(1, "pretrain", {"aux_loss": value(0.5), "accuracy": value(1.0)}, lr=0.1)
    found = {"loss": value(0.1), "cosine": value(-0.25), "skipped": value(True), "psnr": value(30.0)}
    log.add(2, "train", found, lr=0.2)
    found = {"loss": value(math.nan), "cosine": value(0.75), "skipped": value(False), "psnr": value(20.0)}
    log.add(3, "train", found, lr=0.3)
    row = means(log.flush())
    assert row.pop("images_per_s") > 0 and row.pop("memory_mib") > 1 and row.pop("lr") == pytest.approx(0.2)
    assert row == pytest.approx(
        {"aux_loss": 0.5, "accuracy": 1.0, "loss": 0.1, "cosine": 0.25, "skipped": 0.5, "psnr": 25.0}
    )
    columns = log.read()
    np.testing.assert_array_equal(columns["step"], [1, 2, 3])
    np.testing.assert_array_equal(columns["cosine"], [math.nan, -0.25, 0.75])
    np.testing.assert_array_equal(columns["skipped"], [math.nan, 1, 0])
    left = read_steps(log.path, phase="train")
    assert left.keys() == columns.keys()
    for name, values in columns.items():
        np.testing.assert_array_equal(left[name], values[1:])
    log.truncate(2)
    np.testing.assert_array_equal(log.read()["step"], [1, 2])
    (tmp_path / "other.csv").write_text("image,psnr\n")
    with pytest.raises(RunError, match=r"other\.csv is no step log"):
        read_steps(tmp_path / "other.csv")


def test_what_was_not_declared_is_no_measurement(tmp_path):
    log = StepLog(tmp_path / "steps.csv", [LOSS])
    with pytest.raises(ValueError, match="the strategy measured psnr without declaring it"):
        log.add(1, "train", {"psnr": torch.tensor(1.0)}, lr=0.1)


def test_steps_do_not_wait_for_the_device(tmp_path, monkeypatch):
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
            patch.setattr(build_file, "rehearse", lambda *args, **kwargs: None)
            torch.manual_seed(7)
            other = make(tmp_path / f"b {strategy}", strategy=strategy)
        assert torch.equal(after, torch.get_rng_state())
        assert all(torch.equal(value, weights(other)[key]) for key, value in weights(rehearsed).items())
        assert rehearsed.strategy.networks["vr"][1].num_batches_tracked == 0
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
    engine = make(tmp_path / "run", data=poor)
    assert train(engine)
    found = evaluate(engine.strategy, test_set, engine.experiment.crops.degrade, device=torch.device("cpu"))
    assert found.enhanced is not None and not found.scores, "images are scored, answers are not"
