"""Phantoms: drawn chest-CT-like slices for a first run without data, and for tests. They are no patients.

A slice is painted in Hounsfield units, from the outside in, on a grid of twice the wanted resolution: table, trunk with
fat and muscle, ribs, spine and sternum, mediastinum with heart and great vessels, lungs with branching vessels and
airways. The positive class gets ground-glass opacities: soft-edged, peripheral, often bilateral, vessels visible
through them. The negative class is not merely "clean": it has nodules and emphysema at times, so that the mean gray of
the lungs does not give the diagnosis away. At last the slice is seen through a CT window, as a radiologist would.

Coordinates: x and y in [-1, 1], the front of the body at the top, the patient's right on the left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from train.data.base import SPLITS, ImageData
from train.data.cache import ArrayCache
from train.data.phantoms.drawing import Drawing, Field, drawn, noise

_OVERSAMPLING = 2
_AIR, _FAT, _MUSCLE, _BLOOD, _MARROW, _CORTEX = -1000.0, -95.0, 45.0, 50.0, 230.0, 620.0  # Hounsfield units
_WINDOWS = [(-600, 1500), (-500, 1400), (-350, 1800), (-650, 1100)]  # center and width, as lungs are read


def chest_ct(
    name: str,
    *,
    counts: Mapping[str, Mapping[str, int]],
    class_names: tuple[str, str],
    size: int,
    channels: int,
    cache: ArrayCache,
    progress: bool,
) -> ImageData:
    """Chest slices in place of a data set with two classes; the second class is the one with opacities.

    Every image depends on its own name only, ``phantom-<split>-<class>-<number>``.

    :param name: of the data set that is imitated.
    :param counts: images per split and class.
    :param size: side of the images in pixels.
    :param channels: 1, or 3 equal ones.
    :param cache: keeps the images for the next run.
    :param progress: show a progress bar on stderr.
    """
    return drawn(
        name,
        _drawing,
        counts={split: {c: counts[split][c] for c in class_names} for split in SPLITS},
        size=size,
        channels=channels,
        cache=cache,
        progress=progress,
    )


def _drawing(seed: int, kind: int, size: int) -> Drawing:
    return chest_slice(seed, diseased=bool(kind), size=size), None


def chest_slice(seed: int, *, diseased: bool, size: int) -> np.ndarray:
    """Draws one slice.

    :param seed: decides everything that is not given.
    :param diseased: with ground-glass opacities.
    :param size: side in pixels.
    :returns: ``uint8 [size, size]``.
    """
    canvas = _Canvas(np.random.default_rng(seed), size * _OVERSAMPLING)
    window = _WINDOWS[canvas.rng.choice(len(_WINDOWS), p=[0.4, 0.25, 0.2, 0.15])]
    field_of_view = canvas.rng.choice([2, canvas.rng.uniform(1.02, 1.2)])
    level = canvas.rng.uniform()  # 0: just below the collar bones, 1: just above the diaphragm
    _table(canvas)
    chest = _trunk(canvas)
    mediastinum = _mediastinum(canvas, chest, level)
    # The lungs fill what the mediastinum leaves of the chest, with rounded corners.
    lungs = _smooth_min(chest, -mediastinum, 0.06)
    _bones(canvas, chest, level)
    _lung_tissue(canvas, lungs, chest, diseased=diseased)
    _airways(canvas, level)
    return _seen(canvas, size, window, field_of_view)


class _Canvas:
    """A slice in the making: Hounsfield units on a grid, its coordinates, and brushes."""

    def __init__(self, rng: np.random.Generator, n: int) -> None:
        self.rng = rng
        self.n = n
        self.hu = np.full((n, n), _AIR, np.float32)
        axis = np.linspace(-1, 1, n, dtype=np.float32)
        x, y = np.meshgrid(axis, axis)
        # No patient is an ellipse, and none lies quite straight.
        turn = rng.normal(0, 0.03)
        self.x = x - turn * y + 0.012 * self.noise(3)
        self.y = y + turn * x + 0.012 * self.noise(3)
        self.grain = self.noise(24)

    def noise(self, cells: int) -> Field:
        """Smooth noise of about unit variance with features of ``2 / cells``."""
        return noise(self.rng, self.n, cells)

    def ellipse(self, x: float, y: float, a: float, b: float, *, turn: float = 0.0, power: float = 2.0) -> Field:
        """Roughly the distance to the edge of a (super)ellipse, positive inside."""
        dx, dy = self.x - x, self.y - y
        if turn:
            c, s = math.cos(turn), math.sin(turn)
            dx, dy = c * dx + s * dy, c * dy - s * dx
        # In place: this is where a slice spends most of its time.
        dx *= 1 / a
        dy *= 1 / b
        if power == 2:
            dx *= dx
            dy *= dy
            radius = np.sqrt(np.add(dx, dy, out=dx), out=dx)
        else:
            radius = (np.abs(dx) ** power + np.abs(dy) ** power) ** (1 / power)
        radius -= 1
        radius *= -min(a, b)
        return radius

    def inside(self, distance: Field, softness: float = 0.0) -> Field:
        """Coverage in [0, 1] of the region where ``distance`` is positive; antialiased, or softer."""
        coverage = distance * (1 / max(softness, 3 / self.n))
        coverage += 0.5
        return np.clip(coverage, 0, 1, out=coverage)

    def paint(self, coverage: Field, hu: float | Field) -> None:
        self.hu += coverage * (hu - self.hu)

    def bone(self, distance: Field, cortex: float = 0.018) -> None:
        """Marrow in a shell of cortical bone."""
        self.paint(self.inside(distance), _CORTEX)
        self.paint(self.inside(distance - cortex, 0.02), _MARROW + 60 * self.grain)


def _smooth_min(a: Field, b: Field, rounding: float) -> Field:
    """Intersection of two regions, the corners rounded (a polynomial minimum)."""
    mix = np.clip(0.5 + 0.5 * (b - a) / rounding, 0, 1)
    return b + mix * (a - b) - rounding * mix * (1 - mix)


def _smooth_max(a: Field, b: Field, rounding: float) -> Field:
    """Union of two regions, the corners rounded."""
    return -_smooth_min(-a, -b, rounding)


def _table(canvas: _Canvas) -> None:
    rng = canvas.rng
    if rng.uniform() < 0.8:
        depth, curve = rng.uniform(0.86, 0.93), rng.uniform(0.05, 0.25)
        for offset, thickness, hu in ((0, 0.012, -150), (rng.uniform(0.05, 0.09), 0.008, -450)):
            surface = canvas.y - (depth + offset - curve * canvas.x**2)
            canvas.paint(canvas.inside(thickness - np.abs(surface)), hu)


def _trunk(canvas: _Canvas) -> Field:
    """Skin, fat and muscle; returns the chest cavity as a distance."""
    rng = canvas.rng
    a, b, power = rng.uniform(0.88, 0.99), rng.uniform(0.72, 0.86), rng.uniform(2.2, 2.7)
    body = canvas.ellipse(0, 0.02, a, b, power=power)
    canvas.paint(canvas.inside(body), _MUSCLE)
    fat, wall = rng.uniform(0.02, 0.08), rng.uniform(0.1, 0.14)
    canvas.paint(canvas.inside(body - 0.012) * canvas.inside(fat - body - 0.01 * canvas.noise(8)), _FAT)
    chest = canvas.ellipse(0, -0.01, a - wall - fat * 0.6, b - 0.8 * wall - fat * 0.6, power=2.3)
    # Strands of fat between the muscles of the wall.
    strands = canvas.inside(np.abs(canvas.noise(14)) * -0.05 + 0.008, 0.02)
    canvas.paint(strands * canvas.inside(body - fat) * canvas.inside(-chest - 0.07, 0.02), -60)
    return chest


def _mediastinum(canvas: _Canvas, chest: Field, level: float) -> Field:
    """Heart, great vessels and the tissue around the spine; returns their union as a distance."""
    rng = canvas.rng
    heart_size = float(np.interp(level, [0.2, 0.5, 1.0], [0.5, 0.8, 1.1])) * rng.uniform(0.92, 1.08)
    heart = canvas.ellipse(0.1 * heart_size, -0.16, 0.32 * heart_size, 0.33 * heart_size, turn=rng.uniform(0.3, 0.8))
    front = rng.uniform(0.05, 0.12)
    column = np.interp(canvas.y, [-0.65, -0.35, 0.0, 0.2, 0.45, 0.65], [front + 0.08, front, 0.17, 0.12, 0.17, 0.24])
    union = column.astype(np.float32) - np.abs(canvas.x - 0.02)
    aorta = (rng.uniform(0.1, 0.15), rng.uniform(0.27, 0.33), rng.uniform(0.06, 0.08))
    for part in (heart, canvas.ellipse(aorta[0], aorta[1], aorta[2] + 0.01, aorta[2] + 0.01)):
        union = _smooth_max(union, part, 0.05)
    # On the right the dome of the liver rises into the lowest slices.
    if level > 0.75 and rng.uniform() < 0.6:
        dome = rng.uniform(0.12, 0.3)
        liver = canvas.ellipse(-0.36, rng.uniform(-0.08, 0.05), dome, 1.15 * dome)
        union = np.maximum(union, liver)
    union = _smooth_min(union, chest + 0.03, 0.03)

    canvas.paint(canvas.inside(union), -70 + 25 * canvas.noise(10))
    contrast = float(rng.choice([0.0, rng.uniform(40, 160)]))
    canvas.paint(canvas.inside(union - 0.02, 0.03), _MUSCLE)
    canvas.paint(canvas.inside(heart - 0.015, 0.02), _BLOOD)
    for _ in range(3):
        x, y = rng.uniform(-0.1, 0.25) * heart_size, -0.16 + rng.uniform(-0.2, 0.2) * heart_size
        chamber = canvas.ellipse(x, y, rng.uniform(0.06, 0.13), rng.uniform(0.06, 0.13))
        canvas.paint(canvas.inside(chamber, 0.03) * canvas.inside(heart - 0.03), _BLOOD + contrast)
    canvas.paint(canvas.inside(canvas.ellipse(*aorta[:2], aorta[2], aorta[2])), _BLOOD + contrast)
    if level < 0.6:  # ascending aorta and superior vena cava
        for x, y, radius in ((-0.05, -0.2, 0.085), (-0.15, -0.13, 0.05)):
            vessel = canvas.ellipse(x + rng.normal(0, 0.01), y + rng.normal(0, 0.02), radius, radius)
            canvas.paint(canvas.inside(vessel), _BLOOD + 1.2 * contrast)
    return union


def _bones(canvas: _Canvas, chest: Field, level: float) -> None:
    rng = canvas.rng
    # Ribs run obliquely through the slice, so each appears as a piece of the chest wall.
    angle = np.arctan2(canvas.x, -canvas.y)  # 0 at the sternum, +-pi at the spine
    radial = rng.uniform(0.02, 0.027) - np.abs(chest + 0.05)
    middles = np.linspace(0.5, 2.75, 6)
    along = np.full_like(angle, -1)
    for middle in np.concatenate([-middles, middles]) + rng.normal(0, 0.08, 12):
        along = np.maximum(along, 0.6 * (rng.uniform(0.07, 0.17) - np.abs(angle - float(middle))))
    canvas.bone(_smooth_min(radial, along, 0.02), cortex=0.012)
    if level < 0.55:
        for side in (-1, 1):
            blade = canvas.ellipse(side * 0.66, 0.36, 0.02, rng.uniform(0.13, 0.2), turn=side * rng.uniform(0.5, 0.8))
            canvas.bone(blade, cortex=0.01)
    canvas.bone(canvas.ellipse(0, -0.625, rng.uniform(0.09, 0.13), 0.035), cortex=0.014)
    # Vertebra: body, arch around the canal, transverse and spinous processes.
    y = rng.uniform(0.38, 0.42)
    for side in (-1, 1):
        canvas.bone(canvas.ellipse(side * 0.13, y + 0.145, 0.1, 0.028, turn=side * 0.35), cortex=0.012)
    canvas.bone(canvas.ellipse(0, y + 0.25, 0.024, 0.08), cortex=0.012)
    canvas.bone(canvas.ellipse(0, y + 0.135, 0.085, 0.075), cortex=0.02)
    canvas.bone(canvas.ellipse(0, y, rng.uniform(0.12, 0.14), 0.1))
    canvas.paint(canvas.inside(canvas.ellipse(0, y + 0.135, 0.055, 0.048)), 25)


def _lung_tissue(canvas: _Canvas, lungs: Field, chest: Field, *, diseased: bool) -> None:
    """Air, vessels, and what is wrong with them."""
    rng = canvas.rng
    depth = np.clip(lungs, 0, None)
    # Blood and compression make the lower (back) part denser.
    tissue = rng.uniform(-880, -810) + rng.uniform(10, 60) * canvas.y + 9 * canvas.noise(20) + 9 * canvas.noise(60)
    vessels = _vessels(canvas) * np.clip(depth / 0.06, 0.15, 1)
    if diseased:
        tissue = _opacities(canvas, tissue, lungs, chest)
    elif rng.uniform() < 0.25:
        tissue -= 90 * canvas.inside(canvas.noise(18) - 0.9, 0.5)  # emphysema
    tissue += vessels * (_BLOOD - tissue)
    if not diseased and rng.uniform() < 0.25:
        x, y, radius = rng.choice([-1, 1]) * rng.uniform(0.35, 0.55), rng.uniform(-0.3, 0.35), rng.uniform(0.02, 0.06)
        nodule = canvas.ellipse(x, y, radius, radius) + 0.008 * canvas.noise(24)
        tissue += canvas.inside(nodule, 0.02) * (30 - tissue)
    canvas.paint(canvas.inside(lungs), tissue)


def _opacities(canvas: _Canvas, tissue: Field, lungs: Field, chest: Field) -> Field:
    """Ground glass: patches along the pleura, mostly in the back, some with a denser core or a fine net in them."""
    rng = canvas.rng
    likely = (lungs > 0.02) * np.exp(-np.clip(chest, 0, None) / 0.07) * (1 + 1.5 * np.clip(canvas.y, 0, None))
    if rng.uniform() < 0.3:  # one-sided
        likely = likely * (canvas.x * rng.choice([-1, 1]) > 0)
    places = rng.choice(likely.size, size=rng.integers(2, 7), p=(likely / likely.sum()).ravel())
    ragged = 0.6 * canvas.noise(9) + 0.45 * canvas.grain + 0.25 * canvas.noise(48)
    net = np.exp(-((canvas.noise(34) / 0.25) ** 2))
    for place in places:
        x, y = canvas.x.flat[place], canvas.y.flat[place]
        along, across = rng.uniform(0.16, 0.38), rng.uniform(0.1, 0.2)
        wall = math.atan2(y, x) + math.pi / 2  # along the pleura
        patch = canvas.ellipse(x, y, across, along, turn=wall) / min(along, across)  # 1 in the middle, 0 at the edge
        cover = canvas.inside(patch - 0.35 + 0.3 * ragged, 0.6)
        glass = rng.uniform(-560, -330) + 40 * canvas.noise(40)
        if rng.uniform() < 0.35:
            glass = glass + 170 * net
        if rng.uniform() < 0.35:
            glass = glass + canvas.inside(patch - 0.65 + 0.3 * ragged, 0.3) * rng.uniform(200, 420)
        tissue = np.maximum(tissue, tissue + cover * (glass - tissue))
    return tissue


def _vessels(canvas: _Canvas) -> Field:
    """Two trees that fork from the hila towards the pleura, in [0, 1].

    A slice cuts most branches short: pieces are left out, and others are met end-on, as dots.
    """
    rng, n = canvas.rng, canvas.n
    picture = Image.new("L", (n, n))
    draw = ImageDraw.Draw(picture)

    def pixels(values: np.ndarray) -> np.ndarray:
        return (values + 1) / 2 * n

    for side in (-1, 1):
        heading = np.linspace(-1.3, 1.3, 5) + rng.normal(0, 0.15, 5)
        place = np.stack([np.full(5, side * 0.16), rng.uniform(-0.05, 0.12, 5)])
        radius = rng.uniform(0.011, 0.019, 5)
        for generation in range(6):
            length = 0.15 * 0.87**generation * rng.uniform(0.6, 1.3, heading.size)
            end = place + length * np.stack([side * np.cos(heading), np.sin(heading)])
            kept = rng.uniform(size=heading.size) > np.interp(generation, [0, 1, 3, 5], [0.1, 0.4, 0.66, 0.75])
            # What is thinner than a pixel is drawn one pixel wide and fainter: partial volume.
            width = pixels(2 * radius - 1)
            shade = (255 * np.clip(width / 2.2, 0.2, 1)).astype(int)
            dot = (rng.uniform(size=heading.size) < 0.16) & (generation > 1)
            for x0, y0, x1, y1, w, s in np.column_stack([*pixels(place), *pixels(end), width, shade])[kept]:
                draw.line((x0, y0, x1, y1), fill=int(s), width=max(1, round(w)))
                if w > 2.5:
                    draw.ellipse((x1 - w / 2, y1 - w / 2, x1 + w / 2, y1 + w / 2), fill=int(s))
            for x1, y1, w, s in np.column_stack([*pixels(end), 1.7 * width, shade])[dot]:
                draw.ellipse((x1 - w / 2, y1 - w / 2, x1 + w / 2, y1 + w / 2), fill=int(s))
            # Every branch forks; radii follow Murray's law, roughly.
            fork = rng.uniform(0.1, 0.55, heading.size)
            heading = np.concatenate([heading + fork, heading - fork]) + rng.normal(0, 0.1, 2 * heading.size)
            place, radius = np.tile(end, 2), np.tile(radius, 2) * rng.uniform(0.62, 0.85, 2 * radius.size)
    return np.asarray(picture, np.float32) / 255


def _airways(canvas: _Canvas, level: float) -> None:
    """The windpipe above, its two main branches below, and their walls."""
    rng = canvas.rng
    if level < 0.35:
        tubes = [(0.0, 0.0, 0.06, 0.065)]
    elif level < 0.75:
        tubes = [(-0.1, 0.06, 0.055, 0.045), (0.12, 0.07, 0.055, 0.042)]
    else:
        tubes = [(-0.2, 0.1, 0.025, 0.025), (0.22, 0.12, 0.025, 0.025)]
    for x, y, a, b in tubes:
        tube = canvas.ellipse(x + rng.normal(0, 0.012), y + rng.normal(0, 0.012), a, b)
        canvas.paint(canvas.inside(tube + 0.012), 0)
        canvas.paint(canvas.inside(tube), _AIR)


def _seen(canvas: _Canvas, size: int, window: tuple[int, int], field_of_view: float) -> np.ndarray:
    """Reduces to ``size`` and maps a window (center and width in Hounsfield units) to 0..255.

    :param field_of_view: radius of the scanner's circle, outside of which there is nothing.
    """
    rng, (center, width) = canvas.rng, window
    small = np.asarray(Image.fromarray(canvas.hu).reduce(_OVERSAMPLING))
    small = small + rng.uniform(4, 14) * rng.standard_normal(small.shape, dtype=np.float32)  # a little scanner noise
    gray = (small - (center - width / 2)) / width
    axis = np.linspace(-1, 1, size)
    gray[axis[:, None] ** 2 + axis**2 > field_of_view**2] = 0
    return np.round(255 * np.clip(gray, 0, 1)).astype(np.uint8)
