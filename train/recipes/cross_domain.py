"""Trained on skin, tested on colon tissue."""

from train.recipes.base import RECIPES, Condition, Recipe
from train.recipes.common import FROZEN, GRADPROM, IP_ONLY, JOINT, LAMBDAS, QUICK_SEG, SOFT, fixed


@RECIPES.register("cross-domain")
def cross_domain() -> Recipe:
    return Recipe(
        title="Trained on ISIC 2018, tested on Lizard, denoising, segmentation of the lesion as the auxiliary",
        question="Does what an auxiliary has taught a denoiser hold on images of another kind?",
        settings={
            "dataset": "isic2018",
            "channels": 3,
            "task": "denoise",
            "aux": "seg",
            "test_dataset": "lizard",
        },
        quick=QUICK_SEG,
        conditions=(Condition("sigma 0.1", {"sigma": 0.1}), Condition("sigma 0.2", {"sigma": 0.2})),
        arms=(IP_ONLY, JOINT, FROZEN, GRADPROM, SOFT, fixed(GRADPROM)),
        tuning=LAMBDAS,
    )
