"""Arithmetic that knows how wrong the library's may be: a value in extended precision, and a bound on the error.

Every operation of a kernel rounds once: ``fl(a op b) = (a op b)(1 + d) + t`` with ``|d| <= u`` and, where a product,
quotient or root may be subnormal, ``|t| <= eta``, half the smallest subnormal number (N. J. Higham, *Accuracy and
Stability of Numerical Algorithms*, 2002, sections 2.2 and 3.3, running error analysis). :class:`Num` does an operation
on the exact values, carries the errors of its operands along and adds that of the rounding. A fused multiply-add rounds
once where the bound assumes twice, so the bound holds with and without.

Nothing here is from the library.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
EXACT = np.longdouble  # 64 bits of mantissa: 11 more than what is compared with it


class Format(NamedTuple):
    """A binary floating-point format."""

    u: float  #: half the distance of 1 to the next number
    eta: float | np.longdouble  #: half the smallest subnormal number, which float64 has no number for
    largest: float


SINGLE = Format(2.0**-24, 2.0**-150, float(np.finfo(np.float32).max))
DOUBLE = Format(2.0**-53, EXACT(2) ** -1075, float(np.finfo(np.float64).max))


class Num:
    """Numbers as a kernel has them, in the format ``f``.

    :param value: extended precision, what they would be without rounding.
    :param error: how far what the kernel has may be from that.
    :param lost: where an operation has left the format's range; nothing is claimed there.
    """

    __slots__ = ("error", "f", "lost", "value")

    def __init__(self, f: Format, value: Array, error: Array | float = 0.0, lost: Array | bool = False) -> None:
        self.f = f
        self.value = np.asarray(value, EXACT)
        self.error = np.broadcast_to(np.asarray(error, EXACT), self.value.shape)
        self.lost = np.broadcast_to(np.asarray(lost, bool), self.value.shape)

    @classmethod
    def given(cls, f: Format, t: Tensor) -> Num:
        """A tensor's elements, in logical order."""
        return cls(f, t.detach().to(torch.float64).numpy().astype(EXACT))

    def rounded(self, f: Format | None = None) -> Num:
        """After one rounding, to the format ``f``."""
        f = f or self.f
        error = self.error + f.u * (np.abs(self.value) + self.error) + f.eta
        finite = np.isfinite(self.value)
        lost = self.lost | (finite & ~(np.abs(self.value) + error <= f.largest))
        return Num(f, self.value, np.where(finite & ~lost, error, 0), lost)

    def _with(self, other: Num | float) -> Num:
        return other if isinstance(other, Num) else Num(self.f, np.asarray(other, EXACT))

    def _make(self, other: Num, value: Array, error: Array) -> Num:
        return Num(self.f, value, error, self.lost | other.lost).rounded()

    def __add__(self, other: Num | float) -> Num:
        b = self._with(other)
        return self._make(b, self.value + b.value, self.error + b.error)

    def __neg__(self) -> Num:
        return Num(self.f, -self.value, self.error, self.lost)

    def __sub__(self, other: Num | float) -> Num:
        return self + -self._with(other)

    def __mul__(self, other: Num | float) -> Num:
        b = self._with(other)
        error = np.abs(self.value) * b.error + np.abs(b.value) * self.error + self.error * b.error
        return self._make(b, self.value * b.value, error)

    def __truediv__(self, other: Num | float) -> Num:
        b = self._with(other)
        value = self.value / b.value
        smallest = np.abs(b.value) - b.error
        out = self._make(b, value, (self.error + np.abs(value) * b.error) / np.where(smallest > 0, smallest, np.nan))
        return Num(self.f, out.value, out.error, out.lost | ((b.error > 0) & ~(smallest > 0)))

    def sqrt(self) -> Num:
        root = np.sqrt(np.maximum(self.value, 0))
        least = np.sqrt(np.maximum(self.value - self.error, 0))
        # |sqrt(a) - sqrt(b)| = |a - b| / (sqrt(a) + sqrt(b))
        error = np.where(root > 0, self.error / np.where(root > 0, root + least, 1), np.sqrt(self.error))
        return Num(self.f, np.where(np.isnan(self.value), np.nan, root), error, self.lost).rounded()

    def maximum(self, other: Num) -> Num:
        value = np.where(self.value > other.value, self.value, other.value)
        return Num(self.f, value, np.maximum(self.error, other.error), self.lost | other.lost)

    def clamped(self, low: float, high: float) -> Num:
        return Num(self.f, np.clip(self.value, low, high), self.error, self.lost)

    def size(self) -> Num:
        return Num(self.f, np.abs(self.value), self.error, self.lost)

    def reshape(self, shape: tuple[int, ...]) -> Num:
        return Num(self.f, self.value.reshape(shape), self.error.reshape(shape), self.lost.reshape(shape))


def stored(values: Array, dtype: torch.dtype) -> Array:
    """Extended precision to a tensor's type, to nearest; to 16 bits by way of float32, as PyTorch does. Monotone."""
    with np.errstate(over="ignore"):
        if dtype == torch.float64:
            return values.astype(np.float64).astype(EXACT)
        single = torch.from_numpy(np.ascontiguousarray(values.astype(np.float32)))
        return single.reshape(values.shape).to(dtype).to(torch.float64).numpy().astype(EXACT)


def ulp(values: Array) -> Array:
    """The distance of float32 numbers from their neighbor away from zero."""
    return np.spacing(np.abs(values).astype(np.float32)).astype(EXACT)
