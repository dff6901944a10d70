"""The losses, in the notation of the paper: ``L_IP`` compares images, ``L_VR`` what a network recognizes in them.

Every one is a mean over the batch, ``[]``. PyTorch and MONAI are imported when a loss is computed: strategies name
their losses, and the command line reads the strategies before it needs either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def image_loss(enhanced: Tensor, clean: Tensor) -> Tensor:
    """``L_IP``: mean squared error over all pixels.

    :param enhanced: ``float [N, C, H, W]``.
    :param clean: the same shape.
    """
    import torch.nn.functional as F

    return F.mse_loss(enhanced, clean)


def diagnosis_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """``L_VR`` of a diagnosis: cross-entropy, averaged over the images whose label is known; 0 where none is.

    :param logits: ``float [N, K]``.
    :param labels: ``int64 [N]``, in [0, K), or -1 where the label is not known.
    :param smoothing: share of the target that is spread over all classes (C. Szegedy et al., arXiv:1512.00567).
    """
    import torch.nn.functional as F

    total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


def agreement_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The unsupervised ``L_VR``: mean squared error between the softmaxes of what VR says of the enhanced and of the
    clean image, over all classes (and pixels), as in ESTR (Liu et al. 2019, arXiv:1910.09185).

    :param logits: ``float [N, K]`` or ``float [N, K, H, W]``, of the enhanced images.
    :param target: the same shape, of the clean ones, without a graph.
    """
    import torch.nn.functional as F

    return F.mse_loss(logits.softmax(1), target.softmax(1))


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """``L_VR`` of a segmentation: cross-entropy plus Dice loss (MONAI).

    The Dice loss is ``1 - (2 sum(p m) + 1e-5) / (sum(p) + sum(m) + 1e-5)``, ``p`` the softmax of the logits and ``m``
    the mask of a class, averaged over images and classes, the background among them.

    :param logits: ``float [N, K, H, W]``.
    :param masks: ``int64 [N, H, W]``, in [0, K).
    """
    from monai.losses import DiceCELoss

    return DiceCELoss(to_onehot_y=True, softmax=True)(logits, masks[:, None])
