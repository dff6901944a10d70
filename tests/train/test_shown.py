"""What a person is shown: finite scores, names as they are, and a command that can be pasted into a shell."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from train import run
from train.data import Subset
from train.outputs.report import summary
from train.strategies.base import COSINE, GATE, LOSS, PSNR
from train.text import printable, shell_word
from train.training.progress import Display, measured

from . import tiny

ROOT = Path(__file__).parents[2]
FOLDERS = [
    "x[/b]",
    "exp[lr=1e-3]",
    "[red]",
    ":smile:",
    "two words",
    "a$b_c^d$",
    "line\nbreak",
    os.fsdecode(b"caf\xe9"),
    "\x1b[1m",
]


def start(
    cwd: Path, *args: str, module: str = "tests.train.tiny", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """A command line in a process of its own, in the folder ``cwd``."""
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GRADPROM_CACHE": str(cwd / "cache"),
            "COLUMNS": "80",
            **environment,
        },
        capture_output=True,
        check=False,
        timeout=120,
    )


def listed(out: bytes) -> str:
    return out.decode("utf-8", "strict")


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def with_a_black_image(whole: Subset) -> Subset:
    images = whole.images.copy()
    images[0] = 0
    return Subset(images, whole.labels, None, whole.names)


def test_a_black_test_image_counts_alike_in_every_column(tmp_path: Path) -> None:
    """A sharp oracle in NumPy: the mean over all images of the PSNR, of which 60 dB count at most."""
    result = start(tmp_path, *tiny.arguments(task="sr2", max_steps=2, out="run"), module="tests.train.tiny_black")
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)
    clean = with_a_black_image(tiny.subset("test", 6)).images[..., 0] / 255.0
    small = torch.nn.functional.interpolate(
        torch.tensor(clean)[:, None].float(), scale_factor=0.5, mode="bicubic", antialias=True
    ).clamp(0, 1)
    large = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic").clamp(0, 1)[:, 0].double().numpy()
    errors = ((large - clean) ** 2).mean((1, 2))
    assert errors[0] == 0 and (errors[1:] > 1e-6).all()
    expected = (60 - 10 * np.log10(errors[1:]).sum()) / 6
    assert metrics["psnr_degraded"] == pytest.approx(expected, abs=1e-4)
    assert metrics["psnr_classical"] == pytest.approx(expected, abs=1e-4)
    assert metrics["psnr"] <= (60 - 10 * np.log10(errors[1:]).sum()) / 6 + 1
    assert metrics["psnr_cap"] == 60
    assert (metrics["psnr_capped_degraded"], metrics["psnr_capped_classical"]) == (1, 1)
    assert metrics["psnr_capped"] in (0, 1)
    out = listed(result.stdout)
    assert f"{expected:.2f}" in out
    assert "at most 60 dB of each image count: reached by 1 degraded, 1 classical" in out
    assert "inf" not in out.replace("information", "") and "nan" not in out


def test_what_is_not_a_number_is_said_and_has_no_mean() -> None:
    from train.evaluation.metrics import Quality

    quality = Quality(torch.tensor([20.0, math.nan, 60.0]), torch.tensor([0.5, math.nan, 1.0]))
    assert (quality.capped, quality.undefined) == (1, 1)
    assert math.isnan(quality.mean_psnr)


def test_a_line_of_progress_has_no_nan() -> None:
    row = {"loss": 0.1, "psnr": 60.0, "cosine": math.nan, "gate": math.nan}
    assert measured(row, [LOSS, PSNR, COSINE, GATE]) == "loss 0.1000  PSNR 60.00 dB  cosine -  gate -"


# ----------------------------------------------------------------------------------------------------------------------
# Names


def test_folders_of_any_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shown whole when the run begins, when it ends, and when it is asked for once more."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in FOLDERS:
        out = f"runs/{name}/a folder whose name is long enough not to fit into a terminal of eighty columns at all"
        assert run.main(tiny.arguments(max_steps=1, out=out, strategy="ip-only")) == 0
        assert capsys.readouterr().out.count(f"{printable(out)}\n") == 2
        assert run.main(["--resume", out]) == 0
        assert f"{printable(out)} is finished, there is nothing to continue:\n" in capsys.readouterr().out
        assert run.main(["--resume", f"{out}/nowhere"]) == 2
        assert f"--resume {printable(out)}/nowhere: there is no such folder" in capsys.readouterr().err


def test_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    name = "Übung " + os.fsdecode(b"[/b]\xff")
    result = start(tmp_path, *tiny.arguments(max_steps=1, out=name, strategy="ip-only"), PYTHONIOENCODING="ascii")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"\\xdcbung [/b]\\xff\n") == 2


@pytest.mark.parametrize("name", FOLDERS)
def test_a_word_survives_the_shell(name: str) -> None:
    word = shell_word(name)
    assert word.isprintable()
    echoed = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert echoed.stdout == os.fsencode(name)


@pytest.mark.parametrize("word", ["plain", "runs/covidct-denoise-gradprom-s0", "x[/b]"])
def test_ordinary_words_look_as_they_did(word: str) -> None:
    assert shell_word(word) == shlex.quote(word)
    assert printable(word) == word


def test_the_command_that_goes_on_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("train.training.engine.Engine.train", lambda engine, display, stop: False)
    for name in FOLDERS:
        assert run.main(tiny.arguments(out=f"{name}/:warning: [bold]1e-3 [/] {'long ' * 9}end")) == 130
        [line] = [line for line in capsys.readouterr().out.splitlines() if "--resume" in line]
        words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True).stdout
        folder = words.split(b"\0")[-2]
        assert folder == os.fsencode(f"{name}/:warning: [bold]1e-3 [/] {'long ' * 9}end")
        assert Path(os.fsdecode(folder)).is_dir()


def test_a_title_of_a_bar_is_no_markup() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, force_terminal=True, width=200, color_system=None))
    display.begin([LOSS], batch_size=4)
    with display.phase("training [/b] :smile:", done=0, steps=10) as tell:
        tell(10, {"loss": 0.1})
    assert "training [/b] :smile:" in out.getvalue()


METRICS = {
    "run": "covidct-denoise-gradprom-s0 [/b]",
    "data": "real",
    "dataset": "[red]set",
    "sigma": 0.1,
    "n_test": 203,
    **{f"{score}{of}": 20.0 for score in ("psnr",) for of in ("", "_degraded", "_classical")},
    **{f"ssim{of}": 0.5 for of in ("", "_degraded", "_classical")},
    **{f"accuracy{of}": 0.5 for of in ("", "_degraded", "_clean", "_majority")},
    "gate_open_share": 0.5,
    "steps": 10,
    "steps_skipped": 0,
    "ip": "[/ip]",
    "ip_parameters": 5,
    "vr": ":smile:",
    "vr_parameters": 7,
    "backend": "cpu",
    "device": "cpu",
    "seconds": 3.0,
}


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [40, 80])
def test_the_last_table_is_whole(terminal: bool, width: int) -> None:
    """On a console of any kind, one with markup among them; metrics of runs before the cap among them."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    folder = Path("/somewhere/" + "/".join(f"exp[lr=1e-{n}] of a long name" for n in range(9)))
    console.print(summary(METRICS, folder), soft_wrap=True)
    text = out.getvalue()
    for whole in (str(folder), METRICS["run"] + ": 203 test images", "[/ip]", ":smile:, 7 parameters", "real [red]set"):
        assert whole in text
    assert "…" not in text and text.count("20.00") == 3 and "classical: non-local means" in text


# ----------------------------------------------------------------------------------------------------------------------
# Settings that cannot be trained


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"batch_size": 1, "crop": 16, "size": 32, "vr": "resnet18"}, "--batch-size"),
        ({"batch_size": 1, "crop": 16, "size": 32, "vr": "resnet18", "strategy": "frozen"}, "--batch-size"),
        ({"batch_size": 4, "crop": 2, "size": 32}, "--crop"),  # the tiny VR's kernel of 3 does not fit
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_made(tmp_path: Path, changes, culprit: str) -> None:
    result = start(tmp_path, *tiny.arguments(**changes, max_steps=1, out="run"))
    error = listed(result.stderr)
    assert result.returncode == 2, error
    assert error.startswith("Error: ") and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert culprit in error
    assert not (tmp_path / "run").exists() and not (tmp_path / "runs").exists()
