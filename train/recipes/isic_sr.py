"""Super-resolution of skin images."""

from train.recipes.base import RECIPES, Condition, Recipe
from train.recipes.common import FROZEN, GRADPROM, IP_ONLY, JOINT, LAMBDAS, QUICK_SEG, SOFT, fixed


@RECIPES.register("isic-sr")
def isic_sr() -> Recipe:
    return Recipe(
        title="ISIC 2018, super-resolution x2 and x4, segmentation as the auxiliary",
        question="Does a segmentation of the lesion help to enlarge skin images?",
        settings={"dataset": "isic2018", "channels": 3, "aux": "seg"},
        quick=QUICK_SEG,
        conditions=(Condition("x2", {"task": "sr2"}), Condition("x4", {"task": "sr4"})),
        arms=(IP_ONLY, JOINT, FROZEN, GRADPROM, SOFT, fixed(GRADPROM)),
        tuning=LAMBDAS,
    )
