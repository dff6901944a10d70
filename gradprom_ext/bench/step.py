"""One whole training step of an IP and a VR network: ``--what step``.

Every contestant has networks of its own, equal at the start, and the same batch. A step has three parts that are timed
apart: forward and backward, the update of IP (where the methods differ), and the rest (VR's update, dropping the
gradients). The auxiliary loss is scaled so that both gradients of IP have the same length at the start; lambda is 1.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradprom_ext as gp

from . import rivals, timing
from .checking import LeftOut, WrongResultError, leaving_out, relative_error
from .networks import ResNet, SRResNet
from .results import FLOOR, StepResult, step_results
from .timing import Gpu

#: ``eager`` is float32 as PyTorch runs it by default; each of the others differs from it in one thing.
VARIANTS = ("eager", "bf16", "channels_last", "graph")
CLASSES = 10
LR = 1e-3
#: Between the gradients of two contestants' own forward and backward passes, of the largest entry: a forgotten or a
#: doubled gradient is off by several tenths, bfloat16 and atomic additions by far less.
TOLERANCE = 5e-2


@dataclass(frozen=True)
class Setting:
    """What is trained."""

    blocks: int = 16  #: of SR-ResNet
    width: int = 64
    depth: int = 50  #: of the ResNet
    vr_width: int = 64
    batch: int = 16
    size: int = 128
    optimizer: str = "adamw"
    variant: str = "eager"

    def __str__(self) -> str:
        return self.variant


#: By device; the CPU's takes about a minute at ``--rounds 11``.
DEFAULTS = {"cuda": Setting(), "cpu": Setting(blocks=4, depth=18, batch=4, size=32)}


class Problem:
    """The networks as they are before training, a batch, and the two losses."""

    def __init__(self, setting: Setting, device: torch.device) -> None:
        torch.manual_seed(0)
        self.setting, self.device = setting, device
        self.format = torch.channels_last if setting.variant == "channels_last" else torch.contiguous_format
        networks = (
            SRResNet(scale=1, blocks=setting.blocks, width=setting.width),
            ResNet(depth=setting.depth, base=setting.vr_width, classes=CLASSES),
        )
        self._ip, self._vr = (net.to(device=device, memory_format=self.format) for net in networks)  # type: ignore[call-overload]
        images = torch.rand(setting.batch, 3, setting.size, setting.size, device=device)
        self.clean = images.to(memory_format=self.format)
        self.degraded = self.clean + 0.1 * torch.randn_like(self.clean)
        self.labels = torch.randint(CLASSES, (setting.batch,), device=device)
        self.aux_scale = 1.0
        self.aux_scale = self._balance()

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """Copies of IP and VR."""
        return copy.deepcopy(self._ip), copy.deepcopy(self._vr)

    def main_loss(self, ip: nn.Module) -> tuple[Tensor, Tensor]:
        """IP's output and its loss."""
        with self._autocast():
            enhanced = ip(self.degraded)
            return enhanced, F.mse_loss(enhanced, self.clean)

    def aux_loss(self, vr: nn.Module, enhanced: Tensor) -> Tensor:
        """VR's loss, scaled."""
        with self._autocast():
            return self.aux_scale * F.cross_entropy(vr(enhanced), self.labels)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.setting.variant != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _balance(self) -> float:
        ip, vr = self.networks()
        params: list[Tensor] = list(ip.parameters())
        enhanced, main_loss = self.main_loss(ip)
        grads = two_backwards(params, main_loss, self.aux_loss(vr, enhanced))
        stats = gp.gradient_stats(*grads, backend="reference")
        return float(stats.main_norm / stats.aux_norm)


def two_backwards(params: list[Tensor], main_loss: Tensor, aux_loss: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The gradient of each loss, taken from ``.grad`` without a copy; the main one stays there.

    Other leaves (VR's parameters) get their ordinary gradient.
    """
    main_loss.backward(retain_graph=True)
    main = [p.grad for p in params]
    for p in params:
        p.grad = None
    aux_loss.backward()
    aux = [p.grad for p in params]
    for p, g in zip(params, main, strict=True):
        p.grad = g
    return main, aux  # type: ignore[return-value]


# ----------------------------------------------------------------------------------------------------------------------
# Contestants


class Trainer:
    """Owns its networks and optimizers; subclasses say what the gradients are, and how IP is updated."""

    #: Whether the update of IP is GradProm's, and so can be checked against the reference.
    combines: ClassVar[bool] = True

    def __init__(self, problem: Problem, **options: Any) -> None:
        self.problem = problem
        self.capturable = problem.setting.variant == "graph"
        self.ip, self.vr = problem.networks()
        self.params: list[Tensor] = list(self.ip.parameters())
        self.ip_opt = self.ip_optimizer(**options)
        self.vr_opt = self.plain_optimizer(list(self.vr.parameters()))

    def plain_optimizer(self, params: list[Tensor]) -> torch.optim.Optimizer:
        return rivals.plain_optimizer(self.problem.setting.optimizer, params, lr=LR, capturable=self.capturable)

    def ip_optimizer(self) -> torch.optim.Optimizer:
        return self.plain_optimizer(self.params)

    def losses(self) -> tuple[Tensor, Tensor]:
        enhanced, main_loss = self.problem.main_loss(self.ip)
        return main_loss, self.problem.aux_loss(self.vr, enhanced)

    def backward(self) -> None:
        """Forward and backward: leaves gradients."""
        raise NotImplementedError

    def update(self) -> None:
        """Updates IP."""
        self.ip_opt.step()

    def finish(self) -> None:
        """Updates VR and drops the gradients."""
        self.vr_opt.step()
        self.ip_opt.zero_grad()
        self.vr_opt.zero_grad()

    def step(self) -> None:
        self.backward()
        self.update()
        self.finish()


class IPAlone(Trainer):
    """No recognition network."""

    combines = False

    def backward(self) -> None:
        self.problem.main_loss(self.ip)[1].backward()

    def finish(self) -> None:
        self.ip_opt.zero_grad()


class Joint(Trainer):
    """One backward of the summed losses."""

    combines = False

    def backward(self) -> None:
        main_loss, aux_loss = self.losses()
        (main_loss + aux_loss).backward()


class TwoBackwards(Trainer):
    """Two gradients, plain optimizers, and nothing done with the second one: what any such method costs at least."""

    combines = False
    main: list[Tensor]
    aux: list[Tensor]

    def backward(self) -> None:
        self.main, self.aux = two_backwards(self.params, *self.losses())

    def finish(self) -> None:
        self.main, self.aux = [], []
        super().finish()


class PyTorchGradProm(TwoBackwards):
    """GradProm in PyTorch operations (``combine``) before a plain optimizer."""

    combines = True

    def __init__(self, problem: Problem, *, combine: rivals.Combine) -> None:
        super().__init__(problem)
        self.combine = combine

    def update(self) -> None:
        self.combine(self.main, self.aux)
        super().update()


class GradProm(Trainer):
    """``opt.backward`` and ``opt.step``."""

    def ip_optimizer(self, *, backend: str) -> torch.optim.Optimizer:  # type: ignore[override]
        kind = gp.GradPromSGD if self.problem.setting.optimizer == "sgd" else gp.GradPromAdamW
        return kind(self.params, lr=LR, backend=backend, capturable=self.capturable)

    def backward(self) -> None:
        self.ip_opt.backward(*self.losses())  # type: ignore[attr-defined]


class TorchJD(Trainer):
    """PCGrad on IP's parameters; equal to GradProm's sum where the gradients agree."""

    def __init__(self, problem: Problem, *, api: Any) -> None:
        super().__init__(problem)
        self.api, self.aggregator = api, api.PCGrad()
        self.vr_params = list(self.vr.parameters())

    def backward(self) -> None:
        enhanced, main_loss = self.problem.main_loss(self.ip)
        self.api.mtl_backward(
            [main_loss, self.problem.aux_loss(self.vr, enhanced)],
            enhanced,
            shared_params=self.params,
            tasks_params=[[], self.vr_params],
            parallel_chunk_size=1,  # one loss after the other: faster on a CPU than its default, torch.vmap
        )

    def update(self) -> None:
        self.api.jac_to_grad(self.params, self.aggregator)
        super().update()


def contestants(problem: Problem, backends: Sequence[str]) -> dict[str, Callable[[], Trainer]]:
    """Everything that can run here, by name."""
    kernels = [b for b in backends if b != "reference"] or list(backends)
    field: dict[str, Callable[[], Trainer]] = {
        "IP alone": partial(IPAlone, problem),
        "joint": partial(Joint, problem),
        FLOOR: partial(TwoBackwards, problem),
    }
    for backend in kernels:
        field[f"gradprom {backend}"] = partial(GradProm, problem, backend=backend)
    field["best PyTorch"] = partial(PyTorchGradProm, problem, combine=rivals.best_pytorch(problem.device))
    field["naive PyTorch"] = partial(PyTorchGradProm, problem, combine=rivals.add_naively_)
    if (api := rivals.torchjd()) is not None:
        field["TorchJD PCGrad"] = partial(TorchJD, problem, api=api)
    return field


# ----------------------------------------------------------------------------------------------------------------------
# Correct first, then fast


def first_gradient(trainer: Trainer) -> Tensor:
    """Runs a first step and returns the gradient that it must have stepped IP with, flat."""
    before = [p.detach().clone() for p in trainer.params]
    trainer.step()
    if trainer.problem.setting.optimizer == "adamw":
        grads = [trainer.ip_opt.state[p]["exp_avg"] / (1 - 0.9) for p in trainer.params]
    else:
        grads = [(b - p.detach()) / LR for b, p in zip(before, trainer.params, strict=True)]
    return torch.cat([g.reshape(-1) for g in grads])


class Referee:
    """Compares first steps with that of the reference."""

    def __init__(self, problem: Problem) -> None:
        reference = GradProm(problem, backend="reference")
        self._expected = first_gradient(reference)
        self._is_open = reference.ip_opt.stats.gate.item() != 0  # type: ignore[attr-defined]

    def check(self, trainer: Trainer) -> None:
        """Runs a trainer's first step.

        :raises WrongResultError: it steps with another gradient than GradProm's.
        """
        error = relative_error(first_gradient(trainer), self._expected)
        comparable = trainer.combines and (self._is_open or not isinstance(trainer, TorchJD))
        if comparable and not error <= TOLERANCE:
            raise WrongResultError(
                f"it steps with another gradient than GradProm's (off by {error:.1e} of the largest)"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(
    setting: Setting, device: torch.device, backends: Sequence[str], rounds: int
) -> tuple[list[StepResult], list[LeftOut]]:
    """All contestants, checked and timed.

    :param backends: that can run on ``device``, fastest first.
    :returns: the results, and what was left out: contestants that fail or step wrongly, or that no graph can hold; or
        everything, where there is no floor, or not enough memory for it.
    """
    try:
        return measure_on(Gpu(device) if device.type == "cuda" else None, setting, device, backends, rounds)
    except torch.OutOfMemoryError as error:
        return [], [LeftOut(f"{setting} is left out: {str(error).partition('. ')[0]}", is_failure=False)]


def measure_on(
    gpu: Gpu | None, setting: Setting, device: torch.device, backends: Sequence[str], rounds: int
) -> tuple[list[StepResult], list[LeftOut]]:
    """See :func:`measure`.

    :raises torch.OutOfMemoryError: not even the reference has room.
    """
    problem = Problem(setting, device)
    referee = Referee(problem)
    trainers: dict[str, Trainer] = {}
    watches: dict[str, Callable[[], list[float]]] = {}
    notes: list[LeftOut] = []
    for name, make in contestants(problem, backends).items():
        with leaving_out(notes, name, setting):
            trainer = make()
            referee.check(trainer)
            watches[name] = _watch(trainer, gpu)
            trainers[name] = trainer
    if FLOOR not in trainers:
        return [], notes
    samples = timing.interleave(watches, rounds, warmup=1)  # each has had a step or more
    for name, trainer in trainers.items():
        if isinstance(trainer, GradProm) and trainer.ip_opt.skipped_steps.item() != 0:  # type: ignore[attr-defined]
            del samples[name]
            reason = f"{name} is left out of {setting}: it skipped steps, its gradients were not finite"
            notes.append(LeftOut(reason, is_failure=True))
    floor = trainers[FLOOR]
    common = {
        "network": f"srresnet ({setting.blocks} x {setting.width}) + resnet{setting.depth} (x {setting.vr_width})",
        "parameters": sum(p.numel() for p in floor.params),
        "vr_parameters": sum(p.numel() for p in floor.vr.parameters()),
        "optimizer": setting.optimizer,
        "variant": setting.variant,
        "batch": setting.batch,
        "size": setting.size,
    }
    return step_results(common, samples), notes


def _watch(trainer: Trainer, gpu: Gpu | None) -> Callable[[], list[float]]:
    """Seconds of the parts of a step, or of the whole where it is replayed from a graph.

    :raises RuntimeError: a graph was asked for, and the step waits for the device.
    """
    if trainer.problem.setting.variant != "graph":
        return timing.laps([trainer.backward, trainer.update, trainer.finish], trainer.problem.device)
    assert gpu is not None, "the command line refuses graphs on a CPU"
    if gpu.is_awaited_by(trainer.step):
        raise RuntimeError("it waits for the device, which no CUDA graph can hold")
    whole = gpu.queue_watch(gpu.capture([trainer.step]))
    return lambda: [whole()]
