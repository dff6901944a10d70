"""What a person reads about a run: before it begins, and the metrics and the table when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from train.data.base import ImageData
from train.evaluation.evaluate import READER, Evaluation
from train.evaluation.metrics import PSNR_CAP, majority_share
from train.evaluation.scores import REFERENCE_FREE, Score
from train.outputs.remedies import remedies_of, title_key
from train.strategies import Strategy
from train.strategies.auxiliary import AUXILIARIES
from train.strategies.base import PSNR
from train.text import printable

if TYPE_CHECKING:
    from rich.console import Group

Metrics = dict[str, Any]


def count_parameters(network: nn.Module | None) -> int | None:
    """How many numbers a network learns."""
    return None if network is None else sum(parameter.numel() for parameter in network.parameters())


def introduction(data: ImageData, strategy: Strategy, names: Mapping[str, str], training: str, folder: Path) -> str:
    """What is about to happen, and to which data.

    :param names: of the networks, with what a person wants to know of their options, by the keys of their roles.
    :param training: the course of the training in words.
    """
    source = f"real {data.title}" if data.source == "real" else f"PHANTOM (generated) images instead of {data.name}"
    size = "various sizes" if data.size is None else f"{data.size[0]} x {data.size[1]} px"
    networks = ", ".join(
        f"{role.key.upper()} {names[role.key]} ({count_parameters(strategy.networks[role.key]):,} parameters)"
        for role in strategy.roles
    )
    lines = {
        "data": f"{source}, {len(data.train)} training and {len(data.test)} test images of {size}",
        **({} if data.folder is None else {"data folder": str(data.folder)}),
        "networks": networks,
        "training": training,
        "run folder": printable(str(folder)),
    }
    return "\n".join(f"{what}: {line}" for what, line in lines.items())


def collect(
    about: Metrics, data: ImageData, strategy: Strategy, steps: Mapping[str, np.ndarray], evaluation: Evaluation
) -> Metrics:
    """The content of ``metrics.json``, but for where and how fast it was computed.

    PSNR in dB; ``psnr_capped*`` counts the images that reach ``psnr_cap``, ``undefined*`` those that hold NaN. ``None``
    is what the strategy has not got, and the mean of scores of which one is undefined.

    :param about: what the settings say.
    :param steps: columns of the step log.
    """

    def of_all(key: str, what: str) -> Metrics:
        return {
            f"{key}{of}": None if each is None else getattr(each, what) for of, each in evaluation.qualities.items()
        }

    titles = ["accuracy", *(score.key for each in strategy.auxiliaries for score in each.scores)]
    titles += evaluation.scores.get("degraded", {})
    kinds = {"_degraded": "degraded", "": "enhanced", "_clean": "clean"}
    skipped = steps["skipped"][~np.isnan(steps["skipped"])]  # without the steps of a pre-training
    return about | {
        **of_all("psnr", "mean_psnr"),
        "psnr_cap": PSNR_CAP,
        **of_all("psnr_capped", "capped"),
        **of_all("ssim", "mean_ssim"),
        **of_all("undefined", "undefined"),
        "remedy": None,
        **{title_key(name): restored.title for name, restored in evaluation.remedies.items()},
        **{
            f"{title}{of}": evaluation.scores.get(kind, {}).get(title)
            for title in dict.fromkeys(titles)
            for of, kind in kinds.items()
        },
        **evaluation.reference_free,
        "accuracy_majority": majority_share(data.test.labels),
        **_open_shares(strategy, steps),
        "steps": len(skipped),
        "steps_skipped": int(skipped.sum()),
        "n_test": len(data.test),
    }


def _open_shares(strategy: Strategy, steps: Mapping[str, np.ndarray]) -> dict[str, float | None]:
    """How often each gate was open; ``None`` where a strategy has none."""
    columns = [each.name for each in strategy.measures if each.name.split("_")[0] == "gate"] or ["gate"]
    known = {name: steps[name][~np.isnan(steps[name])] if name in steps else np.empty(0) for name in columns}
    return {
        f"gate_open_share{name.removeprefix('gate')}": float((gate > 0).mean()) if len(gate) else None
        for name, gate in known.items()
    }


def finite(metrics: Metrics) -> Metrics:
    """``metrics`` as JSON can hold them: ``None`` where a number is none."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def summary(metrics: Metrics, folder: Path) -> Group:
    """What the run achieved, for a terminal: to be printed with ``soft_wrap=True``, so that nothing is cut off where
    the terminal is narrow. Names are shown as they are, on a console that would read markup in them too.

    :param metrics: of this version or an earlier one.
    """
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    phantom = metrics["data"] == "phantom"
    kind = "validation" if metrics.get("evaluated_on") == "val" else "test"
    title = f"{metrics['run']}: {metrics['n_test']} {kind} images" + (", PHANTOM (generated) data" if phantom else "")
    # Runs of earlier versions had one auxiliary, and a remedy that followed from the task.
    of_before: Metrics = {"remedy": "non-local means" if metrics["sigma"] is not None else "bicubic"}
    metrics = of_before | metrics
    judged = [score for name in metrics.get("aux", ["dia"]) or ["dia"] for score in AUXILIARIES[name].scores]  # type: ignore[attr-defined]
    judged += [
        score._replace(key=READER + score.key, title=f"reader: {score.title}")
        for name in AUXILIARIES
        for score in AUXILIARIES[name].scores  # type: ignore[attr-defined]
        if f"{READER}{score.key}_clean" in metrics
    ]
    judged += [Score(*each) for each in REFERENCE_FREE if f"{each[0]}_degraded" in metrics]
    scores = Table()
    scores.add_column(f"{kind} images")
    for column in ("PSNR (dB)", "SSIM", *(score.title for score in judged)):
        scores.add_column(column, justify="right")
    rows = [("degraded", "_degraded"), *((f"classical: {name}", end) for end, name in remedies_of(metrics).items())]
    if metrics["ip"] is not None:
        rows.append((f"enhanced: {metrics['ip']}", ""))
    if metrics["psnr_degraded"] is not None:
        rows.append(("clean", "_clean"))
    for label, suffix in rows:
        image = (metrics.get(f"psnr{suffix}"), metrics.get(f"ssim{suffix}")) if label != "clean" else (None, None)
        cells = [label, _number(image[0], ".2f"), _number(image[1], ".3f")]
        cells += [_number(metrics.get(f"{score.key}{suffix}"), score.form) for score in judged]
        scores.add_row(*(Text(printable(cell)) for cell in cells))
    scores.width = Console(width=1000).measure(scores).maximum  # its own, whatever the terminal's

    vr = "none (this strategy trains IP alone)"
    if metrics["vr"] is not None:
        vr = (
            f"{metrics['vr']}, {metrics['vr_parameters']:,} parameters "
            f"(always the same answer would be {_number(metrics['accuracy_majority'], '.1%')} right)"
        )
    elif metrics.get("seg") is not None:
        vr = ""
    shares = {name: share for name, share in metrics.items() if name.startswith("gate_open_share")}
    gates = {name.removeprefix("gate_open_share_"): share for name, share in shares.items()}
    opened = ", ".join(
        f"{_number(share, '.1%')}{'' if len(gates) == 1 else f' ({name})'}" for name, share in gates.items()
    )
    skipped = metrics["steps_skipped"]
    facts = {
        "PSNR": _counts(
            metrics, "psnr_capped", f"at most {metrics.get('psnr_cap', 0):.0f} dB of each image count: reached by {{}}"
        ),
        "undefined": _counts(metrics, "undefined", "NaN in {} images, so there is no mean"),
        "data": "PHANTOM: generated images, no patients"
        if phantom
        else f"real {metrics.get('title', metrics['dataset'])}",
        "IP": _network(metrics, "ip") or "none (this strategy trains VR alone)",
        "VR": vr,
        "SEG": _network(metrics, "seg"),
        "critic": _network(metrics, "critic"),
        "gate open": f"{opened} of {metrics['steps']} steps{f'; {skipped} skipped' if skipped else ''}",
        "validation": _validation(metrics),
        "step of IP": "" if metrics["ip"] is None else f"backend {metrics['backend']} on {metrics['device']}",
        "took": f"{metrics['seconds']:.0f} s",
        "run folder": str(folder),
    }
    width = max(map(len, facts))
    lines = [Text(f"{label:<{width}}  {printable(fact)}") for label, fact in facts.items() if fact]
    return Group(Text(printable(title), style="italic"), scores, *lines)


def _network(metrics: Metrics, key: str) -> str:
    return "" if metrics.get(key) is None else f"{metrics[key]}, {metrics[f'{key}_parameters']:,} parameters"


def _validation(metrics: Metrics) -> str:
    """Which epoch was the best, and by how much the last one differs; empty where nobody has looked."""
    if (by := metrics.get("validated_by")) is None:
        return ""
    if metrics["validation_best"] is None:
        return f"no look found a number; the {metrics['selected']} networks are evaluated"
    judged = [score for each in AUXILIARIES for score in AUXILIARIES[each].scores]  # type: ignore[attr-defined]
    scores = {score.key: (score.title, f"{{:{score.form}}}") for score in judged}
    word, form = (PSNR.word, PSNR.form) if by == PSNR.name else scores.get(by, (by, "{:.3f}"))
    best, last = metrics["validation_best"], metrics["validation_last"]
    told = f"best after epoch {metrics['validation_best_epoch']:g}, {word} {form.format(best)}"
    if metrics["validation_last_epoch"] == metrics["validation_best_epoch"]:
        return f"{told}, which is the last"
    behind = "no number" if last is None else f"{form.format(last)}, {form.format(best - last)} less"
    return (
        f"{told}; after the last, {metrics['validation_last_epoch']:g}, {behind}; the {metrics['selected']} networks "
        "are evaluated"
    )


def _counts(metrics: Metrics, name: str, sentence: str) -> str:
    """``sentence`` about how many images of each kind ``name`` counts; empty where it counts none."""
    of = {"_degraded": "degraded", **{end: end[1:] for end in remedies_of(metrics)}, "": "enhanced"}
    counts = {kind: metrics.get(f"{name}{suffix}") or 0 for suffix, kind in of.items()}
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return sentence.format(found) if found else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
