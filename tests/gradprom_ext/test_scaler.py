"""torch.amp.GradScaler: scaled gradients of several losses step like gradients that were never scaled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradprom_ext as gp

RULES = {
    "sgd": (gp.GradPromSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (gp.GradPromAdamW, torch.optim.AdamW, {"lr": 0.01}),
}


def scaler(scale: float = 2.0**12, **options: object) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)  # type: ignore[arg-type]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def losses(model: nn.Module, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    out = model(torch.randn(4, 3, generator=generator))
    return out.square().mean(), (out * torch.randn(4, 2, generator=generator)).sum()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", ["hard", "soft", "always"])
def test_a_scale_changes_nothing(backend, rule, gate):
    kind, _, options = RULES[rule]
    plain, scaled = net(), net()
    settings = dict(options, gate=gate, aux_weight=0.3, max_grad_norm=0.5, backend=backend)
    one, other, by = kind(plain.parameters(), **settings), kind(scaled.parameters(), **settings), scaler()
    for step in range(4):
        one.backward(*losses(plain, step))
        one.step()
        other.backward(*losses(scaled, step), scaler=by)
        by.step(other)
        by.update()
        for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        for name in ("cosine", "gate", "main_norm", "aux_norm", "combined_norm", "clip_coefficient"):
            torch.testing.assert_close(getattr(one.stats, name), getattr(other.stats, name), rtol=1e-6, atol=1e-9)
        one.zero_grad(), other.zero_grad()


@pytest.mark.parametrize("rule", RULES)
def test_it_is_torch_optim_without_auxiliaries(backend, rule):
    kind, reference, options = RULES[rule]
    mine, theirs = net(), net()
    one, other, by, their_scaler = (
        kind(mine.parameters(), **options, backend=backend),
        reference(theirs.parameters(), **options),
        scaler(),
        scaler(),
    )
    for step in range(3):
        one.backward(losses(mine, step)[0], scaler=by)
        by.step(one), by.update(), one.zero_grad()
        their_scaler.scale(losses(theirs, step)[0]).backward()
        their_scaler.step(other), their_scaler.update(), other.zero_grad()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["main", "aux"])
def test_an_overflow_in_either_gradient_skips_and_backs_off(backend, which):
    """Of the auxiliary one the scaler sees nothing by itself."""
    p = nn.Parameter(torch.ones(3))
    opt = gp.GradPromAdamW([p], lr=0.1, backend=backend, nonfinite="raise")
    by = scaler(2.0**100)
    big = torch.full((3,), 1e20)
    small = torch.full((3,), 1e-3)
    main, aux = ((p * big).sum(), (p * small).sum()) if which == "main" else ((p * small).sum(), (p * big).sum())
    opt.backward(main, aux, scaler=by)
    by.step(opt)
    by.update()
    assert torch.equal(p.detach(), torch.ones(3))
    assert by.get_scale() == 2.0**99 and float(opt.skipped_steps) == 1
    assert "step" not in opt.state[p] or float(opt.state[p]["step"]) == 0
    opt.zero_grad()
    opt.backward((p * small).sum(), (p * small).sum(), scaler=by)
    by.step(opt)
    by.update()
    assert not torch.equal(p.detach(), torch.ones(3)) and by.get_scale() == 2.0**99


def test_the_scale_grows_while_nothing_overflows(backend):
    p = nn.Parameter(torch.ones(3))
    opt, by = gp.GradPromSGD([p], lr=0.1, backend=backend), scaler(4.0, growth_interval=2)
    for _ in range(2):
        opt.backward(p.sum(), p.sum(), scaler=by)
        by.step(opt), by.update(), opt.zero_grad()
    assert by.get_scale() == 8.0


@pytest.mark.filterwarnings("error")
def test_gradients_that_were_unscaled_before_the_step(backend):
    """unscale_ knows .grad alone: the auxiliary gradients still have the scale, and the step takes it out."""
    plain, scaled = net(), net()
    one, other, by = (
        gp.GradPromSGD(plain.parameters(), lr=0.1, backend=backend),
        gp.GradPromSGD(scaled.parameters(), lr=0.1, backend=backend),
        scaler(),
    )
    one.backward(*losses(plain, 0))
    main = [p.grad.clone() for p in plain.parameters()]
    one.step()
    other.backward(*losses(scaled, 0), scaler=by)
    by.unscale_(other)
    for p, g in zip(scaled.parameters(), main, strict=True):
        torch.testing.assert_close(p.grad, g)
    by.step(other)
    torch.testing.assert_close(one.stats.packed, other.stats.packed, rtol=1e-6, atol=1e-9)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_micro_batches(backend):
    plain, scaled = net(), net()
    one = gp.GradPromSGD(plain.parameters(), lr=0.1, backend=backend)
    other, by = gp.GradPromSGD(scaled.parameters(), lr=0.1, backend=backend), scaler()
    for part in range(3):
        one.backward(*losses(plain, part))
        other.backward(*losses(scaled, part), scaler=by)
    one.step()
    by.step(other)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_half_precision_parameters_with_masters(backend):
    """The case that scalers are for: float16 gradients that would be zero without a scale."""
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    opt, by = gp.GradPromSGD([p], lr=1e4, master_weights=True, backend=backend), scaler(2.0**16)
    tiny = 2.0**-26  # half of the smallest float16
    opt.backward(p.float().sum() * tiny, p.float().sum() * tiny, scaler=by)
    by.step(opt)
    assert opt.state[p]["master"].tolist() == [1 - 2 * 1e4 * tiny] * 4


def test_a_scaler_that_is_switched_off(backend):
    p = nn.Parameter(torch.ones(3))
    opt, by = gp.GradPromSGD([p], lr=0.1, backend=backend), torch.amp.GradScaler("cpu", enabled=False)
    opt.backward(p.sum(), p.sum(), scaler=by)
    by.step(opt)
    by.update()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.8))


def test_steps_that_would_leave_the_scale_in_are_refused(backend):
    p = nn.Parameter(torch.ones(3))
    opt, by = gp.GradPromSGD([p], lr=0.1, backend=backend), scaler()
    opt.backward(p.sum(), p.sum(), scaler=by)
    with pytest.raises(RuntimeError, match=r"scaler\.step\(optimizer\) and scaler\.update\(\)"):
        opt.step()
    opt.zero_grad()
    opt.backward(by.scale(p.sum()), by.scale(p.sum()))
    with pytest.raises(RuntimeError, match=r"scaler=scaler\), with losses that are not scaled yet"):
        by.step(opt)
    with pytest.raises(ValueError, match="must be given the same scaler"):
        opt.backward(p.sum(), p.sum(), scaler=by)
    assert torch.equal(p.detach(), torch.ones(3))
    opt.zero_grad()
    opt.backward(p.sum(), p.sum())
    opt.step()  # without one, after all


@pytest.mark.parametrize("auxiliaries", [0, 1])
def test_the_next_step_may_do_without_a_scaler(backend, auxiliaries):
    """Whoever clears through the module, and with an auxiliary or without."""
    model = net()
    opt, by = gp.GradPromSGD(model.parameters(), lr=0.1, backend=backend), scaler()
    opt.backward(*losses(model, 0)[: 1 + auxiliaries], scaler=by)
    by.step(opt), by.update(), model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    opt.backward(*losses(model, 1)[: 1 + auxiliaries])
    gradients = [p.grad.clone() for p in model.parameters()]
    opt.step()
    if not auxiliaries:
        for p, q, g in zip(model.parameters(), before, gradients, strict=True):
            torch.testing.assert_close(p, q - 0.1 * g)
    assert not bool(opt.stats.skipped)


def test_copies_do_not_share_a_scaler(backend):
    p = nn.Parameter(torch.ones(3))
    opt, by = gp.GradPromSGD([p], lr=0.1, backend=backend), scaler()
    opt.backward(p.sum(), p.sum(), scaler=by)
    if isinstance(backend, str):
        assert copy.deepcopy(opt)._work.scaler is None
