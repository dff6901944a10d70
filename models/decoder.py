"""A small decoder: from an embedding back to an image, or to logits per pixel."""

from __future__ import annotations

from torch import Tensor, nn


class Decoder(nn.Sequential):
    """Stages of (nearest enlargement by 2, conv, BN, ReLU, conv, BN, ReLU), each of which halves the width, and a last
    convolution: the decoder of Frepa's published code (Chu et al., arXiv:2407.14651), whose four stages from 128 wide
    to three channels have 147,819 parameters. Five stages from 512 wide, for a ResNet-18, to one channel: 2,360,113.

    ``float [N, width, h, w] -> float [N, channels, h * 2^stages, w * 2^stages]``, not clipped.

    :param width: channels of the embedding.
    :param stages: enlargements by 2; without any, the last convolution is all there is.
    :param channels: of the result.
    :raises ValueError: an argument is out of range, or ``width`` is too small to be halved so often.
    """

    def __init__(self, width: int, stages: int, channels: int) -> None:
        if stages < 0 or channels < 1:
            raise ValueError(f"a decoder needs stages >= 0 and channels >= 1, not {stages} and {channels}")
        if width < 2**stages:
            raise ValueError(f"a decoder of {stages} stages needs an embedding of width {2**stages}, not {width}")
        super().__init__(
            *(_stage(width // 2**stage, width // 2 ** (stage + 1)) for stage in range(stages)),
            nn.Conv2d(width // 2**stages, channels, 3, padding=1),
        )


def _stage(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="nearest"),
        *(
            layer
            for width in (inputs, outputs)
            for layer in (nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
        ),
    )


def decoded(decoder: nn.Module, embedding: Tensor, size: tuple[int, int]) -> Tensor:
    """What a decoder makes of an embedding, cut to the size of the image: an encoder whose stride does not divide the
    image's sides has rounded them up.

    :param size: height and width of the image.
    """
    return decoder(embedding)[..., : size[0], : size[1]]
