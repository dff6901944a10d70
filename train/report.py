"""What a run leaves behind when it ends: metrics, weights, and the table a person reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from train.config import RunConfig
from train.data import ImageData
from train.engine import Engine
from train.evaluation import Evaluation, noise_level
from train.metrics import PSNR_CAP
from train.text import printable

if TYPE_CHECKING:
    from rich.console import Group

Metrics = dict[str, Any]


def count_parameters(network: nn.Module | None) -> int | None:
    """How many numbers a network learns."""
    return None if network is None else sum(parameter.numel() for parameter in network.parameters())


def run_name(config: RunConfig, data: ImageData) -> str:
    """``DATASET-TASK-STRATEGY-sSEED``, with ``-PHANTOM`` where the images are generated."""
    name = f"{config.dataset}-{config.task}-{config.strategy}-s{config.seed}"
    return name if data.source == "real" else f"{name}-PHANTOM"


def introduction(engine: Engine, folder: Path) -> str:
    """What is about to happen, and to which data."""
    config, data = engine.config, engine.data
    ip, vr = engine.networks
    source = f"real {data.name}" if data.source == "real" else f"PHANTOM (generated) images instead of {data.name}"
    height, width = data.size
    networks = f"IP {config.ip} {config.blocks} x {config.features} ({count_parameters(ip):,} parameters)"
    if vr is not None:
        networks += f", VR {config.vr} ({count_parameters(vr):,} parameters)"
    return "\n".join(
        (
            f"data: {source}, {len(data.train)} training and {len(data.test)} test images of {height} x {width} px",
            *([] if data.folder is None else [f"data folder: {data.folder}"]),
            f"networks: {networks}",
            f"training: strategy {config.strategy}, preset {config.preset}, {engine.steps} steps "
            f"of {config.batch_size} crops of {config.crop} px, on {engine.device.type}",
            f"run folder: {printable(str(folder))}",
        )
    )


def collect(engine: Engine, evaluation: Evaluation) -> Metrics:
    """The content of ``metrics.json``.

    PSNR in dB; ``psnr_capped*`` counts the images that reach ``psnr_cap``, ``undefined*`` those that hold NaN. ``None``
    is what the strategy has not got, and the mean of scores of which one is undefined.
    """
    config, data = engine.config, engine.data
    ip, vr = engine.networks
    steps = engine.table.columns()
    gate = steps["gate"][~np.isnan(steps["gate"])]
    skipped = steps["skipped"][~np.isnan(steps["skipped"])]  # without the steps of a pre-training
    accuracies = evaluation.accuracies or {}
    qualities = {
        "_degraded": evaluation.quality_degraded,
        "_classical": evaluation.quality_classical,
        "": evaluation.quality_enhanced,
    }
    metrics = {
        "run": run_name(config, data),
        "data": data.source,
        "dataset": config.dataset,
        "task": config.task,
        "sigma": noise_level(engine.degrade),
        "strategy": config.strategy,
        "seed": config.seed,
        "preset": config.preset,
        **{f"psnr{of}": quality.mean_psnr for of, quality in qualities.items()},
        "psnr_cap": PSNR_CAP,
        **{f"psnr_capped{of}": quality.capped for of, quality in qualities.items()},
        **{f"ssim{of}": quality.mean_ssim for of, quality in qualities.items()},
        **{f"undefined{of}": quality.undefined for of, quality in qualities.items()},
        "accuracy_degraded": accuracies.get("degraded"),
        "accuracy": accuracies.get("enhanced"),
        "accuracy_clean": accuracies.get("clean"),
        "accuracy_majority": majority_share(data.test.labels),
        "gate_open_share": float((gate > 0).mean()) if len(gate) else None,
        "steps": len(skipped),
        "steps_skipped": int(skipped.sum()),
        "n_test": len(data.test),
        "ip": config.ip,
        "ip_parameters": count_parameters(ip),
        "vr": None if vr is None else config.vr,
        "vr_parameters": count_parameters(vr),
        "backend": engine.strategy.ip.optimizer.backend,
        "device": engine.device.type,
        "seconds": round(engine.seconds, 1),
    }
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def majority_share(labels: np.ndarray | None) -> float | None:
    """How often the commonest class is right: what a diagnosis that ignores the image achieves."""
    return None if labels is None else float(np.bincount(labels).max() / len(labels))


def summary(metrics: Metrics, folder: Path) -> Group:
    """What the run achieved, for a terminal: to be printed with ``soft_wrap=True``, so that nothing is cut off where
    the terminal is narrow. Names are shown as they are, on a console that would read markup in them too.

    :param metrics: of this version or an earlier one.
    """
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    phantom = metrics["data"] == "phantom"
    title = f"{metrics['run']}: {metrics['n_test']} test images" + (", PHANTOM (generated) data" if phantom else "")
    scores = Table()
    scores.add_column("test images")
    for column in ("PSNR (dB)", "SSIM", "diagnosis right"):
        scores.add_column(column, justify="right")
    classical = "non-local means" if metrics["sigma"] is not None else "bicubic"
    for label, suffix, accuracy in (
        ("degraded", "_degraded", metrics["accuracy_degraded"]),
        (f"classical: {classical}", "_classical", None),
        (f"enhanced: {metrics['ip']}", "", metrics["accuracy"]),
        ("clean", None, metrics["accuracy_clean"]),
    ):
        psnr, ssim = (None, None) if suffix is None else (metrics[f"psnr{suffix}"], metrics[f"ssim{suffix}"])
        cells = (label, _number(psnr, ".2f"), _number(ssim, ".3f"), _number(accuracy, ".1%"))
        scores.add_row(*(Text(printable(cell)) for cell in cells))
    scores.width = Console(width=1000).measure(scores).maximum  # its own, whatever the terminal's

    vr = "none (this strategy trains IP alone)"
    if metrics["vr"] is not None:
        vr = (
            f"{metrics['vr']}, {metrics['vr_parameters']:,} parameters "
            f"(always the same answer would be {metrics['accuracy_majority']:.1%} right)"
        )
    gate, skipped = _number(metrics["gate_open_share"], ".1%"), metrics["steps_skipped"]
    facts = {
        "PSNR": _counts(
            metrics, "psnr_capped", f"at most {metrics.get('psnr_cap', 0):.0f} dB of each image count: reached by {{}}"
        ),
        "undefined": _counts(metrics, "undefined", "NaN in {} images, so there is no mean"),
        "data": "PHANTOM: generated images, no patients" if phantom else f"real {metrics['dataset']}",
        "IP": f"{metrics['ip']}, {metrics['ip_parameters']:,} parameters",
        "VR": vr,
        "gate open": f"{gate} of {metrics['steps']} steps{f'; {skipped} skipped' if skipped else ''}",
        "step of IP": f"backend {metrics['backend']} on {metrics['device']}",
        "took": f"{metrics['seconds']:.0f} s",
        "run folder": str(folder),
    }
    width = max(map(len, facts))
    lines = [Text(f"{label:<{width}}  {printable(fact)}") for label, fact in facts.items() if fact]
    return Group(Text(printable(title), style="italic"), scores, *lines)


def _counts(metrics: Metrics, name: str, sentence: str) -> str:
    """``sentence`` about how many images of each kind ``name`` counts; empty where it counts none."""
    of = {"degraded": "_degraded", "classical": "_classical", "enhanced": ""}
    counts = {kind: metrics.get(f"{name}{suffix}", 0) for kind, suffix in of.items()}
    found = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return sentence.format(found) if found else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
