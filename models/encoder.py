"""What a recognition network offers besides its logits: the dense embedding that it recognizes things in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Encoder(Protocol):
    """A network with an embedding. ``resnet*``, ``swin``, ``vit`` and ``unet`` are such networks.

    :ivar width: channels of the embedding.
    :ivar stride: by what factor it is smaller than the image, a power of two.
    :ivar head: the child modules that come after the embedding, by name: what a pre-training leaves untrained.
    """

    width: int
    stride: int
    head: tuple[str, ...]

    def features(self, x: Tensor) -> Tensor:
        """``float [N, C, H, W] -> float [N, width, ceil(H / stride), ceil(W / stride)]``."""
