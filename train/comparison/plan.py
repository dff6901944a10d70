"""From a recipe to the runs of a comparison. Imports no PyTorch."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from train.errors import RunError
from train.recipes.base import Arm, Condition, Preset, Recipe
from train.settings import FIELDS, Settings, flag, preset_settings
from train.settings.sections import NETWORKS

TUNING_SEED = 100
"""Of the runs that settings are chosen by; no comparison has it."""


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    :param condition: the condition's name.
    :param arm: the arm's name.
    :param settings: without a folder.
    :param folder: relative to the comparison's.
    :param value: of the setting that is being chosen; ``None`` in a run that is compared.
    """

    condition: str
    arm: str
    settings: Settings
    folder: Path
    value: Any = None

    @property
    def seed(self) -> int:
        return self.settings.training.seed


@dataclass(frozen=True)
class Plan:
    """A comparison before anything is run.

    :param name: of the recipe.
    :param base: settings that were given on the command line, over the recipe's (``--set``, ``--max-steps``).
    """

    name: str
    recipe: Recipe
    preset: Preset
    seeds: tuple[int, ...]
    arms: tuple[Arm, ...]
    conditions: tuple[Condition, ...]
    base: Mapping[str, Any]

    @classmethod
    def made(
        cls,
        name: str,
        recipe: Recipe,
        preset: Preset,
        *,
        seeds: Sequence[int] | None = None,
        arms: Sequence[str] | None = None,
        conditions: Sequence[str] | None = None,
        base: Mapping[str, Any] | None = None,
    ) -> Plan:
        """
        :param seeds: in the place of the recipe's.
        :param arms: names of those that take part; by default all of the preset.
        :param conditions: likewise.
        :raises RunError: an arm or a seed does not fit.
        """
        seeds = tuple(recipe.seeds if seeds is None else seeds)
        if TUNING_SEED in seeds or len(set(seeds)) != len(seeds) or not seeds:
            raise RunError(f"--seeds must be different numbers, and not {TUNING_SEED}, which settings are chosen by")
        plan = cls(
            name,
            recipe,
            preset,
            seeds,
            _chosen(recipe.arms, arms, preset, flag="--strategies", what=f"recipe {name} has no arm"),
            _chosen(recipe.conditions, conditions, preset, flag="--conditions", what=f"recipe {name} has no condition"),
            dict(base or {}),
        )
        plan.jobs({})  # whatever does not fit is said now
        return plan

    def settings(self, condition: Condition, arm: Arm, **more: Any) -> Settings:
        """Of a run of an arm.

        :raises RunError: the settings do not fit each other.
        """
        recipe = self.recipe
        own = recipe.quick if self.preset == "quick" else recipe.paper
        changes = {"reader": True, **recipe.settings, **own, **condition.settings, **arm.settings, **self.base, **more}
        # A network is chosen before its options, whichever of them comes first in the recipe.
        return preset_settings(self.preset).change(changes)

    def trials(self, condition: Condition, arm: Arm) -> list[Job]:
        """The runs by which a setting of an arm is chosen; none where the arm does not read it, or fixes it."""
        tuning = self.recipe.tuning
        if tuning is None or tuning.setting in arm.settings or tuning.setting in self.base:
            return []
        settings = self.settings(condition, arm)
        if tuning.setting not in settings.concerned:
            return []
        jobs = []
        for value in tuning.values:
            trial = settings.change({tuning.setting: value, "seed": TUNING_SEED, "evaluate_on": "val"})
            training = trial.training
            if training.max_steps is not None:
                trial = trial.change({"max_steps": max(1, math.ceil(tuning.share * training.max_steps))})
            else:
                trial = trial.change({"epochs": max(1, math.ceil(tuning.share * training.epochs))})
            jobs.append(
                Job(condition.name, arm.name, trial, self._folder("tuning", condition, f"{arm.name}-{value}"), value)
            )
        return jobs

    def jobs(self, chosen: Mapping[str, Any]) -> list[Job]:
        """The runs that are compared.

        :param chosen: values of the tuned setting by :func:`arm_key`; an arm that is not in it has the recipe's value.
        """
        tuning = self.recipe.tuning
        jobs = []
        for seed in self.seeds:  # all arms of a seed first: what is interrupted can be compared all the same
            for condition in self.conditions:
                for arm in self.arms:
                    key = arm_key(condition.name, arm.name)
                    more = {tuning.setting: chosen[key]} if tuning is not None and key in chosen else {}
                    settings = self.settings(condition, arm, seed=seed, **more)
                    folder = self._folder("runs", condition, f"{arm.name}-s{seed}")
                    jobs.append(Job(condition.name, arm.name, settings, folder))
        return jobs

    @staticmethod
    def _folder(kind: str, condition: Condition, name: str) -> Path:
        return Path(kind, *([safe(condition.name)] if condition.name else []), safe(name))

    def facts(self) -> dict[str, Any]:
        """What a folder of this comparison says about itself: with other ones it is another comparison."""
        return {
            "recipe": self.name,
            "preset": self.preset,
            "base": {name: _plain(value) for name, value in self.base.items()},
        }


Part = TypeVar("Part", Arm, Condition)


def _chosen(
    parts: tuple[Part, ...], names: Sequence[str] | None, preset: Preset, *, flag: str, what: str
) -> tuple[Part, ...]:
    """Those of a recipe's parts that were named, or those of the preset.

    :raises RunError: there is no such part.
    """
    if names is None:
        return tuple(each for each in parts if preset == "paper" or not each.paper_only)
    known = {each.name: each for each in parts}
    for each in names:
        if each not in known:
            raise RunError(unknown(flag, each, known, what=what))
    return tuple(known[each] for each in dict.fromkeys(names))


def arm_key(condition: str, arm: str) -> str:
    """An arm under a condition, as a key of JSON."""
    return f"{condition} / {arm}" if condition else arm


def read_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Settings as ``--set KEY=VALUE`` gives them, each as JSON where it is, else as text.

    :raises RunError: there is no such setting, or it is not for a comparison to set.
    """
    import json

    own = {"seed", "out", "resume", "evaluate_on", "device"}
    changes: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not equals:
            raise RunError(f"--set {text}: write KEY=VALUE, such as --set sigma=0.2")
        if key.split(".")[0] in NETWORKS and "." in key:
            pass  # an option of a network, which the settings check
        elif key not in FIELDS or key.endswith("_options") or key in own:
            known = [each for each in FIELDS if not each.endswith("_options") and each not in own]
            raise RunError(unknown("--set", key, known, what="there is no setting"))
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
        if key == "aux_weight":
            given = changes[key]
            changes[key] = tuple(given) if isinstance(given, list) else (float(given),)
        if key in ("data_root", "ip_weights", "vr_weights"):
            changes[key] = Path(value)
    return changes


def unknown(where: str, name: str, known: Mapping[str, Any] | Sequence[str], *, what: str) -> str:
    """A message about a name that does not exist, with the nearest one that does."""
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"choose from: {', '.join(known)}"
    return f"{where}: {what} {name!r}; {hint}"


def differing(stored: Settings, wanted: Settings) -> list[str]:
    """The settings, as flags, by which a run that is there computes something else than one that is wanted."""
    concerned = stored.concerned | wanted.concerned
    before, after = stored.values, wanted.values
    return [
        flag(name)
        for name, field in FIELDS.items()
        if name in concerned
        and field.metadata["computes"]
        and name not in ("out", "source")
        and before[name] != after[name]
    ]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def safe(name: str) -> str:
    """A name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9.+=_]+", "-", name).strip("-")
