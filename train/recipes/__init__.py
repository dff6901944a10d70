"""The comparisons that anybody can repeat, one readable file each: ``python -m train.compare --list``."""

from train.recipes.base import RECIPES, Arm, Condition, Recipe, Reported, Tuning

from train.recipes import camus_denoise as camus_denoise  # isort: skip  (the files register themselves in the registry)
from train.recipes import covidct_denoise as covidct_denoise  # isort: skip
from train.recipes import cross_domain as cross_domain  # isort: skip
from train.recipes import frepa as frepa  # isort: skip
from train.recipes import gates as gates  # isort: skip
from train.recipes import hqgnet as hqgnet  # isort: skip
from train.recipes import iconet as iconet  # isort: skip
from train.recipes import isic_denoise as isic_denoise  # isort: skip
from train.recipes import isic_sr as isic_sr  # isort: skip
from train.recipes import lambdas as lambdas  # isort: skip
from train.recipes import lizard_denoise as lizard_denoise  # isort: skip
from train.recipes import mixed_degradation as mixed_degradation  # isort: skip
from train.recipes import multi_aux as multi_aux  # isort: skip
from train.recipes import vr_depth as vr_depth  # isort: skip

__all__ = ["RECIPES", "Arm", "Condition", "Recipe", "Reported", "Tuning"]
