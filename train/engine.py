"""The training of one run: networks, optimizers and data brought together, step by step, resumable bit for bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import gradprom_ext as gp
from models import IP, VR
from train import checkpoint
from train.batches import Batch, Crops, Order, batches
from train.config import RunConfig
from train.data.base import ImageData, Subset
from train.degradations import Degradation, stable_seed
from train.errors import RunError
from train.evaluation import evaluate
from train.metrics import psnr_of
from train.progress import Display, Stop
from train.steps import Row, StepTable
from train.strategies import STRATEGIES, Strategy, strategy_class
from train.strategies.base import Learner, Phase, StepLog

TITLES: dict[Phase, str] = {"pretrain": "pre-training VR", "train": "training"}
WARM_UP = 0.03  # share of the steps in which the learning rate rises

# Update rules by name: IP's (one of ours), VR's (PyTorch's), and what both are given besides the learning rate.
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (gp.GradPromAdam, torch.optim.Adam, {}),
    "adamw": (gp.GradPromAdamW, torch.optim.AdamW, {}),
    "sgd": (gp.GradPromSGD, torch.optim.SGD, {"momentum": 0.9}),
}


def course(steps: int, step: int) -> float:
    """The learning rate of a step as a share of its peak: a linear rise, then half a cosine down to 0.

    :param steps: steps in all.
    :param step: from 0.
    """
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def build_strategy(
    config: RunConfig, data: ImageData, *, scale: int, steps: dict[Phase, int], device: torch.device
) -> Strategy:
    """The networks with fresh weights (which depend on ``config.seed`` alone), their optimizers, and what trains them.

    :param scale: by what factor IP enlarges.
    :param steps: of each phase.
    :raises RunError: the strategy does not fit the gate or the data.
    :raises UnknownNameError: a strategy or network that does not exist.
    """
    kind = strategy_class(config.strategy)
    if config.gate is not None and not kind.gate_is_free:
        free = ", ".join(name for name in STRATEGIES if strategy_class(name).gate_is_free)
        raise RunError(f"--strategy {config.strategy} fixes its own gate; --gate {config.gate} goes with: {free}")
    ours, pytorchs, options = OPTIMIZERS[config.optimizer]

    def learner(network: nn.Module, rule: type[torch.optim.Optimizer], steps: int, **options: Any) -> Learner[Any]:
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = rule(network.parameters(), **options)
        return Learner(network, optimizer, LambdaLR(optimizer, partial(course, steps)))

    torch.manual_seed(stable_seed("IP", config.seed))
    network = IP.build(config.ip, channels=data.channels, scale=scale, blocks=config.blocks, features=config.features)
    gate = {"gate": config.gate or kind.gate, "aux_weight": config.aux_weight}
    ip = learner(network, ours, steps["train"], lr=config.lr, **gate, **options)
    if not kind.uses_vr:
        return kind(ip, None)

    if data.train.labels is None or data.test.labels is None or data.num_classes < 2:
        raise RunError(
            f"--strategy {config.strategy} needs a diagnosis, and {data.name} has no two classes; use ip-only"
        )
    torch.manual_seed(stable_seed("VR", config.seed))
    network = VR.build(config.vr, channels=data.channels, num_classes=data.num_classes)
    vr = learner(network, pytorchs, steps.get("pretrain", steps["train"]), lr=config.vr_lr, fused=True, **options)
    return kind(ip, vr)


class Engine:
    """One run, from its first step to its last.

    :param config: the run's settings.
    :param data: its images.
    :param degrade: what IP has to undo.
    :param folder: where ``steps.csv`` and ``checkpoint.pt`` go; made by the caller.
    :param device: where to compute.
    :param begun: ``time.monotonic()`` when this process began with the run.
    :raises RunError: the settings do not fit the data or each other, as :func:`rehearse` has found; nothing is made.
    :raises UnknownNameError: a strategy or network that does not exist.
    """

    def __init__(
        self,
        config: RunConfig,
        data: ImageData,
        degrade: Degradation,
        *,
        folder: Path,
        device: torch.device,
        begun: float,
    ) -> None:
        self.config = config
        self.data = data
        self.degrade = degrade
        self.device = device
        self.crops = Crops(data.train, degrade, crop=config.crop, seed=config.seed)
        self.table = StepTable(folder / "steps.csv")
        self.checkpoint = folder / "checkpoint.pt"
        self.step = 0
        self._begun = begun

        per_epoch = len(data.train) // config.batch_size
        if not per_epoch:
            raise RunError(
                f"--batch-size {config.batch_size} exceeds the {len(data.train)} training images of {data.name}"
            )
        for name, pixels in (("--crop", config.crop), ("--size", config.size)):
            if pixels % degrade.scale:
                raise RunError(f"{name} {pixels} is no multiple of {degrade.scale}, which --task {config.task} needs")
        self.phases: dict[Phase, int] = {}
        if strategy_class(config.strategy).pretrains_vr:
            self.phases["pretrain"] = config.pretrain_epochs * per_epoch
        steps = config.epochs * per_epoch
        self.phases["train"] = min(steps, config.max_steps or steps)
        build = partial(build_strategy, config, data, scale=degrade.scale, steps=self.phases, device=device)
        rehearse(build(), self.phases, self.crops, config, data=data, device=device)
        self.strategy = build()

    @property
    def networks(self) -> tuple[nn.Module, nn.Module | None]:
        """IP and, where the strategy has one, VR."""
        ip, vr = self.strategy.ip, self.strategy.vr
        return ip.network, None if vr is None else vr.network

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(self.phases.values())

    @property
    def seconds(self) -> float:
        """How long the run has taken so far, in all processes that worked on it."""
        return time.monotonic() - self._begun

    def train(self, display: Display, stop: Stop) -> bool:
        """Trains from the current step to the last, with a checkpoint now and then and one at the end.

        :returns: whether the last step was reached; ``False`` if ``stop`` was requested before.
        :raises RunError: the training has diverged, or a file cannot be written.
        """
        if self.step == 0:
            torch.manual_seed(stable_seed("training", self.config.seed))  # whatever this process did before
        before = 0
        for phase, steps in self.phases.items():
            done = self.step - before
            before += steps
            if done < steps and not self._train_phase(phase, done, steps, display, stop):
                return False
        return True

    def _train_phase(self, phase: Phase, done: int, steps: int, display: Display, stop: Stop) -> bool:
        config = self.config
        strategy = self.strategy
        strategy.enter(phase)
        take_step = step_of(strategy, phase)
        order = Order(
            phase,
            images=len(self.crops.subset),
            batch_size=config.batch_size,
            steps=steps,
            seed=config.seed,
            start=done,
        )
        with display.phase(TITLES[phase], done, steps) as show:
            for batch in batches(self.crops, order, num_workers=config.num_workers):
                lr = float(strategy.ip.schedule.get_last_lr()[0])
                batch = batch.to(self.device)
                log = take_step(batch)
                done += 1
                self.step += 1
                self.table.add(self.step, phase, log, psnr=batch_psnr(log.enhanced, batch.clean), lr=lr)
                stopping = stop.requested  # read once: it may change at any moment, and no stop without a checkpoint
                due = stopping or done == steps
                if due or self.step % config.log_every == 0:
                    show(done, self._read_back())
                if due or self.step % config.checkpoint_every == 0:
                    self.save()
                if stopping:
                    return False
        return True

    def _read_back(self) -> Row:
        row = self.table.flush()
        if lost := [name for name in ("loss", "aux_loss") if math.isnan(row.get(name, 0.0))]:
            raise RunError(
                f"the training has diverged: {' and '.join(lost)} stopped being finite before step {self.step} "
                f"(see {self.table.path}); lower --lr, --vr-lr or --aux-weight"
            )
        return row

    def save(self) -> None:
        """Writes the checkpoint, and before it what ``steps.csv`` lacks.

        :raises RunError: a file cannot be written.
        """
        self._read_back()
        self.table.sync()  # the checkpoint reaches the disk at once, and must not be ahead of the step log there
        checkpoint.save(
            self.checkpoint,
            {"step": self.step, "seconds": self.seconds, "random": _random_state()}
            | {name: part.state_dict() for name, part in self._parts().items()},
        )

    def resume(self) -> None:
        """Goes back to the checkpoint: what this engine does from here is what an uninterrupted run would have done.

        :raises RunError: the checkpoint is damaged, or that of another run; the step log does not lead up to it.
        """
        state = checkpoint.load(self.checkpoint, self.device)
        if missing := [name for name in ("step", "seconds", "random") if name not in state]:
            raise RunError(f"the checkpoint {self.checkpoint} is none of a run: it has no {', '.join(missing)}")
        checkpoint.restore(self.checkpoint, state, self._parts())
        _set_random_state(state["random"])
        self.step = state["step"]
        self._begun -= state["seconds"]
        self.table.truncate(self.step)

    def _parts(self) -> dict[str, checkpoint.Part]:
        parts: dict[str, checkpoint.Part] = {}
        for name, learner in (("ip", self.strategy.ip), ("vr", self.strategy.vr)):
            if learner is not None:
                parts |= {
                    name: learner.network,
                    f"{name}_optimizer": learner.optimizer,
                    f"{name}_schedule": learner.schedule,
                }
        return parts


def step_of(strategy: Strategy, phase: Phase) -> Callable[[Batch], StepLog]:
    """What takes a step of ``phase``."""
    return strategy.pretrain_step if phase == "pretrain" else strategy.step


def rehearse(
    strategy: Strategy,
    phases: dict[Phase, int],
    crops: Crops,
    config: RunConfig,
    *,
    data: ImageData,
    device: torch.device,
) -> None:
    """Takes the first step of each phase and evaluates one test image: what would fail in a run fails here, before the
    run has a folder or has cost hours. All batches of a run have one shape, so one of them tells for all.

    Which settings fail depends on the networks: batch statistics of a single value (one crop that the strides of VR
    reduce to one pixel), a kernel that is larger than what is left of a crop, an input of fixed size, too little
    memory. No list of such rules would be complete; a trial is.

    :param strategy: one for this purpose alone, as its networks and optimizers are moved.
    :raises RunError: a step or the evaluation fails; the message names the settings.
    """
    networks = f"--ip {config.ip}" + ("" if strategy.vr is None else f" and --vr {config.vr}")
    height, width = data.size
    what, hint = "", ""
    try:
        for phase, steps in phases.items():
            what = f"a step with --batch-size {config.batch_size} and --crop {config.crop} (task {config.task})"
            hint = "a larger --batch-size or --crop"
            strategy.enter(phase)
            images = len(crops.subset)
            order = Order(phase, images=images, batch_size=config.batch_size, steps=min(steps, 1), seed=config.seed)
            for keys in order:
                step_of(strategy, phase)(crops.__getitems__(keys).to(device))
        what, hint = f"the evaluation of an image of {height} x {width} px", "another --size"
        vr = None if strategy.vr is None else strategy.vr.network
        evaluate(strategy.ip.network, vr, _first(data.test), crops.degrade, device=device)
    except (ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in reason:
            hint = "a smaller --batch-size or --crop"
        raise RunError(
            f"{what} does not work with {networks}: {reason}. Nothing was written; give {hint}, or other networks"
        ) from error


def _first(subset: Subset) -> Subset:
    """The first image with what belongs to it."""
    labels, masks = (None if each is None else each[:1] for each in (subset.labels, subset.masks))
    return Subset(subset.images[:1], labels, masks, subset.names[:1])


def batch_psnr(enhanced: Tensor | None, clean: Tensor) -> Tensor | None:
    """PSNR of a whole batch in dB, ``[]``, on its device, capped as those of test images are (:func:`psnr_of`);
    ``None`` where nothing was enhanced."""
    return None if enhanced is None else psnr_of(enhanced, clean)


def _random_state() -> dict[str, Any]:
    # Data and noise have generators of their own; this is for networks that draw numbers (dropout).
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
