"""What a run leaves behind when it ends: metrics, weights, and the table a person reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from train.config import RunConfig, RunError
from train.data.base import ImageData
from train.data.cache import atomic_file
from train.evaluation import Evaluation
from train.steps import StepTable

if TYPE_CHECKING:
    from rich.console import Group

Metrics = dict[str, Any]


def parameters(network: nn.Module | None) -> int | None:
    """How many numbers a network learns."""
    return None if network is None else sum(parameter.numel() for parameter in network.parameters())


def run_name(config: RunConfig, data: ImageData) -> str:
    """``DATASET-TASK-STRATEGY-sSEED``, with ``-PHANTOM`` where the images are generated."""
    name = f"{config.dataset}-{config.task}-{config.strategy}-s{config.seed}"
    return name if data.source == "real" else f"{name}-PHANTOM"


def collect(
    config: RunConfig,
    data: ImageData,
    evaluation: Evaluation,
    table: StepTable,
    *,
    ip: nn.Module,
    vr: nn.Module | None,
    backend: str,
    device: str,
    seconds: float,
) -> Metrics:
    """The content of ``metrics.json``. PSNR in dB; ``None`` is what the strategy has not got, and an infinite PSNR.

    :param seconds: what the run took, all its parts together.
    """
    gate = table.column("gate")
    skipped = table.column("skipped")
    accuracies = evaluation.accuracies or {}
    majority = None if data.test.labels is None else max((data.test.labels == k).mean() for k in range(data.num_classes))
    metrics = {
        "run": run_name(config, data),
        "data": data.source,
        "dataset": config.dataset,
        "task": config.task,
        "sigma": config.sigma if config.task == "denoise" else None,
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
        "accuracy_majority": None if majority is None else float(majority),
        "gate_open_share": sum(weight > 0 for weight in gate) / len(gate) if gate else None,
        "steps": len(skipped),
        "steps_skipped": int(sum(skipped)),
        "n_test": len(data.test),
        "ip": config.ip,
        "ip_parameters": parameters(ip),
        "vr": None if vr is None else config.vr,
        "vr_parameters": parameters(vr),
        "backend": backend,
        "device": device,
        "seconds": round(seconds, 1),
    }
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in metrics.items()}


def write_metrics(folder: Path, metrics: Metrics) -> None:
    """Writes ``metrics.json``; its presence says that the run is finished."""
    write_file(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())


def write_weights(folder: Path, config: RunConfig, ip: nn.Module, vr: nn.Module | None) -> None:
    """Writes ``weights.safetensors``: tensors ``ip.*`` and ``vr.*``, the settings as JSON in the metadata."""
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()  # channels_last weights are not contiguous
        for name, network in (("ip", ip), ("vr", vr))
        if network is not None
        for key, value in network.state_dict().items()
    }
    write_file(folder / "weights.safetensors", save(tensors, {"config": json.dumps(config.to_json())}))


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    :raises RunError: it cannot be written; the message names it.
    """
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error


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
        vr = f"{metrics['vr']}, {metrics['vr_parameters']:,} parameters; always the same answer: {metrics['accuracy_majority']:.1%} right"
    gate = _number(metrics["gate_open_share"], ".1%")
    for label, fact in (
        ("data", "PHANTOM: generated images, no patients" if phantom else f"real {metrics['dataset']}"),
        ("IP", f"{metrics['ip']}, {metrics['ip_parameters']:,} parameters"),
        ("VR", vr),
        ("gate open", f"{gate} of {metrics['steps']} steps" + (f"; {n} skipped" if (n := metrics["steps_skipped"]) else "")),
        ("step of IP", f"backend {metrics['backend']} on {metrics['device']}"),
        ("took", f"{metrics['seconds']:.0f} s"),
        ("run folder", str(folder)),
    ):
        facts.add_row(label, fact)
    return Group(scores, facts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
