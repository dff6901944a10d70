"""What others have published for losses that share parameters, as strategies beside GradProm.

All of them compare gradients through their Gram matrix, so that each is a gate of the library and a class of a few
lines here. Which loss is the main one matters to the cosine gates alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.strategies import STRATEGIES
from train.strategies.base import Advised

if TYPE_CHECKING:
    import gradprom_ext as gp


@STRATEGIES.register("cosine-gated")
class CosineGated(Advised):
    """Y. Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", arXiv:1812.02224, unweighted: the auxiliary
    gradient is added where the cosine is at least 0. The step of theta is that of GradProm's hard gate; what GradProm
    adds is what the losses are."""

    gate = "hard"


@STRATEGIES.register("cosine-gated-weighted")
class CosineGatedWeighted(Advised):
    """The same paper's weighted version: the auxiliary gradient is weighted with ``max(0, cosine)``. The step of theta
    is that of GradProm's soft gate."""

    gate = "soft"


def _pcgrad() -> gp.GatePolicy:
    import gradprom_ext as gp

    return gp.PCGradGate()


def _gradvac() -> gp.GatePolicy:
    import gradprom_ext as gp

    return gp.GradVacGate()


def _mgda() -> gp.GatePolicy:
    import gradprom_ext as gp

    return gp.MGDAGate()


@STRATEGIES.register("pcgrad")
class PCGrad(Advised):
    """T. Yu et al., "Gradient Surgery for Multi-Task Learning", arXiv:2001.06782: of two gradients that conflict, each
    loses its part along the other, IP's gradient too."""

    gate = staticmethod(_pcgrad)


@STRATEGIES.register("gradvac")
class GradVac(Advised):
    """Z. Wang et al., "Gradient Vaccine", arXiv:2010.05874: gradients are turned towards each other until their cosine
    is what it has been on average."""

    gate = staticmethod(_gradvac)


@STRATEGIES.register("mgda")
class MGDA(Advised):
    """O. Sener, V. Koltun, "Multi-Task Learning as Multi-Objective Optimization", arXiv:1810.04650: theta is stepped
    with the shortest vector between the gradients, which lowers every loss or none."""

    gate = staticmethod(_mgda)
