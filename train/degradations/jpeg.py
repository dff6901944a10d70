"""Lossy storage."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.degradations.base import DEGRADATIONS, Degradation

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MODES = {1: "L", 3: "RGB"}


@DEGRADATIONS.register("jpeg")
@dataclass(frozen=True)
class Jpeg(Degradation):
    """Compression as baseline JPEG (ITU-T T.81) by Pillow's encoder, and decompression; there is nothing random in it.

    A file holds 8 bits, so the image is clipped to [0, 1] and rounded to multiples of 1/255 first, and is of that kind
    afterwards. Gray images are stored as such. Color goes through YCbCr, whose two chroma channels are halved in both
    directions (4:2:0, Pillow's default). What a quality means are the quantization tables of the Independent JPEG
    Group's library, scaled. Another encoder's 75 may be another 75, and other versions of Pillow's library may differ
    by a rounding.

    There is no classical remedy: scikit-image has nothing made for block artifacts.

    :param quality: from 1 (least) to 95; beyond, Pillow gives large files without gain. 10, 20, 30 and 40 are those of
        most papers on JPEG artifacts.
    :raises ValueError: ``quality`` is no integer from 1 to 95; on use: an image has neither 1 nor 3 channels.
    """

    quality: int = 10

    name = "jpeg"

    def __post_init__(self) -> None:
        if not isinstance(self.quality, int) or isinstance(self.quality, bool) or not 1 <= self.quality <= 95:
            raise ValueError(f"quality must be an integer from 1 to 95, not {self.quality!r}")

    def degrade(self, image: Tensor, generator: torch.Generator) -> Tensor:
        import numpy as np
        import torch
        from PIL import Image

        if len(image) not in _MODES:
            raise ValueError(f"JPEG stores images of 1 or 3 channels, not of {len(image)}")
        pixels = image.cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
        stored = io.BytesIO()
        Image.fromarray(pixels.squeeze(2) if len(image) == 1 else pixels, _MODES[len(image)]).save(
            stored, "JPEG", quality=self.quality
        )
        read = np.asarray(Image.open(stored)).reshape(pixels.shape)
        return (torch.from_numpy(read.copy()).permute(2, 0, 1).float() / 255).to(image.device)
