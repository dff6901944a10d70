"""A small step of every kind on the CUDA kernels, checked against the reference on the host: quick enough to run under
compute-sanitizer.

    python -m benchmarks.gpu_case
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_case

Every rule, one cosine for all tensors and one for each, in one launch and in one per stage, with more gradients than
may stay on chip; tensors of all types, empty and of one element, misaligned, with gaps and transposed, amid guards.
Ends with status 1 where a number is wrong or a guard is gone.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradprom_ext as gp
from gradprom_ext import backends
from gradprom_ext.self_check import TOLERANCE

RULES: dict[str, Callable[..., Any]] = {
    "sgd": lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, weight_decay=0.1, **kw),
    "momentum": lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, momentum=0.9, dampening=0.1, **kw),
    "nesterov": lambda ps, **kw: gp.GradPromSGD(ps, lr=0.1, momentum=0.9, nesterov=True, maximize=True, **kw),
    "adam": lambda ps, **kw: gp.GradPromAdam(ps, lr=0.1, eps=1e-2, weight_decay=0.1, **kw),
    "adamw": lambda ps, **kw: gp.GradPromAdamW(ps, lr=0.1, eps=1e-2, master_weights=True, **kw),
    "amsgrad": lambda ps, **kw: gp.GradPromAdam(ps, lr=0.1, eps=1e-2, amsgrad=True, **kw),
}
#: Options of the CUDA backend.
FORMS: dict[str, dict[str, Any]] = {
    "one launch": {},
    "one launch per stage": {"cooperative": False},
    "one launch, 4 KB on chip": {"max_shared_bytes": 4096},
    "one launch, two blocks": {"max_blocks": 2, "max_shared_bytes": 20_000},
}
SHAPES = [(20_011,), (3, 129), (), (0,), (8, 5, 3, 3), (1,), (513,)]
GUARD = 7.0


class Placed(NamedTuple):
    """A tensor amid guards."""

    view: Tensor
    buffer: Tensor

    def guards_hold(self) -> bool:
        rest = self.buffer.cpu()
        rest.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(GUARD)
        return bool((rest == GUARD).all())


def place(values: Tensor, layout: str, device: torch.device) -> Placed:
    """``values`` on the device, in one of :data:`LAYOUTS`."""
    order = list(range(values.ndim))
    if layout == "transposed":
        order.reverse()
    strides, step = [0] * values.ndim, 2 if layout == "with gaps" else 1
    for d in reversed(order):
        strides[d], step = step, step * max(values.shape[d], 1)
    offset = 9 if layout == "misaligned" else 8
    buffer = torch.full((step + 16,), GUARD, dtype=values.dtype, device=device)
    view = buffer.as_strided(values.shape, strides, offset)
    view.copy_(values)
    return Placed(view, buffer)


LAYOUTS = ("flat", "misaligned", "with gaps", "transposed")


def problem(seed: int) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters of every shape and type, and for two steps a main and two auxiliary gradients of each."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=g).to(dtype) for s, dtype in itertools.product(SHAPES, TOLERANCE)]
    grads = [[torch.randn(p.shape, generator=g).to(p.dtype) for p in params] for _ in range(6)]
    return params, grads


def train(
    rule: str,
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor]],
    backend: str | backends.Backend,
    **kwargs: Any,
) -> list[list[Tensor]]:
    """Two steps; the parameters' values, the states and the statistics, on the host."""
    leaves = [nn.Parameter(p) for p in params]
    opt = RULES[rule](leaves, gate="soft", max_grad_norm=50.0, backend=backend, **kwargs)
    packed = []
    for main, *aux in (grads[:3], grads[3:]):
        for p, grad in zip(leaves, main, strict=True):
            p.grad = grad
        opt.aux_grads = aux
        opt.step()
        packed.append(opt.stats.packed.cpu())
    states = [opt.state[p][name].cpu() for p in leaves for name in sorted(opt.state[p])]
    return [[p.detach().cpu() for p in leaves], states, packed]


def first_difference(actual: list[list[Tensor]], expected: list[list[Tensor]]) -> str | None:
    """What is wrong, or ``None``."""
    for what, ours, theirs in zip(("parameter", "state", "statistics of step"), actual, expected, strict=True):
        for i, (a, e) in enumerate(zip(ours, theirs, strict=True)):
            tolerance = TOLERANCE[e.dtype] if what != "statistics of step" else 1e-7
            wrong = ~((a.double() - e.double()).abs() <= tolerance * (1 + e.double().abs()))  # NaN is wrong too
            if bool(wrong.any()):
                at = int(wrong.reshape(-1).to(torch.int8).argmax())
                got, wanted = float(a.reshape(-1)[at]), float(e.reshape(-1)[at])
                return f"{what} {i} ({tuple(e.shape)}, {e.dtype}): element {at} is {got!r}, not {wanted!r}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...; cpu tries this script on the CPU kernels")
    device = torch.device(parser.parse_args(argv).device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_case: PyTorch finds no NVIDIA GPU here")
    reason = backends.explain(device).get(device.type)
    if reason is not None:
        sys.exit(f"gpu_case: the backend {device.type} is not usable: {reason}")
    forms = FORMS if device.type == "cuda" else {"CPU": {}}

    params, grads = problem(seed=0)
    failures, cases = 0, 0
    for rule, granularity in itertools.product(RULES, ("global", "tensor")):
        expected = train(rule, [p.clone() for p in params], grads, "reference", granularity=granularity)
        for (form, options), shift in zip(forms.items(), itertools.count()):
            backend = backends.CudaBackend(**options) if device.type == "cuda" else "cpu"
            # Each form sees each tensor in another layout.
            placed = [place(p, LAYOUTS[(i + shift) % 4], device) for i, p in enumerate(params)]
            on_device = [
                [place(g, LAYOUTS[(i + k + shift) % 4], device).view for i, g in enumerate(gs)]
                for k, gs in enumerate(grads)
            ]
            actual = train(rule, [p.view for p in placed], on_device, backend, granularity=granularity)
            problem_found = first_difference(actual, expected)
            if problem_found is None and not all(p.guards_hold() for p in placed):
                problem_found = "something was written beside a parameter"
            cases += 1
            if problem_found is not None:
                failures += 1
                print(f"gpu_case: {rule}, {granularity}, {form}: {problem_found}")
    print(f"gpu_case: {cases - failures} of {cases} cases agree with the reference")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
