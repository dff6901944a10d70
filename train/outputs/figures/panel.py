"""A few examples, and what a network does to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.outputs.figures import style

if TYPE_CHECKING:
    from torch import Tensor

_LABEL = 26  # characters beside an image, and no more: the next row has a label of its own
_CAPTION = 0.27  # inches below an image


def save_panel(
    path: Path,
    *,
    clean: Sequence[Tensor] | Tensor | None,
    degraded: Sequence[Tensor] | Tensor,
    enhanced: Sequence[Tensor] | Tensor | None,
    title: str,
    source: style.Source,
    labels: Sequence[str] = (),
) -> None:
    """One row per example: clean, degraded, enhanced, and the absolute error of the last one. Where the clean images
    are not known: degraded, enhanced, and the absolute difference of the two.

    Images are clamped to [0, 1], shown, and captioned with the PSNR of what is shown; pixels that are NaN are
    left blank.

    :param path: the PNG file.
    :param clean: N > 0 images ``float32 [C, H, W]`` in [0, 1], C 1 or 3; they may differ in size; ``None`` where they
        are not known.
    :param degraded: the same shapes.
    :param enhanced: the same shapes; ``None`` where nothing is enhanced.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :param labels: a word or two per row (the diagnosis).
    :raises ValueError: the shapes differ, or there is no example.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context

    from train.evaluation.metrics import image_quality, psnr_caption

    truth = degraded if clean is None else clean
    columns = {} if clean is None else {"clean": clean}
    columns |= {"degraded": degraded} | ({} if enhanced is None else {"enhanced": enhanced})
    *_, last = columns
    if not len(truth) or any(len(images) != len(truth) for images in columns.values()):
        counts = ", ".join(f"{len(images)} {name}" for name, images in columns.items())
        raise ValueError(f"a panel needs N > 0 images of each kind, of the same shapes, not {counts}")
    with rc_context(style.STYLE):
        captions = {
            name: [
                image_quality(image[None], target[None]).psnr.item()
                for image, target in zip(images, truth, strict=True)
            ]
            for name, images in columns.items()
        }
        error = [style.error(image, target) for image, target in zip(columns[last], truth, strict=True)]
        worst = style.worst(error)

        said = [style.wrapped(label, _LABEL) for label in labels]
        rows, count = len(truth), len(columns)
        grid = style.Grid(
            columns=count + 1,
            side=2.0,
            ratio=1,
            left=0.3 + 0.15 * max(style.lines(said), 1),
            right=0.62,
            above=[0.78] + [_CAPTION] * (rows - 1),
            bottom=_CAPTION + 0.1,
        )
        for row in range(rows):
            for column, (name, images) in enumerate(columns.items()):
                axes = grid.image(row, column)
                axes.imshow(style.shown(images[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                has_caption = clean is not None and name != "clean"
                axes.set_xlabel(psnr_caption(captions[name][row]) if has_caption else "", labelpad=3)
                if row == 0:
                    axes.set_title(name, fontsize=10, fontweight="bold", pad=5)
                if column == 0 and said:
                    axes.set_ylabel(said[row], fontsize=9, labelpad=4)
            axes = grid.image(row, count)
            heat = axes.imshow(error[row], cmap=style.ERROR, vmin=0, vmax=worst, interpolation="nearest")
            axes.set_xlabel(style.error_caption(error[row], "error" if clean is not None else "change"), labelpad=3)
            if row == 0:
                axes.set_title(
                    style.error_of(last) if clean is not None else "difference", fontsize=10, fontweight="bold", pad=5
                )
            grid.bar(row, count + 1, heat)
        style.title(grid.figure, title, source, left=grid.left)
        style.save(grid.figure, path)
