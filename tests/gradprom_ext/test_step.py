"""One gate over several plans. Shares of one device play several devices: who moves what between them is for a GPU."""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import _step

from .test_gate import HalfGate

SHAPES = [(7, 5), (300,), (), (64,), (0,), (3, 3)]


def train(backend: str, **kwargs):
    """Parameters, states and statistics after some steps with open and closed gates, one of them skipped."""
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64)) for s in SHAPES]
    opt = gp.GradPromAdamW(params, lr=0.05, backend=backend, max_grad_norm=0.5, aux_weight=[0.5, 2.0], **kwargs)
    packed = []
    for step in range(5):
        main, *aux = ([torch.randn(s, generator=g, dtype=torch.float64) for s in SHAPES] for _ in range(3))
        main[3], aux[0][3], aux[1][0] = None, None, None
        if step == 3:
            aux[1][1][5] = float("inf")
        for p, grad in zip(params, main, strict=True):
            p.grad = grad
        opt.aux_grads = aux
        opt.step()
        packed.append(opt.stats.packed)
    states = [opt.state[p][name] for p in params for name in sorted(opt.state[p])]
    return [p.detach() for p in params], states, packed, float(opt.skipped_steps)


@pytest.mark.parametrize("gate", ["hard", "project", HalfGate()])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("split", [[[0, 2, 4], [1, 3, 5]], [[5, 0], [4, 3], [1, 2]]])
def test_several_plans_take_one_decision(backend, monkeypatch, split, granularity, gate):
    expected = train(backend, granularity=granularity, gate=gate)
    monkeypatch.setattr(_step, "shares_by_device", lambda params: [(torch.device("cpu"), share) for share in split])
    actual = train(backend, granularity=granularity, gate=gate)
    assert actual[3] == expected[3] == 1
    for a, e in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    for step, (a, e) in enumerate(zip(actual[2], expected[2], strict=True)):
        if step != 3:
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_parameters_that_lie_together_in_the_order_of_devices():
    params = [torch.empty(1, device=d) for d in ("meta", "cpu", "cpu", "meta")]
    assert _step.shares_by_device(params) == [(torch.device("meta"), [0, 3]), (torch.device("cpu"), [1, 2])]
