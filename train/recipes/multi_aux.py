"""One auxiliary or two, each with a gate of its own."""

from train.recipes.base import RECIPES, Arm, Recipe
from train.recipes.common import FIXED, GRADPROM, IP_ONLY, QUICK_SEG


@RECIPES.register("multi-aux")
def multi_aux() -> Recipe:
    capped = {"strategy": "gradprom-capped", **FIXED}
    hard = {**GRADPROM.settings, **FIXED, "aux_weight": (1e-2,)}
    return Recipe(
        title="ISIC 2018, denoising at sigma 0.2 with a diagnosis, a segmentation, or both",
        question="Do two auxiliaries with a gate each help more than one?",
        settings={"dataset": "isic2018", "channels": 3, "task": "denoise", "sigma": 0.2, "aux": "dia,seg"},
        quick=QUICK_SEG,
        arms=(
            IP_ONLY,
            Arm("joint dia+seg", {"strategy": "joint", **FIXED, "aux_weight": (1e-2,)}),
            Arm("gradprom dia", {**hard, "aux": "dia"}),
            Arm("gradprom seg", {**hard, "aux": "seg"}),
            Arm("gradprom dia+seg", hard),
            Arm("capped dia", {**capped, "aux": "dia"}),
            Arm("capped seg", {**capped, "aux": "seg"}),
            Arm("capped dia+seg", capped),
        ),
        against=("ip-only", "joint dia+seg", "gradprom seg", "capped seg"),
    )
