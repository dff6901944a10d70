"""Every gate of the package on one task."""

from train.recipes.base import RECIPES, Arm, Recipe
from train.recipes.common import FIXED, IP_ONLY, QUICK_SEG, SLOW

_SEG = {"dataset": "isic2018", "channels": 3, "task": "denoise", "sigma": 0.2, "aux": "seg"}


@RECIPES.register("gates")
def gates() -> Recipe:
    def arm(name: str, strategy: str, **more: object) -> Arm:
        return Arm(name, {"strategy": strategy, **FIXED, **more})

    return Recipe(
        title="ISIC 2018, denoising at sigma 0.2, fixed segmentation, all gates at one lambda",
        question="Which gate keeps most of what a fixed segmentation network teaches, at the least cost in PSNR?",
        settings={**_SEG, "aux_weight": (1e-2,)},
        quick=QUICK_SEG,
        arms=(
            IP_ONLY,
            Arm("frozen", {"strategy": "frozen", "vr_start": "clean"}),
            arm("hard", "gradprom"),
            arm("hard above 0.05", "gradprom", threshold=0.05),
            arm("hard per tensor", "gradprom", granularity="tensor"),
            arm("soft", "gradprom-soft"),
            arm("capped", "gradprom-capped"),
            arm("capped soft", "gradprom-capped-soft"),
            arm("project", "gradprom", gate="project"),
            arm("pcgrad", "pcgrad"),
            arm("gradvac", "gradvac"),
            arm("mgda", "mgda"),
            Arm("capped (slow VR)", {"strategy": "gradprom-capped", **SLOW}),
        ),
        seeds=(0, 1),
        against=("ip-only", "frozen"),
    )
