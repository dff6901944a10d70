"""Denoising of echocardiograms."""

from train.recipes.base import RECIPES, Condition, Recipe
from train.recipes.common import FROZEN, GRADPROM, IP_ONLY, JOINT, LAMBDAS, QUICK_SEG, SOFT, fixed


@RECIPES.register("camus-denoise")
def camus_denoise() -> Recipe:
    return Recipe(
        title="CAMUS, denoising, segmentation of the heart as the auxiliary",
        question="Does a segmentation of ventricle, muscle and atrium help to denoise ultrasound images?",
        settings={"dataset": "camus", "task": "denoise", "aux": "seg"},
        quick=QUICK_SEG,
        conditions=(Condition("sigma 0.1", {"sigma": 0.1}), Condition("sigma 0.2", {"sigma": 0.2}, paper_only=True)),
        arms=(IP_ONLY, JOINT, FROZEN, GRADPROM, SOFT, fixed(GRADPROM)),
        tuning=LAMBDAS,
    )
