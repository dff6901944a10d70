"""One image, and what each strategy makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from train.outputs.figures import style

if TYPE_CHECKING:
    from torch import Tensor

_SIDE = 1.72  # inches
_MOST = 5  # images beside each other: the picture is as wide as a page, with captions that can be read on it
_NAME = 22  # characters above an image, and no more: the next image has a name of its own
_CAPTION = 0.27  # inches below an image
_ZOOM = 4  # the crop is a fourth as wide and as high as the image
_FEWEST = 16  # rows and columns of a crop


class Crop(NamedTuple):
    """A part of an image, in pixels: its first row and column, and its size."""

    top: int
    left: int
    height: int
    width: int


def save_strategies(
    path: Path,
    *,
    clean: Tensor,
    degraded: Tensor,
    enhanced: Mapping[str, Tensor],
    title: str,
    source: style.Source,
) -> None:
    """One image clean, degraded and as each strategy enhances it; below each a part of it, enlarged, and its error.

    The part is framed in the images; it is where the strategies differ most (:func:`crop_of`). Errors are absolute,
    averaged over channels, and on one scale: that of the strategies, which the degraded image exceeds. Up to five
    images stand beside each other, and the rest below. Images are clamped to [0, 1], shown, and captioned with the PSNR
    of what is shown; pixels that are NaN are left blank.

    :param path: the PNG file.
    :param clean: ``float32 [C, H, W]`` in [0, 1], C 1 or 3, at least 11 x 11 pixels.
    :param degraded: the same shape.
    :param enhanced: the same shape, by the names of the strategies; at least one.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the image comes from.
    :raises ValueError: the shapes differ, or there is no strategy.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.patches import Rectangle

    from train.evaluation.metrics import image_quality, psnr_caption

    if not enhanced or any(each.shape != clean.shape for each in (degraded, *enhanced.values())):
        shapes = ", ".join(f"{list(each.shape)}" for each in (clean, degraded, *enhanced.values()))
        raise ValueError(f"strategies need at least one enhanced image, and all images one shape, not {shapes}")
    # A list of pairs: a strategy may be called "clean".
    images = [("clean", clean), ("degraded", degraded), *enhanced.items()]
    crop = crop_of(clean, list(enhanced.values()))
    errors = [style.error(image, clean) for _, image in images]
    worst = style.worst(errors[2:])
    blocks = -(-len(images) // _MOST)
    columns = -(-len(images) // blocks)
    names = [style.wrapped(name, _NAME) for name, _ in images]
    above = []
    for block in range(blocks):
        heading = 0.14 * style.lines(names[block * columns : (block + 1) * columns]) + 0.08
        above += [heading + (_CAPTION + 0.08 if block else 0.62), _CAPTION, 0.06]
    height, width = clean.shape[1:]
    with rc_context(style.STYLE):
        grid = style.Grid(
            columns=columns,
            side=_SIDE,
            ratio=min(max(height / width, 0.5), 2),
            left=0.42,
            right=0.62,
            above=above,
            bottom=_CAPTION + 0.1,
        )
        for number, (_, image) in enumerate(images):
            block, column = divmod(number, columns)
            row = 3 * block
            axes = grid.image(row, column)
            axes.imshow(style.shown(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(names[number], fontsize=9, fontweight="bold", pad=4)
            psnr = image_quality(image[None], clean[None]).psnr.item()
            axes.set_xlabel("" if number == 0 else psnr_caption(psnr), labelpad=3, fontsize=8.5)
            corner = (crop.left - 0.5, crop.top - 0.5)
            for color, line in ((style.INK, 2.4), (style.BOX, 1.2)):
                axes.add_patch(Rectangle(corner, crop.width, crop.height, fill=False, edgecolor=color, linewidth=line))
            zoom = grid.image(row + 1, column)
            zoom.imshow(_part(style.shown(image), crop), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if number == 0:
                below = None
            else:
                below = grid.image(row + 2, column)
                heat = below.imshow(errors[number], cmap=style.ERROR, vmin=0, vmax=worst, interpolation="nearest")
                below.set_xlabel(style.error_caption(errors[number]), labelpad=3, fontsize=8.5)
                if number == len(images) - 1 or column == columns - 1:
                    grid.bar(row + 2, column + 1, heat, more=True)
            if column == 0:
                axes.set_ylabel("image", fontsize=9, labelpad=4)
                zoom.set_ylabel(f"{crop.height} x {crop.width} px", fontsize=9, labelpad=4)
            if column == (1 if block == 0 else 0) and below is not None:
                below.set_ylabel(style.error_of("image"), fontsize=9, labelpad=4)
        style.title(grid.figure, title, source, left=grid.left)
        style.save(grid.figure, path)


def crop_of(clean: Tensor, enhanced: list[Tensor]) -> Crop:
    """The part in which the strategies differ most: where their variance, summed over its pixels, is largest. With
    one strategy, where its squared error is.

    :param clean: ``float32 [C, H, W]``.
    :param enhanced: the same shapes, N > 0.
    """
    from torch import stack

    shown = stack([each.detach().cpu().double().clamp(0, 1) for each in enhanced])
    spread = shown.var(0, correction=0) if len(enhanced) > 1 else (shown[0] - clean.detach().cpu()) ** 2
    height, width = clean.shape[1:]
    high, wide = (min(max(side // _ZOOM, _FEWEST), side) for side in (height, width))
    # Sums over all such parts at once, as differences of sums over all rectangles from the corner.
    sums = np.zeros((height + 1, width + 1))
    sums[1:, 1:] = spread.sum(0).nan_to_num(0).numpy().cumsum(0).cumsum(1)
    inside = sums[high:, wide:] - sums[:-high, wide:] - sums[high:, :-wide] + sums[:-high, :-wide]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return Crop(int(top), int(left), high, wide)


def _part(pixels: np.ndarray, crop: Crop) -> np.ndarray:
    return pixels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
