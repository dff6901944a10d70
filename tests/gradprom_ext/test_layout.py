"""Parameters and gradients of different memory layouts are matched element by element, never permuted."""

from __future__ import annotations

import pytest
import torch

import gradprom_ext as gp

from .problems import channels_last, contiguous, misaligned, sliced, transposed

SHAPE = (4, 6, 3, 5)


LAYOUTS = [contiguous, channels_last, transposed, sliced, misaligned]
OPTIMIZERS = [
    lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, momentum=0.9, **kw),
    lambda ps, **kw: gp.GradPromAdamW(ps, lr=0.1, amsgrad=True, **kw),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_layouts_do_not_change_the_result(backend, param_layout, grad_layout, make):
    values = [torch.randn(SHAPE) for _ in range(3)]
    outcomes = []
    for p_layout, g_layout in [(contiguous, contiguous), (param_layout, grad_layout)]:
        p = torch.nn.Parameter(p_layout(values[0]))
        opt = make([p], gate="always", backend=backend)
        for _ in range(3):
            # By hand: autograd would give the gradient the parameter's layout.
            p.grad, opt.aux_grads = g_layout(values[1]), [[contiguous(values[2])]]
            opt.step()
        outcomes.append((p, opt.stats.cosine))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-6, atol=1e-7)


def test_writing_a_sliced_parameter_leaves_its_neighbours_alone(backend):
    p = sliced(torch.zeros(SHAPE))
    gp.gradprom_([p], [torch.ones(SHAPE)], [torch.ones(SHAPE)], lr=1.0, backend=backend)
    assert torch.equal(p, torch.full(SHAPE, -2.0))
    whole = p.as_strided((p.numel() * 2,), (1,))
    assert torch.equal(whole[1::2], torch.full((p.numel(),), 7.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_strided_tensors_of_other_dtypes(backend, dtype):
    p, g = sliced(torch.randn(SHAPE).to(dtype)), transposed(torch.randn(SHAPE).to(dtype))
    expected = (p.double() - 0.5 * 2 * g.double()).to(dtype)
    gp.gradprom_([p], [g], [contiguous(g)], lr=0.5, backend=backend)
    torch.testing.assert_close(p, expected)


def test_expanded_and_size_one_dimensions(backend):
    p = torch.zeros(3, 1, 4)
    g = torch.arange(4.0).expand(3, 1, 4)  # stride 0
    odd = torch.empty_strided((3, 1, 4), (4, 99, 1)).copy_(g)  # the stride of a dimension of size 1 means nothing
    stats = gp.gradprom_([p], [g], [odd], lr=1.0, backend=backend)
    assert torch.equal(p, -2 * g)
    assert float(stats.cosine) == pytest.approx(1.0)
    assert float(gp.gradient_stats([g], [odd], backend=backend).cosine) == pytest.approx(1.0)


def test_aliased_gradients(backend):
    """Two parameters may share one gradient tensor, and both losses too (autograd.grad of a + b does that)."""
    shared = torch.tensor([1.0, 2.0])
    params = [torch.zeros(2), torch.zeros(2)]
    gp.gradprom_(params, [shared, shared], [shared, shared], lr=1.0, backend=backend)
    assert [p.tolist() for p in params] == [[-2.0, -4.0]] * 2


OVERLAPPING = {
    "expanded": lambda: torch.zeros(1).expand(4),
    "rows that overlap": lambda: torch.zeros(4).as_strided((2, 2), (1, 1)),
}


@pytest.mark.parametrize("make", OVERLAPPING.values(), ids=OVERLAPPING)
def test_parameters_that_share_memory_with_themselves_are_refused(backend, make):
    first, p = torch.zeros(4), make()
    grads = [torch.ones(4), torch.ones(p.shape)]
    with pytest.raises(ValueError, match=r"params\[1\] is a view in which several elements share one memory address"):
        gp.gradprom_([first, p], grads, grads, backend=backend)
    assert torch.equal(first, torch.zeros(4)), "found before the first parameter is touched"


def test_channels_last_model_trains_like_a_contiguous_one(backend):
    results = []
    for fmt in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 3)).to(
            memory_format=fmt
        )
        head = torch.nn.Linear(3, 2)
        opt = gp.GradPromAdam(net.parameters(), lr=1e-2, backend=backend)
        x = torch.randn(2, 3, 12, 12).contiguous(memory_format=fmt)
        for _ in range(3):
            y = net(x)
            opt.backward(y.square().mean(), head(y.mean((2, 3))).square().mean())
            opt.step()
            opt.zero_grad()
        results.append([p.detach().contiguous() for p in net.parameters()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
