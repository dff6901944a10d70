"""Which values become 0 and 1 where a person says so: a window of a unit, or percentiles of the training images."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from train.data.base import SPLITS, DataError, ImageData, Ragged

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"
_CENTER_WIDTH = re.compile(rf"({_NUMBER})/({_NUMBER})")
_PERCENTILES = re.compile(rf"P({_NUMBER})-P({_NUMBER})", re.IGNORECASE)


@dataclass(frozen=True)
class Window:
    """Values between two limits are spread over [0, 1], and what lies beyond is cut off.

    :param low: the value that becomes 0, or its percentile.
    :param high: the value that becomes 1, or its percentile.
    :param percentiles: which of both.
    """

    low: float
    high: float
    percentiles: bool = False

    @classmethod
    def parse(cls, text: str) -> Window:
        """
        :raises ValueError: it is neither ``CENTER/WIDTH`` nor ``P1-P99``.

        >>> Window.parse("-600/1500"), Window.parse("P1-P99.5")
        (Window(low=-1350.0, high=150.0, percentiles=False), Window(low=1.0, high=99.5, percentiles=True))
        """
        if found := _CENTER_WIDTH.fullmatch(text.strip()):
            center, width = map(float, found.groups())
            if width > 0:
                return cls(center - width / 2, center + width / 2)
        elif found := _PERCENTILES.fullmatch(text.strip()):
            low, high = map(float, found.groups())
            if 0 <= low < high <= 100:
                return cls(low, high, percentiles=True)
        raise ValueError(
            f"{text!r} is no window; give CENTER/WIDTH in the unit of the images, such as -600/1500 (a width above 0), "
            "or two percentiles of the training images, such as P1-P99"
        )

    def limits(self, values: np.ndarray) -> tuple[float, float]:
        """The values that become 0 and 1.

        :param values: of which percentiles are taken.

        >>> Window.parse("40/400").limits(np.arange(5)), Window.parse("P0-P50").limits(np.arange(5))
        ((-160.0, 240.0), (0.0, 2.0))
        """
        if not self.percentiles:
            return self.low, self.high
        low, high = np.percentile(values, [self.low, self.high])
        return float(low), float(high)


def windowed(data: ImageData, window: Window) -> ImageData:
    """The data with other values for 0 and 1, the same ones in all splits.

    :raises DataError: percentiles of the training images coincide.
    """
    images = data.train.images
    low, high = window.limits(images.flat if isinstance(images, Ragged) else images)
    if not low < high:
        raise DataError(f"--window: both percentiles of the training images are {low:g}; take ones further apart")
    changed: dict[str, Any] = {split: replace(getattr(data, split), value_range=(low, high)) for split in SPLITS}
    if data.guides is not None:
        changed["guides"] = replace(data.guides, value_range=(low, high))
    return replace(data, **changed)
