"""Classical restoration of single images: what the degradations offer as their remedy. No network, nothing trained.

Images are ``float32 [C, H, W]`` on the CPU, and not clipped.
"""

from __future__ import annotations

import math
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor
# Non-local means: patch side, search distance and filtering strength h / sigma. From a small search on the validation
# split of COVID-CT at 128 px (sides 3, 5, 7; distances 5 to 11; strengths 0.5 to 1): the best at sigma 0.2 and 0.3, and
# within 0.05 dB of the best at sigma 0.1.
_NLM_PATCH, _NLM_DISTANCE, _NLM_STRENGTH = 5, 6, 0.6


def non_local_means(image: Tensor, sigma: float) -> Tensor:
    """Against white noise.

    A. Buades, B. Coll, J.-M. Morel, "A non-local algorithm for image denoising", CVPR 2005, in the fast variant of
    scikit-image.

    :param sigma: standard deviation of the noise, in the image's units; 0 returns the image as it is.
    """
    import torch
    from skimage.restoration import denoise_nl_means

    if sigma == 0:
        return image
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    restored = denoise_nl_means(
        pixels,
        patch_size=_NLM_PATCH,
        patch_distance=_NLM_DISTANCE,
        h=_NLM_STRENGTH * sigma,
        sigma=sigma,
        fast_mode=True,
        channel_axis=-1,
    )
    # scikit-image drops a single channel.
    return torch.from_numpy(restored.reshape(pixels.shape)).permute(2, 0, 1).float()


def non_local_means_settings() -> dict[str, Any]:
    """JSON-able facts that :func:`non_local_means` depends on."""
    return {
        "non-local means": [_NLM_PATCH, _NLM_DISTANCE, _NLM_STRENGTH],
        "scikit-image": version("scikit-image"),
    }


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation, as a viewer shows an image that is too small.

    Keys' kernel with a = -3/4, as PyTorch has it. Published tables have MATLAB's a = -1/2; on COVID-CT at 128 px (x3:
    129) that is 0.2 dB less at x2 and x3, and 0.1 dB less at x4.

    :param images: ``float32 [N, C, h, w]``, not clipped.
    :returns: ``float32 [N, C, h * scale, w * scale]`` on the same device; ``images`` themselves at scale 1.
    """
    import torch

    return images if scale == 1 else torch.nn.functional.interpolate(images, scale_factor=scale, mode="bicubic")


def anscombe(counts: np.ndarray) -> np.ndarray:
    """Turns Poisson noise into noise of standard deviation near 1 (F. J. Anscombe, Biometrika 35, 1948).

    :param counts: any shape; what is below 0 counts as 0.
    """
    return 2 * np.sqrt(np.maximum(counts, 0) + 3 / 8)


def inverse_anscombe(stabilized: np.ndarray) -> np.ndarray:
    """The mean of the counts whose transforms have the mean ``stabilized``: the exact unbiased inverse, in the closed
    form of M. Mäkitalo, A. Foi, "A closed-form approximation of the exact unbiased inverse of the Anscombe
    variance-stabilizing transformation", IEEE TIP 20(9), 2011.

    The algebraic inverse would darken an image of few counts, as the mean of a square root is not the root of a mean.
    """
    least = 2 * math.sqrt(3 / 8)  # what no counts at all are transformed into
    d = np.maximum(stabilized, least)
    root = math.sqrt(3 / 2)
    mean = d**2 / 4 + root / 4 / d - 11 / 8 / d**2 + 5 * root / 8 / d**3 - 1 / 8
    return np.maximum(mean, 0)
