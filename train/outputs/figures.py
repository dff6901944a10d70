"""The pictures of a run: what the network does to images, and what the gate did to the gradients.

Each function takes arrays and writes one PNG file, whole or not at all.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from train.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _FAINT = "#1b1f24", "#8b949e"
_OPEN, _CLOSED = "#2463ae", "#c8553d"  # told apart with every kind of color vision
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Names are shown as they are, whatever the user's own style: a dollar or an underscore in one begins no formula.
    "text.parse_math": False,
    "text.usetex": False,
}
_DPI = 160
_LABEL = 26  # characters beside an image, and no more: the next row has a label of its own


def save_panel(
    path: Path,
    *,
    clean: Sequence[Tensor] | Tensor,
    degraded: Sequence[Tensor] | Tensor,
    enhanced: Sequence[Tensor] | Tensor | None,
    title: str,
    source: Literal["real", "phantom"],
    labels: Sequence[str] = (),
) -> None:
    """One row per example: clean, degraded, enhanced, and the absolute error of the last one.

    Images are clamped to [0, 1], shown, and captioned with the PSNR of what is shown; pixels that are NaN are
    left blank.

    :param path: the PNG file.
    :param clean: N > 0 images ``float32 [C, H, W]`` in [0, 1], C 1 or 3; they may differ in size.
    :param degraded: the same shapes.
    :param enhanced: the same shapes; ``None`` where nothing is enhanced.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :param labels: a word or two per row (the diagnosis).
    :raises ValueError: the shapes differ, or there is no example.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import colormaps, rc_context

    from train.evaluation.metrics import image_quality, psnr_caption

    columns = {"clean": clean, "degraded": degraded} | ({} if enhanced is None else {"enhanced": enhanced})
    *_, last = columns
    if not len(clean) or any(len(images) != len(clean) for images in columns.values()):
        counts = ", ".join(f"{len(images)} {name}" for name, images in columns.items())
        raise ValueError(f"a panel needs N > 0 images of each kind, of the same shapes, not {counts}")
    with rc_context(_STYLE):
        captions = {
            name: [
                image_quality(image[None], target[None]).psnr.item()
                for image, target in zip(images, clean, strict=True)
            ]
            for name, images in columns.items()
        }
        error = [
            (image.detach().cpu().clamp(0, 1) - target.detach().cpu()).abs().mean(0).numpy()
            for image, target in zip(columns[last], clean, strict=True)
        ]
        # One scale for all rows. A few pixels may exceed it: a single outlier should not turn the rest black.
        known = np.concatenate([each[np.isfinite(each)] for each in error])
        worst = max(float(np.quantile(known, 0.998)) if known.size else 0.0, 0.02)

        said = [textwrap.fill(printable(label), _LABEL) for label in labels]
        lines = max((label.count("\n") + 1 for label in said), default=1)
        rows, side, top, bottom, left, right = len(clean), 2.0, 0.78, 0.1, 0.3 + 0.15 * lines, 0.62  # inches
        gap_x, gap_y = 0.06, 0.27
        count = len(columns)
        width = left + (count + 1) * side + count * gap_x + right
        height = top + rows * (side + gap_y) + bottom
        figure = _figure(width, height)

        def axes_at(row: int, column: int, wide: float = side) -> Axes:
            x, y = left + column * (side + gap_x), height - top - side - row * (side + gap_y)
            axes = figure.add_axes((x / width, y / height, wide / width, side / height))
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            return axes

        for row in range(rows):
            for column, (name, images) in enumerate(columns.items()):
                axes = axes_at(row, column)
                axes.imshow(_shown(images[row]), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set_xlabel("" if name == "clean" else psnr_caption(captions[name][row]), labelpad=3)
                if row == 0:
                    axes.set_title(name, fontsize=10, fontweight="bold", pad=5)
                if column == 0 and said:
                    axes.set_ylabel(said[row], fontsize=9, labelpad=4)
            axes = axes_at(row, count)
            heat = axes.imshow(error[row], cmap=colormaps["inferno"], vmin=0, vmax=worst, interpolation="nearest")
            mean = error[row].mean()
            axes.set_xlabel(f"mean error {mean:.3f}" if np.isfinite(mean) else "mean error undefined: NaN", labelpad=3)
            if row == 0:
                axes.set_title(f"|{last} \N{MINUS SIGN} clean|", fontsize=10, fontweight="bold", pad=5)
            x = left + (count + 1) * (side + gap_x) + 0.02
            y = height - top - side - row * (side + gap_y)
            bar = figure.colorbar(heat, cax=figure.add_axes((x / width, y / height, 0.09 / width, side / height)))
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7, length=2, color=_FAINT)
            bar.ax.locator_params(nbins=5)
        _title(figure, title, source, left=left)
        _save(figure, path)


def save_gate(
    path: Path,
    *,
    step: Sequence[int] | np.ndarray,
    cosine: Sequence[float] | np.ndarray | None,
    gate: Sequence[float] | np.ndarray | None,
    title: str,
    source: Literal["real", "phantom"],
) -> None:
    """Cosine between the main and the auxiliary gradient, and the gate's weight, over the steps of a run.

    Every step is a dot, in the color of its gate, the larger the fewer there are; lines are running means over a
    fiftieth of the run. Under 100 steps that would be the steps themselves: then there is no line over the dots.

    :param path: the PNG file.
    :param step: step numbers ``[T]``.
    :param cosine: ``[T]``, NaN where a step had none (skipped, or another phase); ``None``: the run has no gate, and
        the figure says so.
    :param gate: the weight of the auxiliary gradient ``[T]`` in [0, 1], NaN likewise.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :raises ValueError: the lengths differ.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.collections import PathCollection
    from matplotlib.ticker import MaxNLocator

    steps = np.asarray(step)
    cosines = np.full(len(steps), np.nan) if cosine is None else np.asarray(cosine, dtype=float)
    weights = np.full(len(steps), np.nan) if gate is None else np.asarray(gate, dtype=float)
    if not steps.shape == cosines.shape == weights.shape or steps.ndim != 1:
        raise ValueError(f"{len(steps)} steps need as many cosines ({cosines.shape}) and gates ({weights.shape})")
    known = np.isfinite(cosines) & np.isfinite(weights)
    steps, cosines, weights = steps[known], cosines[known], weights[known]

    with rc_context(_STYLE):
        if not known.any():
            figure = _figure(8, 1.9)
            figure.text(0.5, 0.3, "no gate in this run: there is no auxiliary gradient", ha="center", color=_FAINT)
            _title(figure, title, source, left=0.76)
            _save(figure, path)
            return
        figure = _figure(8, 4.6)
        above, below = figure.subplots(
            2,
            1,
            sharex=True,
            height_ratios=(2.6, 1),
            gridspec_kw={"hspace": 0.12, "top": 0.83, "bottom": 0.1, "left": 0.13, "right": 0.98},
        )
        window = max(1, len(steps) // 50)
        size, alpha = np.clip(2000 / len(steps), 7, 30), np.clip(80 / len(steps), 0.35, 0.9)
        opened = weights > 0
        for chosen, color, name in ((opened, _OPEN, "gate open"), (~opened, _CLOSED, "gate closed")):
            above.scatter(
                steps[chosen],
                cosines[chosen],
                s=size,
                alpha=alpha,
                zorder=3 if len(steps) < 500 else 1,  # under the line once they are a cloud
                color=color,
                linewidths=0,
                label=f"{name} ({chosen.mean():.1%} of steps)",
            )
        above.axhline(0, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if window > 1:
            means = _running_mean(cosines, window)
            above.plot(steps, means, color=_INK, linewidth=1.6, label=f"mean of {window} steps")
        above.set(ylabel="cosine of main and\nauxiliary gradient")
        legend = above.legend(
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=3,
            frameon=False,
            fontsize=8,
            handletextpad=0.3,
        )
        for handle in legend.legend_handles:
            handle.set_alpha(1)
            if isinstance(handle, PathCollection):
                handle.set_sizes([34])
        share = _running_mean(weights, window)
        # Each step is half a step wide to both sides, the first and the last one too.
        edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
        below.stairs(share, edges, fill=True, color=_OPEN, alpha=0.18, linewidth=0)
        below.stairs(share, edges, color=_OPEN, linewidth=1.4)
        mean = "\n(running mean)" if window > 1 else ""
        below.set(ylabel=f"gate weight{mean}", ylim=(0, 1.04), yticks=(0, 0.5, 1), xlabel="step")
        margin = 0.01 * (edges[-1] - edges[0])
        below.set_xlim(edges[0] - margin, edges[-1] + margin)
        below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axes in (above, below):
            axes.grid(axis="y", color=_FAINT, alpha=0.22, linewidth=0.6)
            axes.set_axisbelow(True)
        figure.align_ylabels()
        _title(figure, title, source, left=0.76)
        _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    # Not through pyplot: a figure of its own needs no display, no backend switch, and is freed like any other object.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(figure: Figure, title: str, source: str, *, left: float) -> None:
    """Two lines at the top: the title, and what data it is about. ``left`` in inches."""
    width, height = figure.get_size_inches()
    shown = figure.text(left / width, 1 - 0.13 / height, printable(title), fontsize=11.5, fontweight="bold", va="top")
    # Names of runs say all that is not usual: one that is longer than the picture is wide becomes smaller.
    room, needed = figure.bbox.x1 * (1 - left / width) - figure.dpi * 0.1, shown.get_window_extent().width
    if needed > room:
        shown.set_fontsize(shown.get_fontsize() * room / needed)
    phantom = source == "phantom"
    figure.text(
        left / width,
        1 - 0.36 / height,
        "PHANTOM: generated images, no patients" if phantom else "real images",
        fontweight="bold" if phantom else "normal",
        color=_CLOSED if phantom else _FAINT,
        va="top",
    )


def _shown(image: Tensor) -> np.ndarray:
    """``[C, H, W]`` as matplotlib wants it: ``[H, W]`` or ``[H, W, 3]``."""
    pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of a centered window, cut off at both ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _save(figure: Figure, path: Path) -> None:
    from train.files import write_file

    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_file(path, image.getvalue())
