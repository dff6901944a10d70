"""How a quantity goes in the course of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.outputs.figures import style

_SHARE = 50  # lines are running means over a fiftieth of the steps
_POINTS = 300  # of a line; more cannot be seen


@dataclass(frozen=True)
class Course:
    """A quantity over the steps of a training.

    :param steps: step numbers ``[T]``, rising.
    :param values: ``float [seeds, T]``; NaN where a step has none (skipped, or another phase).
    :raises ValueError: the shapes do not go together, or there is no seed.
    """

    steps: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        steps, values = np.shape(self.steps), np.shape(self.values)
        if len(steps) != 1 or len(values) != 2 or values[1] != steps[0] or not values[0]:
            raise ValueError(f"a course needs values [seeds, T] for steps [T], not {list(values)} for {list(steps)}")


def save_course(
    path: Path,
    *,
    courses: Mapping[str, Course],
    ylabel: str,
    title: str,
    source: style.Source,
    zero: bool = False,
) -> None:
    """A quantity over training steps, a line per strategy: the mean over its seeds in a band that is the 95 % interval
    of that mean (Student's t); no band where there is one seed.

    Each seed's values are averaged over a running window first, which the picture states: a fiftieth of the steps of
    the longest course. Steps without a value take no part, and where most of a window has none the line is broken.

    :param path: the PNG file.
    :param courses: by the names of the strategies; at least one.
    :param ylabel: the quantity, with its unit.
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :param zero: with a line at 0, for a quantity whose sign means something (a cosine).
    :raises ValueError: there is no course.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    if not courses:
        raise ValueError("a picture of courses needs at least one")
    window = max(1, max(len(course.steps) for course in courses.values()) // _SHARE)
    with rc_context(style.STYLE):
        figure = style.figure(7.6, 4.3)
        axes = figure.add_axes((0.1, 0.13, 0.87, 0.68))
        if zero:
            axes.axhline(0, color=style.INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        banded, drawn = False, {}
        for number, (name, course) in enumerate(courses.items()):
            shape, (steps, mean, low, high) = style.look(number), summarized(course, window)
            # Few markers, and not at the same steps as those of the other lines.
            spaced = max(1, len(steps) // 8)
            [line] = axes.plot(
                steps,
                mean,
                color=shape.color,
                linestyle=shape.dashes,
                linewidth=1.7,
                marker=shape.marker,
                markersize=5.5,
                markevery=(number * spaced // max(len(courses), 1), spaced),
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3,
            )
            drawn[name if np.isfinite(mean).any() else f"{name} (none)"] = line
            if np.isfinite(low).any():
                banded = True
                axes.fill_between(
                    steps, low, high, color=shape.color, alpha=0.16 if len(courses) < 5 else 0.08, linewidth=0, zorder=2
                )
        counts = sorted({len(course.values) for course in courses.values()})
        over = f"mean over {' or '.join(map(str, counts))} seeds" if counts != [1] else "one seed: no interval"
        smooth = f", running mean of {window} steps" if window > 1 else ""
        band = ", band: 95 % interval of the mean" if banded else ""
        axes.set(xlabel=f"step ({over}{band}{smooth})", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.margins(x=0.015)
        axes.grid(axis="y", color=style.FAINT, alpha=0.22, linewidth=0.6)
        axes.set_axisbelow(True)
        style.legend_beside(axes, drawn)
        style.title(figure, title, source, left=0.76)
        style.save(figure, path)


def summarized(course: Course, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, the mean over seeds, and the ends of its interval (NaN where there is none), each ``float64 [P]``: of at
    most ``_POINTS`` steps, spread evenly.

    :param window: over how many steps each seed's values are averaged first.
    """
    from train.evaluation.statistics import interval

    if not len(course.steps):
        return (np.empty(0),) * 4
    values = np.asarray(course.values, dtype=np.float64)
    known = np.isfinite(values)
    kernel = np.ones(min(window, values.shape[1]))
    smooth = np.full_like(values, np.nan)
    for seed, own in enumerate(known):
        counts, room = (np.convolve(each, kernel, "same").round() for each in (own, np.ones(len(own))))
        total = np.convolve(np.where(own, values[seed], 0), kernel, "same")
        np.divide(total, counts, out=smooth[seed], where=2 * counts >= np.maximum(room, 1))
    places = np.unique(np.linspace(0, values.shape[1] - 1, min(_POINTS, values.shape[1])).round().astype(int))
    found = [interval(smooth[:, place]) for place in places]
    steps = np.asarray(course.steps, dtype=np.float64)[places]
    mean = np.array([each.mean for each in found])
    low, high = (
        np.array([np.nan if end is None else end for end in ends])
        for ends in ([each.low for each in found], [each.high for each in found])
    )
    return steps, mean, low, high
