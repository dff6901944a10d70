"""What generated images have in common: from a function that draws one of them to a data set, and a few brushes."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw

from train.data.base import SPLITS, ImageData, Subset
from train.data.cache import ArrayCache, file_sha256
from train.seeds import stable_seed

Field = np.ndarray  # float32 [n, n]
Drawing = tuple[np.ndarray, np.ndarray | None]
"""``uint8 [S, S]`` (gray) or ``[S, S, 3]``, and its mask, ``uint8 [S, S]``, if it has one."""


def drawn(
    name: str,
    draw: Callable[[int, int, int], Drawing],
    *,
    counts: Mapping[str, Mapping[str, int]],
    size: int,
    channels: int,
    cache: ArrayCache,
    progress: bool,
    labeled: bool = True,
    mask_names: Sequence[str] = (),
    per_patient: int | None = None,
) -> ImageData:
    """Generated images in place of a data set.

    Every image depends on its own name only, ``phantom-<split>-<class>-<number>``.

    :param name: of the data set that is imitated.
    :param draw: an image from its seed, its class and its size. The file that it is in is a part of the cache's key:
        another drawing is another entry.
    :param counts: images per split and class; the classes of each split in the order of their labels.
    :param size: side of the images in pixels.
    :param channels: 1 or 3.
    :param cache: keeps the images for the next run.
    :param progress: show a progress bar on stderr.
    :param labeled: whether the data set has labels; if not, the one class is no more than a part of the names.
    :param mask_names: what the class indices of the masks mean; empty: there are no masks.
    :param per_patient: so many images of a class, one after the other, are called one patient's; ``None``: the patients
        are not known.
    """
    class_names = tuple(counts["train"])
    names = {
        split: [f"phantom-{split}-{c}-{i:03d}" for c in class_names for i in range(counts[split][c])]
        for split in SPLITS
    }
    labels = {split: np.repeat(np.arange(len(class_names)), [*counts[split].values()]) for split in SPLITS}

    def build() -> dict[str, np.ndarray]:
        from rich.console import Console
        from rich.progress import track

        jobs = [
            (stable_seed("phantom", each), int(label))
            for split in SPLITS
            for each, label in zip(names[split], labels[split], strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = pool.map(lambda job: draw(job[0], job[1], size), jobs)
            bar = track(results, "Drawing phantoms", len(jobs), console=Console(stderr=True), disable=not progress)
            images, masks = zip(*((_in_channels(image, channels), mask) for image, mask in bar), strict=True)
        ends = np.cumsum([len(names[split]) for split in SPLITS])[:-1]
        arrays = dict(zip(SPLITS, np.split(np.stack(images), ends), strict=True))
        if mask_names:
            parts = np.split(np.stack(masks), ends)
            arrays |= {f"{split}-masks": part for split, part in zip(SPLITS, parts, strict=True)}
        return arrays

    key = {
        "phantom": names,
        "size": size,
        "channels": channels,
        "code": [file_sha256(Path(inspect.getfile(draw))), file_sha256(Path(__file__))],
        "libraries": [np.__version__, PIL.__version__],
    }
    arrays = cache.arrays(f"{name}-phantom-{size}px-{channels}ch", key, build)

    def patients(split: str) -> tuple[str, ...]:
        assert per_patient is not None
        return tuple(f"{each[:-4]}-patient{int(each[-3:]) // per_patient:03d}" for each in names[split])

    subsets: dict[str, Any] = {
        split: Subset(
            images=arrays[split],
            labels=labels[split] if labeled else None,
            masks=arrays[f"{split}-masks"] if mask_names else None,
            names=tuple(names[split]),
            patients=None if per_patient is None else patients(split),
        )
        for split in SPLITS
    }
    return ImageData(
        name=name,
        source="phantom",
        class_names=class_names if labeled else (),
        mask_names=tuple(mask_names),
        **subsets,
    )


def _in_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """``[S, S, channels]`` of a gray or colored image."""
    if image.ndim == 3 and channels == 1:
        image = np.asarray(Image.fromarray(image).convert("L"))
    return image if image.ndim == 3 else image[..., None].repeat(channels, axis=2)


def grid(n: int) -> tuple[Field, Field]:
    """x and y of each pixel, from -1 (left, top) to 1."""
    axis = np.linspace(-1, 1, n, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    return x, y


def noise(rng: np.random.Generator, n: int, cells: int) -> Field:
    """Smooth noise of about unit variance with features of ``2 / cells``."""
    small = rng.standard_normal((cells + 3, cells + 3)).astype(np.float32)
    return np.asarray(Image.fromarray(small).resize((n, n), Image.Resampling.BICUBIC))


def ellipse(x: Field, y: Field, a: float, b: float, turn: float = 0.0) -> Field:
    """Roughly the distance to the edge of an ellipse around (0, 0), positive inside."""
    c, s = np.cos(turn), np.sin(turn)
    return (1 - np.hypot((c * x + s * y) / a, (c * y - s * x) / b)) * min(a, b)


def inside(distance: Field, softness: float = 0.0, n: int | None = None) -> Field:
    """Coverage in [0, 1] of the region where ``distance`` is positive; antialiased, or softer.

    :param n: side of the image in pixels, where ``distance`` is that of a part of it.
    """
    return np.clip(distance / max(softness, 2 / (n or len(distance))) + 0.5, 0, 1)


def paint(image: np.ndarray, coverage: Field, color: Sequence[float] | np.ndarray) -> None:
    """Lays a color, or a picture, over ``image`` (``float32 [n, n, 3]``) in place."""
    image += coverage[..., None] * (np.asarray(color, np.float32) - image)


def strokes(n: int, lines: Iterable[tuple[np.ndarray, float]]) -> Field:
    """Coverage in [0, 1] of lines.

    :param lines: the points of each, ``[k, 2]`` (x and y), and its width, in the units of :func:`grid`.
    """
    fine = 4
    picture = Image.new("L", (fine * n, fine * n))
    draw = ImageDraw.Draw(picture)
    for points, width in lines:
        corners = [tuple(each) for each in ((points + 1) / 2 * fine * n).tolist()]
        draw.line(corners, fill=255, width=max(1, round(width / 2 * fine * n)), joint="curve")
    return np.asarray(picture.reduce(fine), np.float32) / 255


def in_bytes(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as ``uint8``."""
    return np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)
