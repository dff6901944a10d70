"""How gradients are captured: one per loss, without copies, for the right parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

import gradprom_ext as gp


class Pair:
    """A tiny IP and VR, and the two losses of a batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.ip = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6)).double()
        self.vr = torch.nn.Linear(6, 3).double()
        self.opt = gp.GradPromSGD(self.ip.parameters(), lr=0.1, backend="auto")

    def losses(self, seed: int = 0, n: int = 5):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 6, generator=g, dtype=torch.float64)
        clean = torch.randn(n, 6, generator=g, dtype=torch.float64)
        label = torch.randint(3, (n,), generator=g)
        y = self.ip(x)
        return mse_loss(y, clean), cross_entropy(self.vr(y), label)

    def expected(self, seed: int = 0):
        """Gradients by torch.autograd.grad, on a graph of their own."""
        main, aux = self.losses(seed)
        ip, vr = list(self.ip.parameters()), list(self.vr.parameters())
        g_main = torch.autograd.grad(main, ip, retain_graph=True)
        g_aux = torch.autograd.grad(aux, [*ip, *vr])
        return list(g_main), list(g_aux[: len(ip)]), list(g_aux[len(ip) :])


def close(a, b):
    torch.testing.assert_close(list(a), list(b), rtol=1e-12, atol=1e-14)


def test_each_loss_gets_its_own_gradient_and_vr_its_ordinary_one():
    pair = Pair()
    main, aux, vr = pair.expected()
    pair.opt.backward(*pair.losses())
    close([p.grad for p in pair.ip.parameters()], main)
    close(pair.opt.aux_grads[0], aux)
    close([p.grad for p in pair.vr.parameters()], vr)


def test_vr_gradient_accumulates_over_auxiliaries_and_matches_the_plain_sum():
    pair, twin = Pair(), Pair()
    (main, a), (_, b) = pair.losses(0), pair.losses(1)
    pair.opt.backward(main, a, b)
    (twin.losses(0)[1] + twin.losses(1)[1]).backward()
    close([p.grad for p in pair.vr.parameters()], [p.grad for p in twin.vr.parameters()])


def test_micro_batches_accumulate_and_are_gated_once():
    pair = Pair()
    g = [pair.expected(seed) for seed in range(3)]
    for seed in range(3):
        pair.opt.backward(*pair.losses(seed))
    main = [sum(x) for x in zip(*(e[0] for e in g), strict=True)]
    aux = [sum(x) for x in zip(*(e[1] for e in g), strict=True)]
    close([p.grad for p in pair.ip.parameters()], main)
    close(pair.opt.aux_grads[0], aux)
    pair.opt.step()
    expected = gp.gradient_stats(main, aux, backend="reference")
    torch.testing.assert_close(pair.opt.stats.cosine, expected.cosine)


def test_no_copies_are_made():
    """What autograd hands over is what the optimizer holds: same memory."""
    pair = Pair()
    seen = {}
    for p in pair.ip.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.setdefault(p, []).append(p.grad.data_ptr()))
    pair.opt.backward(*pair.losses())
    for p, a in zip(pair.ip.parameters(), pair.opt.aux_grads[0], strict=True):
        assert seen[p] == [p.grad.data_ptr(), a.data_ptr()]


def test_an_auxiliary_that_misses_some_parameters():
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = gp.GradPromSGD([a, b], lr=1.0)
    opt.backward(a.sum() + b.sum(), a.sum())
    opt.step()
    assert (a.tolist(), b.tolist()) == ([-1.0, -1.0], [0.0, 0.0])


def test_without_auxiliaries_it_is_the_plain_optimizer():
    pair = Pair()
    twin = copy.deepcopy(pair.ip)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    main, _ = pair.losses()
    pair.opt.backward(main)
    for p, q in zip(pair.ip.parameters(), twin.parameters(), strict=True):
        q.grad = p.grad.clone()
    pair.opt.step()
    plain.step()
    close(pair.ip.parameters(), twin.parameters())
    assert pair.opt.stats.cosine.shape == (0,)


def test_an_ordinary_backward_and_step_work_too():
    pair = Pair()
    before = [p.detach().clone() for p in pair.ip.parameters()]
    pair.losses()[0].backward()
    pair.opt.step()
    close(pair.ip.parameters(), [b - 0.1 * p.grad for b, p in zip(before, pair.ip.parameters(), strict=True)])


def test_retain_graph():
    pair = Pair()
    main, aux = pair.losses()
    pair.opt.backward(main, aux, retain_graph=True)
    pair.opt.backward(main, aux)
    with pytest.raises(RuntimeError, match="second time"):
        pair.opt.backward(main, aux)


def test_an_error_in_an_auxiliary_backward_leaves_the_main_gradient_in_place():
    pair = Pair()
    main, _ = pair.losses()
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    broken = (pair.ip(torch.ones(1, 6, dtype=torch.float64)).sum() * x).sum()
    x.register_hook(lambda g: 1 / 0)
    expected, _, _ = pair.expected()
    with pytest.raises(ZeroDivisionError):
        pair.opt.backward(main, broken)
    close([p.grad for p in pair.ip.parameters()], expected)
    assert pair.opt.aux_grads == []


def test_zero_grad_drops_every_loss():
    pair = Pair()
    pair.opt.backward(*pair.losses())
    pair.opt.zero_grad()
    assert all(p.grad is None for p in pair.ip.parameters())
    main, aux, _ = pair.expected(1)
    pair.opt.backward(*pair.losses(1))
    close(pair.opt.aux_grads[0], aux)
    close([p.grad for p in pair.ip.parameters()], main)


def test_the_step_equals_the_method_written_out_by_hand():
    """Ten steps of GradProm in plain autograd, with the hard gate, against the optimizer."""
    pair, twin = Pair(), Pair()
    gates = set()
    for seed in range(10):
        pair.opt.backward(*pair.losses(seed))
        pair.opt.step()
        pair.opt.zero_grad()
        g_main, g_aux, _ = twin.expected(seed)
        dot = sum((m * a).sum() for m, a in zip(g_main, g_aux, strict=True))
        gates.add(bool(dot >= 0))
        with torch.no_grad():
            for p, m, a in zip(twin.ip.parameters(), g_main, g_aux, strict=True):
                p -= 0.1 * (m + a if dot >= 0 else m)
        close(pair.ip.parameters(), twin.ip.parameters())
    assert gates == {True, False}


def test_vr_does_not_bias_ip():
    """The combined direction never points against the main gradient, whatever VR wants."""
    for gate in ("hard", "soft", "project"):
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            main, aux = torch.randn(50, generator=g), 10 * torch.randn(50, generator=g)
            p = torch.zeros(50)
            gp.gradprom_([p], [main], [aux], lr=1.0, gate=gate)
            assert float(torch.dot(-p, main)) >= 0.999 * float(torch.dot(main, main))
