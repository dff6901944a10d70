"""``do_run``: what programs call, and what the command line prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import CRITIC, IP, SEG, VR
from train.degradations import DEGRADATIONS
from train.errors import RunError
from train.experiment import RunResult, do_run
from train.run import main
from train.strategies import STRATEGIES
from train.training.prepared import sources

from .tiny import arguments, config, digits


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_settings_in_and_results_out(capsys):
    result = do_run(config(max_steps=2))
    assert (result.step, result.steps, result.was_finished) == (2, 2, False)
    assert result.folder.parent == Path("runs")
    assert json.loads((result.folder / "metrics.json").read_text()) == result.metrics
    again = do_run(config(max_steps=2).change({"out": result.folder, "resume": str(result.folder)}))
    assert again == RunResult(result.folder, result.metrics, was_finished=True)
    assert capsys.readouterr().out == "", "nothing is printed"


def test_the_command_line_does_the_same():
    result = do_run(config(max_steps=2, out=Path("one")))
    assert main(arguments(max_steps=2, out="other")) == 0
    other = json.loads(Path("other/metrics.json").read_text())
    assert other | {"seconds": 0} == result.metrics | {"seconds": 0}
    assert digits(Path("one/steps.csv")) == digits(Path("other/steps.csv"))


@pytest.mark.parametrize("task", ["poisson:30", "blur:1.5", "poisson:30+blur:1.5", "sr2+gaussian:0.05"])
def test_a_task_without_sigma_ends_with_its_metrics(task, capsys):
    """A degradation without a sigma once trained to the end, and then died in the evaluation."""
    assert main(arguments(task=task, max_steps=1, out="run")) == 0
    metrics = json.loads(Path("run/metrics.json").read_text())
    assert metrics["sigma"] is None and metrics["task"] == task and metrics["psnr_classical"] > 0
    assert f"classical: {metrics['remedy']}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("strategy", ["gradprom", "frozen", "vr-only"])
@pytest.mark.parametrize("aux", ["seg", "dia,seg"])
def test_segmentation_is_measured_and_shown(strategy, aux, capsys):
    options = {"dataset": "tiny-masks", "strategy": strategy, "aux": aux, "seg": "tiny", "out": "run", "max_steps": 2}
    assert main(arguments(**options)) == 0
    metrics, out = json.loads(Path("run/metrics.json").read_text()), capsys.readouterr().out
    kinds = ["_degraded", "_clean"] + ([] if strategy == "vr-only" else [""])
    assert all(0 <= metrics[f"{score}{kind}"] <= 1 for score in ("miou", "dice") for kind in kinds)
    assert "mIoU" in out and "Dice" in out and ("diagnosis right" in out) == ("dia" in aux)
    assert metrics["aux"] == aux.split(",") and metrics["seg"] == "tiny"
    assert {name.split(".")[0] for name in load_file("run/weights.safetensors")} == {
        *([] if strategy == "vr-only" else ["ip"]),
        *(["vr"] if "dia" in aux else []),
        "seg",
    }
    pictures = {path.name for path in Path("run").glob("*.png")}
    gates = {"gate-dia.png", "gate-seg.png"} if aux == "dia,seg" and strategy != "vr-only" else {"gate.png"}
    assert pictures == {"panel.png"} | gates
    if aux == "dia,seg" and strategy != "vr-only":
        assert {"gate_open_share_dia", "gate_open_share_seg"} <= metrics.keys()
    assert main(["--resume", "run"]) == 0, "it is shown once more"


def test_first_weights_of_a_run(tmp_path):
    do_run(config(max_steps=2, out=Path("first"), strategy="vr-only", train_on="clean"))
    weights = load_file("first/weights.safetensors")
    result = do_run(
        config(max_steps=1, out=Path("second"), strategy="frozen", pretrain_epochs=0).change(
            {"vr_weights": Path("first/weights.safetensors")}
        )
    )
    second = load_file("second/weights.safetensors")
    assert all(torch.equal(value, second[name]) for name, value in weights.items()), "frozen, they stayed as they were"
    assert result.metrics["identity"] != do_run(config(max_steps=1, out=Path("third"))).metrics["identity"]
    config_file = json.loads(Path("second/config.json").read_text())
    assert config_file["auxiliary"]["vr_weights"] == "first/weights.safetensors"

    Path("first/weights.safetensors").unlink()  # a run that goes on has all weights in its checkpoint
    Path("second/metrics.json").unlink()
    assert main(["--resume", "second"]) == 0
    again = json.loads(Path("second/metrics.json").read_text())
    assert again | {"seconds": 0} == result.metrics | {"seconds": 0}


ALONE = {"alone_steps": 5, "alone_lr": 3e-3, "alone_batch_size": 3, "alone_crop": 10}


def test_an_ip_that_was_trained_alone(capsys):
    """Is that of a run of its own, trained once for each seed and task, and moved by what follows."""

    def weights_of(result: RunResult) -> dict[str, torch.Tensor]:
        return {k: v for k, v in load_file(result.folder / "weights.safetensors").items() if k.startswith("ip.")}

    own = {"lr": 3e-3, "batch_size": 3, "crop": 10, "epochs": 5, "max_steps": 5}
    expected = weights_of(do_run(config(strategy="ip-only", **own)))
    # A learning rate this small moves a float32 by less than its last digit.
    still = {"ip_start": "alone", **ALONE, "lr": 1e-30}
    begun = do_run(config(**still))
    assert weights_of(begun).keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(weights_of(begun)[name], values), name

    said = "Training IP alone"
    for changes, trained in [
        ({}, True),
        ({"strategy": "ip-only"}, False),
        ({"seed": 1}, True),
        ({"sigma": 0.3}, True),
        ({"alone_steps": 4}, True),
    ]:
        capsys.readouterr()
        assert main(arguments(ip_start="alone", **ALONE | {"alone_steps": 3} | changes)) == 0
        shown = capsys.readouterr()
        assert (said in shown.out + shown.err) == trained, changes


def test_what_is_kept_depends_on_every_source_of_a_training():
    """Else a network that was changed would begin with the weights of what it was before."""
    entries = [registry[name] for registry in (IP, VR, SEG, CRITIC, DEGRADATIONS, STRATEGIES) for name in registry]
    files = {
        sys.modules[entry.__module__].__file__
        for entry in entries
        if entry.__module__.startswith(("models.", "train."))
    }
    layers = {
        sys.modules[type(IP.build(name, channels=1, scale=2)).__module__].__file__ for name in IP if name[:4] != "tiny"
    }
    assert files | layers <= {str(path) for path in sources()}
    assert len(files) >= 30 and len(layers) > 3


def test_an_ip_begins_in_one_way(elsewhere, tmp_path):
    with pytest.raises(RunError, match="--ip-start alone and --ip-weights both say"):
        config(ip_start="alone", alone_crop=16, ip_weights=tmp_path / "weights.safetensors")
    with pytest.raises(RunError, match="--alone-crop 64 does not fit into images of --size"):
        config(ip_start="alone")
    with pytest.raises(RunError, match="learns from pairs, and strategy hqg-only has none"):
        config(ip_start="alone", alone_crop=16, strategy="hqg-only")
    config(strategy="vr-only", ip_start="alone", aux="dia")  # there is no IP


def test_bare_names_of_the_only_network():
    do_run(config(max_steps=1, out=Path("first"), strategy="ip-only"))
    weights = load_file("first/weights.safetensors")
    save_file({name.removeprefix("ip."): value for name, value in weights.items()}, "bare.safetensors")
    changes = {"ip_weights": Path("bare.safetensors"), "lr": 1e-12, "out": Path("second")}
    do_run(config(max_steps=1, strategy="ip-only").change(changes))
    for name, value in load_file("second/weights.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("strategy", ["gradprom", "ip-only"])
def test_weights_that_do_not_fit_are_listed_and_nothing_is_made(strategy, elsewhere):
    do_run(config(max_steps=1, out=Path("first"), strategy="ip-only"))
    weights = load_file("first/weights.safetensors")
    weights["ip.head.0.weight"] = torch.zeros(1, 2)
    weights["ip.extra"] = weights.pop("ip.tail.bias")
    save_file(weights, "other.safetensors")
    message = (
        r"^--ip-weights other\.safetensors does not fit --ip; missing: ip\.tail\.bias; unexpected: ip\.extra; "
        r"misshapen: ip\.head\.0\.weight \(\[1, 2\] there, \[4, 1, 3, 3\] here\)$"
    )
    with pytest.raises(RunError, match=message):
        do_run(config(strategy=strategy).change({"ip_weights": Path("other.safetensors")}))
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--vr-weights file cannot be read: No such file"),
        (b"text", "--vr-weights file is damaged, or no safetensors file: "),
    ],
)
def test_files_that_hold_no_weights(content, message):
    if content is not None:
        Path("file").write_bytes(content)
    with pytest.raises(RunError, match=message):
        do_run(config().change({"vr_weights": Path("file")}))
    assert not Path("runs").exists()
