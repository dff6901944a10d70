"""Plans from step to step, and several of them under one gate. Shares of one device play several devices: who moves
what between them is for a GPU."""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp
from gradprom_ext import _step, rules

from .problems import HalfGate

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
@pytest.mark.parametrize("aux_cap", [None, 0.8])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
@pytest.mark.parametrize("split", [[[0, 2, 4], [1, 3, 5]], [[5, 0], [4, 3], [1, 2]]])
def test_several_plans_take_one_decision(backend, monkeypatch, split, granularity, aux_cap, gate):
    expected = train(backend, granularity=granularity, aux_cap=aux_cap, gate=gate)
    monkeypatch.setattr(_step, "shares_by_device", lambda params: [(torch.device("cpu"), share) for share in split])
    actual = train(backend, granularity=granularity, aux_cap=aux_cap, gate=gate)
    assert actual[3] == expected[3] == 1
    for a, e in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)
    for step, (a, e) in enumerate(zip(actual[2], expected[2], strict=True)):
        if step != 3:
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


def test_parameters_that_lie_together_in_the_order_of_devices():
    params = [torch.empty(1, device=d) for d in ("meta", "cpu", "cpu", "meta")]
    assert _step.shares_by_device(params) == [(torch.device("meta"), [0, 3]), (torch.device("cpu"), [1, 2])]


def test_a_learning_rate_on_another_device_is_brought_to_every_plan(backend, monkeypatch):
    """Before the states are looked at, too: a plan reads it where its parameters are."""
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    opt = gp.GradPromSGD(params, lr=1.0, momentum=0.5, backend=backend)
    opt.param_groups[0]["lr"] = torch.empty((), device="meta")  # the other device
    moved = lambda number, device: torch.tensor(0.25) if number.device.type == "meta" else number  # noqa: E731
    monkeypatch.setattr(rules, "readable", moved)
    monkeypatch.setattr(_step, "shares_by_device", lambda params: [(torch.device("cpu"), [i]) for i in range(2)])
    opt.backward(sum(p.sum() for p in params))
    opt.step()
    assert [p.tolist() for p in params] == [[0.75, 0.75]] * 2


def test_whatever_changes_between_steps_is_noticed(backend):
    """What a plan knows is kept as long as all tensors are where they were, so everything else changes alone here."""
    twins = []
    for name in (backend, "reference"):
        g = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in [(9,), (4, 5), (600,)]]
        opt = gp.GradPromSGD([{"params": [p]} for p in params], lr=0.1, gate="always", backend=name)
        twins.append((opt, params, [[torch.randn(p.shape, generator=g) for p in params] for _ in range(2)]))

    def replace_state(opt, params):
        state = opt.state[params[2]]
        state["momentum_buffer"] = state["momentum_buffer"] * 2

    changes = {
        "nothing": lambda opt, params: None,
        "other gradients": lambda opt, params: [setattr(p, "grad", p.grad * 2) for p in params],
        "numbers at the same addresses": lambda opt, params: [p.grad.mul_(2) for p in params],
        "one gradient is missing": lambda opt, params: setattr(params[1], "grad", None),
        "a gradient is transposed": lambda opt, params: setattr(params[1], "grad", torch.arange(20.0).view(5, 4).t()),
        "other strides": lambda opt, params: setattr(params[1], "grad", torch.arange(40.0).view(4, 10)[:, ::2]),
        "a learning rate": lambda opt, params: opt.param_groups[1].update(lr=0.5),
        "a learning rate as a tensor": lambda opt, params: opt.param_groups[1].update(lr=torch.tensor(0.25)),
        "momentum": lambda opt, params: [group.update(momentum=0.9) for group in opt.param_groups],
        "memory of a parameter": lambda opt, params: setattr(params[0], "data", params[0].detach().clone() + 1),
        "layout of a parameter": lambda opt, params: setattr(params[1], "data", params[1].detach().t().clone().t()),
        "a state tensor": replace_state,
        "maximize": lambda opt, params: opt.param_groups[2].update(maximize=True),
        "lambda": lambda opt, params: setattr(opt, "aux_weight", 0.5),
        "no momentum": lambda opt, params: [group.update(momentum=0.0) for group in opt.param_groups],
    }
    for name, change in changes.items():
        for opt, params, (main, aux) in twins:
            for p, grad in zip(params, main, strict=True):
                p.grad = grad
            opt.aux_grads = [aux]
            opt.step()
            change(opt, params)
            opt.step()
            opt.step()
        for a, b in zip(twins[0][1], twins[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
            ours, theirs = twins[0][0].state[a], twins[1][0].state[b]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
            # In place, so that nothing moves: rounding errors of the steps so far are not carried on.
            a.detach().copy_(b.detach())
            for key, value in theirs.items():
                ours[key].copy_(value)
