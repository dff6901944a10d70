"""IP alone: *Benchmark-i* of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.strategies import STRATEGIES
from train.strategies.auxiliary import Diagnosis
from train.strategies.base import Buffers, Losses, Measure, Measurements, WithIP, advised_measures

if TYPE_CHECKING:
    from train.strategies.base import Batch


@STRATEGIES.register("ip-only")
class IPOnly(WithIP):
    """theta is stepped with the gradient of ``L_IP``; there is no VR, and so no diagnosis to report.

    Losses of IP's own that are auxiliaries (``--ip-aux``) have GradProm's hard gate: theta is stepped with the main
    gradient plus each of theirs, with its fixed weight, where their cosine is at least 0.
    """

    uses_auxiliaries = False
    gate = "hard"  # without an auxiliary, it has nothing to decide

    @property
    def measures(self) -> tuple[Measure, ...]:
        if self.ip_aux:
            return advised_measures([], self.ip_aux)
        # The columns of an advised training, those of the advice empty: step logs of strategies are put side by side.
        return advised_measures([(Diagnosis.name, Diagnosis.measures)])

    def losses(self, batch: Batch) -> Losses:
        self._kept = Buffers([self.ip.network])
        _, found = self.image_losses(batch)
        return found

    def update(self, found: Losses) -> Measurements:
        stats = self.move_ip(found)
        self._kept.restore_if(stats.skipped)
        self.precision.update()
        return found.measured | self.gates(stats) | {"skipped": stats.skipped}
