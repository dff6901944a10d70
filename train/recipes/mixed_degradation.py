"""The paper's mixture of blur, Poisson and Gaussian noise."""

from train.recipes.base import RECIPES, Recipe
from train.recipes.common import FROZEN, GRADPROM, IP_ONLY, JOINT, LAMBDAS, QUICK_CT, SOFT, fixed


@RECIPES.register("mixed-degradation")
def mixed_degradation() -> Recipe:
    return Recipe(
        title="COVID-CT, a mixture of blur, Poisson noise and Gaussian noise, diagnosis as the auxiliary",
        question="Does the gate hold where the degradation is not one kind of noise?",
        settings={"dataset": "covidct", "task": "mixture", "aux": "dia"},
        quick=QUICK_CT,
        arms=(IP_ONLY, JOINT, FROZEN, GRADPROM, SOFT, fixed(GRADPROM)),
        tuning=LAMBDAS,
    )
