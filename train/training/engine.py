"""The training of one run, step by step, resumable bit for bit. The engine owns time; it knows no network by name."""

from __future__ import annotations

import math
import shutil
import time
from typing import Any, NamedTuple

import torch

from train.errors import RunError
from train.interruption import Stop
from train.outputs.run_folder import RunFolder
from train.seeds import stable_seed
from train.strategies.base import Phase
from train.training import checkpoint
from train.training.batches import batches
from train.training.build import Experiment
from train.training.progress import Display
from train.training.step_log import Row, StepLog, means
from train.training.validation import Look, Validation
from train.training.watch import Watch


class Cadence(NamedTuple):
    """How often an engine looks up from its work, and who helps it.

    :param log_every: steps between two looks at the device.
    :param checkpoint_every: steps between two checkpoints.
    :param num_workers: processes that prepare the batches; 0: this one.
    :param checkpoint_minutes: between two checkpoints at most, however long a step takes.
    :param keep_checkpoints: how many checkpoints there are at most, the newest and those before it.
    """

    log_every: int = 10
    checkpoint_every: int = 100
    num_workers: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2


class Engine:
    """One run, from its first step to its last.

    :param experiment: what there is to train.
    :param folder: where the step log and the checkpoints go; made by the caller. Of several processes each has its
        own; the first one's is the run's.
    :param begun: ``time.monotonic()`` when this process began with the run.
    :param validation: looks at validation images now and then; ``None``: nobody does.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: RunFolder,
        cadence: Cadence,
        *,
        begun: float,
        validation: Validation | None = None,
    ) -> None:
        self.experiment = experiment
        self.strategy = experiment.strategy
        self.cadence = cadence
        self.team = experiment.team
        self.log = StepLog(
            folder.steps,
            (*self.strategy.measures, *self.strategy.precision.measures),
            device=experiment.device,
            every=cadence.log_every,
            batch_size=experiment.batch_size,
        )
        self.watch = Watch(self.strategy, experiment.gate)
        self.checkpoint = folder.checkpoint
        self.validation = validation
        self.step = 0
        self._begun = begun
        self._saved = begun  # when the last checkpoint was written

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.iterations for phase in self.experiment.phases)

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, in all processes that worked on it."""
        return time.monotonic() - self._begun

    def train(self, display: Display, stop: Stop) -> bool:
        """Trains from the current step to the last, with a checkpoint before the first, now and then, and at the end.

        :returns: whether the last step was reached; ``False`` if ``stop`` was requested before.
        :raises RunError: the training has diverged, or a file cannot be written.
        """
        if self.step == 0:
            self._seed()  # whatever this process did before
            self.save(display)  # so that a run that is killed at any moment from here can be resumed
        before = 0
        for phase in self.experiment.phases:
            done = self.step - before
            before += phase.iterations
            left = done < phase.iterations or self._validation_is_due(phase, done)
            if left and not self._train_phase(phase, done, display, stop):
                return False
        return True

    def _train_phase(self, phase: Phase, done: int, display: Display, stop: Stop) -> bool:
        experiment, strategy, cadence = self.experiment, self.strategy, self.cadence
        if not done:
            strategy.begin(phase)
        strategy.enter(phase)
        order = experiment.order(phase, done)
        self.log.begin()
        with display.phase(phase.title, done, phase.iterations, before=self.step - done) as show:
            if self._validation_is_due(phase, done):  # the run was asked to stop before
                if not self._validate(done, display, stop):
                    return False
                self.save(display)
            for batch in batches(experiment.crops, order, num_workers=cadence.num_workers):
                lr = strategy.lr
                with self.team.together():
                    found = strategy.update(strategy.losses(batch.to(experiment.device)))
                self.team.level((*strategy.networks.values(), *strategy.companions.values()))
                found = self.team.mean(found) | strategy.precision.measured
                done += 1
                self.step += 1
                self.log.add(self.step, phase.name, found, lr)
                validating = self._validation_is_due(phase, done)
                look = validating or done == phase.iterations or self.step % cadence.log_every == 0
                # Read once: it may change at any moment, and no stop without a checkpoint. Several processes, of which
                # each has its signals at its own moment, talk about it now and then.
                stopping = self.team.any(stop.requested) if look or self.team.size == 1 else False
                due = stopping or done == phase.iterations
                if look or due:
                    show(done, self._read_back(display, wait=due or validating))
                if validating and not stopping:
                    stopping = not self._validate(done, display, stop)
                overdue = self.team.any(self._overdue()) if look or self.team.size == 1 else False
                if due or stopping or self.step % cadence.checkpoint_every == 0 or overdue:
                    self.save(display)
                if stopping:
                    return False
        return True

    def _validation_is_due(self, phase: Phase, done: int) -> bool:
        """Whether the validation images are to be looked at before the next step."""
        per_epoch = self.experiment.per_epoch
        return self.validation is not None and self.validation.is_due(phase, done, self.step, per_epoch=per_epoch)

    def _validate(self, done: int, display: Display, stop: Stop) -> bool:
        """Looks at the validation images: the first process does, and the others wait.

        :param done: iterations of the phase.
        :returns: ``False``: the run is asked to stop, and where that was before the end of the look, there was none.
        :raises RunError: a file cannot be written.
        """
        validation, team = self.validation, self.team
        assert validation is not None
        score = team.told(validation.score(self.experiment.device, lambda: stop.requested) if team.leads else None)
        if score is None:
            return False
        look = Look(self.step, round(done / self.experiment.per_epoch, 2), score)
        best = validation.note(look)
        if team.leads:
            validation.write(best=best)
        display.validated(self.strategy.score, look, best=best)
        self.log.begin()  # the next step has taken no longer for that
        return not team.any(stop.requested)

    def take_best(self, display: Display) -> None:
        """Gives the strategy the networks with the best score on the validation images, where any has one."""
        assert self.validation is not None
        if not self.validation.take_best():
            display.warn(
                "--select best: no look at the validation images found a number, so that none is the best; the last "
                "networks are evaluated"
            )

    def _read_back(self, display: Display, *, wait: bool) -> Row:
        rows = self.log.flush(wait=wait)
        for warning in self.watch.look(rows):
            display.warn(warning)
        row = means(rows)
        losses = [each.name for each in self.strategy.measures if each.loss]
        if lost := [name for name in losses if math.isnan(row.get(name, 0.0))]:
            raise RunError(
                f"the training has diverged: {' and '.join(lost)} stopped being finite before step {self.step} "
                f"(see {self.log.path}); lower --lr, --vr-lr or --aux-weight"
                + (", or give --precision bf16" if self.strategy.precision.name == "fp16" else "")
                + self._best_so_far()
            )
        return row

    def _best_so_far(self) -> str:
        """What a person may go on with whose training has diverged."""
        best = self.validation and self.validation.best
        if not self.validation or not best or not self.team.leads:
            return ""
        return (
            f". {self.validation.folder.best} has the networks as they were after epoch {best.epoch:g}, the best so far"
        )

    def save(self, display: Display) -> None:
        """Writes the checkpoint, and before it what ``steps.csv`` lacks.

        :param display: is told what is worth a warning in that.
        :raises RunError: a file cannot be written.
        """
        self._read_back(display, wait=True)
        random = self.team.all(_random_state())
        self._saved = time.monotonic()
        if not self.team.leads:
            return
        if self.step:
            self.log.sync()  # the checkpoint reaches the disk at once, and must not be ahead of the step log there
        checkpoint.save(
            self.checkpoint,
            {"step": self.step, "seconds": self.seconds, "random": random[0], "random_of_others": random[1:]}
            | {name: part.state_dict() for name, part in self._parts().items()},
            keep=self.cadence.keep_checkpoints,
        )
        self._saved = time.monotonic()

    def _overdue(self) -> bool:
        return time.monotonic() - self._saved > 60 * self.cadence.checkpoint_minutes

    def resume(self, folder: RunFolder | None = None) -> None:
        """Goes back to the newest whole checkpoint: what this engine does from here is what an uninterrupted run would
        have done.

        :param folder: of the run, where it is not this engine's own.
        :raises RunError: there is no whole checkpoint, or it is that of another run, or the step log does not lead up
            to it.
        """
        if folder is not None:
            self.checkpoint = folder.checkpoint
            if folder.steps.exists():
                shutil.copy(folder.steps, self.log.path)
        path, state = checkpoint.load_newest(self.checkpoint, self.experiment.device)
        if missing := [name for name in ("step", "seconds", "random") if name not in state]:
            raise RunError(f"the checkpoint {path} is none of a run: it has no {', '.join(missing)}")
        checkpoint.restore(path, state, self._parts())
        self.step = state["step"]
        others = state.get("random_of_others", [])
        if self.team.leads or len(others) == self.team.size - 1:
            _set_random_state([state["random"], *others][self.team.rank])
        else:  # it was saved by another number of processes
            self._seed()
        self._begun -= state["seconds"]
        self.log.truncate(self.step)
        if self.validation is not None and self.team.leads:
            self.validation.write_again()

    def _seed(self) -> None:
        """Begins this process's stream of random numbers; that of the first one is as if it were alone."""
        others = (self.team.rank, self.step) if self.team.rank else ()
        torch.manual_seed(stable_seed("training", self.experiment.seed, *others))

    def _parts(self) -> dict[str, checkpoint.Part]:
        return {
            name: part
            for key, learner in self.strategy.learners.items()
            for name, part in (
                (key, learner.network),
                (f"{key}_optimizer", learner.optimizer),
                (f"{key}_schedule", learner.schedule),
            )
        } | {
            **self.strategy.companions,
            **self.strategy.precision.parts,
            **({} if self.validation is None else {"validation": self.validation}),
        }


def _random_state() -> dict[str, Any]:
    # Data and noise have generators of their own; this is for networks that draw numbers (dropout).
    # A run computes on one GPU, and to ask the others would take memory of theirs.
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        saved = state["cuda"]  # of all GPUs, by earlier versions
        torch.cuda.set_rng_state(saved[min(torch.cuda.current_device(), len(saved) - 1)].cpu())
