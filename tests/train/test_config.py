from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import pytest

from train import config as config_file
from train.config import CHANGEABLE, PRESETS, RunConfig, flag, parse
from train.errors import RunError
from train.files import locked

QUICK, PAPER = PRESETS["quick"], PRESETS["paper"]


def test_presets_are_complete_and_different():
    assert QUICK != PAPER
    assert {name: preset.preset for name, preset in PRESETS.items()} == {"quick": "quick", "paper": "paper"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_its_values(preset):
    assert parse(["--preset", preset]) == PRESETS[preset]
    assert parse([f"--preset={preset}"]) == PRESETS[preset]


@pytest.mark.parametrize("order", [1, -1])
def test_a_flag_beats_the_preset(order):
    pairs = [["--preset", "paper"], ["--batch-size", "3"], ["--lr", "0.5"]]
    parsed = parse([part for pair in pairs[::order] for part in pair])
    assert parsed == dataclasses.replace(PAPER, batch_size=3, lr=0.5)


@pytest.mark.parametrize(
    ("gpu", "device", "preset"), [(True, "auto", PAPER), (True, "cpu", QUICK), (False, "auto", QUICK)]
)
def test_auto_goes_by_the_device(monkeypatch, gpu, device, preset):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    assert parse(["--device", device]) == dataclasses.replace(preset, device=device)


def test_json_is_the_settings(tmp_path):
    config = RunConfig(data_root=tmp_path, out=tmp_path / "run", max_steps=5, gate="soft")
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("epochs", 0),
        ("max_steps", 0),
        ("blocks", -1),
        ("seed", -1),
        ("sigma", -0.1),
        ("sigma", math.nan),
        ("aux_weight", math.nan),
        ("aux_weight", -1.0),
        ("aux_weight", math.inf),
        ("lr", 0.0),
        ("lr", math.nan),
        ("num_workers", -1),
    ],
)
def test_out_of_range(name, value):
    with pytest.raises(RunError, match=rf"^{flag(name)} must be .*, not {value}$"):
        parse([f"{flag(name)}={value}"])


def test_a_crop_larger_than_the_image():
    with pytest.raises(RunError, match="--crop 64 does not fit into images of --size 32"):
        parse(["--size", "32", "--crop", "64"])


@pytest.fixture
def run_folder(tmp_path):
    """A run of preset quick with a learning rate of its own, and an (empty) checkpoint."""
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "checkpoint.pt").touch()
    settings = dataclasses.replace(QUICK, lr=0.125, out=folder).to_json()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_resume_takes_the_settings_of_the_run(run_folder):
    parsed = parse(["--resume", str(run_folder)])
    assert parsed == dataclasses.replace(QUICK, lr=0.125, out=run_folder, resume=str(run_folder))


def test_resume_allows_what_changes_no_result(run_folder):
    assert parse(["--resume", str(run_folder), "--num-workers", "3", "--lr", "0.125"]).num_workers == 3


@pytest.mark.parametrize("change", [["--lr", "0.5"], ["--strategy", "joint"], ["--seed", "7"], ["--out", "elsewhere"]])
def test_resume_refuses_other_settings(run_folder, change):
    with pytest.raises(RunError, match=f"and {change[0]} would change them"):
        parse(["--resume", str(run_folder), *change])


def test_resume_latest(run_folder, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("empty"))
    with pytest.raises(RunError, match="--resume latest: no run with a checkpoint under runs/"):
        parse(["--resume", "latest"])
    monkeypatch.setattr(config_file, "RUNS", run_folder.parent)
    assert parse(["--resume", "latest"]).out == run_folder


def test_resume_latest_passes_over_runs_at_work(run_folder, monkeypatch, caplog):
    monkeypatch.setattr(config_file, "RUNS", run_folder.parent)
    newer = run_folder.with_name("newer")
    shutil.copytree(run_folder, newer)
    os.utime(run_folder / "checkpoint.pt", (1e9, 1e9))
    os.utime(newer / "checkpoint.pt", (2e9, 2e9))
    assert parse(["--resume", "latest"]).out == newer
    with locked(newer):
        assert parse(["--resume", "latest"]).out == run_folder
        assert f"{newer} is at work; the latest run that is not: {run_folder}" in caplog.text
        with locked(run_folder), pytest.raises(RunError, match=r"--resume latest: every run under .* is at work"):
            parse(["--resume", "latest"])
    assert parse(["--resume", "latest"]).out == newer


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", "fast"),
        ("lr", None),
        ("lr", True),
        ("size", 1.5),
        ("channels", 7),
        ("gate", "iron"),
        ("device", "tpu"),
        ("dataset", 5),
        ("out", 5),
        ("data_root", [1]),
        ("tensorboard", "yes"),
        ("epochs", 0),
    ],
)
def test_resume_with_a_damaged_setting(run_folder, name, value):
    path = run_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(RunError, match=rf"config\.json does not hold the settings of a run: .*{flag(name)[2:6]}.*"):
        parse(["--resume", str(run_folder)])


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch, run_folder):
    """A shell does not expand the one in ``--out=~/x``."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parse(["--out=~/x", "--data-root=~/y"])
    assert (parsed.out, parsed.data_root) == (tmp_path / "x", tmp_path / "y")
    parsed = parse(["--resume=~/runs/run", "--out=~/runs/run", "--data-root=~/y"])
    assert (parsed.out, parsed.data_root) == (run_folder, tmp_path / "y")


@pytest.mark.parametrize("name", ["out", "data_root", "resume"])
def test_a_tilde_without_a_home(name):
    with pytest.raises(RunError, match=f"^{flag(name)} ~no-such-user/x: there is no such home directory"):
        parse([f"{flag(name)}=~no-such-user/x"])


@pytest.mark.parametrize("missing", ["checkpoint.pt", "config.json"])
def test_resume_without_a_file(run_folder, missing):
    (run_folder / missing).unlink()
    with pytest.raises(RunError, match=f"the folder has no {missing}"):
        parse(["--resume", str(run_folder)])


@pytest.mark.parametrize("content", ["", "[1]", "{}", '{"lr": 1}'])
def test_resume_with_damaged_settings(run_folder, content):
    (run_folder / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json (is damaged|does not hold the settings of a run): "):
        parse(["--resume", str(run_folder)])


def test_everything_has_a_flag_and_a_help_text():
    code = "import sys, train.config\ntry: train.config.parse(['--help'])\nfinally: assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    assert all(flag(name) in shown.stdout for name in RunConfig.field_names())
    assert set(RunConfig.field_names()) >= CHANGEABLE


@pytest.mark.parametrize("wrong", [["--preset", "slow"], ["--gate", "iron"], ["--epochs", "many"], ["--nonsense"]])
def test_unreadable_flags_end_with_status_2(wrong, capsys):
    with pytest.raises(SystemExit) as error:
        parse(wrong)
    assert error.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
