"""Phantoms: echocardiograms of the left heart, drawn. They are no patients.

The ultrasound comes from the top and spreads in a sector. Blood is dark, so the ventricle is a dark bullet, tip
upwards, in a bright shell of muscle that is open towards the atrium below. Waves that interfere cover everything with
speckle, which grows broader with depth. The class is the quality: how much muscle and blood differ, and how much is
lost in shadows. What the heart looks like says nothing about it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from train.data.phantoms.drawing import Drawing, ellipse, grid, in_bytes, inside, noise

# Per quality: how bright muscle is, how bright blood is, and how much of the sector is lost in shadows.
_QUALITIES = ((0.62, 0.07, 0.15), (0.46, 0.11, 0.45), (0.34, 0.16, 0.8))
_CAVITY, _MUSCLE, _ATRIUM = 1, 2, 3


def echo(seed: int, kind: int, size: int) -> Drawing:
    """Draws one frame.

    :param seed: decides everything that is not given.
    :param kind: 0: of good quality, 1: medium, 2: poor.
    :param size: side in pixels.
    :returns: ``uint8 [size, size]``, and what is where: ``uint8 [size, size]``, 0: background, 1: left ventricle, 2:
        myocardium, 3: left atrium.
    """
    rng = np.random.default_rng(seed)
    muscle, blood, lost = _QUALITIES[kind]
    x, y = grid(size)
    depth = np.hypot(x, y + 1) / 2  # 0 at the probe
    angle = np.arctan2(x, y + 1.02)
    width = rng.uniform(0.6, 0.72)
    sector = inside(width - np.abs(angle), 0.02) * inside(0.97 - depth, 0.02) * inside(depth - 0.02, 0.02)

    cx, lean = rng.uniform(-0.12, 0.12), rng.normal(0, 0.08)
    u, v = x - cx - lean * y, y + 0.18 + lean * x
    valve = rng.uniform(0.36, 0.46)  # where the ventricle ends and the atrium begins
    wobble = 0.012 * noise(rng, size, 6)
    a, b, wall = rng.uniform(0.2, 0.28), rng.uniform(0.52, 0.6), rng.uniform(0.09, 0.13)
    above = valve - v
    cavity = np.minimum(ellipse(u, v, a, b) + wobble, above)
    shell = np.minimum(ellipse(u, v, a + wall, b + wall) + wobble, above)
    height = rng.uniform(0.2, 0.26)
    atrium = np.minimum(ellipse(u, v - valve - 0.7 * height, rng.uniform(0.22, 0.28), height) + wobble, -above)
    mask = np.zeros((size, size), np.uint8)
    for region, index in ((shell, _MUSCLE), (cavity, _CAVITY), (atrium, _ATRIUM)):
        mask[(region > 0) & (sector > 0.5)] = index

    around = 0.45 * muscle * (1 + 0.4 * noise(rng, size, 5))  # the right heart, the lungs and the chest wall
    tissue = np.where(shell > 0, muscle, around)
    # The atrium has a wall of its own; valves are thin and bright.
    tissue += 0.5 * muscle * inside(0.03 - np.abs(atrium), 0.03) + 0.3 * muscle * inside(0.015 - np.abs(cavity), 0.03)
    dark = np.maximum(inside(cavity, 0.05), inside(atrium, 0.05))
    tissue += dark * (blood - tissue)
    # Ribs and lungs cast shadows along the beams.
    beams = np.interp(angle, np.linspace(-0.8, 0.8, 9), rng.uniform(0, 1, 9))
    shadow = np.clip(1 - lost * beams**2 * np.clip(2 * depth, 0, 1), 0.1, 1)
    seen = tissue * shadow * (1.1 - 0.35 * depth) * _speckle(rng, angle, depth)
    return in_bytes(np.clip(seen, 0, None) ** 0.8 * sector), mask


def _speckle(rng: np.random.Generator, angle: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Rayleigh noise of mean 1 along beams, interpolated: short in depth, wide across."""
    n = len(angle)
    waves = rng.standard_normal((2, n, max(8, n // 3))).astype(np.float32)
    polar = np.hypot(*waves) / np.sqrt(np.pi / 2)
    polar = np.asarray(Image.fromarray(polar).resize((n, n), Image.Resampling.BICUBIC))
    rows = np.clip(depth * (n - 1), 0, n - 1).astype(int)
    columns = np.clip((angle / 1.6 + 0.5) * (n - 1), 0, n - 1).astype(int)
    return 0.35 + 0.65 * polar[rows, columns]
