"""Joint training: one summed loss, both networks."""

from __future__ import annotations

from train.strategies import STRATEGIES
from train.strategies.base import Advised


@STRATEGIES.register("joint")
class Joint(Advised):
    """theta is stepped with the gradient of ``L_IP + lambda L_VR`` whether the two agree or not."""

    gate = "always"
