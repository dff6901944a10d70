"""IP alone: *Benchmark-i* of the paper."""

from __future__ import annotations

import torch.nn.functional as F

from train.batches import Batch
from train.strategies import STRATEGIES
from train.strategies.base import StepLog, Strategy


@STRATEGIES.register("ip-only")
class IPOnly(Strategy):
    """theta is stepped with the gradient of ``L_IP``; there is no VR, and so no diagnosis to report."""

    gate = "never"
    uses_vr = False

    def step(self, batch: Batch) -> StepLog:
        enhanced = self.ip.network(batch.degraded)
        loss = F.mse_loss(enhanced, batch.clean)
        stats = self.move_ip(loss)
        return StepLog(loss=loss.detach(), skipped=stats.skipped, enhanced=enhanced.detach())
