"""The scores of a training on validation images, and the networks that had the best of them so far."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.errors import RunError, reason
from train.evaluation.validate import validate
from train.files import write_file
from train.outputs.run_folder import RunFolder
from train.strategies.base import Phase
from train.training.build import Experiment


class Look(NamedTuple):
    """A look at the validation images.

    :param step: as ``steps.csv`` counts them.
    :param epoch: passes over the training images, to two digits: at the end of a phase the last one may be incomplete.
    :param score: NaN where an image has none.
    """

    step: int
    epoch: float
    score: float


class Validation:
    """What a training knows of its validation images. It is a part of the checkpoints: ``validation.csv`` and
    ``best.safetensors`` follow from it, and a run that goes on writes them as they were then.

    Of equal scores the earlier one is the best, and NaN never is.

    :param experiment: whose networks are scored, by its validation images.
    :param every: epochs between two looks.
    :param folder: of the run.
    :param settings: of the run, for the metadata of ``best.safetensors``.
    :ivar looks: in their order.
    :ivar selected: which networks the strategy holds when the training is over.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        every: int,
        folder: RunFolder,
        settings: dict[str, Any],
    ) -> None:
        assert experiment.validation is not None
        self.strategy = experiment.strategy
        self.images = experiment.validation
        self.degrade = experiment.crops.degrade
        self.every = every
        self.folder = folder
        self.looks: list[Look] = []
        self.selected = "last"
        self._settings = settings
        self._networks: dict[str, dict[str, Tensor]] = {}

    @property
    def best(self) -> Look | None:
        """The look with the best score; ``None`` where no look had a score."""
        return max(
            (each for each in self.looks if not math.isnan(each.score)), key=lambda each: each.score, default=None
        )

    def is_due(self, phase: Phase, done: int, step: int, *, per_epoch: int) -> bool:
        """Whether the images are to be looked at now: at the end of every so manieth epoch, and of the phase.

        :param done: iterations of the phase.
        :param step: of the run.
        :param per_epoch: iterations.
        """
        trains = self.strategy.roles[0].key in phase.moves
        ends = done == phase.iterations or (done and done % (self.every * per_epoch) == 0)
        return bool(trains and ends and step not in (each.step for each in self.looks[-1:]))

    def score(self, device: torch.device, stopped: Callable[[], bool]) -> float | None:
        """
        :returns: ``None`` where it was stopped.
        """
        terms = self.strategy.terms
        return validate(self.strategy, self.images, self.degrade, device=device, seen=terms.train_on, stopped=stopped)

    def note(self, look: Look) -> bool:
        """Takes down a look, and the networks where it is the best so far.

        :returns: whether it is.
        """
        self.looks.append(look)
        if self.best is not look:
            return False
        self._networks = {
            key: {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
            for key, network in self.strategy.networks.items()
        }
        return True

    def write(self, *, best: bool = True) -> None:
        """Writes ``validation.csv``, and ``best.safetensors`` where there is a best look.

        :param best: ``False``: it has not changed.
        :raises RunError: a file cannot be written.
        """
        name, text = self.strategy.score.name, io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["step", "epoch", name])
        writer.writerows([each.step, f"{each.epoch:g}", f"{each.score:.9g}"] for each in self.looks)
        write_file(self.folder.validation, text.getvalue().encode())
        if best and (look := self.best) is not None:
            score = {"step": look.step, "epoch": look.epoch, name: look.score, "images": len(self.images)}
            self.folder.write_best(self._networks, self._settings, score, without=self.strategy.untrained)

    def write_again(self) -> None:
        """Writes both files as they were at a checkpoint, whatever was written since.

        :raises RunError: a file cannot be written.
        """
        self.write()
        if self.best is None:
            try:
                self.folder.best.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"{self.folder.best} cannot be removed: {reason(error)}") from error

    def take_best(self) -> bool:
        """Gives the strategy the networks that had the best score.

        :returns: whether there are any.
        """
        if self.best is None:
            return False
        for key, network in self.strategy.networks.items():
            network.load_state_dict(self._networks[key])
        self.selected = "best"
        return True

    @property
    def metrics(self) -> dict[str, Any]:
        """For ``metrics.json``."""
        best, last = self.best, self.looks[-1]
        return {
            "validated_by": self.strategy.score.name,
            "validation_images": len(self.images),
            "validation_best": None if best is None else best.score,
            "validation_best_epoch": None if best is None else best.epoch,
            "validation_last": last.score,
            "validation_last_epoch": last.epoch,
            "selected": self.selected,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"looks": [list(each) for each in self.looks], "networks": self._networks}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.looks = [Look(*each) for each in state_dict["looks"]]
        self._networks = {
            key: {name: value.cpu() for name, value in state.items()} for key, state in state_dict["networks"].items()
        }
