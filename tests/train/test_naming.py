"""What tells runs apart: their names for people, their identities for programs."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from train.errors import RunError
from train.run import main
from train.settings import preset_settings
from train.settings.naming import LONGEST, identity, run_name

from .tiny import arguments

QUICK = preset_settings("quick")
DATA = {"data set": "x", "splits": {}}


def name(preset: str = "quick", task: str = "denoise0.1", source: str = "real", **changes) -> str:
    settings = preset_settings(preset).change(changes)
    digest = identity(settings, DATA, degradation=task)
    return run_name(settings, title="covidct", source=source, task=task, identity=digest)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "covidct-denoise0.1-gradprom-s0"),
        ({"seed": 7, "source": "phantom"}, "covidct-denoise0.1-gradprom-s7-PHANTOM"),
        ({"task": "gaussian:0.1+blur:1.5"}, "covidct-gaussian0.1+blur1.5-gradprom-s0"),
        ({"aux_weight": (0.01,), "gate": "soft"}, "covidct-denoise0.1-gradprom-lambda0.01-gatesoft-s0"),
        (
            {"aux": "dia,seg", "aux_weight": (0.01, 0.1)},
            "covidct-denoise0.1-gradprom-dia+seg-lambda0.01+0.1-s0",
        ),
        ({"strategy": "vr-only", "train_on": "clean"}, "covidct-denoise0.1-vr-only-train-onclean-s0"),
        ({"vr": "resnet50", "lr": 0.5}, "covidct-denoise0.1-gradprom-resnet50-lr0.5-s0"),
        ({"preset": "paper"}, "covidct-denoise0.1-gradprom-paper-s0"),
        ({"preset": "paper", "vr": "resnet18"}, "covidct-denoise0.1-gradprom-paper-resnet18-s0"),
        ({"ip.blocks": 8}, "covidct-denoise0.1-gradprom-blocks8-s0"),
        # What a strategy does not read does not tell two of its runs apart.
        ({"strategy": "ip-only", "aux_weight": (0.5,), "vr": "resnet50"}, "covidct-denoise0.1-ip-only-s0"),
        # Nor does where it runs, or what it shows.
        ({"num_workers": 3, "device": "cpu", "log_every": 7, "out": Path("x")}, "covidct-denoise0.1-gradprom-s0"),
    ],
)
def test_a_name_says_what_is_special(changes, expected):
    assert name(**changes) == expected


def test_a_name_is_one_of_a_file_everywhere():
    """However much is special: then a part of the identity tells runs apart."""
    much = {"size": 512, "lr": 0.123456789, "vr_lr": 0.987654321, "epochs": 12345, "crop": 96, "optimizer": "sgd"}
    much |= {"batch_size": 12, "ip.kernel": 5, "ip.norm": "batch", "max_steps": 123456, "aux": "seg,dia"}
    long, other = name(**much), name(**much | {"epochs": 12346})
    assert long != other and long.startswith("covidct-denoise0.1-gradprom-seg+dia-")
    for each in (long, other, name(task="poisson:30+blur:1.5"), name(task="../../x y\n*?")):
        assert re.fullmatch(r"[A-Za-z0-9.+=_-]+", each) and len(each) <= LONGEST + 20


CHANGES = [
    {"lr": 0.5},
    {"ip.blocks": 9},
    {"gate": "soft"},
    {"seed": 1},
    {"aux": "seg"},
    {"max_steps": 3},
    {"strategy": "joint"},
    {"source": "real"},
]


def identified(changes: dict | None = None, data: dict = DATA, degradation: str = "gaussian:0.1") -> str:
    return identity(QUICK.change(changes or {}), data, degradation=degradation)


def test_an_identity_is_that_of_what_is_computed(tmp_path):
    own = identified()
    assert re.fullmatch("[0-9a-f]{16}", own)
    others = [identified(change) for change in CHANGES]
    others += [identified(data={"data set": "y"}), identified(degradation="gaussian:0.2")]
    assert len({own, *others}) == len(others) + 1
    elsewhere = {"data_root": tmp_path, "out": tmp_path, "device": "cpu", "num_workers": 3, "tensorboard": True}
    assert identified(elsewhere) == own
    assert identified({"task": "gaussian:0.1", "sigma": 0.7}) == own, "however it was written"


def test_an_identity_is_for_good():
    """It stands in the folders of runs: a setting that is added must not change it. (This value was once computed.)"""
    assert identified() == "ca45c6c28b4bc55a"


def test_weights_count_by_their_content(tmp_path):
    files = [tmp_path / each for each in "abc"]
    for file, content in zip(files, (b"1", b"1", b"2"), strict=True):
        file.write_bytes(content)
    one, same, other = (identified({"ip_weights": file}) for file in files)
    assert one == same != other != identified()
    with pytest.raises(RunError, match="--ip-weights nowhere cannot be read: No such file"):
        identified({"ip_weights": Path("nowhere")})


def test_three_noises_are_told_apart(tmp_path, monkeypatch, capsys):
    """Their folders were x, x-2 and x-3 once; --resume latest finds the one that is meant."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    for sigma in (0.1, 0.2, 0.3):
        assert main(arguments(strategy="ip-only", sigma=sigma, max_steps=1)) == 0
    folders = {sigma: next(Path("runs").glob(f"tiny-denoise{sigma}-ip-only-*")) for sigma in (0.1, 0.2, 0.3)}
    assert len(set(folders.values())) == len(list(Path("runs").iterdir())) == 3
    for time, folder in enumerate(folders.values()):
        os.utime(folder / "checkpoint.pt", (1e9 + time, 1e9 + time))
    capsys.readouterr()
    for sigma, folder in folders.items():
        assert main(["--resume", "latest", "--sigma", str(sigma)]) == 0
        assert f"{folder} is finished" in capsys.readouterr().out
        assert json.loads((folder / "metrics.json").read_text())["sigma"] == sigma
    identities = {json.loads((folder / "metrics.json").read_text())["identity"] for folder in folders.values()}
    assert len(identities) == 3
