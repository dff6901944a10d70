"""Thousands of steps leave neither memory, nor file handles, nor threads behind. ``make fuzz`` takes 20,000."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import gradprom_ext as gp

from . import targets

STEPS = {"cpu": 600, "reference": 200, "cuda-on-host": 200}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> tuple[int, int, int]:
    """File handles, threads, and objects of Python's."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("target", STEPS)
def test_nothing_grows(target: str) -> None:
    """Everything that makes a plan look again happens in turn: moved states and gradients, other hyper-parameters, a
    reloaded state, a refusal, a functional call."""
    if target == "cpu" and not targets.usable_on_host("cpu"):
        pytest.skip("the compiled module is not built")
    steps = 20_000 if settings.get_current_profile_name() == "fuzz" else STEPS[target]
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in [(64, 64), (64,), ()]]
    with targets.running(target) as backend:
        opt = gp.GradPromAdamW(params, lr=1e-3, backend=backend)

        def step(number: int) -> None:
            for p in params:
                p.grad = torch.randn(p.shape)
            opt.aux_grads = [[torch.randn(p.shape) for p in params]]
            if number % 10 == 1:
                state = opt.state[params[number // 10 % 3]]
                state["exp_avg"].data = state["exp_avg"].data.clone()
            if number % 10 == 3:
                opt.param_groups[0]["lr"] = 1e-3 / (1 + number)
            if number % 50 == 7:
                opt.load_state_dict(opt.state_dict())
            if number % 10 == 5:
                gp.gradprom_([p.detach() for p in params], [p.grad for p in params], opt.aux_grads[0], backend=backend)
            if number % 10 == 9:
                opt.aux_grads = [[torch.ones(3)] * 3]
                with pytest.raises(ValueError, match="has shape"):
                    opt.step()
                return
            opt.step()

        for number in range(steps // 4):  # allocators fill their pools, threads are woken for the first time
            step(number)
        before, memory = held(), resident()
        for number in range(steps // 4, steps):
            step(number)
        after, grown = held(), resident() - memory
    assert after[:2] == before[:2], "file handles or threads"
    assert after[2] <= before[2] + 200, f"{after[2] - before[2]} objects more"
    # What one tensor of 16 KB in every tenth step would have left.
    assert grown < max(4e6, (steps - steps // 4) / 10 * 16384), f"{grown / 1e6:.1f} MB more after {steps} steps"
