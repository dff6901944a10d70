"""The compiled module where it is built, and what of it every step needs beside its kernels."""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import Tensor

__all__ = ["extension", "grads_of", "same_objects"]


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
            "install g++) and run `pip install -e .` again"
        )
    return _C, None


def _same_objects(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _grads_of(params: list[Tensor]) -> list[Tensor | None]:
    return [p.grad for p in params]


_module, _ = extension()
#: ``same_objects(a, b)``: whether two lists hold the same objects. In C++, because hundreds are compared at every step.
same_objects = _module.same_objects if _module is not None else _same_objects
#: ``grads_of(params)``: the list of their ``.grad``.
grads_of = _module.grads_of if _module is not None else _grads_of
