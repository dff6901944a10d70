"""The losses, in the notation of the paper: ``L_IP`` compares images, ``L_VR`` what a network recognizes in them.

Every one is a mean over the batch, ``[]``. PyTorch and MONAI are imported when a loss is computed: strategies name
their losses, and the command line reads the strategies before it needs either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from models.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from train.strategies.base import Keeps

IMAGE_LOSSES: Registry[Tensor] = Registry("image loss")
"""Losses between images by name (``--ip-loss``): ``f(enhanced, clean)``, ``float [N, C, H, W]`` each, gives ``[]``."""


@IMAGE_LOSSES.register("mse")
def image_loss(enhanced: Tensor, clean: Tensor) -> Tensor:
    """``L_IP``: mean squared error over all pixels.

    :param enhanced: ``float [N, C, H, W]``.
    :param clean: the same shape.
    """
    import torch.nn.functional as F

    return F.mse_loss(enhanced, clean)


def rmse_loss(enhanced: Tensor, clean: Tensor) -> Tensor:
    """Root of the mean squared error over the batch. Where the images are equal its gradient is 0, and not the NaN of a
    root at 0.

    :param enhanced: ``float [N, C, H, W]``.
    :param clean: the same shape.
    """
    import torch

    return image_loss(enhanced, clean).clamp(min=torch.finfo(torch.float32).eps ** 2).sqrt()


def gradient_loss(enhanced: Tensor, clean: Tensor) -> Tensor:
    """Mean absolute error of the forward differences along x, plus that of those along y.

    :param enhanced: ``float [N, C, H, W]``, ``H`` and ``W`` at least 2.
    :param clean: the same shape.
    """
    error = enhanced - clean
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


HIGH_PASS = tuple(10 * i / 512 for i in range(1, 6))
"""Where the high-pass filters of Frepa pass 1 - 1/e, in cycles per pixel: 10, 20, ... 50 bins at 512 pixels."""


def high_passed(images: Tensor, cut: float) -> Tensor:
    """Images without their low frequencies: the gain is ``1 - exp(-r^2 / cut^2)``, 0 at frequency 0.

    :param images: ``float [..., H, W]``.
    :param cut: in cycles per pixel.
    """
    from train.frequencies import filtered, radius

    distance = radius(*images.shape[-2:], device=images.device)
    return filtered(images, -(-distance.square() / cut**2).expm1())


def high_frequency_loss(enhanced: Tensor, clean: Tensor) -> Tensor:
    """HFL: mean absolute error of the high-passed images, summed over the filters of ``HIGH_PASS``. The filter is
    centered on frequency 0, which it removes: a constant offset costs nothing.

    :param enhanced: ``float [N, C, H, W]``.
    :param clean: the same shape.
    """
    import torch

    error = enhanced - clean  # filters are linear
    return torch.stack([high_passed(error, cut).abs().mean() for cut in HIGH_PASS]).sum()


@IMAGE_LOSSES.register("frepa")
def frepa_loss(enhanced: Tensor, clean: Tensor) -> Tensor:
    """``RMSE + gradient + 0.2 HFL``: the reconstruction loss of Frepa's published code (Chu et al., arXiv:2407.14651).

    :param enhanced: ``float [N, C, H, W]``, ``H`` and ``W`` at least 2.
    :param clean: the same shape.
    """
    return rmse_loss(enhanced, clean) + gradient_loss(enhanced, clean) + 0.2 * high_frequency_loss(enhanced, clean)


def embedding_distance(embedding: Tensor, target: Tensor) -> Tensor:
    """``1 - cos`` between two embeddings of one image, over the channels at each place. No gradient reaches ``target``.

    :param embedding: ``float [N, D, h, w]``.
    :param target: the same shape.
    """
    import torch.nn.functional as F

    return (1 - F.cosine_similarity(embedding, target.detach(), dim=1)).mean()


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


# ----------------------------------------------------------------------------------------------------------------------
# Unpaired images. HQG-Net (arXiv:2307.07829) names these terms in its abstract; the formulas are ours, and common ones.


def critic_loss(real: Tensor, made: Tensor) -> Tensor:
    """``softplus(-D(z)) + softplus(D(x))``: the cross-entropy of telling real images z from those that a network made.

    :param real: logits of images of high quality, ``float [N, 1, h, w]``.
    :param made: logits of enhanced images.
    """
    import torch.nn.functional as F

    return F.softplus(-real).mean() + F.softplus(made).mean()


def adversarial_loss(made: Tensor) -> Tensor:
    """``softplus(-D(x))``: what a network pays for images that the critic tells from real ones.

    :param made: logits of enhanced images, ``float [N, 1, h, w]``.
    """
    import torch.nn.functional as F

    return F.softplus(-made).mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """R1 (L. Mescheder et al., ICML 2018, arXiv:1801.04406): ``1/2 E ||grad D(z)||^2``, with its graph.

    :param logits: ``float [N, 1, h, w]``; the critic's answer about an image is their mean.
    :param images: what they are of, ``float [N, C, H, W]``, with ``requires_grad``.
    """
    import torch

    answers = logits.flatten(1).mean(1).sum()
    (slope,) = torch.autograd.grad(answers, images, create_graph=True)
    return slope.square().flatten(1).sum(1).mean() / 2


def haar(images: Tensor) -> Tensor:
    """One level of the orthonormal Haar transform.

    :param images: ``float [N, C, H, W]``, sides even.
    :returns: ``float [N, C, 4, H / 2, W / 2]``: of each 2 x 2 block its sum, the difference of its columns (left minus
        right), that of its rows (upper minus lower), and that of its diagonals, each divided by 2.
    """
    import torch
    import torch.nn.functional as F

    blocks = F.pixel_unshuffle(images, 2).unflatten(1, (images.shape[1], 4))
    signs = [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]
    return torch.einsum("bp,ncphw->ncbhw", torch.tensor(signs).to(images) / 2, blocks)


def wavelet_loss(enhanced: Tensor, degraded: Tensor, *, keeps: Keeps = "details") -> Tensor:
    """``sum_b w_b |b(x) - b(y)|`` over the Haar sub-bands b, each a mean over its coefficients.

    :param enhanced: ``float [N, C, H, W]``, sides even.
    :param degraded: the same shape.
    :param keeps: ``"details"``: weights 0.1 for the average and 1 for the three details, which uneven light and blur
        leave. ``"brightness"``: 1 and 0.1, as noise is in the details.
    """
    import torch

    average, detail = (0.1, 1.0) if keeps == "details" else (1.0, 0.1)
    difference = (haar(enhanced) - haar(degraded)).abs().mean((0, 1, 3, 4))
    return difference @ torch.tensor([average, detail, detail, detail]).to(difference)


def feature_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """The mean, over several encoders and levels, of the mean absolute difference of features.

    :param features: of the enhanced images.
    :param targets: of the degraded images, the same shapes; no gradient reaches them.
    """
    import torch
    import torch.nn.functional as F

    pairs = zip(features, targets, strict=True)
    return torch.stack([F.l1_loss(feature, target.detach()) for feature, target in pairs]).mean()


def consistency_loss(enhanced: Tensor, guide: Tensor) -> Tensor:
    """Consistency in the domain of high quality: mean absolute difference of what the guidance encoder says of the
    enhanced images and of their guides.

    :param enhanced: ``float [N, K]``.
    :param guide: ``float [N, K]``; no gradient reaches it.
    """
    import torch.nn.functional as F

    return F.l1_loss(enhanced, guide.detach())


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``1/2 mean(m^2 + s^2 - log s^2 - 1)``: the divergence from the standard normal distribution, per dimension.

    :param mean: ``float [N, K]``.
    :param log_variance: ``float [N, K]``.
    """
    return (mean.square() + log_variance.exp() - log_variance - 1).mean() / 2
