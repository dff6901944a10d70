"""Diagnosis networks of 18, 50 and 101 layers."""

from train.recipes.base import RECIPES, Condition, Recipe, Reported
from train.recipes.common import FROZEN, GRADPROM, IP_ONLY, QUICK_SEG, fixed


@RECIPES.register("vr-depth")
def vr_depth() -> Recipe:
    # arXiv:2501.01114, ISIC 2018, ResNet-101: ESTR and GradProm at sigma 0.1 (sigma 0.2 and 0.3: 25.925 and 20.163
    # against 28.024 and 23.703).
    return Recipe(
        title="ISIC 2018, denoising at sigma 0.1 with diagnosis networks of three depths",
        question="Does a deeper diagnosis network advise better?",
        settings={
            "dataset": "isic2018",
            "channels": 3,
            "task": "denoise",
            "sigma": 0.1,
            "aux": "dia",
            "aux_weight": (1e-2,),
        },
        quick={**QUICK_SEG, "size": 64, "crop": 64, "max_steps": 100},
        conditions=tuple(
            Condition(f"ResNet-{depth}", {"vr": f"resnet{depth}"}, paper_only=depth == 50) for depth in (18, 50, 101)
        ),
        arms=(IP_ONLY, FROZEN, GRADPROM, fixed(GRADPROM)),
        seeds=(0, 1),
        reported=(Reported("ResNet-101", "frozen", 33.723), Reported("ResNet-101", "gradprom", 36.173)),
    )
