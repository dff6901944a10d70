"""Runs that earlier versions have left in the midst (``old_runs/``) are read, and go on, bit for bit.

``version-1``: strategy gradprom with a soft gate, stopped after step 4 of 6; before there was a ``data.json``.
``version-1-with-data``: strategy frozen, stopped after step 5 of 9, in its second phase. ``finished`` holds what the
versions that began them have made of them.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.run import main
from train.settings import from_json, parse

from .test_engine import make
from .tiny import arguments, config, digits

RUNS = Path(__file__).parent / "old_runs"
OF = {
    "version-1": {"strategy": "gradprom", "gate": "soft", "seed": 3, "max_steps": 6},
    "version-1-with-data": {"strategy": "frozen", "max_steps": 6},
}


@pytest.fixture(params=OF)
def run(request, tmp_path, monkeypatch) -> Path:
    """A copy to go on with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(RUNS / request.param, request.param, ignore=shutil.ignore_patterns("finished"))
    return Path(request.param)


def finished(run: Path) -> Path:
    return RUNS / run.name / "finished"


def test_the_settings_are_those_it_was_given(run):
    settings = from_json(json.loads((run / "config.json").read_text()))
    given = config(**OF[run.name]).change({"out": Path("part")})
    assert settings == given
    assert parse(["--resume", str(run)]) == given.change({"out": run, "resume": str(run)})


def test_the_checkpoint_is_taken_up_bit_for_bit(run):
    engine = make(run, **OF[run.name])
    engine.resume()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert engine.step == state["step"]
    for key, learner in engine.strategy.learners.items():
        for name, value in learner.network.state_dict().items():
            assert torch.equal(value, state[key][name])
        for place, parts in state[f"{key}_optimizer"]["state"].items():
            own = learner.optimizer.state_dict()["state"][place]
            assert all(torch.equal(torch.as_tensor(own[name]), torch.as_tensor(parts[name])) for name in parts)
        assert learner.schedule.last_epoch == state[f"{key}_schedule"]["last_epoch"]
    assert torch.equal(torch.get_rng_state(), state["random"]["cpu"])


def test_it_ends_as_it_would_have(run):
    begun = (run / "steps.csv").read_bytes()
    assert main(["--resume", str(run)]) == 0
    steps = (run / "steps.csv").read_bytes()
    weights, expected = (load_file(each / "weights.safetensors") for each in (run, finished(run)))
    assert steps.startswith(begun) and weights.keys() == expected.keys()
    # The last digits are those of the processor: on one like that of the recorded run, all of them are the same.
    assert main(arguments(**OF[run.name], out="anew")) == 0
    before = finished(run) / "steps.csv"
    if digits(Path("anew/steps.csv"), like=before) == digits(before):
        assert steps == (finished(run) / "steps.csv").read_bytes()
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4)
    with (run / "steps.csv").open() as own, (finished(run) / "steps.csv").open() as other:
        for one, another in zip(csv.DictReader(own), csv.DictReader(other), strict=True):
            assert (one["phase"], one["skipped"]) == (another["phase"], another["skipped"])
            for name in ("loss", "psnr", "aux_loss", "lr"):
                assert float(one[name] or 0) == pytest.approx(float(another[name] or 0), rel=1e-3)
    metrics, before = (json.loads((each / "metrics.json").read_text()) for each in (run, finished(run)))
    assert before.keys() <= metrics.keys()
    assert metrics["psnr"] == pytest.approx(before["psnr"], rel=1e-3)


def test_what_it_achieved_is_shown(run, capsys):
    shutil.copy(finished(run) / "metrics.json", run)
    assert main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    metrics = json.loads((run / "metrics.json").read_text())
    assert "nothing to continue" in out and f"{metrics['psnr']:.2f}" in out and "classical: non-local means" in out


def test_a_setting_of_its_own_is_not_changed(run, capsys):
    assert main(["--resume", str(run), "--blocks", "2"]) == 2
    assert "--ip.blocks would change them" in capsys.readouterr().err
