"""What is left of every frequency."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from train.outputs.figures import style


def save_spectrum(
    path: Path,
    *,
    frequencies: np.ndarray,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    title: str,
    source: style.Source,
) -> None:
    """Ring correlation and energy ratio over frequency, a line per pre-training.

    :param path: the PNG file.
    :param frequencies: of the bands in cycles per pixel, ``[B]``.
    :param curves: by name, the means over images of ring correlation and energy ratio, ``[B]`` each.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :raises ValueError: there is no curve.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context

    if not curves:
        raise ValueError("a picture of spectra needs at least one curve")
    with rc_context(style.STYLE):
        figure = style.figure(9.0, 4.2)
        panels = [figure.add_axes((x, 0.13, 0.36, 0.66)) for x in (0.08, 0.53)]
        drawn = {}
        for number, (name, pair) in enumerate(curves.items()):
            look = style.look(number)
            for axes, values in zip(panels, pair, strict=True):
                [line] = axes.plot(
                    frequencies,
                    values,
                    color=look.color,
                    linestyle=look.dashes,
                    marker=look.marker,
                    markersize=5,
                    markeredgecolor="white",
                    markeredgewidth=0.6,
                    linewidth=1.7,
                )
            drawn[name] = line
        for axes, what in zip(
            panels, ("ring correlation with the clean image", "energy, of the clean image's"), strict=True
        ):
            axes.set(xlabel="frequency (cycles per pixel)", ylabel=what, ylim=(0, None))
            axes.grid(axis="y", color=style.FAINT, alpha=0.22, linewidth=0.6)
        style.legend_beside(panels[1], drawn)
        style.title(figure, title, source, left=0.72)
        style.save(figure, path)
