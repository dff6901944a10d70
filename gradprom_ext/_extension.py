"""The compiled module where it is built, and what of it every step needs beside its kernels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["extension", "grads_of", "parameters_moved", "same_objects"]


@functools.cache
def extension() -> tuple[Any, str | None]:
    """The compiled module and ``None``, or ``None`` and the reason why there is none."""
    # torch is imported first (at the top of this file), so that both share one OpenMP runtime: then
    # torch.set_num_threads is honoured and no second pool of threads competes for the cores.
    try:
        from . import _C
    except ImportError as error:
        return None, (
            f"the compiled module cannot be imported ({error}); install a C++17 compiler (Debian, Ubuntu: apt-get "
            "install g++) and install gradprom_ext again"
        )
    return _C, None


def _in_python() -> tuple[Callable[..., Any], ...]:
    return (
        lambda a, b: len(a) == len(b) and all(map(operator.is_, a, b)),
        lambda params: [p.grad for p in params],
    )


@functools.cache
def _functions() -> tuple[Callable[..., Any], ...]:
    """In C++ where that is built, because hundreds of tensors are compared at every step. Looked for at the first use:
    loading the module takes longer than importing the rest of the package."""
    module, _ = extension()
    return _in_python() if module is None else (module.same_objects, module.grads_of)


def parameters_moved(error: BaseException) -> bool:
    """Whether this is what a plan raises, before it writes anything, whose parameters are on another device now."""
    module, _ = extension()
    return module is not None and isinstance(error, module.ParametersMoved)


def same_objects(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return _functions()[0](a, b)


def grads_of(params: list[Tensor]) -> list[Tensor | None]:
    """The list of their ``.grad``."""
    return _functions()[1](params)
