"""Bad input: a clear error that names the culprit, and parameters and optimizer state as they were."""

from __future__ import annotations

import re

import pytest
import torch

import gradprom_ext as gp

from .problems import bits

NAN = float("nan")


def sparse(n=4):
    return torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (n,), check_invariants=True)


def ones(*shape, dtype=None):
    return torch.ones(shape, dtype=dtype)


GRADIENTS = {
    "fewer main gradients": ([ones(4)], [ones(4), ones(4)], ValueError, "main_grads holds 1 gradients for 2 params"),
    "fewer aux gradients": ([ones(4)] * 2, [ones(4)], ValueError, "aux_grads holds 1 gradients for 2 params"),
    "one of several": ([ones(4)] * 2, [[ones(4)] * 2, [ones(4)]], ValueError, "aux_grads[1] holds 1 gradients for 2"),
    "main shape": (
        [ones(4), ones(5)],
        [ones(4)] * 2,
        ValueError,
        "main_grads[1] has shape (5,), but params[1] has shape (4,)",
    ),
    "aux shape": ([ones(4)] * 2, [ones(2, 2), ones(4)], ValueError, "aux_grads[0] has shape (2, 2), but params[0]"),
    "sparse": ([ones(4)] * 2, [ones(4), sparse()], TypeError, "aux_grads[1] is sparse"),
    "complex": (
        [ones(4)] * 2,
        [ones(4, dtype=torch.complex64), ones(4)],
        TypeError,
        "aux_grads[0] has dtype complex64",
    ),
    "integer": ([ones(4, dtype=torch.int64), ones(4)], [ones(4)] * 2, TypeError, "main_grads[0] has dtype int64"),
    "no tensor": ([ones(4), 3.0], [ones(4)] * 2, TypeError, "main_grads[1] is a float, not a tensor"),
    "other device": (
        [ones(4)] * 2,
        [ones(4), ones(4).to("meta")],
        ValueError,
        "aux_grads[1] is on meta, but params[1] is on cpu",
    ),
    "a bare tensor": ([ones(4)] * 2, ones(4), TypeError, "aux_grads is a tensor; pass a sequence"),
    "mixed nesting": ([ones(4)] * 2, [ones(4), [ones(4)]], TypeError, "aux_grads mixes tensors and sequences"),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients(backend, case):
    main, aux, error, message = GRADIENTS[case]
    params = [torch.randn(4), torch.randn(4)]
    before = [bits(p) for p in params]
    with pytest.raises(error, match=re.escape(message)):
        gp.gradprom_(params, main, aux, backend=backend)
    assert before == [bits(p) for p in params]


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(4, dtype=torch.int64), "params[1] has dtype int64; gradprom_ext works on float32"),
        (torch.ones(4, dtype=torch.complex64), "params[1] has dtype complex64"),
        (sparse(), "params[1] is sparse"),
        ("theta", "params[1] is a str, not a tensor"),
    ],
)
def test_parameters(backend, param, message):
    first = torch.ones(4)
    with pytest.raises(TypeError, match=re.escape(message)):
        gp.gradprom_([first, param], [ones(4)] * 2, [ones(4)] * 2, backend=backend)
    assert torch.equal(first, torch.ones(4))


ARGUMENTS = [
    ({"lr": -1e-3}, "lr must be a number >= 0, got -0.001"),
    ({"lr": NAN}, "lr must be a number >= 0, got nan"),
    ({"aux_weight": NAN}, "aux_weight must be finite, got nan"),
    ({"aux_weight": [1.0, 2.0]}, "aux_weight has 2 entries for 1 auxiliary gradients"),
    ({"gate": "ajar"}, "unknown gate 'ajar'; choose 'hard', 'soft', 'always', 'never', 'project', or pass a"),
    ({"threshold": 1.5}, "threshold must be a cosine in [-1, 1], got 1.5"),
    ({"threshold": NAN}, "threshold must be a cosine in [-1, 1], got nan"),
    ({"gate": "always", "threshold": 0.1}, "threshold=0.1 has no meaning for gate='always'"),
    ({"gate": gp.HardGate(), "threshold": 0.1}, "give it to HardGate(threshold=0.0) itself"),
    ({"granularity": "layer"}, "granularity must be 'global' or 'tensor', got 'layer'"),
    ({"nonfinite": "ignore"}, "nonfinite must be 'skip' or 'raise', got 'ignore'"),
    ({"aux_cap": 0.0}, "aux_cap must be a finite number > 0 or None, got 0.0 (gate='never' adds nothing)"),
    ({"aux_cap": -1.0}, "aux_cap must be a finite number > 0 or None, got -1.0"),
    ({"aux_cap": NAN}, "aux_cap must be a finite number > 0 or None, got nan"),
    ({"aux_cap": float("inf")}, "aux_cap must be a finite number > 0 or None, got inf"),
    ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None, got 0.0"),
    ({"backend": "abacus"}, "unknown backend 'abacus'; choose 'auto' or one of 'c"),
]


@pytest.mark.parametrize(("kwargs", "message"), ARGUMENTS)
def test_arguments(kwargs, message):
    p = torch.ones(4)
    with pytest.raises(ValueError, match=re.escape(message)):
        gp.gradprom_([p], [ones(4)], [ones(4)], **kwargs)
    assert torch.equal(p, torch.ones(4))
    if kwargs.get("aux_weight") != [1.0, 2.0]:
        with pytest.raises(ValueError, match=re.escape(message)):
            gp.GradPromAdam([torch.nn.Parameter(p)], **kwargs)


@pytest.mark.parametrize(
    ("make", "kwargs", "message"),
    [
        (gp.GradPromSGD, {"momentum": -0.1}, "momentum must be a number >= 0, got -0.1"),
        (gp.GradPromSGD, {"weight_decay": NAN}, "weight_decay must be a number >= 0, got nan"),
        (gp.GradPromSGD, {"dampening": NAN}, "dampening must be finite, got nan"),
        (gp.GradPromSGD, {"nesterov": True}, "nesterov needs a momentum and no dampening"),
        (gp.GradPromAdam, {"betas": (1.0, 0.9)}, "betas must lie in [0, 1), got (1.0, 0.9)"),
        (gp.GradPromAdamW, {"eps": -1.0}, "eps must be a number >= 0, got -1.0"),
    ],
)
def test_optimizer_arguments(make, kwargs, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make([torch.nn.Parameter(ones(2))], **kwargs)


def test_optimizer_refuses_parameters_and_groups():
    with pytest.raises(TypeError, match="parameter 1 of group 0 has dtype complex64"):
        gp.GradPromSGD([torch.nn.Parameter(ones(2)), torch.nn.Parameter(ones(2, dtype=torch.complex64))])
    opt = gp.GradPromSGD([("w", torch.nn.Parameter(ones(2)))])
    with pytest.raises(ValueError, match="lr must be"):
        opt.add_param_group({"params": [("b", torch.nn.Parameter(ones(2)))], "lr": -1.0})
    assert len(opt.param_groups) == 1, "a refused group is not added"


def fresh(backend):
    p = torch.nn.Parameter(ones(3))
    opt = gp.GradPromAdam([p], lr=0.1, backend=backend)
    opt.backward(p.sum(), p.sum())
    opt.step()
    opt.zero_grad()
    return opt, p, [bits(p), *(bits(t) for t in opt.state[p].values())]


def unchanged(opt, p, before):
    return before == [bits(p), *(bits(t) for t in opt.state[p].values())]


def test_losses(backend):
    opt, p, before = fresh(backend)
    cases = [
        ((p.sum(), torch.tensor(1.0)), ValueError, "aux_losses[0] has no graph"),
        ((p.detach().sum(), p.sum()), ValueError, "main_loss has no graph"),
        ((p.sum(), p.sum(), p * 2), ValueError, "aux_losses[1] must be a single number, its shape is (3,)"),
        ((p.sum(), 1.0), TypeError, "aux_losses[0] is a float, not a tensor"),
    ]
    for losses, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            opt.backward(*losses)
        assert p.grad is None, "the check comes before any backward"
    opt.backward(p.sum(), p.sum())
    with pytest.raises(ValueError, match="2 auxiliary losses, but the gradients so far have 1"):
        opt.backward(p.sum(), p.sum(), p.sum())
    assert unchanged(opt, p, before)


def test_gradients_an_optimizer_cannot_use(backend):
    opt, p, before = fresh(backend)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    bad = gp.GradPromSGD(embedding.parameters(), lr=0.1, backend=backend)
    weight = bits(embedding.weight)
    loss = embedding(torch.tensor([1])).sum()
    bad.backward(loss, loss * 2)
    with pytest.raises(TypeError, match=re.escape("main_grads[0] is sparse (torch.sparse_coo); use dense gradients")):
        bad.step()
    assert weight == bits(embedding.weight)
    assert unchanged(opt, p, before)


def test_a_state_dict_of_another_model(backend):
    opt, p, before = fresh(backend)
    other = gp.GradPromAdam([torch.nn.Parameter(ones(3)), torch.nn.Parameter(ones(3))])
    with pytest.raises(ValueError, match=re.escape("doesn't match the size of optimizer's group")):
        opt.load_state_dict(other.state_dict())
    assert unchanged(opt, p, before)


def test_a_state_tensor_of_another_shape(backend):
    """Found before the first parameter is touched, not after."""
    a, b = (torch.nn.Parameter(ones(3)) for _ in range(2))
    opt = gp.GradPromAdam([a, b], lr=0.1, backend=backend)
    opt.backward(a.sum() + b.sum(), a.sum())
    opt.step()
    opt.state[b]["exp_avg"] = torch.zeros(7)
    before = [bits(a), bits(b)]
    message = "state of params[1]['exp_avg'] has shape (7,), but its parameter has shape (3,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        opt.step()
    assert before == [bits(a), bits(b)]
