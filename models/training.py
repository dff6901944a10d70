"""What a network that owns its loss hands to whoever trains it.

Most IPs are trained with one loss that compares their output with the clean image, and know nothing of it. One that is
supervised inside (in several stages, in several branches) has a method::

    def training_loss(self, degraded: Tensor, clean: Tensor) -> TrainingLoss

besides its ``forward``, and is trained with what that returns. Nothing here imports PyTorch when it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Term(NamedTuple):
    """A loss besides the main one.

    :param weight: its fixed weight beside the main loss; the registry knows the same number
        (:meth:`models.registry.Networks.terms`).
    :param loss: ``[]`` with its graph, not weighted.
    """

    weight: float
    loss: Tensor


class TrainingLoss(NamedTuple):
    """A forward pass in training.

    :param enhanced: what ``forward`` returns, with its graph: ``float [N, C, H * scale, W * scale]``, not clipped.
    :param main: ``[]`` with its graph, weighted.
    :param terms: further losses by their names.
    """

    enhanced: Tensor
    main: Tensor
    terms: Mapping[str, Term] = {}

    def total(self, *, without: tuple[str, ...] = ()) -> Tensor:
        """The main loss plus the weighted terms, ``[]``.

        :param without: names of terms that are left out.
        """
        loss = self.main
        for name, term in self.terms.items():
            if name not in without:
                loss = loss + term.weight * term.loss
        return loss
