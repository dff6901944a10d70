"""What can be measured of images whose clean partners are not known (``--reference-free``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from train.features import penultimate
from train.inference import forward


class ReferenceFree:
    """Gathers how blurred images are, and what a reader's features of them are, a few images at a time.

    :param readers: networks that took no part in the training; the features of all of them are put side by side.
    :param device: where they are.
    """

    def __init__(self, readers: Sequence[nn.Module], device: torch.device) -> None:
        self._readers = list(readers)
        self._device = device
        self._blur: dict[str, list[float]] = {}
        self._features: dict[str, list[Tensor]] = {}

    def add(self, kind: str, images: Tensor) -> None:
        """
        :param kind: ``"clean"``, ``"degraded"`` or ``"enhanced"``; the clean ones are what the others should be like.
        :param images: ``float32 [N, C, H, W]`` in about [0, 1].
        """
        images = images.clamp(0, 1)
        self._blur.setdefault(kind, []).extend(blur(images))
        if self._readers:
            found = [features(reader, images, device=self._device) for reader in self._readers]
            self._features.setdefault(kind, []).append(torch.cat(found, dim=1))

    def result(self, suffixes: Mapping[str, str]) -> dict[str, float]:
        """What was measured, by the keys of ``metrics.json``: ``blur*``, and, with readers, ``feature_frechet*`` and
        ``feature_kernel*``.

        :param suffixes: the end of a key, by the kind of images.
        """
        found = {f"blur{suffixes[kind]}": sum(values) / len(values) for kind, values in self._blur.items()}
        gathered = {kind: torch.cat(parts) for kind, parts in self._features.items()}
        for kind, own in gathered.items():
            if kind != "clean" and "clean" in gathered:
                found[f"feature_frechet{suffixes[kind]}"] = frechet_distance(own, gathered["clean"])
                found[f"feature_kernel{suffixes[kind]}"] = kernel_distance(own, gathered["clean"])
        return found


def blur(images: Tensor) -> list[float]:
    """How blurred each image is, from 0 (sharp) to 1: F. Crete et al., "The blur effect", SPIE 2007 (scikit-image), of
    the mean over the channels.

    :param images: ``float32 [N, C, H, W]`` in [0, 1].
    """
    from skimage.measure import blur_effect

    return [float(blur_effect(image.mean(0).double().cpu().numpy())) for image in images]


@torch.no_grad()
def features(network: nn.Module, images: Tensor, *, device: torch.device) -> Tensor:
    """What a network's last layer is given, averaged over the places of a feature map.

    :param network: in evaluation mode, on ``device``.
    :param images: ``float32 [N, C, H, W]``.
    :returns: ``float32 [N, F]``, on the CPU.
    """

    def described(part: Tensor) -> Tensor:
        with penultimate(network) as seen:
            network(part)
        return seen[0].flatten(2).mean(2) if seen[0].ndim > 2 else seen[0]

    return forward(described, images, device=device)


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The Frechet distance of two normal distributions that have the means and covariances of these features (MONAI).

    It needs several images, and falls with their number: distances of different numbers cannot be compared. NaN with
    fewer than two images on a side.

    :param one: ``float [N, F]``.
    :param other: ``float [M, F]``.
    """
    from monai.metrics.fid import get_fid_score

    if min(len(one), len(other)) < 2:
        return float("nan")
    return float(get_fid_score(one.detach().double(), other.detach().double()))


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """The squared maximum mean discrepancy under the kernel ``(a . b / F + 1)^3``, unbiased: what KID (M. Binkowski et
    al., arXiv:1801.01401) is for other features. It may be a little below 0. NaN with fewer than two images on a side.

    torchmetrics has it for equally many images on both sides, and guides are not as many as test images.

    :param one: ``float [N, F]``.
    :param other: ``float [M, F]``.
    """
    if min(len(one), len(other)) < 2:
        return float("nan")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x.double() @ y.double().T / x.shape[1] + 1) ** 3

    def among(x: Tensor) -> Tensor:  # of different images
        own = kernel(x, x)
        return (own.sum() - own.trace()) / (len(x) * (len(x) - 1))

    return float(among(one) + among(other) - 2 * kernel(one, other).mean())
