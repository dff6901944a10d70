"""Phantoms: stained tissue of the colon under a microscope, drawn. They are no patients.

Hematoxylin colors nuclei blue to purple, eosin all else pink. The six kinds of nuclei differ as they do in life, in
size, shape and color: lymphocytes are small, round and dark, epithelial nuclei large, pale and oval, in rings around a
gland; connective ones are spindles; plasma cells have their nucleus at one side of a purple body, and the granules of
eosinophils are bright red.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.data.phantoms.drawing import Drawing, ellipse, grid, in_bytes, inside, noise, paint


@dataclass(frozen=True)
class _Nucleus:
    """How one kind looks: half axes, where 2 is the side of the image, color, that of the cell around it, and share."""

    long: float
    short: float
    color: tuple[float, float, float]
    cell: tuple[float, float, float] | None
    share: float


_KINDS = (
    _Nucleus(0.046, 0.042, (0.34, 0.20, 0.48), (0.88, 0.70, 0.80), 0.08),  # neutrophil
    _Nucleus(0.085, 0.058, (0.52, 0.38, 0.66), None, 0.44),  # epithelial
    _Nucleus(0.045, 0.043, (0.24, 0.16, 0.42), None, 0.17),  # lymphocyte
    _Nucleus(0.050, 0.045, (0.36, 0.20, 0.50), (0.72, 0.52, 0.74), 0.10),  # plasma
    _Nucleus(0.046, 0.040, (0.40, 0.22, 0.44), (0.90, 0.32, 0.36), 0.06),  # eosinophil
    _Nucleus(0.110, 0.026, (0.42, 0.28, 0.56), None, 0.15),  # connective
)
_EPITHELIAL = 1


def tile(seed: int, kind: int, size: int) -> Drawing:
    """Draws one tile.

    :param seed: decides everything.
    :param kind: without a meaning: tiles have no class.
    :param size: side in pixels.
    :returns: ``uint8 [size, size, 3]``, and whose nucleus is where: ``uint8 [size, size]``, 0: none, 1: neutrophil, 2:
        epithelial, 3: lymphocyte, 4: plasma, 5: eosinophil, 6: connective.
    """
    rng = np.random.default_rng(seed)
    x, y = grid(size)
    stain = rng.uniform(0.92, 1.06, 3)  # no two laboratories stain alike
    image = np.zeros((size, size, 3), np.float32) + np.array([0.90, 0.70, 0.80], np.float32)
    image += 0.05 * (noise(rng, size, 6) + noise(rng, size, 24))[..., None] * np.array([0.4, 1, 0.7], np.float32)
    mask = np.zeros((size, size), np.uint8)
    glands = [(rng.uniform(-0.9, 0.9, 2), rng.uniform(0.25, 0.45)) for _ in range(rng.integers(1, 4))]
    for at, radius in glands:
        body = ellipse(x - at[0], y - at[1], 1.25 * radius, 1.25 * radius) + 0.02 * noise(rng, size, 8)
        paint(image, 0.6 * inside(body, 0.1), (0.80, 0.62, 0.80))
        paint(image, 0.9 * inside(body - 0.75 * radius, 0.05), (0.95, 0.92, 0.95))  # the opening

    taken = np.zeros((0, 2))
    shares = np.array([each.share for each in _KINDS])
    flow = rng.uniform(0, np.pi)  # connective tissue runs in one direction
    edge, chromatin = 0.002 * noise(rng, size, 30), 1 + 0.12 * noise(rng, size, 60)
    for which in rng.choice(len(_KINDS), rng.integers(70, 110), p=shares / shares.sum()):
        look = _KINDS[which]
        at, turn = rng.uniform(-1, 1, 2), flow + rng.normal(0, 0.25)
        if which == _EPITHELIAL:  # in a ring, each pointing to the middle of the gland
            (middle, radius), turn = glands[rng.integers(len(glands))], rng.uniform(0, 2 * np.pi)
            at = middle + radius * rng.normal(1, 0.06) * np.array([np.cos(turn), np.sin(turn)])
        if np.abs(at).max() > 1 or (np.hypot(*(taken - at).T) < 0.09).any():  # cells do not lie in each other
            continue
        taken = np.concatenate([taken, at[None]])
        # Only the pixels around it are looked at: there are many nuclei, and each is small.
        left, top, right, bottom = np.clip((np.array([*(at - 0.2), *(at + 0.2)]) + 1) / 2 * size, 0, size).astype(int)
        window = slice(top, bottom + 1), slice(left, right + 1)
        dx, dy, part = x[window] - at[0], y[window] - at[1], image[window]
        scale = rng.uniform(0.85, 1.15)
        a, b = scale * look.long, scale * look.short
        nucleus = ellipse(dx, dy, a, b, turn) + edge[window]
        if look.cell is not None:
            cell = ellipse(dx - 0.5 * b * np.cos(turn), dy - 0.5 * b * np.sin(turn), 1.7 * b, 1.5 * b, turn)
            paint(part, 0.85 * inside(cell, 0.02, size), look.cell)
        paint(part, inside(nucleus, 0.012, size), chromatin[window][..., None] * np.array(look.color, np.float32))
        mask[window][nucleus > 0] = which + 1
    image = image * stain.astype(np.float32) + 0.012 * rng.standard_normal(image.shape, np.float32)
    return in_bytes(image), mask
