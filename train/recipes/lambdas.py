"""The weight of the auxiliary loss over four orders of magnitude."""

from train.recipes.base import RECIPES, Arm, Recipe
from train.recipes.common import FIXED, IP_ONLY, QUICK_SEG

VALUES = (1e-3, 1e-2, 1e-1, 1.0)


@RECIPES.register("lambda")
def lambdas() -> Recipe:
    swept = {
        "joint": {"strategy": "joint", "vr_update": "train"},
        "frozen": {"strategy": "frozen", "vr_start": "clean"},
        "gradprom": {"strategy": "gradprom", **FIXED},
        "soft": {"strategy": "gradprom-soft", **FIXED},
    }
    sweep = tuple(
        Arm(f"{name} @ {value:g}", {**settings, "aux_weight": (value,)})
        for name, settings in swept.items()
        for value in VALUES
    )
    kappas = tuple(
        Arm(f"{name} @ kappa {kappa:g}", {"strategy": strategy, **FIXED, "aux_cap": kappa})
        for name, strategy in (("capped", "gradprom-capped"), ("capped soft", "gradprom-capped-soft"))
        for kappa in (0.3, 1.0, 3.0)
    )
    return Recipe(
        title="ISIC 2018, denoising at sigma 0.2, segmentation as the auxiliary: lambda and kappa",
        question="Does a gate keep IP from harm where joint training and a fixed VR cost PSNR, and which gate does?",
        settings={"dataset": "isic2018", "channels": 3, "task": "denoise", "sigma": 0.2, "aux": "seg"},
        quick=QUICK_SEG,
        arms=(IP_ONLY, *sweep, *kappas),
        seeds=(0, 1),
        against=("ip-only",),
        curve=True,
    )
