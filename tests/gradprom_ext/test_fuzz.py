"""The attack of fuzz_binding.py, in a process of its own: a crash is a failing test that names the case."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import settings

from . import targets

CASES = {"cpu": 300, "cuda-on-host": 300}


@pytest.mark.parametrize("module", CASES)
def test_nothing_ends_the_process(module: str) -> None:
    if module == "cpu":
        if not targets.usable_on_host("cpu"):
            pytest.skip("the compiled module is not built")
    else:
        targets.built("cuda_on_host")
    fuzzing = settings.get_current_profile_name() == "fuzz"
    cases = settings().max_examples if fuzzing else CASES[module]
    command = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-m", "tests.gradprom_ext.fuzz_binding",
               "--module", module, "--cases", str(cases)]  # fmt: skip
    run = subprocess.run(command, cwd=targets.ROOT, capture_output=True, text=True)
    last = run.stdout.strip().splitlines()[-1:]
    assert run.returncode == 0, f"{' '.join(command)} ended with {run.returncode} in {last}\n{run.stderr[-4000:]}"
    assert last == [f"{cases} attacks were survived"]
