"""Small random changes of a training crop that leave its diagnosis as it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TURN = 10.0
"""Greatest rotation, in degrees."""
ZOOM = 0.1
"""Greatest change of size, as a share."""
SHIFT = 0.06
"""Greatest shift along each axis, as a share of the side."""
CONTRAST = 0.2
"""Greatest change of contrast around the crop's mean, as a share."""
BRIGHTNESS = 0.1
"""Greatest change of brightness, in units of the range [0, 1]."""


def augmented(image: Tensor, mask: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Turns, scales and shifts a crop (mirroring what lies beyond its border), and changes contrast and brightness.

    Every amount is uniform between its limit's two signs. A mask moves along with its image.

    :param image: ``float32 [C, H, W]`` in [0, 1].
    :param mask: ``int64 [H, W]``, or ``None``.
    :param generator: of the random numbers.
    :returns: the same shapes and dtypes, the image in [0, 1].
    """
    turn, zoom, right, down, contrast, brightness = (2 * torch.rand(6, generator=generator) - 1).tolist()
    angle, scale = math.radians(TURN * turn), 1 / (1 + ZOOM * zoom)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    # Of the output's coordinates in [-1, 1] those of the input; a shift of one side is 2 of these.
    matrix = torch.tensor([[cosine, -sine, 2 * SHIFT * right], [sine, cosine, 2 * SHIFT * down]])
    grid = F.affine_grid(matrix[None], [1, 1, *image.shape[1:]], align_corners=False)
    moved = F.grid_sample(image[None], grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]
    if mask is not None:
        nearest = F.grid_sample(
            mask[None, None].float(), grid, mode="nearest", padding_mode="reflection", align_corners=False
        )
        mask = nearest[0, 0].long()
    mean = moved.mean()
    return (mean + (1 + CONTRAST * contrast) * (moved - mean) + BRIGHTNESS * brightness).clamp(0, 1), mask
