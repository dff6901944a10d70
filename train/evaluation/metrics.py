"""How good an enhanced image is, how often a diagnosis is right, and how well a segmentation covers.

Images are scored per image at data range 1 and the scores averaged. Whatever is scored is clamped to [0, 1] first, the
degraded images just like the enhanced ones: an image outside its range cannot be shown, and clamping alone gains a
noisy image about 0.9 dB at sigma 0.1, which must not be counted as the network's merit.

At most 60 dB of each image count (``PSNR_CAP``), of degraded, classical and enhanced images alike. An image that equals
the clean one has an infinite PSNR, and one that differs by rounding errors has more than 100 dB: a single black image
would decide a mean. Leaving such images out would hide what a network spoils in them, and a higher cap would let errors
count that cannot be seen: clean images have 8 bits, whose rounding alone is an error of 58.9 dB. The cap is that of
Netflix's libvmaf for 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PSNR_CAP = 60.0
"""The PSNR in dB that an image or a batch can have at most: a root mean squared error of 1/1000 of the range."""

_BATCH = 64  # images scored at once: bounds the memory that SSIM's windows take


@dataclass(frozen=True)
class Quality:
    """Scores per image.

    :param psnr: peak signal-to-noise ratio in dB, ``float32 [N]``, at most ``PSNR_CAP``; NaN where a pixel is NaN.
    :param ssim: structural similarity, at most 1, ``float32 [N]``; NaN likewise.
    """

    psnr: Tensor
    ssim: Tensor

    @property
    def mean_psnr(self) -> float:
        """In dB; NaN where one of the images has none, as an image that a network made of NaN must not be forgotten."""
        return self.psnr.double().mean().item()

    @property
    def mean_ssim(self) -> float:
        """NaN where one of the images has none."""
        return self.ssim.double().mean().item()

    @property
    def capped(self) -> int:
        """How many images reach ``PSNR_CAP``."""
        return int((self.psnr >= PSNR_CAP).sum())

    @property
    def undefined(self) -> int:
        """How many images hold NaN, and so have no score."""
        return int(self.psnr.isnan().sum())


def psnr_caption(psnr: float) -> str:
    """A PSNR in words.

    :param psnr: in dB, as in :class:`Quality`.

    >>> psnr_caption(20.0), psnr_caption(PSNR_CAP), psnr_caption(float("nan"))
    ('PSNR 20.00 dB', 'PSNR ≥ 60 dB', 'PSNR undefined: NaN')
    """
    if psnr != psnr:
        return "PSNR undefined: NaN"
    return f"PSNR {psnr:.2f} dB" if psnr < PSNR_CAP else f"PSNR \N{GREATER-THAN OR EQUAL TO} {PSNR_CAP:.0f} dB"


def psnr_of(images: Tensor, clean: Tensor, *, dim: tuple[int, ...] | None = None) -> Tensor:
    """PSNR in dB at data range 1, at most ``PSNR_CAP``; on the tensors' device, without waiting for it.

    :param images: ``float [N, C, H, W]``, clamped to [0, 1] here.
    :param clean: the same shape, in [0, 1].
    :param dim: what the error is averaged over; by default everything. ``(1, 2, 3)``: a value per image, ``[N]``.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    reduction: Any = "elementwise_mean" if dim is None else "none"
    psnr = peak_signal_noise_ratio(images.clamp(0, 1), clean, data_range=1.0, reduction=reduction, dim=dim)
    return psnr.clamp(max=PSNR_CAP)


def image_quality(images: Tensor, clean: Tensor) -> Quality:
    """Scores images against the clean ones, at data range 1, after clamping them to [0, 1].

    PSNR (torchmetrics) is that of the mean squared error over all pixels and channels of one image, at most
    ``PSNR_CAP``. SSIM (MONAI) is that of Z. Wang et al., "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 2004: an 11 x 11 Gaussian window of sigma 1.5 wherever it fits into the image, K = 0.01 and
    0.03, channels averaged. It is not that of torchmetrics, which counts windows over a mirrored margin too.

    :param images: ``float [N, C, H, W]``, at least 11 x 11 pixels.
    :param clean: the same shape, in [0, 1].
    :returns: scores on the CPU.
    :raises ValueError: the shapes differ, or there is no image.
    """
    from monai.metrics.regression import SSIMMetric

    if images.shape != clean.shape or clean.ndim != 4 or not len(clean):
        raise ValueError(
            f"images and clean images must share one shape [N, C, H, W] with N > 0, "
            f"not {list(images.shape)} and {list(clean.shape)}"
        )
    similarity = SSIMMetric(spatial_dims=2, data_range=1.0, win_size=11, kernel_sigma=1.5, reduction="none")
    psnr, ssim = [], []
    for image, target in zip(images.split(_BATCH), clean.split(_BATCH), strict=True):
        pair = image.float().clamp(0, 1), target.float()
        psnr.append(psnr_of(*pair, dim=(1, 2, 3)))
        ssim.append(torch.as_tensor(similarity(*pair)).flatten())
    return Quality(torch.cat(psnr).cpu(), torch.cat(ssim).cpu())


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is that of the label, of those whose label is known.

    :param logits: ``float [N, num_classes]``.
    :param labels: ``int64 [N]``, -1 where it is not known.
    :raises ValueError: the numbers differ, or no label is known.
    """
    known = labels >= 0
    if len(logits) != len(labels) or not known.any():
        raise ValueError(
            f"accuracy needs as many logits as labels, and at least one that is known: {len(logits)}, {len(labels)}"
        )
    return right(logits, labels)[known].double().mean().item()


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which diagnoses are right: those whose largest logit is that of the label. NaN is no diagnosis, and never right.

    :param logits: ``float [N, num_classes]``.
    :param labels: ``int64 [N]``; no diagnosis is right where it is -1, not known.
    :returns: ``bool [N]``, on the tensors' device.
    """
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def majority_share(labels: np.ndarray | None) -> float | None:
    """How often the commonest class is right, of the images whose class is known: what a diagnosis that ignores the
    image achieves."""
    known = np.empty(0, np.int64) if labels is None else labels[labels >= 0]
    return float(np.bincount(known).max() / len(known)) if len(known) else None


def confusion(logits: Tensor, masks: Tensor) -> Tensor:
    """How many pixels of each class were given which answer (torchmetrics).

    :param logits: ``float [N, K, H, W]``; a pixel with NaN in it is no answer.
    :param masks: ``int64 [N, H, W]``, in [0, K).
    :returns: ``int64 [K, K + 1]``: true classes in rows, answers in columns, the last of which counts the missing ones.
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    classes = logits.shape[1]
    answers = torch.where(logits.isnan().any(1), classes, logits.argmax(1))
    return multiclass_confusion_matrix(answers, masks, num_classes=classes + 1, validate_args=False)[:classes]


class Overlap(NamedTuple):
    """Means over the classes that occur in the masks or in the answers, ``float64 []``.

    :param iou: intersection over union.
    :param dice: twice the intersection over the sum of both.
    """

    iou: Tensor
    dice: Tensor


def overlap(counts: Tensor) -> Overlap:
    """What a confusion matrix is worth.

    :param counts: of :func:`confusion`, or a sum of such matrices.
    """
    counts = counts.double()
    hits, true, answered = counts.diagonal(), counts.sum(1), counts.sum(0)[:-1]
    occurs = (true + answered) > 0
    # A class that does not occur has 0 / 0 here, and takes no part in the mean.
    ratios = (hits / (true + answered - hits), 2 * hits / (true + answered))
    return Overlap(*(torch.where(occurs, ratio, 0).sum() / occurs.sum() for ratio in ratios))
