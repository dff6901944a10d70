"""One run by several processes: what they train is what one process trains with the whole batches."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from models import VR
from train.degradations import Gaussian
from train.errors import RunError
from train.interruption import Stop
from train.outputs.run_folder import RunFolder
from train.team import ALONE, Team
from train.training.build import build
from train.training.engine import Cadence, Engine
from train.training.progress import Display
from train.training.step_log import PERFORMANCE

from ..gradprom_ext.processes import start, together
from .tiny import arguments, config, image_data

ROOT = Path(__file__).resolve().parents[2]


@VR.register("tiny-plain")
def tiny_plain(*, channels: int, num_classes: int) -> nn.Module:
    """Without batch statistics and dropout, which would see a part of a batch."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


PLAIN = {"vr": "tiny-plain", "optimizer": "sgd", "lr": 0.05, "vr_lr": 0.05, "aux_weight": (0.1,)}
RUNS: dict[str, dict[str, Any]] = {
    "ip-only": {"strategy": "ip-only", **PLAIN},
    "gradprom": {"strategy": "gradprom", **PLAIN},
    "pcgrad": {"strategy": "pcgrad", **PLAIN},
    "frozen": {"strategy": "frozen", **PLAIN},
    "ema": {"strategy": "gradprom", "vr_update": "ema", **PLAIN},
    "vr-only": {"strategy": "vr-only", **PLAIN},
}
"""Strategies whose digits do not depend on how a batch is shared, but for rounding."""
OTHERS: dict[str, dict[str, Any]] = {
    "batch statistics and dropout": {"strategy": "gradprom"},
    "masked": {"strategy": "masked"},
    "masked in float16": {"strategy": "masked", "precision": "fp16"},
    "float16": {"strategy": "gradprom", "precision": "fp16"},
    "hqg": {"strategy": "hqg", "ip": "hqgnet", "ip.width": 2, "ip.levels": 1, "task": "illumination", "crop": 16},
}
"""Strategies whose replicas must stay the same all the same."""


def engine_of(folder: Path, team: Team = ALONE, **changes: Any) -> Engine:
    folder.mkdir(parents=True, exist_ok=True)
    settings = config(**changes)
    from train.experiment import look_up

    degrade = look_up(settings) if "task" in changes else Gaussian(0.1)
    experiment = build(settings, image_data(), degrade, device=torch.device("cpu"), team=team)
    cadence = Cadence(settings.output.log_every, settings.output.checkpoint_every)
    return Engine(experiment, RunFolder(folder), cadence, begun=time.monotonic())


def train(engine: Engine, stop: Stop | None = None) -> bool:
    return engine.train(Display(Console(quiet=True)), stop or Stop())


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    networks = engine.strategy.networks | engine.strategy.companions
    return {f"{name}.{key}": v.clone() for name, each in networks.items() for key, v in each.state_dict().items()}


def rows(engine: Engine) -> dict[str, Any]:
    """The step log, without what differs from run to run."""
    return {name: values for name, values in engine.log.read().items() if name not in PERFORMANCE}


def everyone() -> Team:
    return Team(dist.group.WORLD)


# --- in the processes ---


def trained(rank: int, number: int, *, folder: str, changes: dict[str, Any]) -> Any:
    engine = engine_of(Path(folder) / str(rank), everyone(), **changes)
    finished = train(engine)
    return finished, weights(engine), rows(engine), float(torch.rand(()))


def stopped_and_resumed(rank: int, number: int, *, folder: str) -> Any:
    """A signal reaches the second process alone, in its third step; both stop at the next look, and go on later."""

    class Asked(Stop):
        @property
        def requested(self) -> bool:  # type: ignore[override]
            return rank == 1 and engine.step >= 3

    changes = {"strategy": "gradprom", "log_every": 2, "checkpoint_every": 100}
    engine = engine_of(Path(folder) / str(rank), everyone(), **changes)
    finished, step = train(engine, Asked()), engine.step
    dist.barrier()
    own = Path(folder) / "later" / str(rank)
    again = engine_of(own if rank else Path(folder) / "0", everyone(), **changes)
    again.resume(None if rank == 0 else RunFolder(Path(folder) / "0"))
    begins = again.step
    return finished, step, begins, train(again), weights(again), rows(again)


def looked(rank: int, number: int, *, folder: str, who: int | None) -> Any:
    """
    :param who: which process is asked to stop while the first one looks at the validation images for the first time.
    """
    from .test_validation import LOOKING, StopInLook, make

    class Asked(Stop):
        @property
        def requested(self) -> bool:  # type: ignore[override]
            return rank == who and bool(engine.validation.looks)  # type: ignore[union-attr]

    own = Path(folder) / str(rank)
    engine = make(own, team=everyone(), **LOOKING)
    finished = train(engine, StopInLook(engine, 1) if rank == who == 0 else Asked())
    stopped = engine.step, len(engine.validation.looks)  # type: ignore[union-attr]
    dist.barrier()
    if not finished:
        engine = make(own, team=everyone(), **LOOKING)
        engine.resume(None if rank == 0 else RunFolder(Path(folder) / "0"))
        finished = train(engine)
    files = sorted(path.name for path in own.iterdir() if "checkpoint" not in path.name)
    return finished, stopped, weights(engine), engine.validation.looks, files, float(torch.rand(()))  # type: ignore[union-attr]


def not_finite_on_one(rank: int, number: int, *, folder: str, strategy: str) -> Any:
    """In the second step a pixel of the second process's images is not a number."""
    engine = engine_of(Path(folder) / str(rank), everyone(), strategy=strategy)
    before: list[dict[str, torch.Tensor]] = []
    learn = engine.strategy.losses

    def spoiled(batch: Any) -> Any:
        before.append(weights(engine))
        if len(before) == 2 and rank == 1:
            batch.degraded[0, 0, 0, 0] = math.nan
            batch.clean[0, 0, 0, 0] = math.nan
        return learn(batch)

    engine.strategy.losses = spoiled  # type: ignore[method-assign]
    with contextlib.suppress(RunError):  # of a loss that was not finite when it was looked at
        train(engine)
    return before[1], before[2] if len(before) > 2 else weights(engine)


def agreements(rank: int, number: int) -> Any:
    team = everyone()
    order = []
    hasty = Team(dist.new_group(timeout=timedelta(seconds=5)))
    with hasty.leader_first():
        if hasty.leads:
            time.sleep(7)  # it trains what the others will need
        order.append(time.monotonic())
    return {
        "any": (team.any(rank == 1), team.any(False)),
        "told": team.told(f"process {rank}"),
        "all": team.all(rank),
        "mean": team.mean({"a": torch.tensor(float(rank)), "b": torch.tensor(2.0)}),
        "part": list(team.part([0, 1, 2, 3])),
        "alone": (team.alone().size, team.alone().rank, team.alone() is team.alone()),
        "when": order[0],
    }


def refused(rank: int, number: int, *, folder: str) -> Any:
    def message(**changes: Any) -> str:
        with pytest.raises(RunError) as refusal:
            engine_of(Path(folder) / str(rank), everyone(), strategy="ip-only", **changes)
        return str(refusal.value)

    return message(batch_size=3), message(sync_batchnorm=True)


def deserted(rank: int, number: int, *, folder: str) -> Any:
    """The second process ends without a word in its third step."""
    engine = engine_of(Path(folder) / str(rank), everyone(), strategy="ip-only")
    learn = engine.strategy.losses

    def losses(batch: Any) -> Any:
        if rank == 1 and engine.step == 2:
            os._exit(0)
        return learn(batch)

    engine.strategy.losses = losses  # type: ignore[method-assign]
    try:
        train(engine)
    except RunError as error:
        (Path(folder) / "told").write_text(str(error))
    os._exit(0)


# --- the tests ---


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("two")
    works: dict[str, tuple[str, dict[str, Any]]] = {
        name: ("trained", {"folder": str(folder / name), "changes": changes})
        for name, changes in (RUNS | OTHERS).items()
    }
    for strategy in ("gradprom", "vr-only", "masked"):
        name = f"not finite, {strategy}"
        works[name] = ("not_finite_on_one", {"folder": str(folder / name), "strategy": strategy})
    works["stopped"] = ("stopped_and_resumed", {"folder": str(folder / "stopped")})
    works["blind"] = ("trained", {"folder": str(folder / "blind"), "changes": {"strategy": "gradprom", "epochs": 3}})
    for who in (None, 0, 1):
        works[f"looked {who}"] = ("looked", {"folder": str(folder / f"looked-{who}"), "who": who})
    works["agreements"] = ("agreements", {})
    works["refused"] = ("refused", {"folder": str(folder / "refused")})
    return {"folder": [folder], **together(folder, 2, __name__, works)}


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, two: dict[str, list[Any]], tmp_path: Path) -> None:
    engine = engine_of(tmp_path, **RUNS[name])
    assert train(engine)
    wanted, start_ = weights(engine), weights(engine_of(tmp_path / "start", **RUNS[name]))
    assert any((wanted[key] - start_[key]).abs().max() > 1e-3 for key in wanted), "something was learned"
    for finished, found, _, _ in two[name]:
        assert finished
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    ours, theirs = two[name][0][2], rows(engine)
    for column, values in theirs.items():
        if column != "psnr":  # the mean of the parts' PSNRs is not that of the whole
            torch.testing.assert_close(
                torch.tensor(ours[column]), torch.tensor(values), rtol=1e-3, atol=1e-5, equal_nan=True
            )


@pytest.mark.parametrize("name", [*RUNS, *OTHERS])
def test_replicas_stay_the_same(name: str, two: dict[str, list[Any]]) -> None:
    (_, one, seen, drawn), (_, other, seen_there, drawn_there) = two[name]
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    for column in seen:
        assert (torch.tensor(seen[column]).nan_to_num() == torch.tensor(seen_there[column]).nan_to_num()).all()
    assert drawn != drawn_there, "each process draws its own numbers for dropout"


def test_a_signal_to_one_process_stops_all_and_they_go_on_bit_for_bit(
    two: dict[str, list[Any]], tmp_path: Path
) -> None:
    whole = two["batch statistics and dropout"][0]
    for finished, step, begins, finished_later, found, seen in two["stopped"]:
        assert (finished, step, begins, finished_later) == (False, 4, 4, True)
        assert [key for key in found if not torch.equal(found[key], whole[1][key])] == []
        assert seen["step"].tolist() == [1, 2, 3, 4, 5, 6]
    # And one process goes on with what two have begun.
    alone = engine_of(two["folder"][0] / "stopped" / "0", strategy="gradprom")
    alone.step = 0
    alone.resume()
    assert alone.step == 6 and [k for k, v in weights(alone).items() if not torch.equal(v, whole[1][k])] == []


@pytest.mark.parametrize("who", [None, 0, 1])
def test_one_process_looks_at_validation_images_and_all_wait(who: int | None, two: dict[str, list[Any]]) -> None:
    """And go on with the digits of a training that nobody has looked at; a signal meanwhile stops all of them."""
    (blind, other_blind), (first, second) = two["blind"], two[f"looked {who}"]
    for without, (finished, stopped, found, looks, _, drawn) in ((blind, first), (other_blind, second)):
        assert finished
        # The process that looks leaves off at once; where another one is asked, the look is done first.
        assert stopped == {None: (9, 3), 0: (3, 0), 1: (3, 1)}[who]
        assert [key for key in found if not torch.equal(found[key], without[1][key])] == []
        assert drawn == without[3] and [look.step for look in looks] == [3, 6, 9]
    assert first[3] == second[3] == two["looked None"][0][3]
    assert first[4] == ["best.safetensors", "steps.csv", "validation.csv"] and second[4] == ["steps.csv"]


@pytest.mark.parametrize("strategy", ["gradprom", "vr-only", "masked"])
def test_a_loss_that_is_not_finite_in_one_process_moves_none(strategy: str, two: dict[str, list[Any]]) -> None:
    for before, after in two[f"not finite, {strategy}"]:
        assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_what_processes_agree_on(two: dict[str, list[Any]]) -> None:
    first, second = two["agreements"]
    for each in (first, second):
        assert each["any"] == (True, False) and each["told"] == "process 0" and each["all"] == [0, 1]
        assert {name: float(value) for name, value in each["mean"].items()} == {"a": 0.5, "b": 2.0}
        assert each["alone"] == (1, 0, True)
    assert first["part"] == [0, 1] and second["part"] == [2, 3] and first["when"] <= second["when"]


def test_what_processes_cannot_do(two: dict[str, list[Any]]) -> None:
    for uneven, synchronized in two["refused"]:
        assert uneven == (
            "--batch-size 3 is that of all processes together, and 2 cannot share it evenly; give --batch-size 4"
        )
        assert synchronized.startswith("--sync-batchnorm works on GPUs alone")


def test_torchrun_trains_one_run(tmp_path: Path) -> None:
    arguments_ = arguments(strategy="gradprom", out=tmp_path / "run", checkpoint_every=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GRADPROM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "tests.train.tiny", *arguments_], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("took ") == 1, "one process alone says what came of it"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["steps"] == 6
    assert not (tmp_path / "run" / "run.lock").exists()


def test_a_comparison_is_not_for_torchrun(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from train.compare import main

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["--recipe", "gates"]) == 2
    assert "torchrun -m train.run for a single run" in capsys.readouterr().err


def test_a_process_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    start(tmp_path, 2, __name__, {"deserted": ("deserted", {"folder": str(tmp_path / "run")})})
    told = (tmp_path / "run" / "told").read_text()
    assert told.startswith("process 0 of 2 lost another process of this run (") and "--resume" in told
