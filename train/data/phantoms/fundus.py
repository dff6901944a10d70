"""Phantoms: photographs of the back of the eye, drawn. They are no patients.

A good one shows an orange disc with the bright head of the optic nerve, vessels that fork out of it, and the dark
macula. A bad one is the same, blurred and far too dark, too bright or uneven. An outlier is another thing: the front of
an eye. Nothing is burnt in.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from train.data.phantoms.drawing import Drawing, ellipse, grid, in_bytes, inside, noise, paint, strokes

_RETINA = np.array([[0.78, 0.42, 0.16], [0.70, 0.52, 0.10], [0.62, 0.26, 0.10]], np.float32)
_IRIS = np.array([[0.36, 0.24, 0.14], [0.30, 0.42, 0.52], [0.34, 0.40, 0.24]], np.float32)
_GOOD, _BAD, _OUTLIER = range(3)


def photograph(seed: int, kind: int, size: int) -> Drawing:
    """Draws one photograph.

    :param seed: decides everything that is not given.
    :param kind: 0: good, 1: bad, 2: no fundus.
    :param size: side in pixels.
    :returns: ``uint8 [size, size, 3]``; there is no mask.
    """
    rng = np.random.default_rng(seed)
    image = _front(rng, size) if kind == _OUTLIER else _retina(rng, size)
    if kind == _BAD:
        x, y = grid(size)
        turn = rng.uniform(0, 2 * np.pi)
        light = rng.choice([0.3, 0.55, 2.0]) * (1 + rng.uniform(0, 0.8) * (np.cos(turn) * x + np.sin(turn) * y))
        image *= np.clip(light, 0, None)[..., None]
        haze = ImageFilter.GaussianBlur(rng.uniform(0.015, 0.045) * size)
        image = np.asarray(Image.fromarray(in_bytes(image)).filter(haze), np.float32) / 255
    x, y = grid(size)
    # The camera's field is round, and wider than the photograph is high.
    image *= inside(1.12 - np.hypot(x, y), 0.03)[..., None]
    image += 0.008 * rng.standard_normal(image.shape, np.float32)
    return in_bytes(image), None


def _retina(rng: np.random.Generator, size: int) -> np.ndarray:
    x, y = grid(size)
    side = rng.choice([-1, 1])  # the left or the right eye
    at = np.array([side * rng.uniform(0.3, 0.5), rng.uniform(-0.12, 0.12)])
    image = np.zeros((size, size, 3), np.float32) + rng.choice(_RETINA) * rng.uniform(0.9, 1.1)
    image *= (1.1 - 0.35 * np.hypot(x, y) ** 2 + 0.04 * noise(rng, size, 5) + 0.02 * noise(rng, size, 50))[..., None]
    paint(image, 0.45 * inside(ellipse(x - at[0] + side * 0.75, y - at[1] - 0.08, 0.13, 0.13), 0.2), (0.30, 0.12, 0.05))
    paint(image, 0.9 * inside(ellipse(x - at[0], y - at[1], 0.14, 0.16), 0.06), (0.97, 0.86, 0.55))
    paint(image, 0.7 * inside(ellipse(x - at[0], y - at[1], 0.06, 0.07), 0.06), (1.0, 0.96, 0.80))
    for color, scale in (((0.36, 0.08, 0.05), 1.0), ((0.55, 0.16, 0.08), 0.7)):  # veins, and arteries beside them
        paint(image, 0.75 * strokes(size, _tree(rng, at, side, scale)), color)
    return image


def _tree(rng: np.random.Generator, at: np.ndarray, side: int, scale: float) -> list[tuple[np.ndarray, float]]:
    """Four vessels that leave the optic nerve upwards and downwards and bend around the macula, with their branches."""
    lines = []
    # Where it starts, its direction, its width, and how much it bends towards the horizontal.
    open_ends = [
        (at, up * np.pi / 2 + side * up * lean + rng.normal(0, 0.15), 0.042 * scale, side * up * bend)
        for up in (-1, 1)
        for lean, bend in ((0.25, 0.09), (-0.6, -0.04))
    ]
    for _ in range(5):
        grown = []
        for start, heading, width, bend in open_ends:
            steps = 0.075 * np.ones(6) * rng.uniform(0.7, 1.2)
            turns = heading + np.cumsum(bend * np.ones(6) + rng.normal(0, 0.09, 6))
            moves = steps[:, None] * np.stack([np.cos(turns), np.sin(turns)], 1)
            points = np.concatenate([start[None], start + np.cumsum(moves, 0)])
            lines.append((points, width))
            grown.append((points[-1], turns[-1], 0.8 * width, bend))
            if rng.uniform() < 0.8:
                grown.append((points[3], turns[3] + rng.choice([-1, 1]) * rng.uniform(0.5, 0.9), 0.55 * width, 0.0))
        open_ends = grown
    return lines


def _front(rng: np.random.Generator, size: int) -> np.ndarray:
    """The front of an eye: lids, white, iris and pupil."""
    x, y = grid(size)
    image = np.zeros((size, size, 3), np.float32) + np.array([0.80, 0.60, 0.48], np.float32) * rng.uniform(0.7, 1.05)
    image *= (1 + 0.05 * noise(rng, size, 6) + 0.03 * noise(rng, size, 40))[..., None]
    dx, dy = x - rng.uniform(-0.2, 0.2), y - rng.uniform(-0.2, 0.2)
    opening = inside(ellipse(dx, dy, 0.95, rng.uniform(0.4, 0.6)) + 0.02 * noise(rng, size, 6), 0.05)
    paint(image, opening, (0.90, 0.86, 0.82))
    rays = 1 + 0.2 * np.sin(rng.integers(20, 40) * np.arctan2(dy, dx) + 2 * noise(rng, size, 8))
    paint(image, opening * inside(0.36 - np.hypot(dx, dy), 0.04), rays[..., None] * rng.choice(_IRIS))
    paint(image, opening * inside(rng.uniform(0.1, 0.2) - np.hypot(dx, dy), 0.03), (0.03, 0.02, 0.02))
    paint(image, inside(ellipse(dx - 0.08, dy + 0.08, 0.04, 0.04), 0.03), (1, 1, 1))
    return image
