"""GradProm: the method of this project."""

from __future__ import annotations

from train.strategies import STRATEGIES
from train.strategies.base import Advised


@STRATEGIES.register("gradprom")
class GradProm(Advised):
    """theta is stepped with ``G_main + lambda G_aux`` where their cosine is at least 0, else with ``G_main`` alone.

    ``--gate`` puts another policy in the place of this one.
    """

    gate = "hard"
    gate_is_free = True
    settings = Advised.settings | {"gate"}
