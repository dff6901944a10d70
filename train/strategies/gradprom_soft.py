"""GradProm with the gate of its Lemma 3.1."""

from __future__ import annotations

from train.strategies import STRATEGIES
from train.strategies.base import Advised


@STRATEGIES.register("gradprom-soft")
class GradPromSoft(Advised):
    """theta is stepped with ``G_main + max(0, cosine) lambda G_aux``."""

    gate = "soft"
