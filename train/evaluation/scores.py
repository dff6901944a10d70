"""What an evaluation finds out about a network that recognizes something, gathered a few images at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Score(NamedTuple):
    """Something that an evaluation finds out about a VR.

    :param key: in ``metrics.json``: bare for the enhanced images, with ``_degraded`` and ``_clean`` for the others.
    :param title: heads the column of the table.
    :param form: how a value is written, for :func:`format`.
    """

    key: str
    title: str
    form: str


REFERENCE_FREE = (
    Score("blur", "blur", ".3f"),
    Score("feature_frechet", "Frechet distance (reader's features)", ".3g"),
    Score("feature_kernel", "kernel distance (reader's features)", ".3g"),
)
"""What is measured without clean images, where it is asked for; less is better.

*blur* is the mean of scikit-image's ``blur_effect``. The distances are those between the features that the independent
reader has of images of a kind and of clean test images (of the guides, where the clean ones are not known). They are
not FID and KID, whose features are those of Inception on photographs, and no figure of another project is like them.
"""


class Scorer(ABC):
    """Gathers what a VR says about one kind of images, a few at a time: its memory does not grow with their number."""

    @abstractmethod
    def add(self, output: Tensor, index: Sequence[int]) -> None:
        """
        :param output: the network's output for the images ``index`` of the subset, on the CPU.
        """

    @abstractmethod
    def result(self) -> dict[str, float]:
        """The scores by their keys, over all images that were added."""

    @abstractmethod
    def per_image(self) -> dict[str, np.ndarray]:
        """The scores by their keys, ``float64 [N]`` each, of every image by itself; NaN where it has none."""
