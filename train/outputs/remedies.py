"""How metrics name the classical remedies: the scores of each, and what it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.degradations import CLASSICAL


def title_key(name: str) -> str:
    """Where metrics hold what a remedy is called, by its name among a degradation's remedies.

    >>> title_key("classical"), title_key("bm3d")
    ('remedy', 'remedy_bm3d')
    """
    return "remedy" if name == CLASSICAL else f"remedy_{name}"


def remedies_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """What the classical remedies of a run are called, by the ends of the keys of their scores.

    >>> remedies_of({"psnr_bm3d": 28.0, "remedy": "non-local means", "remedy_bm3d": "BM3D"})
    {'_classical': 'non-local means', '_bm3d': 'BM3D'}
    """
    first = {f"_{CLASSICAL}": metrics["remedy"]} if metrics.get("remedy") is not None else {}
    further = [key for key in metrics if key.startswith("remedy_")]
    return first | {key.removeprefix("remedy"): metrics[key] for key in further}
