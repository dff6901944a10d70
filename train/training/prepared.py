"""Trainings that a run stands on, each done once and kept in the cache under a key of everything that it depends on.

A VR that has learned from clean images is what a fixed VR begins with, and the independent reader. An encoder that was
pre-trained without labels is what VR may begin with, and an IP that was trained alone what IP begins with where a
comparison asks what VR can add to a good one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from train.data.base import ImageData
from train.data.cache import ArrayCache, file_sha256
from train.degradations import Degradation, Gaussian, parse
from train.errors import RunError
from train.files import locked
from train.interruption import stop_on_signal
from train.outputs.run_folder import RunFolder
from train.settings.naming import identity
from train.settings.sections import FIELDS, Settings
from train.strategies.masked import METHODS
from train.team import ALONE, Team
from train.training.build import build
from train.training.engine import Cadence, Engine
from train.training.progress import Display

READER_SEED = 1000
"""What is added to a run's seed to have that of its reader: it must not be the VR that the run began with."""

_DEPENDS_ON = (
    "models/**/*.py",
    "train/degradations/*.py",
    "train/strategies/*.py",
    "train/training/*.py",
    "train/losses.py",
    "train/frequencies.py",
    "train/precision.py",
    "train/seeds.py",
)
_NOTHING = Gaussian(0.0)
_NEITHER_EVALUATED_NOR_RESUMED = {
    "reader": False,
    **{name: FIELDS[name].default for name in ("evaluate_on", "validate_every", "validation_images", "select")},
    "resume": None,
}


def clean_settings(settings: Settings, auxiliary: str, seed: int) -> Settings:
    """The settings of the training of a VR on clean images: those of ``--strategy vr-only --train-on clean``.

    :param settings: of the run that needs it.
    :param auxiliary: its task.
    """
    own, clean = settings.auxiliary, settings.clean
    crop = clean.clean_crop or settings.data.size
    return settings.change(
        {
            "aux": auxiliary,
            "aux_weight": own.aux_weight[:1],
            "vr_weights": None,
            "vr_start": "fresh",
            "label_smoothing": clean.clean_smoothing if auxiliary == "dia" else 0.0,
            "ip_start": "fresh",
            "strategy": "vr-only",
            "train_on": "clean",
            "gate": None,
            "threshold": 0.0,
            "vr_lr": clean.clean_lr,
            "batch_size": clean.clean_batch_size,
            "crop": crop,
            "epochs": clean.clean_epochs,
            "max_steps": None,
            "augment": clean.clean_augment,
            "seed": seed,
            "clean_seed": None,
            "precision": "fp32",  # a reader must not depend on how the run was computed that it reads
            "task": "denoise",
            "sigma": 0.0,
            **_NEITHER_EVALUATED_NOR_RESUMED,
        }
    )


def clean_weights(
    settings: Settings,
    data: ImageData,
    facts: Mapping[str, Any],
    auxiliary: str,
    *,
    seed: int,
    device: torch.device,
    cache: ArrayCache,
    display: Display,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """The weights of a VR that was trained on the clean training images of ``data``, from the cache or trained now.

    :param settings: of the run that needs it; of these only those of VR and of section ``clean`` matter.
    :param facts: the fingerprint of the data.
    :param auxiliary: the VR's task.
    :param seed: of its training.
    :param display: shows the training.
    :param team: this process by itself, where there are others.
    :raises RunError: it cannot be trained with these settings.
    :raises KeyboardInterrupt: a signal asked to stop.
    """
    own = clean_settings(settings, auxiliary, seed)
    return _trained_once(
        own,
        data,
        _NOTHING,
        facts,
        name=f"vr-{settings.data.dataset}-{auxiliary}",
        title="training VR on clean images",
        what="Training VR ({role}, seed {seed}) on clean images",
        device=device,
        cache=cache,
        display=display,
        team=team,
    )


def pretraining_settings(settings: Settings, auxiliary: str) -> Settings:
    """The settings of the pre-training that ``--vr-start`` names: those of ``python -m train.pretrain``.

    :param settings: of the run that begins with it.
    :param auxiliary: the task whose network is pre-trained.
    """
    given = settings.pretraining
    method = METHODS[settings.auxiliary.vr_start]
    return settings.change(
        {
            **method.settings,
            "aux": auxiliary,
            "aux_weight": settings.auxiliary.aux_weight[:1],
            "ip_weights": None,
            "vr_weights": None,
            "vr_start": "fresh",
            "ip_start": "fresh",
            "gate": None,
            "threshold": 0.0,
            "adversarial": given.masked_adversarial or method.adversarial,
            "vr_lr": given.masked_lr,
            "batch_size": given.masked_batch_size,
            "crop": given.masked_crop or settings.data.size,
            "epochs": given.masked_epochs,
            "max_steps": given.masked_steps,
            "augment": False,
            "seed": settings.training.seed if given.masked_seed is None else given.masked_seed,
            **_NEITHER_EVALUATED_NOR_RESUMED,
        }
    )


def pretrained_weights(
    settings: Settings,
    data: ImageData,
    facts: Mapping[str, Any],
    auxiliary: str,
    *,
    device: torch.device,
    cache: ArrayCache,
    display: Display,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """The weights of an encoder that was pre-trained on the training images as ``--vr-start`` says, from the cache or
    trained now; without its head.

    :param settings: of the run that begins with it; only those of its network and of section ``pretraining`` matter.
    :param facts: the fingerprint of the data.
    :param auxiliary: the task whose network is pre-trained.
    :param display: shows the training.
    :param team: this process by itself, where there are others.
    :raises RunError: it cannot be trained with these settings.
    :raises KeyboardInterrupt: a signal asked to stop.
    """
    start, own = settings.auxiliary.vr_start, pretraining_settings(settings, auxiliary)
    return _trained_once(
        own,
        data,
        parse(own.degradation.task),
        facts,
        name=f"{start}-{settings.data.dataset}-{auxiliary}",
        title=f"pre-training ({start})",
        what=f"Pre-training ({start}) of the {{role}} of {auxiliary}, seed {{seed}}",
        device=device,
        cache=cache,
        display=display,
        team=team,
    )


def alone_settings(settings: Settings) -> Settings:
    """The settings of the training of an IP alone: those of ``--strategy ip-only``, for the task, the data, the network
    and the seed of the run that begins with it."""
    alone = settings.alone
    return settings.change(
        {
            "strategy": "ip-only",
            "gate": None,
            "threshold": 0.0,
            "ip_start": "fresh",
            "lr": alone.alone_lr,
            "batch_size": alone.alone_batch_size,
            "crop": alone.alone_crop,
            "epochs": alone.alone_steps,  # as many as can be: an epoch has at least one step
            "max_steps": alone.alone_steps,
            "augment": False,
            **_NEITHER_EVALUATED_NOR_RESUMED,
        }
    )


def alone_weights(
    settings: Settings,
    data: ImageData,
    facts: Mapping[str, Any],
    degrade: Degradation,
    *,
    device: torch.device,
    cache: ArrayCache,
    display: Display,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """The weights of an IP that was trained without VR, from the cache or trained now.

    :param settings: of the run that needs it.
    :param facts: the fingerprint of the data.
    :param degrade: what IP has to undo.
    :param display: shows the training.
    :param team: this process by itself, where there are others.
    :raises RunError: it cannot be trained with these settings.
    :raises KeyboardInterrupt: a signal asked to stop.
    """
    return _trained_once(
        alone_settings(settings),
        data,
        degrade,
        facts,
        name=f"ip-{settings.data.dataset}",
        title="training IP alone",
        what="Training IP alone ({role}, seed {seed})",
        device=device,
        cache=cache,
        display=display,
        team=team,
    )


def sources() -> list[Path]:
    """The files that decide, besides its settings, what a training arrives at."""
    root = Path(__file__).resolve().parents[2]
    return [path for pattern in _DEPENDS_ON for path in sorted(root.glob(pattern))]


@functools.cache
def _code() -> list[str]:
    return [file_sha256(path) for path in sources()]


@contextlib.contextmanager
def _unfinished(cache: ArrayCache, name: str, key: Mapping[str, Any]) -> Iterator[RunFolder]:
    """The folder of a training until it is done, in the cache: one that is interrupted goes on there.

    A temporary one where there is no cache, or another process is at work on the same training.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    with contextlib.ExitStack() as held:
        place = None if cache.folder is None else cache.folder / f"{name}-{digest}.unfinished"
        if place is not None:
            try:
                place.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(place))
            except (OSError, RunError):
                place = None
        yield RunFolder(place or Path(held.enter_context(tempfile.TemporaryDirectory())))
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)


def _trained_once(
    own: Settings,
    data: ImageData,
    degrade: Degradation,
    facts: Mapping[str, Any],
    *,
    name: str,
    title: str,
    what: str,
    device: torch.device,
    cache: ArrayCache,
    display: Display,
    team: Team = ALONE,
) -> dict[str, Tensor]:
    """The weights of the first network of a training, from the cache or trained now.

    :param own: the training's settings.
    :param name: begins the name of the file in the cache.
    :param title: of the training's phases.
    :param what: is announced, with the fields ``role`` and ``seed``.
    """
    key = {
        "run": identity(own, facts, degradation=str(degrade)),
        "code": _code(),
        "torch": torch.__version__,
    }

    def train() -> dict[str, np.ndarray]:
        experiment = build(own, data, degrade, device=device, team=team)
        strategy = experiment.strategy
        role = strategy.roles[0]
        experiment.phases[:] = [each._replace(title=title) for each in experiment.phases]
        display.announce(f"{what.format(role=role.name, seed=own.training.seed)}, once: it is kept in the cache.")
        with _unfinished(cache, name, key) as folder:
            display.begin(experiment.strategy.measures, batch_size=experiment.batch_size, events=None)
            # Checkpoints by time alone: most of these trainings take minutes.
            cadence = Cadence(checkpoint_every=10**9, keep_checkpoints=1)
            engine = Engine(experiment, folder, cadence, begun=time.monotonic())
            if folder.checkpoints:
                try:
                    engine.resume()
                except RunError as error:
                    shutil.rmtree(folder.path, ignore_errors=True)
                    raise RunError(f"{error}. It was removed: give the same command again.") from error
            with stop_on_signal() as stop:
                if not engine.train(display, stop):
                    raise stop.error()
        state = {
            name: value.detach().cpu().contiguous()
            for name, value in strategy.networks[role.key].state_dict().items()
            if f"{role.key}.{name}" not in strategy.untrained
        }
        weights = save(state)
        return {"weights": np.frombuffer(weights, np.uint8)}

    found = cache.arrays(name, key, train)
    return load(found["weights"].tobytes())
