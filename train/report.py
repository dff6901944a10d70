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
            f"run folder: {folder}",
        )
    )


def collect(engine: Engine, evaluation: Evaluation) -> Metrics:
    """The content of ``metrics.json``. PSNR in dB; ``None`` is what the strategy has not got, and an infinite PSNR."""
    config, data = engine.config, engine.data
    ip, vr = engine.networks
    steps = engine.table.columns()
    gate = steps["gate"][~np.isnan(steps["gate"])]
    skipped = steps["skipped"][~np.isnan(steps["skipped"])]  # without the steps of a pre-training
    accuracies = evaluation.accuracies or {}
    metrics = {
        "run": run_name(config, data),
        "data": data.source,
        "dataset": config.dataset,
        "task": config.task,
        "sigma": noise_level(engine.degrade),
        "strategy": config.strategy,
        "seed": config.seed,
        "preset": config.preset,
        "psnr_degraded": evaluation.quality_degraded.mean_psnr,
        "psnr_classical": evaluation.quality_classical.mean_psnr,
        "psnr": evaluation.quality_enhanced.mean_psnr,
        "ssim_degraded": evaluation.quality_degraded.mean_ssim,
        "ssim_classical": evaluation.quality_classical.mean_ssim,
        "ssim": evaluation.quality_enhanced.mean_ssim,
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
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in metrics.items()}


def majority_share(labels: np.ndarray | None) -> float | None:
    """How often the commonest class is right: what a diagnosis that ignores the image achieves."""
    return None if labels is None else float(np.bincount(labels).max() / len(labels))


def summary(metrics: Metrics, folder: Path) -> Group:
    """What the run achieved, as a table for a terminal."""
    from rich.console import Group
    from rich.table import Table

    phantom = metrics["data"] == "phantom"
    title = f"{metrics['run']}: {metrics['n_test']} test images" + (", PHANTOM (generated) data" if phantom else "")
    scores = Table(title=title, title_justify="left")
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
        scores.add_row(label, _number(psnr, ".2f"), _number(ssim, ".3f"), _number(accuracy, ".1%"))

    facts = Table.grid(padding=(0, 2))
    vr = "none (this strategy trains IP alone)"
    if metrics["vr"] is not None:
        vr = (
            f"{metrics['vr']}, {metrics['vr_parameters']:,} parameters "
            f"(always the same answer would be {metrics['accuracy_majority']:.1%} right)"
        )
    gate = _number(metrics["gate_open_share"], ".1%")
    for label, fact in (
        ("data", "PHANTOM: generated images, no patients" if phantom else f"real {metrics['dataset']}"),
        ("IP", f"{metrics['ip']}, {metrics['ip_parameters']:,} parameters"),
        ("VR", vr),
        (
            "gate open",
            f"{gate} of {metrics['steps']} steps" + (f"; {n} skipped" if (n := metrics["steps_skipped"]) else ""),
        ),
        ("step of IP", f"backend {metrics['backend']} on {metrics['device']}"),
        ("took", f"{metrics['seconds']:.0f} s"),
        ("run folder", str(folder)),
    ):
        facts.add_row(label, fact)
    return Group(scores, facts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
