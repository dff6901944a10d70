from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from train.run import main
from train.strategies import STRATEGIES

from . import tiny
from .tiny import arguments

KEYS = {
    "data",
    "dataset",
    "strategy",
    "seed",
    "psnr_degraded",
    "psnr",
    "psnr_classical",
    "ssim_degraded",
    "ssim_classical",
    "ssim",
    "accuracy",
    "accuracy_degraded",
    "accuracy_clean",
    "gate_open_share",
    "n_test",
    "seconds",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GRADPROM_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_run(strategy, capsys):
    own = {"strategy": strategy, "max_steps": 3, "epochs": 3}  # half of the images make one step of an epoch
    assert main(arguments(**own)) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name == tiny.name_of(**own)
    files = {
        "config.json",
        "data.json",
        "steps.csv",
        "metrics.json",
        "checkpoint.pt",
        "checkpoint-1.pt",
        "weights.safetensors",
        "panel.png",
        "gate.png",
        "images.csv",
    }
    assert {path.name for path in folder.iterdir()} == files
    for name in ("panel.png", "gate.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    metrics = metrics_of(folder)
    assert metrics.keys() >= KEYS
    assert (metrics["data"], metrics["dataset"], metrics["strategy"], metrics["n_test"]) == (
        "phantom",
        "tiny",
        strategy,
        6,
    )
    assert metrics["steps"] == 3 and metrics["steps_skipped"] == 0
    shares = [metrics[key] for key in ("accuracy", "accuracy_degraded", "accuracy_clean", "gate_open_share")]
    if strategy in ("ip-only", "hqg-only", "masked"):
        assert shares == [None] * 4
    elif strategy == "vr-only":
        assert shares[0] is shares[3] is metrics["psnr"] is None and all(0 <= share <= 1 for share in shares[1:3])
    else:
        assert all(0 <= share <= 1 for share in shares)
    assert (strategy in ("joint", "frozen")) <= (metrics["gate_open_share"] == 1)

    out = capsys.readouterr().out
    assert "PHANTOM" in out and f"{metrics['psnr_classical']:.2f}" in out and str(folder) in out
    if strategy not in ("vr-only", "masked"):
        assert f"{metrics['psnr']:.2f}" in out and f"backend {metrics['backend']}" in out


def test_a_run_on_real_images(shared_data):
    root = shared_data("COVID-CT").parent
    real = {"dataset": "covidct", "data_root": root, "source": "real", "size": 32, "max_steps": 2}
    assert main(arguments(**real)) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("covidct-denoise0.1-gradprom-") and not folder.name.endswith("PHANTOM")
    metrics = metrics_of(folder)
    assert (metrics["data"], metrics["n_test"]) == ("real", 203)
    assert 20 < metrics["psnr_degraded"] < 22  # of sigma 0.1, clamped


def test_the_run_folder_tells_all(capsys):
    assert main(arguments(max_steps=2, out="here", num_workers=1)) == 0
    settings = json.loads(Path("here/config.json").read_text())
    assert settings["data"]["source"] == "phantom" and settings["training"]["device"] == "cpu"
    assert settings["preset"] == "quick" and settings["version"] == 2
    assert settings["identity"] == metrics_of(Path("here"))["identity"]
    checkpoint = torch.load("here/checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 2
    with safe_open("here/weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"]) == settings | {"output": settings["output"] | {"out": None}}
        assert {name.split(".")[0] for name in file.keys()} == {"ip", "vr"}  # noqa: SIM118 (it is no dict)
        assert torch.equal(file.get_tensor("ip.tail.weight"), checkpoint["ip"]["tail.weight"])


def test_numbers_are_reproducible():
    for out in ("one", "other"):
        assert main(arguments(max_steps=3, out=out)) == 0
    one, other = metrics_of(Path("one")), metrics_of(Path("other"))
    assert one | {"seconds": 0} == other | {"seconds": 0}


def test_super_resolution(capsys):
    assert main(arguments(task="sr2", max_steps=2, out="sr")) == 0
    metrics = metrics_of(Path("sr"))
    assert metrics["psnr_classical"] == pytest.approx(metrics["psnr_degraded"])  # both are bicubic interpolation
    assert "classical: bicubic" in capsys.readouterr().out


def test_without_noise_every_image_counts_with_the_cap(capsys):
    assert main(arguments(sigma=0, max_steps=1, out="noiseless")) == 0
    metrics = metrics_of(Path("noiseless"))
    assert metrics["psnr_degraded"] == metrics["psnr_classical"] == metrics["psnr_cap"]
    assert metrics["psnr_capped_degraded"] == metrics["psnr_capped_classical"] == metrics["n_test"]
    assert "reached by 6 degraded, 6 classical" in capsys.readouterr().out


def test_a_network_that_makes_nan_has_no_mean(capsys, monkeypatch):
    """Nor an image among the well enhanced ones of the panel."""
    from train import experiment
    from train.evaluation import evaluate

    forward, shown = evaluate.forward, {}

    def spoiled(network, images, **options):
        result = forward(network, images, **options)
        if result.ndim == 4:
            result[0] = math.nan
        return result

    def spy(path, **panel):
        shown.update(panel)
        save(path, **panel)

    save = experiment.save_panel
    monkeypatch.setattr(evaluate, "forward", spoiled)
    monkeypatch.setattr(experiment, "save_panel", spy)
    assert main(arguments(max_steps=1, out="spoiled")) == 0
    metrics = json.loads(Path("spoiled/metrics.json").read_text(), parse_constant=pytest.fail)
    assert (metrics["psnr"], metrics["ssim"], metrics["undefined"], metrics["undefined_degraded"]) == (None, None, 1, 0)
    assert "NaN in 1 enhanced images, so there is no mean" in capsys.readouterr().out
    assert [bool(image.isnan().any()) for image in shown["enhanced"]] == [True, False, False]  # the worst of the three


def test_an_older_run_is_never_overwritten(capsys):
    for _ in range(2):
        assert main(arguments(max_steps=1, strategy="ip-only")) == 0
    name = tiny.name_of(strategy="ip-only", max_steps=1)
    assert sorted(path.name for path in Path("runs").iterdir()) == [name, f"{name}-2"]


def test_resuming_a_finished_run_shows_it(capsys):
    assert main(arguments(max_steps=1, out="done")) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("done").iterdir()}
    assert main(["--resume", "done"]) == 0
    assert "nothing to continue" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in Path("done").iterdir()} == before


def test_tensorboard():
    pytest.importorskip("tensorboard")
    assert main([*arguments(max_steps=2, out="seen"), "--tensorboard"]) == 0
    assert list(Path("seen/tensorboard").glob("events.*"))


def test_tensorboard_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*arguments(max_steps=1, out="unseen"), "--tensorboard"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert not Path("unseen").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size must be at least 1, not 0"),
        ({"epochs": 0}, "--epochs must be at least 1, not 0"),
        ({"sigma": -0.1}, "--sigma must be a finite number, at least 0, not -0.1"),
        ({"aux_weight": "nan"}, "--aux-weight must be a finite number, at least 0, not nan"),
        ({"lr": -1}, "--lr must be a finite number above 0, not -1.0"),
        ({"dataset": "list"}, "unknown data set 'list'; choose from: "),
        ({"task": "list"}, "unknown degradation 'list'; choose from: denoise, sr2, sr3, sr4, mixture (blur:1+"),
        ({"ip": "list"}, "unknown IP network 'list'; choose from: "),
        ({"vr": "list"}, "unknown VR network 'list'; choose from: resnet18, resnet50, resnet101"),
        (
            {"strategy": "list"},
            f"unknown strategy 'list'; choose from: {', '.join(STRATEGIES)}",
        ),
        ({"strategy": "joint", "gate": "hard"}, "--strategy joint fixes its own gate"),
        ({"task": "sr4", "crop": 10}, "--crop 10 is no multiple of 4, which --task sr4 needs; give --crop 8"),
        (
            {"task": "sr3"},
            "--size 16 and --crop 8 are no multiples of 3, which --task sr3 needs; give --size 15 --crop 9",
        ),
        ({"batch_size": 14}, "--batch-size 14 exceeds the 13 training images"),
        ({"data_root": __file__, "source": "real", "dataset": "covidct"}, f"the data root {__file__} is a file"),
        ({"out": __file__}, f"--out {__file__} is a file"),
        ({"out": Path(__file__).parent}, "is not empty; give another folder, or --resume"),
        ({"out": Path(__file__) / "run"}, "cannot be made: Not a directory"),
    ],
)
def test_errors_of_the_user(changes, message, capsys, elsewhere):
    assert main(arguments(**changes)) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("Error: ") and message in shown.err
    assert len(shown.err.strip().splitlines()) == 1, "one paragraph"
    assert not any(path.name != "cache" for path in elsewhere.iterdir()), "nothing is left behind"


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(arguments(device="cuda")) == 2
    assert "--device cuda: PyTorch sees no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("resume", ["nowhere", "latest", "."])
def test_nothing_to_resume(resume, capsys):
    assert main(["--resume", resume]) == 2
    assert f"--resume {resume}: " in capsys.readouterr().err


def test_a_damaged_checkpoint(capsys):
    assert main(arguments(max_steps=2, out="run")) == 0
    Path("run/metrics.json").unlink()
    for checkpoint in Path("run").glob("checkpoint*.pt"):  # where one is whole, the run goes on from it
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert main(["--resume", "run"]) == 2
    assert "the checkpoint run/checkpoint.pt cannot be read; it is damaged" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_an_interrupt_before_the_first_step(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("train.experiment.load", interrupted)
    assert main(arguments()) == 130


def test_no_traceback_at_the_command_line():
    command = [sys.executable, "-m", "train.run", "--strategy", "list"]
    shown = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 2
    assert "Traceback" not in shown.stderr and "choose from: frozen, gradprom" in shown.stderr
