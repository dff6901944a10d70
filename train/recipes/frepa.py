"""What VR begins with: nothing, or a pre-training that had no labels.

What the frozen encoders hold (ring correlation per frequency, linear probe, frozen segmentation) is asked by one
command for each data set, on COVID-CT over the same cached weights; on ISIC the recipe pre-trains segmentation
networks, and the command judges diagnosis networks:

    python -m train.probe --masked-steps 160 --masked-seed 0 --dataset covidct
    python -m train.probe --masked-steps 160 --masked-seed 0 --dataset isic2018 --channels 3
"""

from train.recipes.base import RECIPES, Arm, Condition, Recipe
from train.recipes.common import ALONG, IP_ONLY, ISIC, QUICK_CT


def _arm(start: str) -> Arm:
    return Arm(start, {"strategy": "gradprom", **ALONG, "vr_start": start})


@RECIPES.register("frepa")
def frepa() -> Recipe:
    return Recipe(
        title="Denoising at sigma 0.1 with GradProm, VR pre-trained without labels: Frepa, MAE, MFM, or not at all",
        question="Does a VR that has kept high frequencies conflict less often with denoising?",
        settings={"task": "denoise", "sigma": 0.1, "masked_seed": 0, "aux_weight": (1e-2,)},
        quick={**QUICK_CT, "clean_epochs": 3, "masked_steps": 160},
        conditions=(
            Condition("COVID-CT, diagnosis", {"dataset": "covidct", "aux": "dia"}),
            Condition("ISIC, segmentation", {**ISIC, "aux": "seg"}),
        ),
        arms=(IP_ONLY, *map(_arm, ("fresh", "mae", "mfm", "frepa"))),
        against=("ip-only", "fresh"),
    )
