"""The tasks of VRs: what network an auxiliary needs, its loss, and what is measured of it. A new one is one class here.

An auxiliary reads its target from a batch in training and from a subset in evaluation; it owns no network.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from models import SEG, VR, Networks
from models.registry import Registry
from train import losses
from train.errors import RunError
from train.evaluation.scores import Score, Scorer
from train.strategies.base import Measure, Role

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from train.data.base import ImageData, Subset
    from train.strategies.base import Batch

AUXILIARIES: Registry[Auxiliary] = Registry("auxiliary")


class Auxiliary(ABC):
    """One task of a VR.

    :cvar name: on the command line (``--aux``).
    :cvar role: of its network.
    :cvar networks: where its network is looked up.
    :cvar measures: what is measured on every batch besides the loss.
    :cvar scores: what is measured in the evaluation.
    :cvar masks: whether it reads masks.
    :param data: tells the number of classes.
    :param smoothing: label smoothing of its loss, where it has any.
    :raises RunError: the data have not got what the task needs.
    """

    name: ClassVar[str]
    role: ClassVar[Role]
    networks: ClassVar[Networks]
    measures: ClassVar[tuple[Measure, ...]]
    scores: ClassVar[tuple[Score, ...]]
    masks: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, data: ImageData, smoothing: float = 0.0) -> None: ...

    num_classes: int

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """``L_VR``, ``[]``."""

    @abstractmethod
    def measure(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The ``measures`` of a batch, ``[]`` each, without a graph."""

    @abstractmethod
    def can_score(self, subset: Subset) -> bool:
        """Whether ``subset`` has what an answer is compared with."""

    @abstractmethod
    def scorer(self, subset: Subset) -> Scorer:
        """A new scorer for images of ``subset``, which has what it needs."""

    def baseline(self, subset: Subset) -> dict[str, Any]:
        """What an answer that ignores the image achieves, as further keys of ``metrics.json``."""
        return {}


@AUXILIARIES.register("dia")
class Diagnosis(Auxiliary):
    """Which class an image has: cross-entropy, and the share of right answers."""

    name = "dia"
    role = Role("diagnosis", "auxiliary", "vr")
    networks = VR
    measures = (Measure("accuracy"),)
    scores = (Score("accuracy", "diagnosis right", ".1%"),)

    def __init__(self, data: ImageData, smoothing: float = 0.0) -> None:
        if data.train.labels is None or data.num_classes < 2:
            raise RunError(f"needs a diagnosis, and {data.name} has no two classes; use ip-only")
        self.num_classes = data.num_classes
        self.smoothing = smoothing

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return losses.diagnosis_loss(output, batch.labels, smoothing=self.smoothing)

    def measure(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        from train.evaluation.metrics import right

        known = batch.labels >= 0
        return {"accuracy": right(output, batch.labels).float().sum() / known.sum().clamp(min=1)}

    def can_score(self, subset: Subset) -> bool:
        return subset.labels is not None

    def scorer(self, subset: Subset) -> Scorer:
        return _Right(subset)

    def baseline(self, subset: Subset) -> dict[str, Any]:
        from train.evaluation.metrics import majority_share

        return {"accuracy_majority": majority_share(subset.labels)}


class _Right(Scorer):
    """Of each image whose label is known, whether the answer is right."""

    def __init__(self, subset: Subset) -> None:
        import numpy as np

        assert subset.labels is not None
        self._labels = subset.labels
        self._right = np.full(len(subset), np.nan)

    def add(self, output: Tensor, index: Sequence[int]) -> None:
        import torch

        from train.evaluation.metrics import right

        labels = self._labels[list(index)]
        answers = right(output, torch.tensor(labels)).double().numpy()
        answers[labels < 0] = math.nan
        self._right[list(index)] = answers

    def result(self) -> dict[str, float]:
        import numpy as np

        known = self._right[~np.isnan(self._right)]
        return {"accuracy": float(known.mean()) if len(known) else math.nan}

    def per_image(self) -> dict[str, np.ndarray]:
        return {"accuracy": self._right}


@AUXILIARIES.register("seg")
class Segmentation(Auxiliary):
    """Which class every pixel has: cross-entropy plus Dice loss; mean Dice and mean intersection over union.

    Both scores are those of the confusion matrix of all pixels of all images, averaged over the classes that occur in
    the masks or in the answers, the background among them.
    """

    name = "seg"
    role = Role("segmentation", "auxiliary", "seg")
    networks = SEG
    measures = (Measure("dice", "Dice", "{:.2f}"),)
    scores = (Score("miou", "mIoU", ".3f"), Score("dice", "Dice", ".3f"))
    masks = True

    def __init__(self, data: ImageData, smoothing: float = 0.0) -> None:
        if not data.train.has_masks or data.num_mask_classes < 2:
            raise RunError(f"needs masks for --aux seg, and {data.name} has none; use --aux dia or another data set")
        self.num_classes = data.num_mask_classes

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        assert batch.masks is not None
        return losses.segmentation_loss(output, batch.masks)

    def measure(self, output: Tensor, batch: Batch) -> dict[str, Tensor]:
        from train.evaluation.metrics import confusion, overlap

        assert batch.masks is not None
        return {"dice": overlap(confusion(output, batch.masks)).dice.float()}

    def can_score(self, subset: Subset) -> bool:
        return subset.has_masks

    def scorer(self, subset: Subset) -> Scorer:
        return _Overlap(subset, self.num_classes)


class _Overlap(Scorer):
    def __init__(self, subset: Subset, num_classes: int) -> None:
        import torch

        self._subset = subset
        self._counts = torch.zeros(len(subset), num_classes, num_classes + 1, dtype=torch.int64)

    def add(self, output: Tensor, index: Sequence[int]) -> None:
        from train.evaluation.metrics import confusion

        masks = self._subset.masks_tensor(list(index))
        for row, place in enumerate(index):
            self._counts[place] = confusion(output[row : row + 1], masks[row : row + 1])

    def result(self) -> dict[str, float]:
        from train.evaluation.metrics import overlap

        found = overlap(self._counts.sum(0))
        return {"miou": found.iou.item(), "dice": found.dice.item()}

    def per_image(self) -> dict[str, np.ndarray]:
        import numpy as np

        from train.evaluation.metrics import overlap

        each = [overlap(counts) for counts in self._counts]
        return {
            "miou": np.array([one.iou.item() for one in each]),
            "dice": np.array([one.dice.item() for one in each]),
        }
