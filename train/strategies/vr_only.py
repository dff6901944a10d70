"""VR alone: *Benchmark-ii* (diagnosis) and *Benchmark-iii* (segmentation) of the paper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from train.strategies import STRATEGIES
from train.strategies.base import AUX_LOSS, SKIPPED, Losses, Measure, Measurements, WithVR, columns

if TYPE_CHECKING:
    from torch import Tensor

    from train.strategies.base import Batch


@STRATEGIES.register("vr-only")
class VROnly(WithVR):
    """phi is stepped with the gradient of ``L_VR`` on degraded (or, with ``--train-on clean``, on clean) images; there
    is no IP, and so nothing is enhanced. Several auxiliaries learn side by side and know nothing of each other."""

    trains_ip = False
    validated_by = "tasks"
    settings = frozenset({"train_on"})

    @property
    def measures(self) -> tuple[Measure, ...]:
        among = len(self.auxiliaries)
        own = [columns((AUX_LOSS, *each.measures), each.name, among) for each in self.auxiliaries]
        return (*(measure for each in own for measure in each), SKIPPED)

    @property
    def score(self) -> Measure:
        first = [each.scores[0] for each in self.auxiliaries]
        if len(first) == 1:
            return Measure(first[0].key, first[0].title, f"{{:{first[0].form}}}")
        return Measure("score", f"mean of {' and '.join(each.title for each in first)}", "{:.3f}")

    def losses(self, batch: Batch) -> Losses:
        images = batch.clean if self.terms.train_on == "clean" else batch.enlarged()
        return self.recognize_alone(images, batch)

    def update(self, found: Losses) -> Measurements:
        return self.update_alone(found)

    def enhance(self, degraded: Tensor) -> Tensor:
        return degraded
