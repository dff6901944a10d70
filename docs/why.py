"""Draws docs/why.svg, from results/lambda/results.json: python docs/why.py [FILE]."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from train.files import write_file  # noqa: E402
from train.outputs.figures import style  # noqa: E402

MEASURED = ROOT / "results" / "lambda" / "results.json"
CURVES = {
    "joint": "no gate: joint training",
    "frozen": "no gate: fixed VR",
    "gradprom": "hard gate, fixed VR",
    "soft": "soft gate, fixed VR",
}
CAPPED = {"capped soft @ kappa 1": "soft gate and cap (\N{GREEK SMALL LETTER KAPPA} = 1)"}


def lost(arms: dict[str, Any], arm: str) -> float:
    """PSNR of an arm minus that of IP alone, in dB, means over the seeds."""
    return float(arms[arm]["psnr"]["mean"] - arms["ip-only"]["psnr"]["mean"])


def curves() -> dict[str, list[tuple[float, float]]]:
    """What was measured: for each strategy lambda and the difference to IP alone in dB. Those with a cap have one
    lambda, which is 1."""
    [condition] = json.loads(MEASURED.read_text())["conditions"]
    arms = condition["arms"]
    found = {}
    for strategy, name in CURVES.items():
        weights = [float(arm.partition(" @ ")[2]) for arm in arms if arm.partition(" @ ")[0] == strategy]
        found[name] = [(weight, lost(arms, f"{strategy} @ {weight:g}")) for weight in sorted(weights)]
    return found | {name: [(1.0, lost(arms, arm))] for arm, name in CAPPED.items()}


def main(path: Path) -> None:
    """To the left what a gate does with two gradients, to the right what it kept from harm."""
    from matplotlib import rc_context

    with rc_context({**style.STYLE, "svg.hashsalt": "why", "svg.fonttype": "path"}):
        figure = style.figure(9.2, 3.7)
        _vectors(figure.add_axes((0.01, 0.45, 0.2, 0.30)), (1.2, 1.05), "they agree: both are followed", agree=True)
        below = figure.add_axes((0.01, 0.02, 0.2, 0.30))
        _vectors(below, (-0.75, 1.05), "they conflict: VR's is left out", agree=False)
        axes = figure.add_axes((0.3, 0.14, 0.43, 0.68))
        axes.axhline(0, color=style.FAINT, linewidth=0.8)
        drawn = {}
        for number, (name, points) in enumerate(curves().items()):
            shape = style.look(number)
            x, y = zip(*points, strict=True)
            [drawn[name]] = axes.plot(
                x, y, color=shape.color, linestyle=shape.dashes, marker=shape.marker, markersize=5.5, clip_on=False
            )
        axes.set(xlabel="weight of VR's loss, \N{GREEK SMALL LETTER LAMDA}", ylabel="PSNR minus IP alone (dB)")
        axes.set_xscale("log")
        axes.set_xticks([1e-3, 1e-2, 1e-1, 1.0], ["0.001", "0.01", "0.1", "1"])
        axes.minorticks_off()
        axes.grid(color=style.FAINT, alpha=0.22, linewidth=0.6)
        style.legend_beside(axes, drawn, characters=26)
        style.title(figure, "What a gate does, and what it kept from harm", "real", left=0.1)
        image = io.BytesIO()
        figure.savefig(image, format="svg", metadata={"Date": None, "Creator": None})
        write_file(path, image.getvalue())


def _vectors(axes: Any, aux: tuple[float, float], caption: str, *, agree: bool) -> None:
    """IP's gradient, VR's, and the one that IP's parameters are stepped with."""
    main = np.array([1.6, 0.0])
    total = main + np.array(aux) if agree else main

    def arrow(start: Any, end: Any, color: str, text: str, place: tuple[float, float], width: float = 1.6) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0})
        axes.text(*place, text, color=color, fontsize=8)

    arrow((0, 0), main, style.OPEN, "IP", (1.66, -0.08))
    arrow((0, 0), aux, style.CLOSED, "VR", (aux[0] - 0.05, aux[1] + 0.08))
    # Below IP's where it is the same, so that both are seen.
    down = np.array([0.0, 0.0 if agree else -0.07])
    arrow(down, total + down, style.INK, "step", (total[0] + 0.06, 1.11 if agree else -0.42), 2.6)
    axes.set(xlim=(-1.0, 3.4), ylim=(-0.5, 1.5), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(caption, fontsize=8.5, loc="left")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "why.svg")
