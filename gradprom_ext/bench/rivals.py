"""The method written without kernels of its own, and the optimizers of others."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Combine = Callable[[list[Tensor], list[Tensor]], None]


def plain_optimizer(name: str, params: list[Tensor], *, lr: float, capturable: bool = False) -> torch.optim.Optimizer:
    """PyTorch's fastest ``sgd`` or ``adamw``: one fused call over all parameters.

    :param capturable: for AdamW in a CUDA graph; SGD can always be captured.
    """
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, fused=True)
    return torch.optim.AdamW(params, lr=lr, fused=True, capturable=capturable)


def add_if_agreed_(main: list[Tensor], aux: list[Tensor]) -> None:
    """``main += aux`` where their cosine is not negative: a dot product per tensor, norms and sum by ``_foreach``.

    Branches on the gate, which costs nothing on a CPU and waits on a GPU. Nothing is flattened: gradients that lie
    dense in memory are viewed as vectors.
    """
    if _cosine_by_dots(main, aux) >= 0:
        torch._foreach_add_(main, aux)


def add_gated_by_dots_(main: list[Tensor], aux: list[Tensor]) -> None:
    """The same without waiting: the gate stays a tensor. ``aux`` is scaled in place, its last use."""
    _add_gated_(main, aux, _cosine_by_dots(main, aux))


def add_gated_by_foreach_(main: list[Tensor], aux: list[Tensor]) -> None:
    """The same with a number of launches that does not grow with the number of tensors.

    There is no ``_foreach_dot``, so the inner product comes from norms, ``2 <m, a> = |m + a|^2 - |m|^2 - |a|^2``: more
    memory traffic and a temporary, far fewer launches.
    """
    together = list(torch._foreach_add(main, aux))
    squares = [_norm(gs).square() for gs in (together, main, aux)]
    del together
    _add_gated_(main, aux, squares[0] - squares[1] - squares[2])


def add_naively_(main: list[Tensor], aux: list[Tensor]) -> None:
    """The same as most code has it: flatten, compare, add, and copy back."""
    flat_main, flat_aux = (torch.cat([g.reshape(-1) for g in gs]) for gs in (main, aux))
    if F.cosine_similarity(flat_main, flat_aux, dim=0) >= 0:
        flat_main += flat_aux
    for g, piece in zip(main, flat_main.split([g.numel() for g in main]), strict=True):
        g.copy_(piece.view_as(g))


def best_pytorch(device: torch.device) -> Combine:
    """The fastest of these that never waits for ``device``."""
    return add_if_agreed_ if device.type == "cpu" else add_gated_by_foreach_


def _norm(grads: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()


def _vector(g: Tensor) -> Tensor:
    """A dense tensor in the order of its memory, so that nothing is copied whatever the memory format."""
    return g.as_strided((g.numel(),), (1,))


def _cosine_by_dots(main: list[Tensor], aux: list[Tensor]) -> Tensor:
    dot = torch.stack([torch.dot(_vector(m), _vector(a)) for m, a in zip(main, aux, strict=True)]).sum()
    return dot / (_norm(main) * _norm(aux))


def _add_gated_(main: list[Tensor], aux: list[Tensor], agreement: Tensor) -> None:
    torch._foreach_mul_(aux, (agreement >= 0).to(agreement.dtype))
    torch._foreach_add_(main, aux)


def torchjd() -> Any | None:
    """TorchJD's ``mtl_backward``, ``jac_to_grad`` and ``PCGrad`` in one object; ``None`` where it is not installed."""
    try:
        from torchjd.aggregation import PCGrad
        from torchjd.autojac import jac_to_grad, mtl_backward
    except ImportError:
        return None
    return SimpleNamespace(PCGrad=PCGrad, jac_to_grad=jac_to_grad, mtl_backward=mtl_backward)


def fused_lamb() -> Any | None:
    """apex's ``FusedLAMB``; ``None`` where apex is not installed, or without its kernels."""
    try:
        import amp_C  # noqa: F401  (its constructor would raise)
        from apex.optimizers import FusedLAMB
    except ImportError:
        return None
    return FusedLAMB
