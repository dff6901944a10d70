"""Super-resolution of k-space, with and without undersampling: what a reconstruction prior is worth."""

from train.recipes.base import RECIPES, Arm, Condition, Overrides, Recipe
from train.recipes.common import SHARED_VRS

ICONET = {"strategy": "ip-only", "ip": "iconet", "ip.loss": "mse"}
PLAIN = "iconet without fusion"
QUICK: Overrides = {
    **SHARED_VRS,
    "crop": 128,
    "batch_size": 4,
    "ip.blocks": 4,
    "ip.features": 16,
    "epochs": 1000,
    "max_steps": 200,
}
"""Every IP begins with random weights: networks are compared here."""


@RECIPES.register("iconet")
def iconet() -> Recipe:
    """All arms have the mean squared error and take the same number of steps, on whole images: what undersampling does
    to a crop is not what it does to an image. In preset quick, where they have as many blocks of one width, an ICONet
    has more parameters than the SR-ResNet (53,474 and 30,471) and a step takes three times as long; without its fusion
    it has 47,074, so that what the prior is worth is asked of two networks that are nearly alike."""
    return Recipe(
        title="COVID-CT as magnitude images, x2 from the middle of k-space, all of it measured or a quarter",
        question="Does the prior of a reconstruction help where there is aliasing, and not where there is none?",
        settings={"dataset": "covidct", "reader": False},
        quick=QUICK,
        conditions=(Condition("kspace2", {"task": "kspace2"}), Condition("joint2", {"task": "joint2"})),
        arms=(
            Arm("srresnet", {"strategy": "ip-only", "ip": "srresnet"}),
            Arm("iconet", ICONET),
            Arm(PLAIN, {**ICONET, "ip.fusion": False}),
            Arm("iconet gated prior", {**ICONET, "ip_aux": "rec"}),
        ),
        against=("srresnet", PLAIN),
    )
