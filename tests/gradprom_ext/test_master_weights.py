"""Float32 masters of 16-bit parameters: the oracle is torch.optim on the masters, in float32."""

from __future__ import annotations

import io

import pytest
import torch

import gradprom_ext as gp

from .problems import CASES, HALF, bits, channels_last, sliced, transposed

SHAPES = [(7, 5, 3, 3), (5,), (), (301,), (33, 17)]


def make(case: str, backend: str, dtype: torch.dtype, layout=torch.clone, **kwargs):
    """Our optimizer on 16-bit parameters, and torch's on float32 copies of them."""
    ours, theirs, options = CASES[case]
    a = [torch.nn.Parameter(layout(torch.randn(s)).to(dtype)) for s in SHAPES]
    b = [torch.nn.Parameter(p.detach().float()) for p in a]
    opt = ours(a, lr=0.05, gate="always", aux_weight=0.5, master_weights=True, backend=backend, **options, **kwargs)
    return opt, a, theirs(b, lr=0.05, foreach=False, **options), b


def feed(opt, a, other, b, seed):
    g = torch.Generator().manual_seed(seed)
    aux = []
    for p, q in zip(a, b, strict=True):
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        aux.append(torch.randn(p.shape, generator=g).to(p.dtype))
        q.grad = p.grad.float() + 0.5 * aux[-1].float()
    opt.aux_grads = [aux]
    opt.step()
    other.step()


@pytest.mark.slow_in_interpreter
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", CASES)
def test_masters_follow_float32_training(backend, case, dtype):
    """Fifty steps: the masters stay with torch.optim's float32, the parameters are the masters rounded, bit for bit."""
    opt, a, other, b = make(case, backend, dtype)
    for seed in range(50):
        feed(opt, a, other, b, seed)
    for p, q in zip(a, b, strict=True):
        state = opt.state[p]
        torch.testing.assert_close(state["master"], q.detach(), rtol=2e-5, atol=2e-6)
        assert bits(p) == bits(state["master"].to(dtype))
        assert {t.dtype for t in state.values()} == {torch.float32}


@pytest.mark.slow_in_interpreter
def test_small_updates_add_up(backend):
    """A thousand updates of 1e-4 each vanish in bfloat16 without a master, whose last place at 1 is 0.0078."""
    results = []
    for master_weights in (False, True):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        opt = gp.GradPromSGD([p], lr=1e-4, master_weights=master_weights, backend=backend)
        for _ in range(1000):
            p.grad = torch.ones(3, dtype=torch.bfloat16)
            opt.step()
        results.append(float(p.detach()[0]))
    assert results == [1.0, float(torch.tensor(0.9).bfloat16())]


@pytest.mark.parametrize("layout", [sliced, transposed, channels_last])
def test_layouts(backend, layout):
    torch.manual_seed(1)
    values = torch.randn(4, 6, 3, 5)
    gradient = torch.randn(4, 6, 3, 5).bfloat16()
    outcomes = []
    for arrange in (torch.clone, layout):
        p = torch.nn.Parameter(arrange(values.bfloat16()))
        opt = gp.GradPromAdamW([p], lr=0.1, master_weights=True, backend=backend)
        for _ in range(3):
            p.grad = gradient
            opt.aux_grads = [[gradient]]
            opt.step()
        outcomes.append((p.detach().contiguous(), opt.state[p]["master"].contiguous()))
    assert all(bits(x) == bits(y) for x, y in zip(*outcomes, strict=True))


def test_float32_and_float64_parameters_have_none(backend):
    params = [torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64, torch.float16)]
    opt = gp.GradPromSGD(params, lr=0.5, master_weights=True, backend=backend)
    opt.backward(sum(p.sum() for p in params))
    opt.step()
    assert [sorted(opt.state[p]) for p in params] == [[], [], ["master"]]
    assert [p.tolist() for p in params] == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("nested", ["float64 gradient", "strided gradient"])
def test_gradients_of_other_types_and_layouts(backend, nested):
    p = torch.nn.Parameter(torch.randn(5, 7).half())
    master = p.detach().float()
    g = torch.randn(5, 7, dtype=torch.float64) if nested.startswith("float64") else torch.randn(7, 5).half().t()
    gp_opt = gp.GradPromSGD([p], lr=0.3, master_weights=True, backend=backend)
    p.grad = g.half() if g.dtype == torch.float64 else g
    gp_opt.aux_grads = [[g]]
    gp_opt.step()
    exact = (master.double() - 0.3 * (p.grad.double() + g.double())).float()
    torch.testing.assert_close(gp_opt.state[p]["master"], exact, rtol=3e-7, atol=1e-7)
    assert bits(p) == bits(gp_opt.state[p]["master"].half())


def test_a_skipped_step_leaves_everything(backend):
    opt, a, other, b = make("adam", backend, torch.bfloat16)
    feed(opt, a, other, b, 0)
    before = [bits(t) for p in a for t in (p, *opt.state[p].values())]
    for p in a:
        p.grad = torch.full_like(p, float("nan"))
    opt.step()
    assert [bits(t) for p in a for t in (p, *opt.state[p].values())] == before
    assert float(opt.skipped_steps) == 1


def test_a_write_to_a_parameter_is_a_write_to_its_master(backend):
    opt, a, other, b = make("sgd-momentum", backend, torch.bfloat16)
    feed(opt, a, other, b, 0)
    kept = opt.state[a[0]]["master"].clone()
    with torch.no_grad():
        a[1].fill_(3.0)
        a[0].copy_(a[0].clone())  # the same values: the master keeps its finer ones
    for p in a:
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.aux_grads = []
    opt.step()
    assert torch.equal(opt.state[a[1]]["master"], torch.full((5,), 3.0))
    torch.testing.assert_close(opt.state[a[0]]["master"], kept, rtol=0, atol=0)


def test_state_dict_round_trip_is_exact(backend):
    """Masters and moments stay float32: torch.optim alone would cast them to the parameter's type."""

    def run(reload: bool):
        torch.manual_seed(0)
        opt, a, other, b = make("adamw", backend, torch.bfloat16)
        for seed in range(6):
            if seed == 3 and reload:
                buffer = io.BytesIO()
                torch.save((opt.state_dict(), [p.detach() for p in a]), buffer)
                buffer.seek(0)
                saved, values = torch.load(buffer, weights_only=True)
                opt, a, *_ = make("adamw", backend, torch.bfloat16)
                opt.load_state_dict(saved)
                with torch.no_grad():  # in either order: equal values do not refresh a master
                    for p, v in zip(a, values, strict=True):
                        p.copy_(v)
            feed(opt, a, other, b, seed)
        return [bits(t) for p in a for t in (p, *opt.state[p].values())]

    assert run(True) == run(False)


def test_a_state_dict_without_masters_can_be_loaded(backend):
    opt, a, other, b = make("adam", backend, torch.bfloat16)
    plain = torch.optim.Adam([torch.nn.Parameter(p.detach().clone()) for p in a], lr=0.05)
    for p in plain.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    plain.step()
    opt.load_state_dict(plain.state_dict())
    feed(opt, a, other, b, 0)
    assert {t.dtype for s in opt.state.values() for t in s.values()} == {torch.float32}
    assert {float(s["step"]) for s in opt.state.values()} == {2.0}
