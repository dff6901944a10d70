"""GradProm in NumPy and float64, written from the paper and the table of corner cases; no code of the library is in it.

The update rules are not here: their oracle is torch.optim itself, fed with :func:`combined`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Decision(NamedTuple):
    cosine: np.ndarray  # [K]
    gate: np.ndarray  # [K]
    combined: list[np.ndarray | None]  # per parameter, float64, before clipping
    cap: np.ndarray  # [K]


def to_numpy(t: Tensor) -> np.ndarray:
    return t.detach().to(torch.float64).numpy()


def flat(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> np.ndarray:
    """All gradients as one vector, in logical (row-major) order; a missing one is zeros."""
    parts = [np.zeros(p.numel()) if g is None else to_numpy(g).reshape(-1) for g, p in zip(grads, like, strict=True)]
    return np.concatenate(parts) if parts else np.zeros(0)


def decide(
    params: Sequence[Tensor],
    main: Sequence[Tensor | None],
    aux: Sequence[Sequence[Tensor | None]],
    gate: str,
    aux_weight: float | Sequence[float] = 1.0,
    threshold: float = 0.0,
    aux_cap: float | None = None,
) -> Decision:
    weights = [aux_weight] * len(aux) if isinstance(aux_weight, float) else list(aux_weight)
    g0 = flat(main, params)
    total = g0.copy()
    cosines, gates, caps = [], [], []
    for weight, grads in zip(weights, aux, strict=True):
        g = flat(grads, params)
        n0, n = np.linalg.norm(g0), np.linalg.norm(g)
        longest = np.inf if aux_cap is None or weight == 0 or n == 0 else aux_cap * n0
        cap = float(longest / n / abs(weight)) if longest < abs(weight) * n else 1.0
        # Normalise first: the product of two tiny or huge norms may leave the range of float64.
        cosine = float(np.dot(g0 / n0, g / n)) if n0 > 0 and n > 0 else 0.0
        if gate == "hard":
            value = 1.0 if cosine >= threshold else 0.0
        elif gate == "soft":
            value = max(0.0, cosine) if cosine >= threshold else 0.0
        elif gate in ("always", "project"):
            value = 1.0
        elif gate == "never":
            value = 0.0
        else:
            raise ValueError(f"the oracle knows no gate {gate!r}")
        if gate == "project" and cosine < 0:
            g = g - np.dot(g, g0) / np.dot(g0, g0) * g0
        if value != 0.0:
            total = total + value * (weight * cap) * g
        cosines.append(cosine)
        gates.append(value)
        caps.append(cap)
    combined: list[np.ndarray | None] = []
    offset = 0
    for i, p in enumerate(params):
        piece = total[offset : offset + p.numel()].reshape(p.shape)
        missing = main[i] is None and all(grads[i] is None for grads in aux)
        combined.append(None if missing else piece)
        offset += p.numel()
    return Decision(np.array(cosines), np.array(gates), combined, np.array(caps))
