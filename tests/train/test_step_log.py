"""What ``steps.csv`` holds, how it is read back from a device that runs ahead, and what is warned of."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from train.errors import RunError
from train.settings.sections import Settings
from train.strategies.base import LOSS, PSNR, SKIPPED
from train.training import step_log
from train.training.build import build_strategy, gate_of
from train.training.progress import Brief, Display
from train.training.step_log import PERFORMANCE, Ring, Row, StepLog, means, memory_mib, read_steps
from train.training.watch import IN_A_ROW, WINDOW, Watch

from .test_engine import make, rows, train
from .tiny import config, digits, image_data, with_masks

MEASURES = (LOSS, PSNR, SKIPPED)
value = torch.tensor


def noted(log: StepLog, *steps: int) -> None:
    """Of each step a loss that is its number."""
    for step in steps:
        log.add(step, "train", {"loss": value(float(step)), "skipped": value(False)}, lr=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(("aux", "granularity"), [("dia", "global"), ("dia,seg", "global"), ("dia", "tensor")])
def test_lengths_are_those_of_the_gradients(tmp_path, aux, granularity):
    """Of every auxiliary, before its weight: against the gradients that the optimizer has left."""
    data = with_masks(image_data())
    engine = make(tmp_path / "run", data, aux=aux, seg="tiny", granularity=granularity, aux_weight=(0.01,), max_steps=3)
    strategy, lengths = engine.strategy, []
    update = strategy.update

    def spy(found):
        measured = update(found)
        main = [p.grad for p in strategy.ip.network.parameters()]
        lengths.append(
            [
                math.sqrt(sum(float(g.double().square().sum()) for g in grads if g is not None))
                for grads in (main, *strategy.ip.optimizer.aux_grads)
            ]
        )
        return measured

    strategy.update = spy
    assert train(engine)
    names = ["main_norm", *([f"aux_norm_{each}" for each in aux.split(",")] if "," in aux else ["aux_norm"])]
    found = [[float(row[name]) for name in names] for row in rows(engine)]
    assert found == [pytest.approx(each, rel=1e-6) for each in lengths]
    assert all(length > 0 for each in found for length in each)


def test_speed_and_memory(tmp_path, monkeypatch):
    """Each step from the end of the one before, the first from the beginning; the memory is this process's."""
    times = iter([0.0, 10.0, 10.5, 10.75, 12.75])
    monkeypatch.setattr(step_log.time, "perf_counter", lambda: next(times))
    log = StepLog(tmp_path / "steps.csv", MEASURES, batch_size=4)
    log.begin()
    noted(log, 1, 2, 3)
    found = log.flush()
    assert [row["images_per_s"] for row in found] == [8.0, 16.0, 2.0]
    assert means(found)["images_per_s"] == pytest.approx(3 * 4 / 2.75)
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
    assert found[0]["memory_mib"] == pytest.approx(resident, rel=0.2)
    table = read_steps(log.path)
    np.testing.assert_allclose(table["images_per_s"], [8, 16, 2], rtol=1e-4)
    np.testing.assert_allclose(table["memory_mib"], found[0]["memory_mib"], atol=0.06)


def test_a_system_that_does_not_tell_its_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(step_log, "_STATM", tmp_path / "none")
    assert math.isnan(memory_mib(torch.device("cpu")))
    log = StepLog(tmp_path / "steps.csv", MEASURES)
    noted(log, 1)
    log.flush()
    assert log.path.read_text().splitlines()[1].endswith(",")
    assert np.isnan(read_steps(log.path)["memory_mib"]).all()


def test_more_steps_than_the_ring_has_rows(tmp_path, monkeypatch):
    """Nobody has to flush in time."""
    monkeypatch.setattr(step_log, "MOST_ROWS", 3)
    log = StepLog(tmp_path / "steps.csv", MEASURES, every=10**6)
    noted(log, *range(1, 8))
    assert [row["loss"] for row in log.flush()] == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(read_steps(log.path)["loss"], range(1, 8))


# ----------------------------------------------------------------------------------------------------------------------
# A device that runs ahead


class Late(Ring):
    """As on a GPU: what is sent is on the host once somebody has waited for it, and not a moment before; the rows of
    the device go on being written meanwhile."""

    waited = 0

    def __init__(self, device: torch.device, length: int, width: int) -> None:
        super().__init__(device, length, width)
        self._here = torch.full((length, width), math.nan)
        self._arrived = self  # type: ignore[assignment]
        self._way: torch.Tensor | None = None

    def record(self) -> None:
        """A copy in the stream is of what the rows are by then; it is not here yet."""
        self._way, self._here[:] = self._here.clone(), math.nan

    def synchronize(self) -> None:
        assert self._way is not None
        self._here[:], self._way = self._way, self._way
        Late.waited += 1


def test_a_gpu_is_not_waited_for(tmp_path, monkeypatch):
    """What was noted since the last look is on its way until the next one; whoever has to know waits for it."""
    monkeypatch.setattr(step_log, "Ring", Late)
    log = StepLog(tmp_path / "steps.csv", MEASURES, every=2)
    Late.waited = 0
    noted(log, 1, 2)
    assert log.flush(wait=False) == [] and Late.waited == 0 and not log.path.exists()
    noted(log, 3, 4)
    assert [row["loss"] for row in log.flush(wait=False)] == [1, 2]
    noted(log, 5)
    assert [row["loss"] for row in log.flush(wait=True)] == [3, 4, 5]
    assert log.flush(wait=False) == [] and log.flush() == []
    np.testing.assert_array_equal(read_steps(log.path)["loss"], range(1, 6))


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 100), (2, 3), (4, 100)])
def test_a_device_that_runs_ahead_changes_nothing(tmp_path, monkeypatch, log_every, checkpoint_every):
    """No checkpoint is ahead of the log, and at the end nothing is missing."""
    usual = make(tmp_path / "usual")
    train(usual)
    with monkeypatch.context() as patch:
        patch.setattr(step_log, "Ring", Late)
        late = make(tmp_path / "late", log_every=log_every, checkpoint_every=checkpoint_every)
    saved: list[tuple[int, int]] = []

    def save(path, state, keep):  # the first time before there is a log
        saved.append((state["step"], len(rows(late)) if late.log.path.exists() else 0))

    monkeypatch.setattr("train.training.engine.checkpoint.save", save)
    train(late)
    assert digits(late.log.path) == digits(usual.log.path)
    assert saved[-1] == (6, 6) and all(step == written for step, written in saved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    """Noting and looking wait for nothing (PyTorch would raise); the numbers are those of the steps."""
    log = StepLog(tmp_path / "steps.csv", MEASURES, device="cuda", every=5, batch_size=2)
    losses = torch.arange(1.0, 21.0, device="cuda")
    skipped = torch.zeros((), device="cuda", dtype=torch.bool)
    log.begin()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 21):
            log.add(step, "train", {"loss": losses[step - 1], "skipped": skipped}, lr=0.1)
            if step % 5 == 0:
                log.flush(wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    log.flush()
    found = read_steps(log.path)
    np.testing.assert_array_equal(found["loss"], range(1, 21))
    assert (found["images_per_s"] > 0).all() and (found["memory_mib"] > 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions


def test_killed_at_any_byte(tmp_path):
    """Wherever a write was cut off, a log goes on from the checkpoint as if it had never been."""
    log = StepLog(tmp_path / "steps.csv", MEASURES)
    noted(log, 1, 2)
    log.flush()
    checkpointed = log.path.read_bytes()
    noted(log, 3, 4)
    log.flush()
    whole = log.path.read_bytes()
    for end in range(len(checkpointed), len(whole) + 1):
        log.path.write_bytes(whole[:end])
        again = StepLog(log.path, MEASURES)
        again.truncate(2)
        assert log.path.read_bytes() == checkpointed
        noted(again, 3, 4)
        again.flush()
        np.testing.assert_array_equal(read_steps(log.path)["loss"], [1, 2, 3, 4])


def test_what_was_not_read_back_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(step_log, "Ring", Late)
    log = StepLog(tmp_path / "steps.csv", MEASURES, every=2)
    noted(log, 1, 2)
    log.flush()
    noted(log, 3, 4)
    log.flush(wait=False)
    noted(log, 5)
    log.truncate(2)
    assert log.flush() == []
    noted(log, 3)
    log.flush()
    np.testing.assert_array_equal(read_steps(log.path)["step"], [1, 2, 3])


def test_a_log_of_an_earlier_version_keeps_its_columns(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("step,phase,loss,skipped,lr\n1,train,0.5,0,0.1\n")
    log = StepLog(path, (LOSS, SKIPPED))
    log.truncate(1)
    noted(log, 2)
    (row,) = log.flush()
    assert row["images_per_s"] > 0, "people are told nevertheless"
    assert path.read_text() == "step,phase,loss,skipped,lr\n1,train,0.5,0,0.1\n2,train,2,0,0.1\n"
    for header in ("step,phase,skipped,lr", "step,phase,skipped,loss,lr", "step,phase,loss,skipped,lr,gate"):
        path.write_text(header + "\n")
        with pytest.raises(RunError, match="line 1: it must be the header step,phase,loss,skipped,lr,images_per_s"):
            StepLog(path, (LOSS, SKIPPED)).truncate(1)


def test_tensorboard_counts_as_the_log_does(tmp_path, monkeypatch):
    """And what a process that was killed has written of later steps is not shown beside what is done again."""
    written: list[tuple[str, int | None, list[tuple[str, int]]]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            written.append((folder, purge_step, []))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[-1][2].append((name, step))

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("train.training.progress.summary_writer", lambda: Writer)
    engine = make(tmp_path / "run", strategy="frozen", log_every=1)
    display = Display(Console(quiet=True))
    display.begin(engine.strategy.measures, batch_size=4, events=tmp_path)
    train_with(engine, display)
    (_, first, before), (_, second, after) = written
    assert (first, second) == (1, 4)
    assert {step for _, step in before} == {1, 2, 3} and {step for _, step in after} == {4, 5, 6, 7, 8, 9}
    names = {name.split("/")[1] for name, _ in after}
    assert {"loss", "cosine", "gate", "main_norm", "aux_norm", "skipped", "lr", *PERFORMANCE} <= names


def train_with(engine: Any, display: Display) -> None:
    from train.interruption import Stop

    assert engine.train(display, Stop())


# ----------------------------------------------------------------------------------------------------------------------
# Warnings


def watch(**changes: Any) -> Watch:
    own = {"ip": "tiny-staged"} if "ip_aux" in changes else {}
    settings: Settings = config(**{"seg": "tiny", **own, **changes})
    strategy = build_strategy(settings, with_masks(image_data()))
    return Watch(strategy, gate_of(settings, strategy) if strategy.trains_ip else {})


def stream(
    n: int = WINDOW,
    *,
    begin: int = 1,
    gate: Any = 1.0,
    main: Any = 1.0,
    aux: Any = 1.0,
    skipped: Any = 0.0,
    suffix: str = "",
) -> list[Row]:
    """Rows as :meth:`StepLog.flush` returns them; what is callable is a function of the step."""

    def at(number: Any, step: int) -> float:
        return float(number(step) if callable(number) else number)

    return [
        {
            "step": step,
            f"gate{suffix}": at(gate, step),
            "main_norm": at(main, step),
            f"aux_norm{suffix}": at(aux, step),
            "skipped": at(skipped, step),
        }
        for step in range(begin, begin + n)
    ]


def told(looker: Watch, found: list[Row], every: int = 10) -> list[str]:
    """All warnings, where the log is looked at every few steps."""
    return [text for i in range(0, len(found), every) for text in looker.look(found[i : i + every])]


def sometimes(step: int) -> float:
    """A gate that is open in every other step."""
    return float(step % 2)


def test_a_training_that_goes_well_is_not_warned_of():
    assert told(watch(), stream(1000, gate=sometimes, main=1.0, aux=900.0)) == []  # times its weight of 0.001


def test_an_auxiliary_that_dwarfs_the_main_loss():
    found = told(watch(aux_weight=(0.5,)), stream(1000, gate=sometimes, main=2.0, aux=100.0))
    assert found == [
        "in the last 100 steps (1 to 100) the gradient of dia, times its weight 0.5, was 25 times as long as that of "
        "IP's own loss (the median of the 50 with an open gate): IP follows dia alone. Give --aux-cap 1, or a lower "
        "--aux-weight"
    ]
    # One of several, and from when on it does.
    rows_ = stream(400, gate=1, suffix="_dia", aux=lambda step: 1e5 if step > 200 else 1.0)
    for row, other in zip(rows_, stream(400, gate=sometimes, suffix="_seg", aux=1.0), strict=True):
        row |= other
    (text,) = told(watch(aux="dia,seg", strategy="joint"), rows_)
    assert "(151 to 250)" in text or "(152 to 251)" in text, text
    assert "the gradient of dia, times its weight 0.001" in text and "--strategy gradprom-capped, or a lower" in text


@pytest.mark.parametrize(
    ("changes", "rows_"),
    [
        ({"gate": "never"}, stream(gate=0.0, aux=1e9)),  # it is long, and goes nowhere
        ({"aux_weight": (0.0,)}, stream(aux=1e9)),
        ({"aux_cap": 100.0}, stream(gate=sometimes, aux=1e9)),  # as long as it was asked to be
        ({"strategy": "gradprom-capped"}, stream(gate=sometimes, aux=1e9)),
        ({"strategy": "mgda"}, stream(aux=1e9)),  # whose weights are its own affair
        ({}, stream(gate=lambda step: step % 10 == 0, aux=1e9)),  # ten steps are few
        ({}, stream(gate=sometimes, aux=lambda step: 1e9 if step % 9 == 1 else 1.0)),  # so are outliers
        ({}, stream(WINDOW - 1, gate=1, aux=1e9)),  # too short to be judged
        ({}, stream(gate=sometimes, main=0.0, aux=1.0)),  # no ratio
        ({}, stream(300, gate=lambda step: step > 200, aux=1e9, skipped=1.0)[:IN_A_ROW - 1]),
        ({"strategy": "ip-only"}, [{"step": s, "main_norm": 1.0, "skipped": 0.0} for s in range(300)]),
        ({"strategy": "frozen"}, [{"step": s, "aux_loss": 1.0, "accuracy": 0.5} for s in range(300)]),  # pre-training
        ({"strategy": "vr-only"}, [{"step": s, "aux_loss": 1.0, "skipped": 0.0} for s in range(300)]),
    ],
)  # fmt: skip
def test_no_false_alarm_of_lengths(changes, rows_):
    assert told(watch(**changes), rows_) == []


def test_a_gate_that_never_opens():
    assert told(watch(), stream(300, gate=0.0)) == [
        "in the last 100 steps (1 to 100) the gate of dia never opened: its gradient points away from that of IP's own "
        "loss each time, and takes no part. Give a lower --threshold, or --vr-start clean, so that VR knows its task "
        "before it advises, or --strategy ip-only, which costs less"
    ]
    (text,) = told(watch(strategy="cosine-gated", vr_start="clean"), stream(gate=0.0))
    assert text.endswith("Give --strategy ip-only, which costs less")
    (text,) = told(watch(strategy="hqg", ip="hqgnet"), stream(gate=0.0))
    assert text.endswith("Give a lower --threshold, or --strategy hqg-only, which costs less")


def test_a_gate_that_never_closes():
    (text,) = told(watch(), stream(300, gate=1.0))
    assert text == (
        "in the last 100 steps (1 to 100) the gate of dia never closed: so far there was nothing that it protects IP "
        "from, and no harm in that. Where you expect conflicts: Give a higher --threshold, or --strategy joint, which "
        "is the same then"
    )
    (text,) = told(watch(strategy="ip-only", ip_aux="rec"), stream(gate=1.0, suffix="_rec"))
    assert text.endswith("You may leave rec out of --ip-aux")


@pytest.mark.parametrize("gate", [0.0, 1.0])
@pytest.mark.parametrize(
    "changes",
    [{"gate": "always"}, {"gate": "never"}, {"gate": "project"}, {"strategy": "joint"}, {"strategy": "frozen"},
     {"strategy": "pcgrad"}, {"strategy": "mgda"}, {"aux_weight": (0.0,)}],
)  # fmt: skip
def test_gates_that_decide_nothing_by_design(changes, gate):
    assert told(watch(**changes), stream(500, gate=gate)) == []


@pytest.mark.parametrize(
    ("changes", "rows_"),
    [
        ({}, stream(WINDOW - 1, gate=1.0)),
        ({}, stream(500, gate=lambda step: step % 50 == 0)),  # rarely is not never
        ({}, stream(500, gate=lambda step: step % 50 != 0)),
        ({"threshold": -1.0}, stream(500, gate=1.0)),  # what it was asked to be
        ({"gate": "soft"}, stream(500, gate=lambda step: 0.0 if step % 50 == 0 else 0.3)),
        ({"granularity": "tensor"}, stream(500, gate=0.9)),  # closed for one of ten tensors
        ({"granularity": "tensor", "gate": "soft"}, stream(500, gate=0.2)),  # which may be closed for some
        ({}, stream(99, gate=0.0) + stream(99, gate=1.0, begin=100)),
        # Skipped steps say nothing of gates: NaN or not, they are no steps of the window.
        ({}, stream(99, gate=0.0) + stream(5, gate=math.nan, skipped=1.0, begin=100)),
    ],
)  # fmt: skip
def test_no_false_alarm_of_gates(changes, rows_):
    assert told(watch(**changes), rows_) == []


def test_each_auxiliary_is_judged_by_itself():
    both = [
        one | other
        for one, other in zip(stream(gate=0.0, suffix="_dia"), stream(gate=sometimes, suffix="_seg"), strict=True)
    ]
    (text,) = told(watch(aux="dia,seg"), both)
    assert "the gate of dia never opened" in text
    mixed = [
        one | other for one, other in zip(stream(gate=0.0, suffix="_rec"), stream(gate=1.0, suffix="_dia"), strict=True)
    ]
    first, second = told(watch(ip_aux="rec"), mixed)
    assert "the gate of rec never opened" in first and first.endswith(
        "Give a lower --threshold, or leave rec out of --ip-aux"
    )
    assert "the gate of dia never closed" in second


def test_an_auxiliary_that_says_nothing():
    """A gradient of zero has the cosine 0, at which a hard gate is open: that is not why its gate never closes."""
    (text,) = told(watch(), stream(300, gate=1.0, aux=0.0))
    assert "the gradient of dia was zero 100 times" in text
    assert told(watch(), stream(300, gate=sometimes, aux=lambda step: step % 3 != 0)) == []


def test_steps_that_are_skipped():
    plain, half = watch(), watch(precision="fp16")
    for looker, advice in ((plain, "a lower --lr or --vr-lr or --aux-weight"), (half, "Give --precision bf16 or fp32")):
        (text,) = told(looker, stream(500, gate=sometimes, skipped=lambda step: step % 10 == 0))
        assert "10 of the last 100 steps, up to step 100, were skipped" in text and advice in text
    (text,) = told(watch(precision="fp16"), stream(60, skipped=1.0))
    assert text.startswith(f"the last {IN_A_ROW} steps, up to step 20, were skipped")
    # A run that has gone well, and comes to grief.
    (text,) = told(watch(), stream(300, gate=sometimes, skipped=lambda step: step > 200))
    assert "up to step 206" in text


@pytest.mark.parametrize(
    "skipped",
    [
        lambda step: step <= 16,  # float16 looks for its scale
        lambda step: step % 50 == 1,  # and tries another one now and then
        lambda step: step in (101, 102, 103, 104, 105),
    ],
)
def test_no_false_alarm_of_skipped_steps(skipped):
    assert told(watch(precision="fp16"), stream(500, gate=sometimes, skipped=skipped)) == []


@pytest.mark.parametrize("kind", [Display, Brief])
def test_warnings_are_seen(tmp_path, kind, monkeypatch):
    """Also in a comparison, which shows little else, and with the progress bar of a terminal; once."""
    monkeypatch.setattr("train.training.watch.WINDOW", 4)
    out = io.StringIO()
    display = kind(Console(file=out, force_terminal=kind is Display, width=300))
    engine = make(tmp_path / "run", gate="hard", threshold=1.0, log_every=1)
    display.begin(engine.strategy.measures, batch_size=4)
    train_with(engine, display)
    text = " ".join(out.getvalue().split())
    assert text.count("Warning: in the last 4 steps (1 to 4) the gate of dia never opened") == 1
