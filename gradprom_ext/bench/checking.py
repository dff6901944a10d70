"""Nothing is timed that computes something else, and no contestant takes the others' figures with it when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


class WrongResultError(Exception):
    """A contestant's step is not the one it should be."""


@dataclass(frozen=True)
class LeftOut:
    """Something that was not timed."""

    reason: str
    is_failure: bool  #: of this library


@contextlib.contextmanager
def leaving_out(notes: list[LeftOut], name: str, case: object) -> Iterator[None]:
    """Whatever goes wrong inside leaves a note, and the benchmark goes on.

    :param name: of the contestant.
    :param case: what it was to be timed on.
    """
    try:
        yield
    except Exception as error:
        text = str(error).partition("\n")[0]
        if not isinstance(error, WrongResultError):
            text = f"{type(error).__name__}: {text}"
        is_failure = is_ours(name) and not isinstance(error, torch.OutOfMemoryError)
        notes.append(LeftOut(f"{name} is left out of {case}: {text}", is_failure))


def is_ours(name: str) -> bool:
    """Whether a contestant is this library."""
    return name.startswith("gradprom")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value.

    >>> relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 5.0]))
    0.10000000149011612
    """
    return float((actual - expected).abs().max() / expected.abs().max())
