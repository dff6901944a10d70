"""What the tests of the library work on: update rules, shapes, types, layouts, random gradients, and steps on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

import gradprom_ext as gp
from gradprom_ext import policy

from . import oracle

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
HALF = [torch.float16, torch.bfloat16]
GATES = list(policy.GATES)


def bits(t: torch.Tensor) -> bytes:
    flat = torch.empty(t.numel(), dtype=t.dtype)  # of stride 1, which reshape() does not give a single element
    return flat.copy_(t.detach().reshape(-1)).view(torch.uint8).numpy().tobytes()


# Update rules --------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An optimizer, its counterpart in torch.optim, and the arguments of both."""

    ours: Callable[..., Any]
    theirs: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]


CASES = {
    "sgd": Case(gp.GradPromSGD, torch.optim.SGD, {}),
    "sgd-decay-maximize": Case(gp.GradPromSGD, torch.optim.SGD, {"weight_decay": 0.1, "maximize": True}),
    "sgd-momentum": Case(gp.GradPromSGD, torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "sgd-nesterov": Case(gp.GradPromSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": Case(gp.GradPromAdam, torch.optim.Adam, {}),
    "adam-decay": Case(gp.GradPromAdam, torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}),
    "adam-amsgrad-maximize": Case(gp.GradPromAdam, torch.optim.Adam, {"amsgrad": True, "maximize": True}),
    "adamw": Case(gp.GradPromAdamW, torch.optim.AdamW, {}),
    "adamw-decay-amsgrad": Case(gp.GradPromAdamW, torch.optim.AdamW, {"weight_decay": 0.3, "amsgrad": True}),
}
#: One of every kind of update that the kernels have, where all combinations would take too long.
RULES = ["sgd", "sgd-momentum", "sgd-nesterov", "adam-decay", "adamw", "adamw-decay-amsgrad"]


def make(rule: str, params: Any, **kwargs: Any) -> Any:
    """Our optimizer of a case; ``kwargs`` stand over its arguments."""
    case = CASES[rule]
    return case.ours(params, **{"lr": 0.05, **case.options, **kwargs})


SMALL_SHAPES = [(7, 5, 3, 3), (5,), (), (33, 17)]


def twins(case: str, backend: Any, dtype=torch.float64, shapes=SMALL_SHAPES, **kwargs):
    """Our optimizer and torch's on equal parameters."""
    ours, theirs, options = CASES[case]
    a = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    b = [torch.nn.Parameter(p.detach().clone()) for p in a]
    opt = ours(a, lr=0.05, backend=backend, **options, **kwargs)
    return opt, a, theirs(b, lr=0.05, foreach=False, **options), b


def feed(opt, params, other, others, gate="hard", aux_weight=0.7, seed=0):
    """One step each with the same random gradients; torch.optim gets what the oracle combines. Returns the gate."""
    g = torch.Generator().manual_seed(seed)
    main = [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]
    aux = [torch.randn(p.shape, generator=g).to(p.dtype) for p in params]
    opt.backward(
        sum((p * m).sum() for p, m in zip(params, main, strict=True)),
        sum((p * m).sum() for p, m in zip(params, aux, strict=True)),
    )
    decision = oracle.decide(params, main, [aux], gate, aux_weight)
    for p, c in zip(others, decision.combined, strict=True):
        p.grad = torch.from_numpy(np.array(c)).to(p.dtype)
    for o in (opt, other):
        o.step()
        o.zero_grad()
    return float(decision.gate[0])


# Gradients -----------------------------------------------------------------------------------------------------------

SHAPES = [(64, 3, 3, 3), (64,), (1,), (), (17, 31), (40_001,), (0,)]


def problem(num_aux: int = 1, seed: int = 0, shapes=SHAPES, dtype=torch.float32, lean: float = 0.0):
    """Parameters, main and auxiliary gradients; ``lean`` pulls the auxiliary ones along the main one."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    main = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    aux = [
        [(torch.randn(s, generator=g) + lean * m).to(dtype) for s, m in zip(shapes, main, strict=True)]
        for _ in range(num_aux)
    ]
    return params, main, aux


def train(rule, shapes, *, dtypes=(torch.float32,), num_aux=1, steps=3, seed=0, missing=0.0, backend="cpu", **kwargs):
    """The parameters, states and statistics after a few steps on random gradients."""
    g = torch.Generator().manual_seed(seed)
    dtype_of = itertools.cycle(dtypes)
    params = [torch.nn.Parameter(torch.randn(s, generator=g).to(next(dtype_of))) for s in shapes]
    opt = make(rule, params, lr=0.1, backend=backend, **kwargs)
    packed = []
    for _ in range(steps):
        grads = [[torch.randn(p.shape, generator=g).to(p.dtype) for p in params] for _ in range(1 + num_aux)]
        for gs in grads:
            for i in range(len(gs)):
                if float(torch.rand((), generator=g)) < missing:
                    gs[i] = None
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = grad
        opt.aux_grads = grads[1:]
        opt.step()
        packed.append(opt.stats.packed)
    states = [opt.state[p][name] for p in params for name in sorted(opt.state[p])]
    return [p.detach() for p in params], states, packed


def same_bits(a, b) -> bool:
    return [bits(t) for group in a for t in group] == [bits(t) for group in b for t in group]


class HalfGate(gp.GatePolicy):
    """A policy that exists in Python alone."""

    def __call__(self, gram, aux_weight):
        return torch.full_like(gram[..., 0, 0], 0.25), torch.full_like(gram[..., 0, 1:], 0.5)


# Layouts -------------------------------------------------------------------------------------------------------------


def contiguous(t):
    return t.clone()


def channels_last(t):
    return t.clone(memory_format=torch.channels_last)


def transposed(t):
    return t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def sliced(t):
    """Every other element of a larger buffer: not dense."""
    buffer = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7.0, dtype=t.dtype)
    view = buffer[..., ::2]
    view.copy_(t)
    return view


def misaligned(t):
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
    view = buffer[1:].view(t.shape)
    view.copy_(t)
    return view
