"""HQG-Net: uneven light, undone without pairs."""

from train.recipes.base import RECIPES, Arm, Overrides, Recipe
from train.recipes.common import ISIC, SHARED_VRS

HQG: Overrides = {"strategy": "hqg", "ip": "hqgnet"}

ARMS = (
    Arm("paired SR-ResNet", {"strategy": "ip-only", "ip": "srresnet", "ip.blocks": 4, "ip.features": 16}),
    Arm("hqg", HQG),
    Arm("hqg always", {**HQG, "gate": "always"}),
    Arm("hqg never", {**HQG, "gate": "never"}),
    Arm("hqg without a cue", {**HQG, "ip.guided": False}),
)
"""The first one has all pairs, and is the ceiling; the others have none. In the last one the guide does not reach the
enhancer: the critic alone knows what images of high quality look like."""

AGAINST = ("hqg never", "hqg without a cue", "paired SR-ResNet")

QUICK: Overrides = {**SHARED_VRS, "crop": 64, "batch_size": 8, "epochs": 1000, "max_steps": 200, "lr": 5e-4}


@RECIPES.register("hqgnet")
def hqgnet() -> Recipe:
    return Recipe(
        title="COVID-CT, uneven light, HQG-Net without pairs, diagnosis as the auxiliary",
        question="Can light be evened without pairs, is the cue of high quality used, and does a diagnosis help?",
        settings={"dataset": "covidct", "task": "illumination", "aux": "dia", "reference_free": True},
        quick=QUICK,
        arms=ARMS,
        against=AGAINST,
    )


@RECIPES.register("hqgnet-isic")
def hqgnet_isic() -> Recipe:
    return Recipe(
        title="ISIC 2018, uneven light, HQG-Net without pairs, segmentation of the lesion as the auxiliary",
        question="Can light be evened without pairs, is the cue of high quality used, and does a segmentation help?",
        settings={**ISIC, "task": "illumination", "aux": "seg", "reference_free": True},
        quick={**QUICK, "clean_epochs": 3},
        arms=ARMS,
        against=AGAINST,
    )
