"""What a recipe is: settings, arms and seeds of one comparison. Nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models.registry import Registry

Overrides = Mapping[str, Any]
"""Settings by their names, as :meth:`train.settings.Settings.change` takes them."""

Preset = Literal["quick", "paper"]


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    :param name: in tables, figures and folders.
    :param settings: what makes it differ from the others.
    :param paper_only: whether preset quick leaves it out.
    """

    name: str
    settings: Overrides
    paper_only: bool = False


@dataclass(frozen=True)
class Condition:
    """Under which the arms are compared: every condition is a comparison by itself.

    :param name: in tables and folders; empty where there is one condition only.
    :param settings: what makes it differ from the others.
    :param paper_only: whether preset quick leaves it out.
    """

    name: str = ""
    settings: Overrides = field(default_factory=dict)
    paper_only: bool = False


@dataclass(frozen=True)
class Tuning:
    """How a setting is chosen for every arm that reads it: by validation images, with a seed that no comparison uses.

    :param setting: its name.
    :param values: what is tried; every arm gets the same number of trials.
    :param share: of the training's steps that a trial has.
    """

    setting: str
    values: tuple[Any, ...]
    share: float = 0.5


@dataclass(frozen=True)
class Reported:
    """What the paper reports for an arm.

    :param condition: the condition's name.
    :param arm: the arm's name.
    :param psnr: in dB.
    :param ssim: structural similarity.
    """

    condition: str
    arm: str
    psnr: float
    ssim: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A comparison that anybody can repeat.

    :param title: heads what is written about it.
    :param question: what the comparison is to answer, in a sentence.
    :param settings: of all runs.
    :param quick: further ones of preset quick: minutes on two CPU cores.
    :param paper: further ones of preset paper.
    :param arms: what is compared.
    :param conditions: under which.
    :param seeds: of the runs; the first few are enough for a first look (``--seeds 0``).
    :param tuning: how a setting is chosen for each arm; ``None``: nothing is.
    :param against: the arms that every other one is tested against, where they take part.
    :param curve: the setting along which arms of one strategy form a curve (``lambda``); each such arm is called
        ``STRATEGY @ VALUE``.
    :param reported: what the paper reports.
    """

    title: str
    question: str
    settings: Overrides
    arms: tuple[Arm, ...]
    quick: Overrides = field(default_factory=dict)
    paper: Overrides = field(default_factory=dict)
    conditions: tuple[Condition, ...] = (Condition(),)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning: Tuning | None = None
    against: tuple[str, ...] = ("ip-only", "frozen", "joint")
    curve: bool = False
    reported: tuple[Reported, ...] = field(default=())

    def __post_init__(self) -> None:
        for what, names in (("arm", [e.name for e in self.arms]), ("condition", [e.name for e in self.conditions])):
            if len(set(names)) != len(names):
                raise ValueError(f"{self.title}: an {what} is named twice")
        if commas := [each.name for each in self.arms if "," in each.name]:
            raise ValueError(f"{self.title}: a comma separates arms on the command line, and {commas[0]!r} has one")


RECIPES: Registry[Recipe] = Registry("recipe")
