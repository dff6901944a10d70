"""A fixed VR: ESTR (Liu et al. 2019, arXiv:1910.09185), called frozen-params in the paper."""

from __future__ import annotations

import torch.nn.functional as F

from train.batches import Batch
from train.strategies import STRATEGIES
from train.strategies.base import Advised, Phase, StepLog, share_right


@STRATEGIES.register("frozen")
class Frozen(Advised):
    """VR learns to diagnose clean images first; then phi and its batch statistics stay as they are while IP is trained
    with the gradient of ``L_IP + lambda L_VR``."""

    gate = "always"
    pretrains_vr = True

    def enter(self, phase: Phase) -> None:
        super().enter(phase)
        if phase == "train":
            self.vr.network.eval().requires_grad_(False)

    def pretrain_step(self, batch: Batch) -> StepLog:
        logits = self.vr.network(batch.clean)
        aux_loss = F.cross_entropy(logits, batch.labels)
        self.vr.optimizer.zero_grad()
        aux_loss.backward()
        self.vr.step()
        return StepLog(aux_loss=aux_loss.detach(), accuracy=share_right(logits, batch.labels))

    def move_vr(self) -> None:
        """phi stays as it is."""
