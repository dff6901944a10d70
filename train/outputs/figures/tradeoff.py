"""What is gained in one score for what is lost in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.outputs.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from train.evaluation.statistics import Interval

# Of a point, for the number beside it: points to the right and up, and how the text is aligned.
_SIDES = ((7, 5, "left"), (-7, 5, "right"), (7, -11, "left"), (-7, -11, "right"), (0, 9, "center"), (0, -15, "center"))


@dataclass(frozen=True)
class Point:
    """What a strategy achieves with one weight of the auxiliary gradient.

    :param x: the score to the right, over seeds.
    :param y: the score upwards, over seeds.
    :param weight: lambda; ``None`` where the strategy has none.
    """

    x: Interval
    y: Interval
    weight: float | None = None


def save_tradeoff(
    path: Path,
    *,
    curves: Mapping[str, Sequence[Point]],
    xlabel: str,
    ylabel: str,
    title: str,
    source: style.Source,
) -> None:
    """Two scores against each other, a curve per strategy through its weights lambda, with bars that are the 95 %
    intervals over seeds.

    Points that have no score are left out. Each is labeled with its lambda, where there is room for that.

    :param path: the PNG file.
    :param curves: by the names of the strategies; at least one. Points are joined in the order of their weights.
    :param xlabel: the score to the right, with its unit (PSNR in dB).
    :param ylabel: the score upwards (a reader's accuracy).
    :param title: what the reader sees; the word PHANTOM is added to it where ``source`` asks for it.
    :param source: where the images come from.
    :raises ValueError: there is no curve.
    :raises RunError: the file cannot be written.
    """
    from matplotlib import rc_context

    if not curves:
        raise ValueError("a trade-off needs at least one curve")
    with rc_context(style.STYLE):
        figure = style.figure(7.6, 5.0)
        axes = figure.add_axes((0.1, 0.12, 0.87, 0.72))
        shown: list[Point] = []
        barred, drawn = False, {}
        for number, (name, points) in enumerate(curves.items()):
            shape = style.look(number)
            known = [each for each in points if np.isfinite(each.x.mean) and np.isfinite(each.y.mean)]
            known.sort(key=lambda each: -1.0 if each.weight is None else each.weight)
            x, y = [each.x.mean for each in known], [each.y.mean for each in known]
            for each in known:
                barred |= _bars(axes, each, shape.color)
            [line] = axes.plot(
                x,
                y,
                color=shape.color,
                linestyle=shape.dashes,
                linewidth=1.5,
                marker=shape.marker,
                markersize=7.5,
                markeredgecolor="white",
                markeredgewidth=0.7,
                zorder=3,
            )
            drawn[name if known else f"{name} (none)"] = line
            shown += known
        bars = "; bars: 95 % interval over seeds" if barred else "; one seed: no interval"
        numbers = "numbers: \N{GREEK SMALL LETTER LAMDA}" if any(each.weight is not None for each in shown) else ""
        axes.set(xlabel=f"{xlabel}\n({numbers}{bars})".replace("(; ", "("), ylabel=ylabel)
        axes.margins(0.08)
        axes.grid(color=style.FAINT, alpha=0.22, linewidth=0.6)
        axes.set_axisbelow(True)
        style.legend_beside(axes, drawn)
        _label(axes, shown)
        style.title(figure, title, source, left=0.76)
        style.save(figure, path)


def _bars(axes: Axes, point: Point, color: str) -> bool:
    """Draws the intervals that a point has."""
    drawn = False
    for own, horizontal in ((point.x, True), (point.y, False)):
        if own.low is None or own.high is None:
            continue
        ends = [own.low, own.high]
        places = (ends, [point.y.mean] * 2) if horizontal else ([point.x.mean] * 2, ends)
        axes.plot(*places, color=color, linewidth=1.0, alpha=0.55, solid_capstyle="butt", zorder=2)
        drawn = True
    return drawn


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Writes lambda beside each point, on the first side where it covers neither a point nor another number, and not at
    all where there is no such side."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure = axes.get_figure(root=True)
    assert figure is not None
    axes.autoscale_view()
    reach = 4 * figure.dpi / 72  # of a marker, in pixels
    places = [axes.transData.transform((each.x.mean, each.y.mean)) for each in points]
    taken = [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in places]
    for point in points:
        if point.weight is None:
            continue
        for right, up, aligned in _SIDES:
            # In ink, as the colors of some lines are too light for text, and on white, as lines run below it.
            text = axes.annotate(
                f"{point.weight:g}",
                (point.x.mean, point.y.mean),
                xytext=(right, up),
                textcoords="offset points",
                ha=aligned,
                fontsize=7.5,
                path_effects=[withStroke(linewidth=2, foreground="white")],
                zorder=4,
            )
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()
