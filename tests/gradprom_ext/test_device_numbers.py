"""Learning rate and lambda as tensors, which the kernels read when they run; and the count of skipped steps."""

from __future__ import annotations

import copy

import pytest
import torch

import gradprom_ext as gp

from .problems import CASES, bits, problem

TYPES = [torch.float32, torch.float64]


def run(optimizer, lrs, aux_weights, *, tensors, backend, **kwargs):
    """Parameters after a few steps whose lr and lambda change, as numbers or as tensors that are written to."""
    params, main, aux = problem(2, seed=1, shapes=[(5, 3), (), (700,)])
    leaves = [torch.nn.Parameter(p) for p in params]
    lr, weight = lrs[0], aux_weights[0]
    if tensors is not None:
        lr, weight = torch.tensor(lr, dtype=tensors), torch.tensor(weight, dtype=tensors)
    opt = optimizer(leaves, lr=lr, aux_weight=weight, gate="soft", threshold=-1.0, backend=backend, **kwargs)
    for new_lr, new_weight in zip(lrs, aux_weights, strict=True):
        if tensors is None:
            opt.param_groups[0]["lr"], opt.aux_weight = new_lr, new_weight
        else:
            lr.fill_(new_lr)
            weight.copy_(torch.tensor(new_weight))
        for p, g in zip(leaves, main, strict=True):
            p.grad = g
        opt.aux_grads = aux
        opt.step()
    return [p.detach() for p in leaves]


@pytest.mark.parametrize("tensors", TYPES)
@pytest.mark.parametrize("aux_weights", [(0.5, 2.0, 1.25), ((0.5, 2.0), (0.25, -1.0), (4.0, 0.0))])
@pytest.mark.parametrize("optimizer", [gp.GradPromSGD, gp.GradPromAdam, gp.GradPromAdamW])
def test_tensors_mean_what_numbers_mean(backend, optimizer, aux_weights, tensors):
    """Powers of two: the same in both types, so the same bits."""
    lrs = (0.5, 0.125, 0.25)
    numbers = run(optimizer, lrs, aux_weights, tensors=None, backend=backend)
    assert [bits(p) for p in run(optimizer, lrs, aux_weights, tensors=tensors, backend=backend)] == [
        bits(p) for p in numbers
    ]


@pytest.mark.parametrize("case", CASES)
def test_schedulers_write_into_tensors(backend, case):
    """``capturable``: numbers become tensors, and a scheduler of torch.optim goes on as before."""
    ours, _, options = CASES[case]
    outcomes = []
    for capturable in (False, True):
        params, main, aux = problem(1, seed=2, shapes=[(9, 4), (3,)], dtype=torch.float64)
        leaves = [torch.nn.Parameter(p) for p in params]
        opt = ours(leaves, lr=0.05, aux_weight=0.7, capturable=capturable, backend=backend, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.5)
        for _ in range(5):
            for p, g in zip(leaves, main, strict=True):
                p.grad = g
            opt.aux_grads = aux
            opt.step()
            scheduler.step()
        tensors = [opt.param_groups[0]["lr"], opt.aux_weight]
        assert [isinstance(t, torch.Tensor) for t in tensors] == [capturable] * 2
        outcomes.append(leaves)
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_the_very_tensor_is_read(backend):
    """Its owner keeps it: no copy is made, and nothing of it is remembered between steps."""
    p, weight, lr = torch.nn.Parameter(torch.zeros(1)), torch.tensor(1.0), torch.tensor(1.0)
    opt = gp.GradPromSGD([p], lr=lr, aux_weight=weight, capturable=True, backend=backend)
    assert opt.param_groups[0]["lr"] is lr
    for value in (1.0, 3.0, 0.5):
        weight.fill_(value)
        lr.fill_(1 / value)
        p.grad, opt.aux_grads = torch.ones(1), [[torch.ones(1)]]
        opt.step()
    assert float(p.detach()) == pytest.approx(-(2 / 1 + 4 / 3 + 1.5 / 0.5))


def test_groups_have_a_learning_rate_each(backend):
    a, b = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    opt = gp.GradPromSGD([{"params": [a], "lr": torch.tensor(0.5)}, {"params": [b]}], lr=2.0, backend=backend)
    opt.backward(a.sum() + b.sum())
    opt.step()
    assert (a.tolist(), b.tolist()) == ([-0.5] * 2, [-2.0] * 2)


def test_projection_uses_lambda_twice(backend):
    """The weight of the main gradient depends on lambda too."""
    theta = [torch.zeros(2)]
    stats = gp.gradprom_(
        theta,
        [torch.tensor([1.0, 0.0])],
        [torch.tensor([-1.0, 1.0])],
        lr=torch.tensor(1.0),
        aux_weight=torch.tensor(2.0),
        gate="project",
        backend=backend,
    )
    assert float(stats.main_weight) == 3.0
    assert theta[0].tolist() == [-1.0, -2.0]


def test_state_dict_and_copies_keep_tensors(backend):
    p = torch.nn.Parameter(torch.ones(3))
    opt = gp.GradPromAdam([p], lr=0.1, capturable=True, master_weights=True, backend=backend)
    opt.backward(p.sum())
    opt.step()
    other = gp.GradPromAdam([torch.nn.Parameter(torch.ones(3))], lr=9.0, capturable=True, backend=backend)
    other.load_state_dict(opt.state_dict())
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.1)
    clone = copy.deepcopy(opt)
    clone.backward(clone.param_groups[0]["params"][0].sum())
    clone.step()
    assert isinstance(clone.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": torch.ones(2)}, ValueError, "lr must be a number, or a float32 or float64 tensor of one element"),
        ({"lr": torch.tensor(1)}, ValueError, "lr must be a number, or a float32 or float64 tensor of one element"),
        ({"lr": torch.tensor(-1.0)}, ValueError, "lr must be a number >= 0"),
        ({"aux_weight": torch.ones(2, 2)}, ValueError, r"aux_weight has shape \(2, 2\)"),
        (
            {"aux_weight": torch.tensor(1)},
            TypeError,
            "aux_weight has dtype torch.int64; as a tensor",
        ),
    ],
)
def test_tensors_that_are_no_numbers(kwargs, error, message):
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(error, match=message):
        gp.GradPromSGD([p], **kwargs)


def test_a_lambda_too_many(backend):
    p = torch.nn.Parameter(torch.ones(2))
    opt = gp.GradPromSGD([p], aux_weight=torch.ones(3), backend=backend)
    opt.backward(p.sum(), p.sum())
    with pytest.raises(ValueError, match="aux_weight has 3 entries for 1 auxiliary gradients"):
        opt.step()


class Everything(gp.GatePolicy):
    def __call__(self, gram, aux_weight):
        return torch.ones_like(gram[..., 0, 0]), torch.ones_like(gram[..., 0, 1:])


@pytest.mark.parametrize("gate", ["hard", Everything()])
@pytest.mark.parametrize("granularity", ["global", "tensor"])
def test_skipped_steps_are_counted(backend, granularity, gate):
    p = torch.nn.Parameter(torch.ones(300))
    opt = gp.GradPromSGD([p], lr=0.1, gate=gate, granularity=granularity, backend=backend)
    counts = []
    for value in (1.0, float("nan"), float("inf"), 1.0, float("nan")):
        p.grad, opt.aux_grads = torch.ones(300), [[torch.full((300,), value)]]
        opt.step()
        counts.append(float(opt.skipped_steps))
    assert counts == [0, 1, 2, 2, 3]
