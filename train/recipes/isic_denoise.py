"""Denoising of skin images: every noise level, task and kind of loss of the paper's first table."""

from train.recipes.base import RECIPES, Arm, Condition, Recipe, Reported
from train.recipes.common import (
    CAPPED,
    CAPPED_SOFT,
    FROZEN,
    GRADPROM,
    IP_ONLY,
    ISIC,
    JOINT,
    LAMBDAS,
    QUICK_SEG,
    SOFT,
    fixed,
)

SIGMAS = (0.1, 0.2, 0.3)


def _condition(sigma: float, aux: str, loss: str) -> Condition:
    # Preset quick has one noise level and one task: those at which a fixed VR was seen to help in pilot runs.
    # Without labels VR cannot learn its task from the enhanced images, so that one which learns along knows it already.
    start = {"vr_start": "clean"} if loss == "unsupervised" else {}
    return Condition(
        f"sigma {sigma}, {aux}, {loss}",
        {"sigma": sigma, "aux": aux, "vr_loss": loss, **start},
        paper_only=(sigma, aux) != (0.2, "seg"),
    )


@RECIPES.register("isic-denoise")
def isic_denoise() -> Recipe:
    gates: tuple[Arm, ...] = (GRADPROM, SOFT, CAPPED, CAPPED_SOFT)
    return Recipe(
        title="ISIC 2018, denoising",
        question="Does a segmentation or a diagnosis of the lesion, with labels or without, help to denoise skin?",
        settings={**ISIC, "task": "denoise"},
        quick=QUICK_SEG,
        conditions=tuple(
            _condition(sigma, aux, loss)
            for sigma in SIGMAS
            for aux in ("seg", "dia")
            for loss in ("supervised", "unsupervised")
        ),
        arms=(IP_ONLY, JOINT, FROZEN, *gates, *map(fixed, gates)),
        tuning=LAMBDAS,
        reported=(
            # arXiv:2501.01114 at sigma 0.1; which task and loss these figures belong to is not stated.
            Reported("sigma 0.1, seg, supervised", "frozen", 32.152, 0.906),
            Reported("sigma 0.1, seg, supervised", "gradprom", 33.383, 0.915),
        ),
    )
