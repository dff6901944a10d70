"""How noisy images are, and whether that is what a network was trained for."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import numpy as np

FACTOR = 2.0
"""By how much the noise of an image may differ from that of the training before there is a warning."""
SIDE = 1024  # of what is looked at of an image, in pixels
LEAST = 16  # pixels along a side: the noise of less cannot be told from what is seen


def estimate(image: np.ndarray) -> float | None:
    """The standard deviation of white Gaussian noise, by the median of the finest wavelet coefficients (D. L. Donoho
    and I. M. Johnstone, Biometrika 81, 1994, as scikit-image has it), in the units of the image.

    Fine texture counts as noise, and noise that is correlated (of a resized or a JPEG image) hardly counts.

    :param image: ``float [H, W]``.
    :returns: ``None`` for a small or a flat image.
    """
    from skimage.restoration import estimate_sigma

    if min(image.shape) < LEAST or not np.ptp(image):
        return None
    found = float(estimate_sigma(image))
    return found if np.isfinite(found) else None


def middle(image: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The middle of an image, ``[H, W, C]``, which stands for all of it: a view of at most ``side`` pixels a side."""
    top, left = (max(0, (length - side) // 2) for length in image.shape[:2])
    return image[top : top + side, left : left + side]


def typical(estimates: Iterable[float | None]) -> float | None:
    """The median of what could be estimated."""
    known = [each for each in estimates if each is not None]
    return statistics.median(known) if known else None


def mismatch(noise: float | None, sigma: float | None) -> str:
    """What is wrong with the noise of an image, in words; empty where nothing is known to be.

    :param noise: as estimated, in units of the window.
    :param sigma: that the network was trained to remove.

    >>> mismatch(0.11, 0.1)
    ''
    >>> mismatch(0.02, 0.1)
    'much less noise than the network was trained for (about 0.020, not 0.1): it may take details for noise'
    """
    if noise is None or sigma is None:
        return ""
    if noise * FACTOR < sigma:
        what, danger = "less", "it may take details for noise"
    elif noise > sigma * FACTOR:
        what, danger = "more", "it may leave much of it, or see structures in it"
    else:
        return ""
    return f"much {what} noise than the network was trained for (about {noise:.3f}, not {sigma:g}): {danger}"
