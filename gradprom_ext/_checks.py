"""Checks of what a user hands in. They cost a few microseconds per tensor, so the optimizers run them when parameters
come in, and every entry point runs them when a kernel has refused something, to say what exactly it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if tensor.is_nested:
        raise TypeError(f"{name} is nested; gradprom_ext works on plain tensors")
    if tensor.layout != torch.strided:
        hint = "; use dense gradients (nn.Embedding(sparse=False))" if "grads" in name else ""
        raise TypeError(f"{name} is sparse ({tensor.layout}){hint}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}; gradprom_ext works on {names}")


def _check_memory(name: str, tensor: Tensor) -> None:
    """:raises TypeError: the values of ``tensor`` are not in memory."""
    if torch.compiler.is_compiling():
        return  # all tensors are fake there; the operator looks at the real ones
    if _torch.intercepts_operations(type(tensor)):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, which intercepts every operation and has no memory of its own; "
            "gradprom_ext needs plain tensors"
        )
    if _torch.is_functional(tensor):
        raise TypeError(f"{name} is a functional tensor, which stands for another one and has no memory of its own")
    if _torch.is_efficient_zero(tensor):
        raise TypeError(f"{name} is an efficient zero tensor, which has no memory; clone() gives it some")
    if tensor.device.type != "meta" and tensor.numel() > 0 and not has_room(tensor):
        raise TypeError(
            f"{name} has no memory that could be read: its storage was freed or shrunk, or it never had one"
        )


def has_room(tensor: Tensor) -> bool:
    """Whether all elements of a tensor with some lie in its storage, which can be resized under it."""
    reach = tensor.storage_offset() + sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr() != 0 and (reach + 1) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def check_param(name: str, param: object) -> None:
    """:raises TypeError: not a dense tensor of a supported floating-point type with memory that can be written to."""
    _check_tensor(name, param)
    assert isinstance(param, Tensor)
    _check_memory(name, param)
    if not torch.compiler.is_compiling() and param.is_neg():
        raise TypeError(
            f"{name} is a lazily negated view (is_neg()); what its memory holds are not its values, so give it memory "
            "of its own: resolve_neg()"
        )


def check_gradients(name: str, grads: Sequence[Tensor | None], params: Sequence[Tensor], what: str = "params") -> None:
    """Checks one gradient per parameter; ``None`` is a zero.

    :raises TypeError: a gradient is sparse, complex, without memory, or no tensor.
    :raises ValueError: number, shape or device differ from the parameters'.
    """
    if len(grads) != len(params):
        raise ValueError(f"{name} holds {len(grads)} gradients for {len(params)} {what}")
    for i, (g, p) in enumerate(zip(grads, params, strict=True)):
        if g is None:
            continue
        _check_tensor(f"{name}[{i}]", g)
        if g.shape != p.shape:
            raise ValueError(f"{name}[{i}] has shape {tuple(g.shape)}, but {what}[{i}] has shape {tuple(p.shape)}")
        if g.device != p.device:
            raise ValueError(f"{name}[{i}] is on {g.device}, but {what}[{i}] is on {p.device}")
        _check_memory(f"{name}[{i}]", g)


def check_writable(name: str, param: Tensor) -> None:
    """:raises ValueError: several elements of ``param`` share one address, so it cannot be updated in place."""
    reach = 0  # of the dimensions so far: each further one has to step over it
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride <= reach and param.numel() > 0:
            raise ValueError(
                f"{name} is a view in which several elements share one memory address (an expanded tensor?); it cannot "
                "be updated in place, clone it first"
            )
        reach += stride * (size - 1)


def check_state(name: str, state: Tensor, param: Tensor) -> None:
    """
    :raises ValueError: an optimizer state does not fit its parameter, or several of its elements share one address.
    :raises TypeError: it has no memory.
    """
    if state.shape != param.shape:
        raise ValueError(f"{name} has shape {tuple(state.shape)}, but its parameter has shape {tuple(param.shape)}")
    _check_memory(name, state)
    check_writable(name, state)


def aux_sequences(
    aux_grads: Sequence[Tensor | None] | Sequence[Sequence[Tensor | None]],
) -> list[Sequence[Tensor | None]]:
    """``aux_grads`` as a list of auxiliaries: one sequence of tensors is a single auxiliary."""
    if isinstance(aux_grads, Tensor):
        raise TypeError("aux_grads is a tensor; pass a sequence with one gradient per parameter")
    # Of their few types, because asking hundreds of objects takes as long as reading their memory.
    kinds = {issubclass(kind, Sequence) for kind in set(map(type, aux_grads))}
    if len(kinds) > 1:
        raise TypeError("aux_grads mixes tensors and sequences; pass one sequence of tensors, or one per auxiliary")
    return list(aux_grads) if True in kinds else [list(aux_grads)]  # type: ignore[arg-type]
