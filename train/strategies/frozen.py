"""A fixed VR: ESTR (Liu et al. 2019, arXiv:1910.09185), called frozen-params in the paper."""

from __future__ import annotations

from train.strategies import STRATEGIES
from train.strategies.base import Advised


@STRATEGIES.register("frozen")
class Frozen(Advised):
    """Every VR learns its task on clean images first; then phi and its batch statistics stay as they are while IP is
    trained with the gradient of ``L_IP + lambda L_VR``. (ESTR's own loss is the unsupervised one.)"""

    gate = "always"
    vr_update = "fixed"
    settings = Advised.settings - {"vr_update"}
