"""Tensors whose memory does not hold their values: lazy views, and tensors without memory of their own.

They are read as PyTorch would, or refused by name before anything is written; never read as plain memory.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

import gradprom_ext as gp

from .problems import bits

pytestmark = pytest.mark.not_mirrored


def negated(t: torch.Tensor) -> torch.Tensor:
    """A view of the values of ``t`` whose memory holds their opposites."""
    return torch._neg_view(-t)


def imaginary(t: torch.Tensor) -> torch.Tensor:
    """The same through the public interface: every second number of complex memory, with the negative bit."""
    return torch.complex(torch.randn(t.shape, dtype=t.dtype), -t).conj().imag


LAZY = [negated, imaginary]
SHAPES = [(1,), (), (7, 5), (301,)]


def problem():
    g = torch.Generator().manual_seed(0)
    return [[torch.randn(s, generator=g) for s in SHAPES] for _ in range(3)]


@pytest.mark.parametrize("which", ["main", "aux"])
@pytest.mark.parametrize("lazy", LAZY)
def test_gradients_with_the_negative_bit(backend, lazy, which):
    params, main, aux = problem()
    expected = [p.clone() for p in params]
    plain = gp.gradprom_(expected, main, aux, lr=0.5, backend=backend)
    views = [lazy(g) for g in (main if which == "main" else aux)]
    assert all(v.is_neg() for v in views)
    memory = [torch._neg_view(v).tolist() for v in views]
    stats = gp.gradprom_(
        params, *((views, aux) if which == "main" else (main, views)), lr=0.5, backend=backend
    )  # fmt: skip
    assert bits(stats.packed) == bits(plain.packed)
    for p, e in zip(params, expected, strict=True):
        assert bits(p) == bits(e)
    assert memory == [torch._neg_view(v).tolist() for v in views], "gradients are never written"


@pytest.mark.parametrize("lazy", LAZY)
def test_the_cosine_of_a_gradient_with_its_own_copy(backend, lazy):
    g = torch.randn(9)
    assert float(gp.gradient_stats([lazy(g)], [g], backend=backend).cosine) == pytest.approx(1.0)


def test_a_complex_loss_in_a_training_loop(backend):
    """Autograd leaves a lazy view in ``.grad`` of a one-element parameter."""
    im, twin = torch.nn.Parameter(torch.tensor([0.5])), torch.nn.Parameter(torch.tensor([0.5]))
    z = torch.tensor([1.0 + 2.0j])
    loss = lambda im: (z * torch.complex(torch.tensor([0.3]), im).conj()).real.sum()  # noqa: E731
    opt = gp.GradPromSGD([im], lr=0.1, backend=backend)
    plain = torch.optim.SGD([twin], lr=0.1)
    for _ in range(3):
        opt.backward(loss(im), loss(im))
        (2 * loss(twin)).backward()
        for o in (opt, plain):
            o.step()
            o.zero_grad()
    assert float(opt.stats.cosine) == pytest.approx(1.0)
    torch.testing.assert_close(im, twin)


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("make", [gp.GradPromSGD, gp.GradPromAdamW])
def test_parameters_with_the_negative_bit(backend, make, lazy):
    """Handled as PyTorch handles them, or refused by name before anything is written."""
    p, q = torch.nn.Parameter(lazy(torch.ones(5))), torch.nn.Parameter(torch.ones(5))
    other = torch.nn.Parameter(torch.ones(3))
    outcomes = []
    for params in ([other, p], [torch.nn.Parameter(torch.ones(3)), q]):
        for t in params:
            t.grad = torch.ones(t.shape)
        try:
            make(params, lr=0.1, backend=backend).step()
            outcomes.append([t.tolist() for t in params])
        except TypeError as error:
            assert "parameter 1 of group 0 is a lazily negated view" in str(error)
            assert other.tolist() == [1.0] * 3
            return
    assert outcomes[0] == pytest.approx(outcomes[1])


def test_a_parameter_that_becomes_lazy_later(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromSGD([p], lr=0.1, backend=backend)
    p.grad = torch.ones(3)
    opt.step()
    p.data = negated(p.data)
    before = p.detach().clone()
    try:
        opt.step()
    except TypeError as error:
        assert "params[0] is a lazily negated view" in str(error)
        assert torch.equal(p, before)
    else:
        torch.testing.assert_close(p.detach(), before - 0.1)


def test_a_state_with_the_negative_bit(backend):
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    outcomes = []
    for param, buffer in ((p, negated(torch.full((3,), 2.0))), (q, torch.full((3,), 2.0))):
        opt = gp.GradPromSGD([param], lr=0.1, momentum=0.5, backend=backend)
        opt.state[param] = {"momentum_buffer": buffer, "step": torch.ones(())}
        param.grad = torch.ones(3)
        try:
            opt.step()
        except TypeError as error:
            assert "state of params[0]['momentum_buffer'] is a lazily negated view" in str(error)
            assert param.tolist() == [0.0] * 3
            return
        outcomes.append(param.tolist())
    assert outcomes[0] == outcomes[1]


class Wrapper(torch.Tensor):
    """A tensor that says it holds something and has no memory, as DTensor and quantized weights do."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    def __init__(self, shape):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} is not for wrappers")


def fake(*shape):
    with FakeTensorMode():
        return torch.empty(*shape)


PHANTOMS = {
    "fake": (lambda: fake(3), r"main_grads\[1\] is a FakeTensor"),
    "wrapper": (lambda: Wrapper((3,)), r"main_grads\[1\] is a Wrapper"),
    "efficient zero": (lambda: torch._efficientzerotensor((3,)), r"main_grads\[1\] is an efficient zero tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), r"main_grads\[1\] is on meta"),
    "freed": (lambda: freed(3), r"main_grads\[1\] has no memory"),
    "sparse": (lambda: torch.ones(3).to_sparse(), r"main_grads\[1\] is sparse"),
    "functional": (lambda: torch._to_functional_tensor(torch.ones(3)), r"main_grads\[1\] is a functional tensor"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        r"main_grads\[1\] has dtype qint8",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        r"main_grads\[1\] is (a NestedTensor|nested)",
    ),
}


def freed(n):
    t = torch.ones(n)
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", PHANTOMS)
def test_tensors_without_memory(backend, kind):
    make, message = PHANTOMS[kind]
    params = [torch.ones(3), torch.ones(3)]
    zero = kind == "efficient zero"
    try:
        gp.gradprom_(params, [torch.ones(3), make()], [torch.ones(3)] * 2, gate="always", lr=0.5, backend=backend)
    except (TypeError, ValueError) as error:
        assert re.search(message, str(error)), str(error)
        assert [p.tolist() for p in params] == [[1.0] * 3] * 2
    else:
        assert zero, f"{kind}: accepted"
        assert [p.tolist() for p in params] == [[0.0] * 3, [0.5] * 3]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", PHANTOMS)
def test_gradients_of_an_optimizer_without_memory(backend, kind):
    """No check in Python stands before the kernel here."""
    make, message = PHANTOMS[kind]
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = gp.GradPromSGD(params, lr=0.5, gate="always", backend=backend)
    for p in params:
        p.grad = torch.ones(3)
    opt.step()
    opt.aux_grads = [[torch.ones(3), make()]]
    message = message.replace("main_grads", r"aux_grads\[0\]")
    try:
        opt.step()
    except (TypeError, ValueError) as error:
        assert re.search(message, str(error)), str(error)
        assert [p.tolist() for p in params] == [[0.5] * 3] * 2
    else:
        assert kind == "efficient zero", f"{kind}: accepted"
        assert [p.tolist() for p in params] == [[-0.5] * 3, [0.0] * 3]


@pytest.mark.parametrize("kind", ["fake", "wrapper", "freed", "functional"])
def test_parameters_without_memory(backend, kind):
    make, message = PHANTOMS[kind]
    with pytest.raises((TypeError, ValueError), match=message.replace("main_grads", "params")):
        gp.gradprom_([torch.ones(3), make()], [torch.ones(3)] * 2, [torch.ones(3)] * 2, backend=backend)


def test_a_state_without_memory(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromAdam([p], lr=0.1, backend=backend)
    p.grad = torch.ones(3)
    opt.step()
    before = bits(p)
    opt.state[p]["exp_avg_sq"].untyped_storage().resize_(0)
    with pytest.raises((TypeError, ValueError), match=re.escape("state of params[0]['exp_avg_sq'] has no memory")):
        opt.step()
    assert bits(p) == before
