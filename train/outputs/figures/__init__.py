"""The pictures of runs: what networks do to images, what they look at, and what the gate did to the gradients.

Each function takes arrays and writes one PNG file, whole or not at all. Names are data and shown as they are; generated
images are called so (PHANTOM) in every picture. What the pictures have in common is in
:mod:`train.outputs.figures.style`.
"""

from __future__ import annotations

from train.outputs.figures.attention import save_attention
from train.outputs.figures.course import Course, save_course
from train.outputs.figures.gate import save_gate
from train.outputs.figures.panel import save_panel
from train.outputs.figures.spectrum import save_spectrum
from train.outputs.figures.strategies import save_strategies
from train.outputs.figures.tradeoff import Point, save_tradeoff

__all__ = [
    "Course",
    "Point",
    "save_attention",
    "save_course",
    "save_gate",
    "save_panel",
    "save_spectrum",
    "save_strategies",
    "save_tradeoff",
]
