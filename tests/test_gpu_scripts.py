"""What a person with a GPU runs, as far as it goes without one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gradprom_ext as gp
from benchmarks import gpu_case, gpu_table
from gradprom_ext import doctor
from gradprom_ext.bench import __main__ as bench_main

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


# ----------------------------------------------------------------------------------------------------------------------
# gpu.sh

SCRIPT = str(ROOT / "benchmarks" / "gpu.sh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    run = subprocess.run(
        ["bash", SCRIPT, str(tmp_path / "out")],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "finds no NVIDIA GPU here" in run.stderr
    assert "nothing was run" in run.stderr


@pytest.mark.parametrize("arguments", [[], ["--dry"], ["a", "b"], ["--dry-run"]])
def test_it_says_how_it_is_called(arguments):
    run = subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (2, "usage: bash benchmarks/gpu.sh [--dry-run] OUTDIR\n")


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> dict[str, list[str]]:
    """What a dry run says: the words of each part's command."""
    out = tmp_path_factory.mktemp("dry") / "out"
    env = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(["bash", SCRIPT, "--dry-run", str(out)], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not out.exists()
    assert run.stdout.endswith(f"everything would be in {out}/table.md; nothing was run\n")
    lines = [line.removeprefix("== ").split(maxsplit=1) for line in run.stdout.splitlines() if line.startswith("== ")]
    return {name: shlex.split(told.rpartition(" s: ")[2]) for name, told in lines}


def test_a_dry_run_names_every_part(dry):
    parts = "machine build check check-triton triton tests memcheck racecheck update step"
    assert [name for name in dry if name != "everything"] == [
        *parts.split(),
        *(f"{name}.json" for name in ("tests", "sanitizer", "table")),
    ]


def test_every_command_of_it_can_be_read(dry, capsys):
    """By the parsers that will read it."""

    def arguments(name: str, module: str) -> list[str]:
        words = dry[name]
        assert sys.executable in words, words
        assert words[words.index("-m") + 1] == module
        return words[words.index("-m") + 2 :]

    for name in ("update", "step"):
        given = bench_main._parser().parse_args(arguments(name, "gradprom_ext.bench"))
        assert (given.what, given.device) == (name, "cuda")
    for name, backend in (("check", "cuda"), ("check-triton", "triton")):
        given = doctor._parser().parse_args(arguments(name, "gradprom_ext.doctor"))
        assert (given.check, given.backend, given.device) == (True, backend, torch.device("cuda:0"))
    assert arguments("memcheck", "benchmarks.gpu_case") == []
    for name in ("machine", "tests.json", "sanitizer.json", "table.json"):
        part, _ = arguments(name, "benchmarks.gpu_table")
        with pytest.raises(SystemExit):
            gpu_table.main([part])  # knows the part, and misses the folder
        assert "invalid choice" not in capsys.readouterr().err
    words = {
        name: [w for w in arguments(name, "pytest") if not w.startswith("--junitxml")] for name in ("triton", "tests")
    }
    assert [w.replace("not triton", "triton") for w in words["tests"]] == words["triton"]  # two halves of one whole
    assert "tests/gradprom_ext" in words["triton"]
    few = ["tests/gradprom_ext/test_gpu.py" if w == "tests/gradprom_ext" else w for w in words["triton"]]
    command = [sys.executable, "-m", "pytest", *few, "--collect-only"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert any("test_gpu.py::" in line for line in run.stdout.splitlines())


#: Plays the Python, the GPU and the tools of a machine that has them: what needs none is done by the real Python.
PLAYED = r"""#!/bin/bash
what="$*"
out="${!#}" # the last word
case "$what" in
  "-c import torch") ;;
  "-c import pybind11") ;;
  "-c import sys; print(sys.executable)") echo "$0" ;;
  "-c import torch; print("*) echo 90 ;;
  "-m benchmarks.gpu_table machine "*) echo '{"device": "Played GPU", "date": "today"}' > "$out/machine.json" ;;
  "-m benchmarks.gpu_table build "*)
    echo '{"nvcc": "13.0", "architectures": "90-real", "backends": {"cuda": null}}' > "$out/build.json" ;;
  "-m benchmarks.gpu_table "*) exec "$REAL_PYTHON" "$@" ;;
  "-m gradprom_ext.doctor") echo "the doctor" ;;
  "-m gradprom_ext.doctor --check --backend cuda "*) echo "cuda  $CHECK"; [ "$CHECK" = ok ] ;;
  "-m gradprom_ext.doctor --check --backend triton "*) echo "triton  ok"; sleep "$SLEEP" ;;
  "-m pytest "*)
    [ "$GRADPROM_SELF_CHECK" = off ] || exit 1
    for word in "$@"; do
      case "$word" in
        --junitxml=*)
          echo "<testsuite tests='3' failures='$FAILURES' errors='0' skipped='1' time='1'>" > "${word#--junitxml=}"
          echo "</testsuite>" >> "${word#--junitxml=}" ;;
      esac
    done
    [ "$FAILURES" = 0 ] ;;
  "-m benchmarks.gpu_case") echo "12 of 12"; exit "$FAILURES" ;;
  "-m gradprom_ext.bench "*)
    [ "$FAILURES" = 0 ] || { echo "out of memory"; exit 1; }
    case "$what" in
      *"--what update "*) cp benchmarks/results/cpu.json "$out" ;;
      *) cp benchmarks/results/cpu_step.json "$out" ;;
    esac ;;
  *) echo "nobody plays: $what" >&2; exit 99 ;;
esac
"""


def played(tmp_path: Path, *tools: str, **scene: str) -> tuple[int, dict[str, str], str]:
    """gpu.sh on a played machine: its status, the outcome of each part, and the table."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python").write_text(PLAYED)
    for tool in ("cmake", "ninja", "nvcc", "c++"):
        (programs / tool).write_text("#!/bin/bash\n")
    for tool in tools:
        (programs / tool).write_text(
            '#!/bin/bash\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = --tool ] && tool=$2; shift; '
            'case "$1" in memcheck | racecheck | 1) shift ;; esac; done\n"$@" || exit 1\n'
            'if [ "$tool" = memcheck ]; then echo "========= ERROR SUMMARY: 0 errors"\n'
            'else echo "========= RACECHECK SUMMARY: 0 hazards displayed"; fi\n'
        )
    for program in programs.iterdir():
        program.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir()
    env = {"PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere", "PYTHON": str(programs / "python"), "TMPDIR": str(cache)}
    env |= {"REAL_PYTHON": sys.executable, "HOME": str(tmp_path), "CHECK": "ok", "SLEEP": "0", "FAILURES": "0", **scene}
    out = tmp_path / "out"
    run = subprocess.run(["bash", SCRIPT, str(out)], env=env, capture_output=True, text=True)
    assert list(cache.iterdir()) == [], "the folder of what a self-check found is gone"
    outcomes = {name: outcome for name, outcome, _ in gpu_table.parts(out / "parts.tsv")}
    return run.returncode, outcomes, (out / "table.md").read_text() if (out / "table.md").exists() else run.stderr


PARTS = ["machine", "build", "check", "check-triton", "triton", "tests", "memcheck", "racecheck", "update", "step"]


def test_on_a_machine_where_all_is_well(tmp_path):
    status, outcomes, table = played(tmp_path, "compute-sanitizer")
    assert outcomes == dict.fromkeys(PARTS, "passed")
    assert status == 0
    assert table.startswith("# Played GPU, today")
    for told in (
        "nvcc 13.0, 90-real. Backends: cuda: yes.",
        "```text\ncuda  ok\n```",
        "```text\ntriton  ok\n```",
        "4 passed, 0 failed, 2 skipped",
        "* memcheck: ERROR SUMMARY: 0 errors",
        "* racecheck: RACECHECK SUMMARY: 0 hazards displayed",
        "## The optimizer step",
        "## The whole training step",
    ):
        assert told in table


def test_on_a_machine_where_much_is_wrong(tmp_path):
    """What fails keeps nothing else from running."""
    status, outcomes, table = played(tmp_path, "compute-sanitizer", CHECK="wrong", FAILURES="1")
    well = {"machine", "build", "check-triton"}
    assert outcomes == {name: "passed" if name in well else "failed" for name in PARTS}
    assert status == 1
    assert "```text\ncuda  wrong\n```" in table
    assert "2 passed, 2 failed, 2 skipped" in table
    assert "* memcheck: 12 of 12" in table


def test_on_a_machine_without_sanitizers_and_time(tmp_path):
    status, outcomes, table = played(tmp_path, SLEEP="60", GRADPROM_GPU_DEADLINE="4")
    assert outcomes == {
        **dict.fromkeys(("machine", "build", "check", "triton", "tests"), "passed"),
        "check-triton": "timed out",
        **dict.fromkeys(("memcheck", "racecheck"), "absent"),
        **dict.fromkeys(("update", "step"), "no time"),
    }
    assert status == 1
    assert "* memcheck: compute-sanitizer was not found" in table
    assert "| check-triton | timed out |" in table
