"""The learning rate's course."""

from __future__ import annotations

import math

WARM_UP = 0.03  # share of the iterations in which the learning rate rises


def course(steps: int, step: int) -> float:
    """The learning rate of a step as a share of its peak: a linear rise, then half a cosine down to 0.

    :param steps: steps in all.
    :param step: from 0.
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
