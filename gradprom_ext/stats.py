"""What a step measured: a view of a few numbers that stay in device memory until they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["GateStats"]

#: Before the first row of ``GateStats.packed``: skipped, combined norm, clip coefficient (csrc/gradprom/policy.h).
HEADER = 3


def row_size(num_aux: int) -> int:
    """Number of float64 values in a row of ``GateStats.packed`` (csrc/gradprom/policy.h)."""
    return 2 + 4 * num_aux


def packed_size(rows: int, num_aux: int) -> int:
    """Number of float64 values that describe a step."""
    return HEADER + rows * row_size(num_aux)


@dataclass(frozen=True, repr=False, eq=False)
class GateStats:
    """Statistics of one step. Every attribute is a float64 tensor on the gradients' device; reading one is free,
    turning it into a number (``float(stats.cosine)``, ``print``) waits for the device.

    With ``K`` auxiliaries, ``granularity="global"`` gives the shapes below; ``granularity="tensor"`` puts the number
    of parameters in front of the shapes marked †.

    >>> import torch, gradprom_ext as gp
    >>> stats = gp.gradient_stats([torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])], aux_weight=0.5)
    >>> float(stats.main_norm), stats.aux_norm.tolist(), stats.cosine.tolist()  # 8 / (5 * 2)
    (5.0, [2.0], [0.8])
    >>> round(float(stats.combined_norm) ** 2, 6)  # of (3, 4) + 0.5 (0, 2)
    34.0
    """

    packed: Tensor
    num_aux: int
    rows: int | None  #: number of parameters where granularity is "tensor", else None

    def _table(self, start: int, width: int | None) -> Tensor:
        table = self.packed[HEADER:].view(self.rows or (0 if self.rows == 0 else 1), row_size(self.num_aux))
        columns = table[:, start] if width is None else table[:, start : start + width]
        return columns if self.rows is not None else columns[0]

    @property
    def cosine(self) -> Tensor:
        """``[K]``†: cosine of the main gradient with each auxiliary one; 0 where either is zero."""
        return self._table(2, self.num_aux)

    @property
    def gate(self) -> Tensor:
        """``[K]``†: weight of each auxiliary gradient before lambda, 0 or 1 (hard), ``max(0, cos)`` (soft)."""
        return self._table(2 + self.num_aux, self.num_aux)

    @property
    def main_norm(self) -> Tensor:
        """``[]``†: L2 norm of the main gradient."""
        return self._table(0, None)

    @property
    def main_weight(self) -> Tensor:
        """``[]``†: weight of the main gradient; 1 except under a projecting policy."""
        return self._table(1, None)

    @property
    def aux_norm(self) -> Tensor:
        """``[K]``†: L2 norm of each auxiliary gradient."""
        return self._table(2 + 2 * self.num_aux, self.num_aux)

    @property
    def cap(self) -> Tensor:
        """``[K]``†: what ``aux_cap`` multiplied each lambda with, in [0, 1]; 1 where the auxiliary gradient was short
        enough, and everywhere without a cap. It is that of an auxiliary behind a closed gate too."""
        return self._table(2 + 3 * self.num_aux, self.num_aux)

    @property
    def combined_norm(self) -> Tensor:
        """``[]``: L2 norm of the combined gradient before clipping."""
        return self.packed[1]

    @property
    def clip_coefficient(self) -> Tensor:
        """``[]``: what ``max_grad_norm`` multiplied the combined gradient with; 1 where it was short enough."""
        return self.packed[2]

    @property
    def skipped(self) -> Tensor:
        """``[]``, bool: a gradient held NaN or infinity, so nothing was updated."""
        return self.packed[0] != 0

    def __repr__(self) -> str:
        def text(x: Tensor) -> str:
            return str([round(v, 4) for v in x.flatten().tolist()]) if x.numel() <= 8 else f"<{tuple(x.shape)}>"

        return (
            f"GateStats(cosine={text(self.cosine)}, gate={text(self.gate)}, main_norm={text(self.main_norm)}, "
            f"aux_norm={text(self.aux_norm)}, cap={text(self.cap)}, skipped={bool(self.skipped)})"
        )


def pack(
    *,
    skipped: Tensor,
    combined_norm: Tensor,
    clip_coefficient: Tensor,
    main_norm: Tensor,
    main_weight: Tensor,
    cosine: Tensor,
    gate: Tensor,
    aux_norm: Tensor,
    cap: Tensor,
    per_tensor: bool,
) -> GateStats:
    """Builds the statistics from PyTorch tensors with a leading row dimension, in the kernels' layout."""
    rows, num_aux = cosine.shape
    header = torch.stack([skipped.to(torch.float64), combined_norm, clip_coefficient])
    table = torch.cat([main_norm[:, None], main_weight[:, None], cosine, gate, aux_norm, cap], dim=1)
    return GateStats(torch.cat([header, table.flatten()]), num_aux, rows if per_tensor else None)
