"""Denoising of chest CT with a diagnosis as the auxiliary."""

from dataclasses import replace

from train.recipes.base import RECIPES, Recipe
from train.recipes.common import CAPPED, CAPPED_SOFT, FROZEN, GRADPROM, IP_ONLY, JOINT, LAMBDAS, QUICK_CT, SOFT, fixed


@RECIPES.register("covidct-denoise")
def covidct_denoise() -> Recipe:
    return Recipe(
        title="COVID-CT, denoising at sigma 0.1, diagnosis as the auxiliary",
        question="Does the gradient of a diagnosis make a denoiser better, and does the gate keep it from harm?",
        settings={"dataset": "covidct", "task": "denoise", "sigma": 0.1, "aux": "dia"},
        quick=QUICK_CT,
        arms=(
            IP_ONLY,
            JOINT,
            FROZEN,
            GRADPROM,
            SOFT,
            fixed(GRADPROM),
            replace(fixed(CAPPED), paper_only=True),
            fixed(CAPPED_SOFT),
        ),
        seeds=(0, 1, 2, 3, 4),
        tuning=LAMBDAS,
    )
