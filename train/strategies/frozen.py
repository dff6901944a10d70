"""A fixed VR: ESTR (Liu et al. 2019, arXiv:1910.09185), called frozen-params in the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.strategies import STRATEGIES
from train.strategies.base import IP, Advised, Losses, Measurements, Phase

if TYPE_CHECKING:
    from torch import Tensor

    from train.strategies.base import Batch

PRETRAIN = "pretrain"


@STRATEGIES.register("frozen")
class Frozen(Advised):
    """Every VR learns its task on clean images first; then phi and its batch statistics stay as they are while IP is
    trained with the gradient of ``L_IP + lambda L_VR``."""

    gate = "always"
    settings = Advised.settings | {"pretrain_epochs"}

    def phases(self, per_epoch: int) -> list[Phase]:
        (train,) = super().phases(per_epoch)
        advisors = tuple(each.role.key for each in self.auxiliaries)
        pretrain = Phase(PRETRAIN, "pre-training VR", self.terms.pretrain_epochs * per_epoch, advisors)
        return [pretrain, train._replace(moves=(IP.key,))]

    def enter(self, phase: Phase) -> None:
        super().enter(phase)
        if phase.name != PRETRAIN:
            for each in self.auxiliaries:
                self.vr(each).network.eval().requires_grad_(False)

    def losses(self, batch: Batch) -> Losses:
        return self.recognize_alone(batch.clean, batch) if self._pretrains else super().losses(batch)

    def update(self, found: Losses) -> Measurements:
        if not self._pretrains:
            return super().update(found)
        measured = self.update_alone(found)
        del measured["skipped"]  # the column counts what happened to theta
        return measured

    def move_vr(self, skipped: Tensor) -> None:
        """phi stays as it is."""

    @property
    def _pretrains(self) -> bool:
        return self.phase is not None and self.phase.name == PRETRAIN
