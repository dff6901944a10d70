"""What a strategy is, and the step that all strategies with an auxiliary share.

Notation as in the paper: IP has the parameters theta, VR has phi. ``L_IP`` is the mean squared error between the
enhanced and the clean image, ``L_VR`` the cross-entropy of the diagnosis that VR reads from the enhanced image.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import gradprom_ext as gp
from train.batches import Batch
from train.config import GateName
from train.metrics import right

Phase = Literal["pretrain", "train"]
GradPromOptimizer = gp.GradPromSGD | gp.GradPromAdam
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class Learner(Generic[Optimizer]):
    """A network with what moves it."""

    network: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler

    def step(self) -> None:
        self.optimizer.step()
        self.schedule.step()


class StepLog(NamedTuple):
    """What one step measured: 0-dim tensors on the device, so that nobody waits for them before somebody reads them.

    :param loss: ``L_IP``.
    :param aux_loss: ``L_VR``.
    :param accuracy: share of the batch that VR diagnosed right.
    :param cosine: between the gradients of ``L_IP`` and ``L_VR`` by theta.
    :param gate: the weight the auxiliary gradient got before lambda.
    :param skipped: 1 where a gradient was not finite and theta stayed as it was, else 0.
    :param enhanced: the enhanced batch.

    What a step has not got (``cosine`` without VR, say) is ``None``.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    accuracy: Tensor | None = None
    cosine: Tensor | None = None
    gate: Tensor | None = None
    skipped: Tensor | None = None
    enhanced: Tensor | None = None


class Strategy(ABC):
    """One way to train IP.

    :cvar gate: the gate of IP's optimizer.
    :cvar gate_is_free: whether the user may choose another one.
    :cvar uses_vr: whether there is a VR at all.
    :cvar pretrains_vr: whether a phase ``"pretrain"`` comes before the phase ``"train"``.
    :param ip: IP, its optimizer one of ``gradprom_ext``.
    :param vr: VR, its optimizer one of ``torch.optim``; ``None`` where ``uses_vr`` is false.
    """

    gate: ClassVar[GateName]
    gate_is_free: ClassVar[bool] = False
    uses_vr: ClassVar[bool] = True
    pretrains_vr: ClassVar[bool] = False

    def __init__(self, ip: Learner[GradPromOptimizer], vr: Learner[torch.optim.Optimizer] | None) -> None:
        self.ip = ip
        self.vr = vr

    def enter(self, phase: Phase) -> None:
        """Sets the networks' modes; called when a phase begins, and when a run is resumed within it."""
        for learner in (self.ip, self.vr):
            if learner is not None:
                learner.network.train()

    def pretrain_step(self, batch: Batch) -> StepLog:
        """One step of the phase ``"pretrain"``."""
        raise NotImplementedError(f"{type(self).__name__} has no pre-training")

    @abstractmethod
    def step(self, batch: Batch) -> StepLog:
        """One step of the phase ``"train"``: the networks, optimizers and schedules have moved on when it returns."""

    def move_ip(self, loss: Tensor, *aux_losses: Tensor) -> gp.GateStats:
        """Steps theta with the gradients that the gate lets through; VR's parameters get their ``.grad``."""
        self.ip.optimizer.zero_grad()
        self.ip.optimizer.backward(loss, *aux_losses)
        self.ip.step()
        assert self.ip.optimizer.stats is not None  # there has been a step
        return self.ip.optimizer.stats


def share_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the labels that the largest logit names: ``[N, K]``, ``[N]`` -> ``[]``."""
    return right(logits.detach(), labels).float().mean()


class Advised(Strategy):
    """IP advised by VR: the step of joint training, of frozen parameters and of GradProm. They differ in the gate."""

    vr: Learner[torch.optim.Optimizer]

    def step(self, batch: Batch) -> StepLog:
        enhanced = self.ip.network(batch.degraded)
        loss = F.mse_loss(enhanced, batch.clean)
        logits = self.vr.network(enhanced)
        aux_loss = F.cross_entropy(logits, batch.labels)
        self.vr.optimizer.zero_grad()
        stats = self.move_ip(loss, aux_loss)
        self.move_vr()
        return StepLog(
            loss=loss.detach(),
            aux_loss=aux_loss.detach(),
            accuracy=share_right(logits, batch.labels),
            cosine=stats.cosine[0],
            gate=stats.gate[0],
            skipped=stats.skipped,
            enhanced=enhanced.detach(),
        )

    def move_vr(self) -> None:
        """Steps phi with the gradient of ``L_VR``."""
        self.vr.step()
