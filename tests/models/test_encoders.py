"""Networks with an embedding, and the decoder of one."""

from __future__ import annotations

import math

import pytest
import torch

from models import SEG, VR, swin, vit
from models.decoder import Decoder, decoded
from models.encoder import Encoder
from models.swin import SwinOptions
from models.vit import ViTOptions

ENCODERS = [(VR, name) for name in ("resnet18", "resnet50", "resnet101", "swin", "vit")] + [(SEG, "unet")]


def count(network: torch.nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize(("registry", "name"), ENCODERS)
def test_embedding(registry, name: str) -> None:
    network = registry.build(name, channels=1, num_classes=3).eval()
    assert isinstance(network, Encoder)
    assert network.stride & (network.stride - 1) == 0
    for height, width in [(64, 64), (33, 70)]:
        images = torch.rand(2, 1, height, width)
        with torch.no_grad():
            embedding, logits = network.features(images), network(images)
            h, w = math.ceil(height / network.stride), math.ceil(width / network.stride)
            assert embedding.shape == (2, network.width, h, w)
            # What the network says is what its head makes of the embedding.
            (head,) = (network.get_submodule(each) for each in network.head)
            given = embedding if registry is SEG else embedding.mean((2, 3))
            torch.testing.assert_close(head(given)[..., :height, :width], logits, rtol=1e-4, atol=1e-5)


def test_embedding_of_unet_is_not_padded() -> None:
    network = SEG.build("unet", channels=1, num_classes=3)
    assert network.features(torch.rand(1, 1, 40, 33)).shape == (1, 16, 40, 33)


@pytest.mark.parametrize(("name", "number", "file"), [("swin", 1_595_108, swin), ("vit", 2_731_586, vit)])
def test_parameter_count(name: str, number: int, file) -> None:
    assert count(VR.build(name, channels=1, num_classes=2)) == number
    assert f"{number:,}" in getattr(file, name).__doc__.replace("\n", " ")


def test_vit_knows_where_a_patch_is_in_images_of_any_size() -> None:
    """The embedding of equal patches differs by their places alone, and not at all without position embeddings."""
    network = VR.build("vit", ViTOptions(features=12, depth=1), channels=1, num_classes=2).eval()
    for side in (128, 40):
        embedding = network.features(torch.full((1, 1, side, side), 0.5))[0]
        assert (embedding[:, 0, 0] - embedding[:, -1, -1]).abs().max() > 1e-4
    torch.nn.init.zeros_(network.position)
    embedding = network.features(torch.full((1, 1, 40, 40), 0.5))[0]
    torch.testing.assert_close(embedding[:, 0, 0], embedding[:, -1, -1])


def test_as_many_patches_in_another_shape_are_interpolated_too() -> None:
    """16 x 64 patches as 32 x 32: whoever counts them takes the places of the one for those of the other."""
    network = VR.build("vit", ViTOptions(features=12, depth=1, side=8), channels=1, num_classes=2).eval()
    with torch.no_grad():
        network.embed.weight.zero_()
        network.position.copy_(torch.arange(8.0)[:, None] * torch.ones(1, 12, 8, 8))  # tells the row
        wide = network.features(torch.rand(1, 1, 32, 128))
        square = network.features(torch.rand(1, 1, 64, 64))
    for each in (wide, square):
        assert (each.std(3) < 1e-5).all(), "along a row all places are alike"
    assert wide.shape[2:] == (4, 16) and square.shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (lambda: SwinOptions(features=10), "features must be a multiple of heads"),
        (lambda: SwinOptions(depth=3), "depth must be even"),
        (lambda: SwinOptions(window=0), "window must be at least 1"),
        (lambda: ViTOptions(heads=5), "features must be a multiple of heads"),
        (lambda: ViTOptions(patch=12), "patch must be a power of two"),
        (lambda: ViTOptions(depth=0), "depth must be at least 1"),
    ],
)
def test_wrong_options(options, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options()


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_wrong_arguments(name: str) -> None:
    for wrong in ({"channels": 0}, {"num_classes": 0}):
        with pytest.raises(ValueError, match="must be at least 1, not 0"):
            VR.build(name, **({"channels": 1, "num_classes": 2} | wrong))


@pytest.mark.parametrize(
    ("width", "stages", "channels", "number"),
    # The second is the published one, of 128 x 32 x 32 embeddings.
    [(512, 5, 1, 2_360_113), (128, 4, 3, 147_819), (16, 0, 1, 145)],
)
def test_decoder(width: int, stages: int, channels: int, number: int) -> None:
    decoder = Decoder(width, stages, channels)
    assert count(decoder) == number
    assert decoder(torch.rand(2, width, 2, 3)).shape == (2, channels, 2 * 2**stages, 3 * 2**stages)
    assert number < 1000 or f"{number:,}" in Decoder.__doc__


def test_decoder_cuts_what_the_stride_rounded_up() -> None:
    assert decoded(Decoder(32, 5, 1), torch.rand(1, 32, 2, 3), (33, 70)).shape == (1, 1, 33, 70)


def test_wrong_decoders() -> None:
    with pytest.raises(ValueError, match="needs an embedding of width 32, not 16"):
        Decoder(16, 5, 1)
    with pytest.raises(ValueError, match="channels >= 1"):
        Decoder(16, 1, 0)
