"""Phantoms: axial slices of a head as in T2-weighted MRI, drawn. They are no patients.

From outside: a bright scalp, a dark skull, bright fluid, gray matter whose folds the fluid follows inwards, darker
white matter, and two bright ventricles. The coil is nearer to one side, which is brighter.
"""

from __future__ import annotations

import numpy as np

from train.data.phantoms.drawing import Drawing, ellipse, grid, in_bytes, inside, noise


def head(seed: int, kind: int, size: int) -> Drawing:
    """Draws one slice.

    :param seed: decides everything.
    :param kind: without a meaning: there is one kind.
    :param size: side in pixels.
    :returns: ``uint8 [size, size]``, and no mask.
    """
    rng = np.random.default_rng(seed)
    x, y = grid(size)
    a, b = rng.uniform(0.62, 0.74), rng.uniform(0.78, 0.88)
    turn = rng.normal(0, 0.08)
    outer = ellipse(x, y, a, b, turn) + 0.015 * noise(rng, size, 5)
    scalp, bone = rng.uniform(0.05, 0.09), rng.uniform(0.04, 0.07)
    depth = outer - scalp - bone  # inside of the skull
    image = np.zeros((size, size), np.float32)

    def lay(coverage: np.ndarray, value: float | np.ndarray) -> None:
        nonlocal image
        image = image + coverage * (value - image)

    lay(inside(outer), rng.uniform(0.45, 0.65) + 0.1 * noise(rng, size, 8))
    lay(inside(outer - scalp), 0.04)
    lay(inside(depth), rng.uniform(0.8, 0.95))
    # Folds: where a wave of the angle is deep, the fluid reaches further in.
    angle = np.arctan2(y, x)
    folds = np.sin(rng.integers(14, 22) * angle + 2.5 * noise(rng, size, 4)) ** 8
    cortex = depth - 0.02 - 0.12 * folds
    lay(inside(cortex), rng.uniform(0.5, 0.6) + 0.04 * noise(rng, size, 24))
    lay(inside(cortex - rng.uniform(0.07, 0.1)), rng.uniform(0.28, 0.38) + 0.03 * noise(rng, size, 16))
    lay(inside(0.012 - np.abs(x * np.cos(turn) + y * np.sin(turn) + 0.01 * noise(rng, size, 6))) * inside(depth), 0.85)
    wide, tall, apart = rng.uniform(0.04, 0.09), rng.uniform(0.14, 0.26), rng.uniform(0.09, 0.13)
    for side in (-1, 1):
        lay(inside(ellipse(x - side * apart, y + 0.02, wide, tall, turn + 0.25 * side)), 0.92)
    coil = 1 + rng.uniform(-0.12, 0.12) * x + rng.uniform(-0.12, 0.12) * y
    speckle = np.hypot(image * coil + rng.normal(0, 0.015, image.shape), rng.normal(0, 0.015, image.shape))  # Rician
    return in_bytes(speckle), None
