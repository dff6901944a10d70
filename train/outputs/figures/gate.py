"""What the gate did to the gradients of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from train.outputs.figures import style


def save_gate(
    path: Path,
    *,
    step: Sequence[int] | np.ndarray,
    cosine: Sequence[float] | np.ndarray | None,
    gate: Sequence[float] | np.ndarray | None,
    title: str,
    source: style.Source,
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

    with rc_context(style.STYLE):
        if not known.any():
            figure = style.figure(8, 1.9)
            figure.text(0.5, 0.3, "no gate in this run: there is no auxiliary gradient", ha="center", color=style.FAINT)
            style.title(figure, title, source, left=0.76)
            style.save(figure, path)
            return
        figure = style.figure(8, 4.6)
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
        for chosen, color, name in ((opened, style.OPEN, "gate open"), (~opened, style.CLOSED, "gate closed")):
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
        above.axhline(0, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if window > 1:
            means = style.running_mean(cosines, window)
            above.plot(steps, means, color=style.INK, linewidth=1.6, label=f"mean of {window} steps")
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
        share = style.running_mean(weights, window)
        # Each step is half a step wide to both sides, the first and the last one too.
        edges = np.concatenate([steps[:1] - 0.5, (steps[1:] + steps[:-1]) / 2, steps[-1:] + 0.5])
        below.stairs(share, edges, fill=True, color=style.OPEN, alpha=0.18, linewidth=0)
        below.stairs(share, edges, color=style.OPEN, linewidth=1.4)
        mean = "\n(running mean)" if window > 1 else ""
        below.set(ylabel=f"gate weight{mean}", ylim=(0, 1.04), yticks=(0, 0.5, 1), xlabel="step")
        margin = 0.01 * (edges[-1] - edges[0])
        below.set_xlim(edges[0] - margin, edges[-1] + margin)
        below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        for axes in (above, below):
            axes.grid(axis="y", color=style.FAINT, alpha=0.22, linewidth=0.6)
            axes.set_axisbelow(True)
        figure.align_ylabels()
        style.title(figure, title, source, left=0.76)
        style.save(figure, path)
