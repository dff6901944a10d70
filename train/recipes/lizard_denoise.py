"""Denoising of colon tissue."""

from train.recipes.base import RECIPES, Condition, Recipe
from train.recipes.common import FROZEN, GRADPROM, IP_ONLY, JOINT, LAMBDAS, QUICK_SEG, SOFT, fixed


@RECIPES.register("lizard-denoise")
def lizard_denoise() -> Recipe:
    return Recipe(
        title="Lizard, denoising, segmentation of nuclei as the auxiliary",
        question="Does a segmentation of the nuclei help to denoise microscope images?",
        settings={"dataset": "lizard", "channels": 3, "task": "denoise", "aux": "seg"},
        quick=QUICK_SEG,
        conditions=(Condition("sigma 0.1", {"sigma": 0.1}), Condition("sigma 0.2", {"sigma": 0.2}, paper_only=True)),
        arms=(IP_ONLY, JOINT, FROZEN, GRADPROM, SOFT, fixed(GRADPROM)),
        tuning=LAMBDAS,
    )
