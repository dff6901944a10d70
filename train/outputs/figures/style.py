"""What all pictures have in common: colors, type, titles, and how they are written."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from train.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from torch import Tensor

Source = Literal["real", "phantom"]
"""Where images come from."""

INK, FAINT = "#1b1f24", "#8b949e"
OPEN, CLOSED = "#2463ae", "#c8553d"  # told apart with every kind of color vision
ERROR, ATTENTION = "inferno", "viridis"  # color maps whose lightness grows evenly, so that they work in gray too
BOX = "#ffd23f"  # a frame in an image, seen on black and on white with the dark one around it

# M. A. Petroff, "Accessible color sequences for data visualization", arXiv:2107.02270, the sequence of ten: chosen by a
# model of preference among those that stay apart in normal vision and in each of its deficiencies. Ten colors are not
# enough for every reader and printer: each line has a marker of its own as well, of which there are eleven, so that
# no two of the first 110 lines look alike.
_COLORS = (
    "#3f90da",
    "#ffa90e",
    "#bd1f01",
    "#94a4a2",
    "#832db6",
    "#a96b59",
    "#e76300",
    "#b9ac70",
    "#717581",
    "#92dadd",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "*")
_DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Names are shown as they are, whatever the user's own style: a dollar or an underscore in one begins no formula.
    "text.parse_math": False,
    "text.usetex": False,
}
_DPI = 160
_INCH = 72  # points


class Look(NamedTuple):
    """What a line is told apart by."""

    color: str
    marker: str
    dashes: Any


def look(number: int) -> Look:
    """Of the line ``number``: the same strategy in the same place looks the same in every picture of a report."""
    return Look(_COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)], _DASHES[number % len(_DASHES)])


def figure(width: float, height: float) -> Figure:
    """An empty picture, its size in inches."""
    # Not through pyplot: a figure of its own needs no display, no backend switch, and is freed like any other object.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(empty)
    return empty


def title(figure: Figure, title: str, source: Source, *, left: float) -> None:
    """Two lines at the top: the title, and what data it is about. ``left`` in inches."""
    width, height = figure.get_size_inches()
    shown = figure.text(left / width, 1 - 0.13 / height, printable(title), fontsize=11.5, fontweight="bold", va="top")
    phantom = source == "phantom"
    about = figure.text(
        left / width,
        1 - 0.36 / height,
        "PHANTOM: generated images, no patients" if phantom else "real images",
        fontweight="bold" if phantom else "normal",
        color=CLOSED if phantom else FAINT,
        va="top",
    )
    # Names of runs say all that is not usual: one that is longer than the picture is wide becomes smaller.
    room = figure.bbox.x1 * (1 - left / width) - figure.dpi * 0.1
    for line in (shown, about):
        needed = line.get_window_extent().width
        if needed > room:
            line.set_fontsize(line.get_fontsize() * room / needed)


def wrapped(name: str, characters: int) -> str:
    """A name over as many lines as it takes, none longer than so many characters."""
    return textwrap.fill(printable(name), characters) or " "


def lines(names: Iterable[str]) -> int:
    """How many lines the longest of some wrapped names has."""
    return max((name.count("\n") + 1 for name in names), default=0)


class Grid:
    """Images in rows and columns, placed by the inch, so that one beside another is one pixel beside another.

    :param columns: how many.
    :param rows: how many; a picture may have several blocks of rows, and any space between two rows.
    :param side: width of an image.
    :param ratio: height of an image by its width.
    :param left: what is kept free for the names of the rows.
    :param right: what is kept free for color bars.
    :param above: what is kept free above each row: the title above the first one, names of columns, captions.
    :param bottom: what is kept free below the last row.
    """

    def __init__(
        self,
        *,
        columns: int,
        side: float,
        ratio: float,
        left: float,
        right: float,
        above: list[float],
        bottom: float,
    ) -> None:
        self.side, self.high = side, side * ratio
        self.left, self._gap = left, 0.06
        self.width = left + columns * side + (columns - 1) * self._gap + right
        self.height = sum(above) + len(above) * self.high + bottom
        self._tops = [sum(above[: row + 1]) + row * self.high for row in range(len(above))]
        self.figure = figure(self.width, self.height)

    def image(self, row: int, column: int) -> Axes:
        """Axes without ticks and frame."""
        axes = self._axes(row, self.left + column * (self.side + self._gap), self.side)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    def bar(self, row: int, columns: int, heat: AxesImage, *, more: bool = False) -> None:
        """The color bar of a row with so many images, beside the last one.

        :param more: whether the scale ends where many pixels do not, which the bar shows by its pointed end.
        """
        axes = self._axes(row, self.left + columns * (self.side + self._gap) + 0.02, 0.09)
        bar = self.figure.colorbar(heat, cax=axes, extend="max" if more else "neither")
        bar.outline.set_visible(False)  # type: ignore[operator]
        axes.tick_params(labelsize=7, length=2, color=FAINT)
        axes.locator_params(nbins=5)

    def _axes(self, row: int, x: float, wide: float) -> Axes:
        y = self.height - self._tops[row] - self.high
        return self.figure.add_axes((x / self.width, y / self.height, wide / self.width, self.high / self.height))


def legend_beside(axes: Axes, drawn: Mapping[str, Line2D], characters: int = 30) -> None:
    """Names lines to the right of the axes, and makes the picture as wide and as high as that takes.

    The axes keep their width in inches.

    :param drawn: the lines by their names, which are not the lines' own labels: matplotlib keeps labels that begin with
        an underscore, and empty ones, out of legends.
    :param characters: of a line of text, at most.
    """
    whole = axes.get_figure(root=True)
    assert whole is not None
    legend = axes.legend(
        list(drawn.values()),
        [wrapped(name, characters) for name in drawn],
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0,
        frameon=False,
        fontsize=8,
        handlelength=2.6,
        labelspacing=0.7,
    )
    width, height = whole.get_size_inches()
    box, place = legend.get_window_extent(), axes.get_position()
    below, above = place.y0 * height, (1 - place.y1) * height
    left, inner = place.x0 * width, place.width * width
    wide = max(width, left + inner * 1.01 + box.width / whole.dpi + 0.1)
    high = max(height, box.height / whole.dpi + below + above)
    whole.set_size_inches(wide, high)
    axes.set_position((left / wide, below / high, inner / wide, (high - below - above) / high))


def shown(image: Tensor) -> np.ndarray:
    """``[C, H, W]`` as matplotlib wants it: ``[H, W]`` or ``[H, W, 3]``, clamped to [0, 1]."""
    pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def error(image: Tensor, clean: Tensor) -> np.ndarray:
    """The absolute error of an image as it is shown, ``[H, W]``: the mean over its channels."""
    return (image.detach().cpu().clamp(0, 1) - clean.detach().cpu()).abs().mean(0).numpy()


def error_of(name: str) -> str:
    """What an error is called."""
    return f"|{name} \N{MINUS SIGN} clean|"


def worst(errors: Iterable[np.ndarray]) -> float:
    """Where the one scale of all errors ends. A few pixels exceed it: an outlier should not turn the rest black."""
    known = np.concatenate([each[np.isfinite(each)] for each in errors])
    return max(float(np.quantile(known, 0.998)) if known.size else 0.0, 0.02)


def error_caption(error: np.ndarray, what: str = "error") -> str:
    """What is written below an error, or below another difference, which ``what`` names."""
    mean = error.mean()
    return f"mean {what} {mean:.3f}" if np.isfinite(mean) else f"mean {what} undefined: NaN"


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of a centered window, cut off at both ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG file, whole or not at all.

    :raises RunError: it cannot be written; the message names it.
    """
    from train.files import write_file

    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_file(path, image.getvalue())
