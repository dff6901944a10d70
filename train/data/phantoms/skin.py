"""Phantoms: dermoscopic images of skin lesions, drawn. They are no patients.

Each kind has what gives it away to a dermatologist: a mole (``other``) is round and evenly brown, a melanoma is ragged
and of several colors, a seborrheic keratosis is waxy, sharply bordered and has bright cysts. Hairs lie over them, and
most are seen through a round tube.
"""

from __future__ import annotations

import numpy as np

from train.data.phantoms.drawing import Drawing, ellipse, grid, in_bytes, inside, noise, paint, strokes

_SKIN = np.array([[0.93, 0.76, 0.67], [0.86, 0.66, 0.58], [0.80, 0.62, 0.50]], np.float32)
_BROWN = np.array([[0.55, 0.36, 0.25], [0.45, 0.28, 0.19], [0.62, 0.42, 0.31]], np.float32)
_OTHER, _MELANOMA, _KERATOSIS = range(3)


def lesion(seed: int, kind: int, size: int) -> Drawing:
    """Draws one lesion.

    :param seed: decides everything that is not given.
    :param kind: 0: a mole, 1: a melanoma, 2: a seborrheic keratosis.
    :param size: side in pixels.
    :returns: ``uint8 [size, size, 3]``, and the lesion: ``uint8 [size, size]``, 1 inside.
    """
    rng = np.random.default_rng(seed)
    x, y = grid(size)
    image = np.zeros((size, size, 3), np.float32) + rng.choice(_SKIN) * rng.uniform(0.92, 1.04)
    image *= (1 + 0.03 * noise(rng, size, 4) + 0.02 * noise(rng, size, 40))[..., None]

    ragged = {_OTHER: 0.015, _MELANOMA: 0.055, _KERATOSIS: 0.02}[kind]
    edge = ragged * (noise(rng, size, 6) + 0.6 * noise(rng, size, 16))
    at = rng.uniform(-0.2, 0.2, 2)
    long = rng.uniform(0.3, 0.6)
    a, b = long, long * rng.uniform(0.75, 0.95) * (0.85 if kind == _MELANOMA else 1)
    spot = ellipse(x - at[0], y - at[1], a, b, rng.uniform(0, np.pi)) + edge

    brown = rng.choice(_BROWN) * rng.uniform(0.8, 1.1)
    shades = np.broadcast_to(brown, image.shape).copy()
    if kind == _MELANOMA:
        for color, cells in (((0.17, 0.11, 0.10), 4), ((0.36, 0.38, 0.45), 5), ((0.62, 0.30, 0.26), 5)):
            paint(shades, inside(noise(rng, size, cells) - 0.5, 0.7), color)
    elif kind == _KERATOSIS:
        shades = 0.55 * shades + 0.45 * np.array([0.72, 0.58, 0.40], np.float32)
        paint(shades, 0.5 * inside(noise(rng, size, 22) - 0.9, 0.6), (0.35, 0.24, 0.18))
    else:
        shades *= (1 - 0.25 * inside(np.abs(noise(rng, size, 24)) * -0.5 + 0.2, 0.3))[..., None]  # a fine net
    shades *= (1 - 0.2 * np.clip(spot / b, 0, 1) + 0.04 * noise(rng, size, 20))[..., None]
    paint(image, inside(spot, 0.03 if kind == _KERATOSIS else 0.1), shades)
    if kind == _KERATOSIS:
        for _ in range(rng.integers(6, 14)):
            turn, far = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.75) * b
            cyst = ellipse(x - at[0] - far * np.cos(turn), y - at[1] - far * np.sin(turn), 0.025, 0.025)
            paint(image, 0.7 * inside(cyst, 0.03), (0.95, 0.88, 0.72))

    hairs = []
    along = np.linspace(-1, 1, 12)[:, None]
    for _ in range(rng.integers(0, 9)):
        turn, bend = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.2)
        way, side = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
        hairs.append((rng.uniform(-0.9, 0.9, 2) + rng.uniform(0.3, 0.9) * along * way + bend * along**2 * side, 0.012))
    paint(image, 0.8 * strokes(size, hairs), (0.13, 0.09, 0.08))
    if rng.uniform() < 0.6:
        image *= inside(rng.uniform(1.1, 1.35) - np.hypot(x, y), 0.15)[..., None]
    image += 0.012 * rng.standard_normal(image.shape, np.float32)
    return in_bytes(image), (spot > 0).astype(np.uint8)
