"""What a comparison costs, before it is run: the arithmetic of its networks, divided by how fast this machine is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import Any

from train.comparison.plan import Job, Plan
from train.degradations import parse
from train.recipes import RECIPES
from train.recipes.base import Preset
from train.settings import Settings
from train.settings.sections import NETWORKS
from train.strategies.auxiliary import AUXILIARIES
from train.threads import threads_each

# Of a run besides its steps and its evaluation, in seconds: building, figures. Measured on a CPU core with the
# recipes of preset quick.
_BESIDES = 6.0


def listing(preset: Preset, *, at_once: int) -> str:
    """The recipes, each with the number of its runs and their estimated time on this machine.

    :param at_once: how many runs side by side.
    """
    lines = []
    for name in RECIPES:
        recipe = RECIPES.build(name)
        plan = Plan.made(name, recipe, preset)
        jobs = _all(plan)
        lines.append(f"{name:<20} {len(jobs):>3} runs, about {_time(estimate(jobs, at_once)):>9}   {recipe.title}")
    return "\n".join(lines)


def dry_run(plan: Plan, *, at_once: int) -> str:
    """Every run of a comparison, what is chosen how, and what it costs.

    :param at_once: how many runs side by side.
    """
    jobs = _all(plan)
    lines = [plan.recipe.title, plan.recipe.question, ""]
    trials = [job for job in jobs if job.value is not None]
    if trials:
        tuning = plan.recipe.tuning
        assert tuning is not None
        lines.append(
            f"{len(trials)} trials choose {tuning.setting} by validation images: "
            f"{', '.join(map(_plain, tuning.values))} for each arm, with {tuning.share:.0%} of the steps"
        )
    lines += [f"{job.folder}: {_words(job.settings)}" for job in plan.jobs({})]
    return "\n".join(
        [*lines, "", f"{len(jobs)} runs, about {_time(estimate(jobs, at_once))} on this machine with --jobs {at_once}"]
    )


def _words(settings: Settings) -> str:
    own = settings.values
    shown = ["dataset", "task", "sigma", "strategy", "aux", "aux_weight", "aux_cap", "vr_update", "vr_loss", "vr_start"]
    concerned = settings.concerned
    told = {name: own[name] for name in shown if name in concerned and own[name] is not None}
    return ", ".join(f"{name} {_plain(value)}" for name, value in told.items())


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _all(plan: Plan) -> list[Job]:
    trials = [job for condition in plan.conditions for arm in plan.arms for job in plan.trials(condition, arm)]
    return trials + plan.jobs({})


def _time(seconds: float) -> str:
    return str(timedelta(minutes=max(1, round(seconds / 60))))[:-3] + " h"


def estimate(jobs: Sequence[Job], at_once: int) -> float:
    """Seconds that the jobs take on this machine; what they share is counted once: VRs of clean images, pre-trainings,
    and IPs that were trained alone.

    :param at_once: how many run side by side, with a share of the CPU cores each.
    """
    from train.training.prepared import alone_settings, pretraining_settings

    rate = speed(threads_each(at_once))
    runs = shared = 0.0
    alone: set[Any] = set()
    clean: set[Any] = set()
    for job in jobs:
        settings = job.settings
        runs += _BESIDES + (_steps(settings) * _step(settings) + _evaluation(settings)) / rate
        start = (settings.training.seed, settings.degradation, settings.data, settings.network)
        if settings.ip_starts_alone and start not in alone:
            alone.add(start)
            own = alone_settings(settings)
            runs += _steps(own) * _step(own) / rate
        for auxiliary in settings.auxiliary.names if settings.needs_clean_vr else ():
            for kind in ("start",) * settings.starts_clean + ("reader",) * settings.evaluation.reader:
                seed = settings.training.seed if settings.clean.clean_seed is None else settings.clean.clean_seed
                key = (kind, auxiliary, seed, settings.auxiliary.vr, settings.data.dataset)
                if key not in clean:
                    clean.add(key)
                    shared += _clean(settings, auxiliary) / rate
        for auxiliary in settings.auxiliary.names if settings.starts_pretrained else ():
            own = pretraining_settings(settings, auxiliary)
            key = (settings.auxiliary.vr_start, auxiliary, own.training.seed, own.auxiliary.vr, own.data.dataset)
            if key not in clean:
                clean.add(key)
                shared += _steps(own) * _pretraining_step(own) / rate
    # What several runs share is made by one of them, for which the others wait.
    return shared + runs / at_once


IMAGES = {"covidct": 425, "isic2018": 1815, "camus": 1260, "lizard": 1000, "drimdb": 150}
"""Training images of a data set, about: an estimate must not have to decode them."""

TESTED = {"covidct": 203, "isic2018": 519, "camus": 360, "lizard": 300, "drimdb": 40}
"""Its test images; of the validation images there are about half as many."""


def _steps(settings: Settings) -> int:
    images = IMAGES.get(settings.data.dataset, 500)
    steps = settings.training.epochs * max(1, images // settings.training.batch_size)
    return min(steps, settings.training.max_steps or steps)


def _clean(settings: Settings, auxiliary: str) -> float:
    side = settings.clean.clean_crop or settings.data.size or 128
    images = settings.clean.clean_epochs * IMAGES.get(settings.data.dataset, 500)
    return 3 * images * _operations(settings, "vr" if auxiliary == "dia" else "seg", side)


def _step(settings: Settings) -> float:
    """Operations of a step of IP's training: a forward pass and one backward pass per loss, each of which is two."""
    kind, training = settings.method.kind, settings.training
    ip = _operations(settings, "ip", training.crop) if kind.trains_ip else 0.0
    total = 3 * ip
    for auxiliary in settings.auxiliary.names if kind.uses_auxiliaries else ():
        vr = _operations(settings, "vr" if auxiliary == "dia" else "seg", training.crop)
        total += 2 * ip + 3 * vr
    if kind.guided:
        # Guide and features are described and compared; the critic is asked thrice, and once for its slope.
        total += 2 * ip + 9 * _operations(settings, "critic", training.crop)
    return total * training.batch_size


def _evaluation(settings: Settings) -> float:
    """Operations of an evaluation. What a fixed VR and the reader say of clean and degraded images is kept in the cache
    after the first run, which is left out."""
    kind, side = settings.method.kind, settings.data.size or 128
    images = TESTED.get(settings.data.dataset, 200)
    if settings.evaluation.evaluate_on == "val":
        images //= 2
    total = _operations(settings, "ip", side) if kind.trains_ip else 0.0
    for auxiliary in settings.auxiliary.names:
        vr = _operations(settings, "vr" if auxiliary == "dia" else "seg", side)
        total += vr * settings.evaluation.reader
        if kind.uses_auxiliaries:
            total += vr * (1 if settings.vr_update == "fixed" else 3)
    return total * images


def _pretraining_step(settings: Settings) -> float:
    """Operations of a step of a pre-training: encoder, decoder (about half as much) and, if any, second image."""
    key = AUXILIARIES[settings.auxiliary.names[0]].role.key  # type: ignore[attr-defined]
    images = 2 if settings.method.adversarial in ("consistency", "both") else 1.5
    return 3 * images * _operations(settings, key, settings.training.crop) * settings.training.batch_size


def _operations(settings: Settings, key: str, side: int) -> float:
    """Floating-point operations of a network's forward pass on one image.

    :param side: of the image, which IP is given reduced.
    """
    name, options = settings.values[key], settings.values[f"{key}_options"]
    shape = {} if key == "critic" else {"num_classes": 2}
    if key == "ip":
        scale = parse(settings.degradation.task).scale
        side, shape = side // scale, {"scale": scale}
    return _counted(key, name, options, settings.data.channels, side, **shape)


@cache
def _counted(key: str, name: str, options: Any, channels: int, side: int, **shape: int) -> float:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = NETWORKS[key].build(name, options, channels=channels, **shape).eval()
        network(torch.empty(1, channels, side, side))
    return float(counter.get_total_flops())


@cache
def speed(threads: int) -> float:
    """Operations per second that this machine does in the training of small convolutional networks.

    :param threads: of the CPU; a GPU does not ask.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _speed()
    finally:
        torch.set_num_threads(before)


def _speed() -> float:
    import torch
    from torch import nn

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(4))).to(device)
    images = torch.rand(4, 32, 64, 64, device=device)
    operations = 3 * 4 * 4 * 2 * 32 * 32 * 9 * 64 * 64
    least, begun = float("inf"), time.monotonic()
    while time.monotonic() - begun < 0.7:
        before = time.monotonic()
        network(images).square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        # The least time is that of the machine; the others are those of whatever else it does, and of warming up.
        least = min(least, time.monotonic() - before)
    return operations / least
