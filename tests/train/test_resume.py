"""A run that is killed, and what ``--resume`` makes of it: in processes of their own, through the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .tiny import arguments, digits

ROOT = Path(__file__).parents[2]


def start(*args: str, **changes) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.train.tiny", *(arguments(**changes) if changes else []), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_steps(folder: Path, process: subprocess.Popen[str], steps: int) -> None:
    """Until ``steps.csv`` holds so many steps."""
    table = folder / "steps.csv"
    deadline = time.monotonic() + 120
    while not table.exists() or table.read_text().count("\n") <= steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 60 steps."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = start(out=folder, epochs=20, checkpoint_every=25)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert digits(folder / "steps.csv") == digits(whole / "steps.csv")
    one, other = (load_file(path / "weights.safetensors") for path in (folder, whole))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_between_two_checkpoints(tmp_path, whole):
    folder = tmp_path / "run"
    process = start(out=folder, epochs=20, checkpoint_every=25)
    wait_for_steps(folder, process, 30)
    process.kill()
    process.wait(timeout=60)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    kept = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 25 <= kept < 60

    again = start("--resume", str(folder))
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, (out, err)
    assert_same(folder, whole)
