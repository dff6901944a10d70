"""GradProm: the method of this project."""

from __future__ import annotations

from train.strategies import STRATEGIES
from train.strategies.base import Advised


@STRATEGIES.register("gradprom")
class GradProm(Advised):
    """theta is stepped with ``G_main + lambda G_aux`` where their cosine is at least 0, else with ``G_main`` alone.

    ``--gate`` puts another policy in the place of this one, ``--threshold`` another cosine in the place of 0, and
    ``--granularity tensor`` gives each tensor of theta a gate of its own.
    """

    gate = "hard"
    gate_is_free = True
    settings = Advised.settings | {"gate", "threshold", "granularity", "aux_cap"}


@STRATEGIES.register("gradprom-soft")
class GradPromSoft(Advised):
    """theta is stepped with ``G_main + max(0, cosine) lambda G_aux``: the gate of the paper's Lemma 3.1."""

    gate = "soft"
    settings = Advised.settings | {"threshold", "granularity", "aux_cap"}


class Capped(Advised):
    """A gate that needs no lambda: VR's gradient is let through at no more than kappa lengths of IP's own.

    The weight is 1, or ``kappa |G_main| / |G_aux|`` where that is less. The paper's gate asks for the direction alone:
    where it is open, a gradient many times longer and nearly orthogonal goes through.
    """

    aux_cap = 1.0
    aux_weight = 1.0
    settings = Advised.settings - {"aux_weight"} | {"threshold", "granularity", "aux_cap"}


@STRATEGIES.register("gradprom-capped")
class GradPromCapped(Capped):
    """GradProm with a cap: ``G_main + min(1, kappa |G_main| / |G_aux|) G_aux`` where the cosine is at least 0."""

    gate = "hard"


@STRATEGIES.register("gradprom-capped-soft")
class GradPromCappedSoft(Capped):
    """The soft gate with a cap: ``G_main + max(0, cosine) min(1, kappa |G_main| / |G_aux|) G_aux``."""

    gate = "soft"
