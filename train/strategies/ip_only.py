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
    """theta is stepped with the gradient of ``L_IP``; there is no VR, and so no diagnosis to report."""

    uses_auxiliaries = False

    @property
    def measures(self) -> tuple[Measure, ...]:
        # The columns of an advised training, those of the advice empty: step logs of strategies are put side by side.
        return advised_measures([(Diagnosis.name, Diagnosis.measures)])

    def losses(self, batch: Batch) -> Losses:
        self._kept = Buffers([self.ip.network])
        _, found = self.image_losses(batch)
        return found

    def update(self, found: Losses) -> Measurements:
        skipped = self.move_ip(found).skipped
        self._kept.restore_if(skipped)
        return found.measured | {"skipped": skipped}
