"""What networks look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from train.outputs.figures import style

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 1.72  # inches
_MOST = 5  # images beside each other
_NAME = 22  # characters above an image
_OPACITY = 0.55  # of a map over its image


def save_attention(
    path: Path,
    *,
    images: Mapping[str, Tensor],
    maps: Mapping[str, Tensor],
    title: str,
    source: style.Source,
    note: str,
) -> None:
    """Each image, and below it the same with a map of :mod:`train.evaluation.attention` over it.

    Up to five images stand beside each other, and the rest below. All maps are on the one scale from 0 to 1; the colors
    of the bar are those over an image, half-transparent like there.

    :param path: the PNG file.
    :param images: ``float32 [C, H, W]`` in [0, 1], C 1 or 3, by what they are (clean, degraded, a strategy's name); at
        least one; they may differ in size.
    :param maps: ``float32 [H, W]`` in [0, 1], of the same names; NaN is left blank.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :param note: what the maps are, in a sentence below the title.
    :raises ValueError: names or sizes differ, or there is no image.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context

    if not images or images.keys() != maps.keys():
        raise ValueError(f"attention needs a map for each image, not images {list(images)} and maps {list(maps)}")
    for name, image in images.items():
        if image.shape[1:] != maps[name].shape:
            raise ValueError(f"{name}: the map is {list(maps[name].shape)}, the image {list(image.shape)}")
    blocks = -(-len(images) // _MOST)
    columns = -(-len(images) // blocks)
    names = [style.wrapped(name, _NAME) for name in images]
    height, width = next(iter(images.values())).shape[1:]
    left, right = 0.42, 0.62
    said = style.wrapped(note, int((left + columns * _SIDE) / 0.072)) if note else ""
    above = []
    for block in range(blocks):
        heading = 0.14 * style.lines(names[block * columns : (block + 1) * columns]) + 0.08
        above += [heading + (0.14 if block else 0.66 + 0.16 * style.lines([said])), 0.06]
    with rc_context(style.STYLE):
        grid = style.Grid(
            columns=columns,
            side=_SIDE,
            ratio=min(max(height / width, 0.5), 2),
            left=left,
            right=right,
            above=above,
            bottom=0.12,
        )
        for number, (name, image) in enumerate(images.items()):
            block, column = divmod(number, columns)
            axes, below = grid.image(2 * block, column), grid.image(2 * block + 1, column)
            for each in (axes, below):
                each.imshow(style.shown(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(names[number], fontsize=9, fontweight="bold", pad=4)
            seen = maps[name].detach().cpu().numpy()
            heat = below.imshow(seen, cmap=style.ATTENTION, vmin=0, vmax=1, alpha=_OPACITY, interpolation="nearest")
            if column == 0:
                axes.set_ylabel("image", fontsize=9, labelpad=4)
                below.set_ylabel("image and map", fontsize=9, labelpad=4)
            if number == len(images) - 1 or column == columns - 1:
                grid.bar(2 * block + 1, column + 1, heat)
        style.title(grid.figure, title, source, left=grid.left)
        if said:
            grid.figure.text(left / grid.width, 1 - 0.58 / grid.height, said, va="top", fontsize=8.5)
        style.save(grid.figure, path)
