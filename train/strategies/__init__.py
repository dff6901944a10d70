"""How IP and VR are trained: each strategy owns one training step. A new one is a class in a file imported below."""

from __future__ import annotations

from typing import cast

from models.registry import Registry
from train.strategies.base import Strategy

STRATEGIES: Registry[Strategy] = Registry("strategy")

from train.strategies import frozen as frozen  # noqa: E402  (the files register themselves in the registry above)
from train.strategies import gradprom as gradprom  # noqa: E402
from train.strategies import hqg as hqg  # noqa: E402
from train.strategies import ip_only as ip_only  # noqa: E402
from train.strategies import joint as joint  # noqa: E402
from train.strategies import masked as masked  # noqa: E402
from train.strategies import published as published  # noqa: E402
from train.strategies import vr_only as vr_only  # noqa: E402

__all__ = ["STRATEGIES", "Strategy", "strategy_class"]


def strategy_class(name: str) -> type[Strategy]:
    """What is registered under ``name``.

    :raises UnknownNameError: nothing is.
    """
    return cast("type[Strategy]", STRATEGIES[name])
