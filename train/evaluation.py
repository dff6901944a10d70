"""What a trained run achieves on the test images, whose degradation is the same for every run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.data.base import Subset
from train.data.cache import ArrayCache
from train.degradations import Degradation, fixed_seeds
from train.metrics import Quality, accuracy, classical_quality, image_quality, restore_classical

BATCH = 16  # images at once: bounds the memory of IP's feature maps


@dataclass(frozen=True)
class Evaluation:
    """Images ``float32 [N, C, H, W]`` on the CPU, and what they are worth.

    :param degraded: what IP was given; enlarged bicubically where it was smaller than ``clean``.
    :param classical: quality of non-local means (denoising) or bicubic interpolation (super-resolution).
    :param accuracies: of the diagnosis on the ``clean``, ``degraded`` and ``enhanced`` images; ``None`` without VR.
    """

    clean: Tensor
    degraded: Tensor
    enhanced: Tensor
    quality_degraded: Quality
    quality_enhanced: Quality
    quality_classical: Quality
    accuracies: dict[str, float] | None


@torch.no_grad()
def evaluate(
    ip: nn.Module,
    vr: nn.Module | None,
    subset: Subset,
    degrade: Degradation,
    *,
    device: torch.device,
    cache: ArrayCache | None = None,
) -> Evaluation:
    """Scores IP and VR on all images of ``subset``; enhanced images are clamped to [0, 1], as they would be shown.

    :param cache: keeps the scores of the classical method for the next run.
    """
    clean = subset.tensor()
    given = degrade(clean, fixed_seeds(degrade, subset.names))
    enhanced = _apply(ip, given, device).clamp(0, 1)
    degraded = given if degrade.scale == 1 else restore_classical(given, scale=degrade.scale)
    accuracies = None
    if vr is not None:
        labels = torch.tensor(subset.labels)
        images = {"clean": clean, "degraded": degraded, "enhanced": enhanced}
        accuracies = {name: accuracy(_apply(vr, each, device), labels) for name, each in images.items()}
    return Evaluation(
        clean=clean,
        degraded=degraded,
        enhanced=enhanced,
        quality_degraded=image_quality(degraded, clean),
        quality_enhanced=image_quality(enhanced, clean),
        quality_classical=classical_quality(given, clean, sigma=noise_level(degrade), cache=cache),
        accuracies=accuracies,
    )


def noise_level(degrade: Degradation) -> float | None:
    """Sigma of a degradation that has one: non-local means is told it, as IP has learned it."""
    return getattr(degrade, "sigma", None)


def _apply(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    network.eval()
    parts = [network(part.to(device, memory_format=torch.channels_last)).cpu() for part in images.split(BATCH)]
    return torch.cat(parts).contiguous()
