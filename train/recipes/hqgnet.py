"""HQG-Net: uneven light, undone without pairs."""

from train.recipes.base import RECIPES, Arm, Overrides, Recipe
from train.recipes.common import ISIC, SHARED_VRS

HQG: Overrides = {"strategy": "hqg", "ip": "hqgnet", "lr": 5e-4, "critic_lr": 1e-3, "r1_weight": 0.1}
"""The rates with which a pilot run evened the light of small images; with four times IP's it swung to and fro."""

PAIRED = Arm(
    "paired SR-ResNet", {"strategy": "ip-only", "ip": "srresnet", "ip.blocks": 16, "ip.features": 32, "lr": 5e-4}
)
"""Its rate is that of the others: with four times as much 16 blocks without normalization diverge."""

ARMS = (
    Arm("hqg", HQG),
    Arm("hqg always", {**HQG, "gate": "always"}),
    Arm("hqg never", {**HQG, "gate": "never"}),
    Arm("hqg without a cue", {**HQG, "ip.guided": False}),
    PAIRED,
)
"""The last one has all pairs, costs about as much per step, and is the ceiling; the others have none. Without a cue,
the guide does not reach the enhancer: the critic alone knows what images of high quality look like."""

UNROLLED = Arm("hqg unrolled", {**HQG, "gate": "always", "hyper": "unrolled"})
"""The ablation of the first-order scheme: where the auxiliary is signal, and takes no other part."""

AGAINST = ("hqg never", "hqg without a cue", "paired SR-ResNet")

QUICK: Overrides = {**SHARED_VRS, "size": 64, "crop": 64, "batch_size": 4, "epochs": 1000, "max_steps": 400}


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
        quick={**QUICK, "clean_epochs": 3, "max_steps": 250},
        arms=(*ARMS, UNROLLED),
        against=AGAINST,
    )
