"""Grids of patches over images and spectra: what the corruptions of pre-trainings have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def check_share(**shares: float) -> None:
    """
    :raises ValueError: a share is not in [0, 1]; the message names it.
    """
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be a share from 0 to 1, not {value!r}")


def check_range(low: float, high: float) -> None:
    """
    :raises ValueError: the two are no shares, or the wrong way round.
    """
    check_share(low=low, high=high)
    if low > high:
        raise ValueError(f"low must not exceed high, and {low:g} exceeds {high:g}")


def check_grid(grid: int) -> None:
    """
    :raises ValueError: ``grid`` is no number of patches.
    """
    if not isinstance(grid, int) or grid < 1:
        raise ValueError(f"grid must be an integer of at least 1, not {grid!r}")


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """A number from [low, high)."""
    import torch

    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def cells(length: int, grid: int) -> Tensor:
    """To which of ``grid`` equal stretches each of ``length`` places belongs, ``int64 [length]``.

    Where the grid does not divide the length, stretches differ by one place; where it exceeds the length, there are as
    many stretches as places.

    >>> cells(8, 4).tolist(), cells(5, 2).tolist(), cells(2, 16).tolist()
    ([0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 0, 1, 1], [0, 1])
    """
    import torch

    return torch.arange(length) * min(grid, length) // length


def patches(height: int, width: int, grid: int) -> Tensor:
    """The number of the patch that each pixel belongs to, row by row, ``int64 [height, width]``: of ``grid`` patches
    along each side."""
    rows, columns = cells(height, grid), cells(width, grid)
    return rows[:, None] * (int(columns[-1]) + 1) + columns
