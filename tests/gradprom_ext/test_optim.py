"""The optimizers against torch.optim fed with the combined gradient, and as citizens of torch.optim."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch

import gradprom_ext as gp

from . import oracle
from .problems import CASES, bits, feed, twins


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("case", CASES)
def test_parity_over_many_steps(backend, case):
    opt, a, other, b = twins(case, backend, aux_weight=0.7)
    gates = {feed(opt, a, other, b, seed=i) for i in range(60)}
    assert gates == {0.0, 1.0}, "the run must see the gate open and closed"
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_close_to_float64_as_torch_is(backend, case):
    """One step in float32: within 2 ulp of the float64 result where the parameter is the larger term, within 4 where
    the update is (nine roundings lie between Adam's gradient and its update)."""
    opt, a, _, _ = twins(case, backend, dtype=torch.float32, aux_weight=0.5, gate="always")
    wide = CASES[case][1]([p.detach().double().requires_grad_() for p in a], lr=0.05, foreach=False, **CASES[case][2])
    w = wide.param_groups[0]["params"]
    before = [p.detach().double() for p in a]
    g = torch.Generator().manual_seed(1)
    main = [torch.randn(p.shape, generator=g) for p in a]
    aux = [torch.randn(p.shape, generator=g) for p in a]
    for p, q, m, x in zip(a, w, main, aux, strict=True):
        p.grad = m
        q.grad = m.double() + 0.5 * x.double()
    opt.aux_grads = [aux]
    opt.step()
    wide.step()
    for p, q, old in zip(a, w, before, strict=True):
        old, new, update = old.numpy(), q.detach().numpy(), (q - old).detach().numpy()
        unit = np.spacing(np.maximum(np.abs(old), np.abs(update)).astype(np.float32))
        ulps = np.abs(oracle.to_numpy(p) - new) / unit
        assert np.all(ulps <= np.where(np.abs(old) > 4 * np.abs(update), 2.0, 4.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_sixteen_bit_parameters_round_once(backend, case, dtype):
    """Arithmetic in float32, one rounding at the end: the exact step, rounded to 16 bits."""
    opt, a, _, _ = twins(case, backend, dtype=dtype, aux_weight=0.5, gate="always", shapes=[(301,), (4, 5)])
    wide = CASES[case][1]([p.detach().double().requires_grad_() for p in a], lr=0.05, foreach=False, **CASES[case][2])
    for p, q in zip(a, wide.param_groups[0]["params"], strict=True):
        main, aux = torch.randn(p.shape).to(dtype), torch.randn(p.shape).to(dtype)
        p.grad, q.grad = main, main.double() + 0.5 * aux.double()
        opt.aux_grads = [[*(opt.aux_grads or [[]])[0], aux]]
    opt.step()
    wide.step()
    half_unit = torch.finfo(dtype).eps / 2
    for p, q in zip(a, wide.param_groups[0]["params"], strict=True):
        assert p.dtype == dtype
        assert torch.all((p.double() - q).abs() <= 1.01 * half_unit * q.abs() + 1e-6)
    names = [key for key in opt.state[a[0]] if key != "step"]
    for name in names:
        ours, theirs = opt.state[a[0]][name].double(), wide.state[wide.param_groups[0]["params"][0]][name]
        assert torch.all((ours - theirs).abs() <= 1.01 * half_unit * theirs.abs() + torch.finfo(dtype).smallest_normal)


def test_matches_adam_fused_and_foreach_too(backend):
    opt, a, _, b = twins("adam", backend, dtype=torch.float32, aux_weight=0.7)
    fused = torch.optim.Adam(b, lr=0.05, fused=True)
    for i in range(20):
        feed(opt, a, fused, b, seed=i)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


def test_param_groups_and_a_group_added_later(backend):
    a = [torch.nn.Parameter(torch.randn(4, dtype=torch.float64)) for _ in range(3)]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    groups = lambda ps: [{"params": [ps[0]], "lr": 0.1}, {"params": [ps[1]], "weight_decay": 0.5}]  # noqa: E731
    opt = gp.GradPromAdamW(groups(a), lr=0.01, aux_weight=0.7, backend=backend)
    other = torch.optim.AdamW(groups(b), lr=0.01, foreach=False)
    feed(opt, a[:2], other, b[:2], seed=0)
    for o, ps in ((opt, a), (other, b)):
        o.add_param_group({"params": [ps[2]], "lr": 0.5})
    for i in range(1, 9):
        feed(opt, a, other, b, seed=i)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_learning_rate_schedulers(backend):
    opt, a, other, b = twins("sgd-momentum", backend, aux_weight=0.7)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20) for o in (opt, other)]
    for i in range(15):
        feed(opt, a, other, b, seed=i)
        for s in schedulers:
            s.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


def test_learning_rate_as_a_tensor(backend):
    opt, a, other, b = twins("adamw", backend, aux_weight=0.7)
    opt.param_groups[0]["lr"] = torch.tensor(0.05)
    feed(opt, a, other, b)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_state_dict_round_trip_mid_run_is_exact(backend, case):
    def run(reload: bool):
        torch.manual_seed(0)
        opt, a, other, b = twins(case, backend, aux_weight=0.7)
        for i in range(6):
            if i == 3 and reload:
                buffer = io.BytesIO()
                torch.save(opt.state_dict(), buffer)
                buffer.seek(0)
                opt = CASES[case][0](a, lr=99.0, aux_weight=0.7, backend=backend)
                opt.load_state_dict(torch.load(buffer, weights_only=True))
            feed(opt, a, other, b, seed=i)
        return [bits(p) for p in a]

    assert run(True) == run(False)


@pytest.mark.parametrize("case", ["sgd-momentum", "adam", "adamw-decay-amsgrad"])
def test_state_of_torch_optim_can_be_taken_over(backend, case):
    opt, a, other, b = twins(case, backend, aux_weight=0.7)
    scratch, c, _, _ = twins(case, backend)
    for i in range(3):
        feed(scratch, c, other, b, seed=i)
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            p.copy_(q)
    opt.load_state_dict(copy.deepcopy(other.state_dict()))  # load_state_dict shares tensors
    for i in range(3, 6):
        feed(opt, a, other, b, seed=i)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_deepcopy_and_pickle(backend):
    opt, a, other, b = twins("adam", backend, aux_weight=0.7)
    feed(opt, a, other, b)
    for clone in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        params = clone.param_groups[0]["params"]
        assert params[0] is not a[0]
        for o, ps in ((clone, params),):
            o.backward(sum(p.sum() for p in ps), sum(p.sum() for p in ps))
            o.step()
        assert float(clone.stats.cosine) == pytest.approx(1.0)
        assert not torch.equal(params[0], a[0])


def test_parameters_that_move_or_are_recast_after_construction(backend):
    net = torch.nn.Linear(3, 2)
    opt = gp.GradPromSGD(net.parameters(), lr=1.0, backend=backend)
    for change in (lambda: None, net.double, lambda: setattr(net.weight, "data", net.weight.detach().t().clone().t())):
        change()
        before = net.weight.detach().clone()
        opt.backward(net.weight.sum() + net.bias.sum(), net.weight.sum() + net.bias.sum())
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(net.weight.detach(), before - 2)


def test_state_tensors_replaced_behind_our_back(backend):
    """`for s in opt.state.values(): s[k] = v.to(device)` and resetting the state are common idioms."""
    opt, a, other, b = twins("adam", backend, aux_weight=0.7)
    for i in range(2):
        feed(opt, a, other, b, seed=i)
    for state in opt.state.values():
        for key in state:
            state[key] = state[key].clone()
    feed(opt, a, other, b, seed=2)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
    for o in (opt, other):
        o.state.clear()
    feed(opt, a, other, b, seed=3)
    for p in a:
        opt.state[p] = {}
    for p in b:
        other.state[p] = {}
    feed(opt, a, other, b, seed=4)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)


def test_several_processes_are_warned_about(backend, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(UserWarning, match="each process would gate by its own auxiliary gradients"):
        gp.GradPromSGD([torch.nn.Parameter(torch.ones(3))], backend=backend)


def test_named_parameters_and_hooks(backend):
    net = torch.nn.Linear(2, 2)
    opt = gp.GradPromSGD(net.named_parameters(), lr=0.1, backend=backend)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(opt.stats is not None))
    opt.backward(net(torch.ones(1, 2)).sum())
    opt.step()
    assert calls == [True]
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_empty_parameters_have_state_as_in_torch(backend):
    params = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.ones(2))]
    opt = gp.GradPromAdam(params, lr=0.1, backend=backend)
    opt.backward(sum(p.sum() for p in params), params[1].sum())
    opt.step()
    assert [float(opt.state[p]["step"]) for p in params] == [1.0, 1.0]
    assert opt.state[params[0]]["exp_avg"].shape == (0, 3)


def test_frozen_parameters_are_left_alone(backend):
    net = torch.nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    before = bits(net.bias)
    opt = gp.GradPromAdamW(net.parameters(), lr=0.1, backend=backend)
    opt.backward(net(torch.ones(1, 2)).sum(), net(torch.ones(1, 2)).sum())
    opt.step()
    assert before == bits(net.bias)


def test_stats_of_earlier_steps_stay_what_they_were(backend):
    opt, a, other, b = twins("sgd", backend)
    feed(opt, a, other, b, seed=0)
    first = opt.stats
    value = first.packed.clone()
    feed(opt, a, other, b, seed=1)
    assert torch.equal(first.packed, value)
    assert not torch.equal(opt.stats.packed, value)


def test_granularity_tensor_in_an_optimizer(backend):
    p, q = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = gp.GradPromSGD([p, q], lr=1.0, granularity="tensor", backend=backend)
    opt.backward(p.sum() + q.sum(), p.sum() - q.sum())
    opt.step()
    assert opt.stats.gate.tolist() == [[1.0], [0.0]]
    assert (p.tolist(), q.tolist()) == ([-2.0, -2.0], [-1.0, -1.0])
