"""Every code block of the README runs, and every command in it exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.markdown import ROOT, blocks, languages

README = ROOT / "README.md"
PYTHON = blocks(README, "python")
SHELL = [code.strip() for code in blocks(README, "bash")]
TABLE = re.findall(r"^\| `(python -m [^`]+)` \|", README.read_text(), flags=re.MULTILINE)

# What turns a command of hours or minutes into one of seconds, without changing what it does.
SHORT = {
    "train.run": "--source phantom --preset quick --max-steps 2 --size 32 --crop 16 --batch-size 4 --blocks 1 "
    "--features 4 --pretrain-epochs 1 --out {out}",
    "train.compare --list": "",
    "train.compare": "--set source=phantom --set size=32 --set crop=16 --set ip.features=4 --set aux_weight=0.01 "
    "--set reader=false --set ip_start=fresh --seeds 0 --strategies ip-only,gradprom --max-steps 2 --out {out}",
    "train.pretrain": "--source phantom --preset quick --max-steps 2 --size 32 --crop 32 --batch-size 4 --out {out}",
    "train.probe": "--source phantom --preset quick --size 32 --crop 32 --starts fresh,mfm --masked-steps 1 "
    "--head-steps 1 --out {out}",
    "train.enhance": "",
    "gradprom_ext.bench": "--networks srresnet --optimizers sgd --rounds 2",
    "gradprom_ext.bench --what step": "--rounds 2 --batch 2 --size 8 --blocks 1 --width 4 --depth 18 --vr-width 4",
    "gradprom_ext.doctor": "",
}


def test_the_readme_has_blocks_of_a_known_kind():
    assert languages(README) == {"python", "bash"}
    assert len(PYTHON) >= 2
    assert len(SHELL) == 3
    assert SHELL[2] in TABLE, "a command is tried as one of the table"


@pytest.mark.parametrize("code", PYTHON)
def test_python(code, capsys):
    exec(compile(code, "README.md", "exec"), {})


def run(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    program, dash_m, module, *rest = shlex.split(command)
    assert (program, dash_m) == ("python", "-m")
    shorter = SHORT.get(" ".join([module, *rest]), SHORT[module])
    options = shorter.format(out=shlex.quote(str(tmp_path / "run")))
    if {"--help", "--resume"} & set(rest):
        options = ""
    env = {**os.environ, "GRADPROM_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", module, *rest, *shlex.split(options)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_main_command(tmp_path):
    """`pip install -e .` is what made this test run at all; what follows it runs here, shortened."""
    install, _, main = SHELL[0].partition(" && ")
    assert install == "pip install -e ."
    result = run(main, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "PSNR" in result.stdout
    assert "PHANTOM" in result.stdout


def test_the_test_command_is_the_one_ci_runs():
    assert SHELL[1] == 'pip install -e ".[test]" && pytest'
    assert SHELL[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("command", TABLE)
def test_commands_of_the_table(command, tmp_path):
    result = run(command, tmp_path)
    if "--resume latest" in command:  # nothing to resume here: the answer says so
        assert result.returncode == 2
        assert "--resume latest: no run with a checkpoint under" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
