"""What a person with a GPU runs, as far as it goes without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradprom_ext as gp
from benchmarks import gpu_case, gpu_table

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif("cpu" not in gp.available_backends(), reason="the compiled module is not built")
def test_the_small_case_agrees_with_the_reference(capsys, monkeypatch):
    monkeypatch.setattr(gpu_case, "FORMS", {"one launch": {}})
    assert gpu_case.main(["--device", "cpu"]) == 0
    assert "12 of 12 cases agree" in capsys.readouterr().out
    monkeypatch.setitem(gpu_case.TOLERANCE, torch.float32, 1e-12)
    assert gpu_case.main(["--device", "cpu"]) == 1


def test_a_write_beside_a_tensor_is_seen():
    for layout in gpu_case.LAYOUTS:
        placed = gpu_case.place(torch.randn(5, 3), layout, torch.device("cpu"))
        assert placed.guards_hold()
        placed.view.fill_(0.0)
        assert placed.guards_hold()
        placed.buffer[-1] = 0.0
        assert not placed.guards_hold()


def test_a_report_of_pytest_in_numbers(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no time')\ndef test_c(): pass\n"
    )
    subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=x.xml", "test_x.py"], cwd=tmp_path
    )
    found = gpu_table.tests([tmp_path / "x.xml"])
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert [(f["test"], "assert 1 == 2" in f["message"]) for f in found["failures"]] == [("test_x::test_b", True)]
    assert found["skips"] == {"no time": 1}


def test_verdicts_of_compute_sanitizer(tmp_path):
    (tmp_path / "memcheck.log").write_text("gpu_case: fine\n========= ERROR SUMMARY: 0 errors\n")
    assert gpu_table.sanitizer(tmp_path) == {
        "memcheck": "ERROR SUMMARY: 0 errors",
        "racecheck": "compute-sanitizer was not found",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    run = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path / "out")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "finds no NVIDIA GPU here" in run.stderr
    assert "nothing was run" in run.stderr
