from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import IP
from models.drunet import DRUNetOptions
from models.drunet.network import DRUNet

SMALL = DRUNetOptions(features=4, levels=3, blocks=1, unshuffle=2)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def counted(channels: int, *, features: int, levels: int, blocks: int, unshuffle: int) -> int:
    """By hand: weights and biases of each convolution."""

    def conv(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side * side + outputs

    maps = channels * unshuffle**2
    total = conv(maps, features, 3) + conv(features, maps, 3)
    for level in range(levels):
        width = features * 2**level
        both_ways = 1 if level == levels - 1 else 2
        total += both_ways * blocks * 2 * conv(width, width, 3)
        if both_ways == 2:
            total += conv(width, 2 * width, 2) + conv(2 * width, width, 2)
    return total


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "form",
    [
        {"features": 5, "levels": 1, "blocks": 2, "unshuffle": 1},
        {"features": 4, "levels": 3, "blocks": 1, "unshuffle": 2},
        {"features": 3, "levels": 2, "blocks": 3, "unshuffle": 3},
    ],
)
def test_parameter_count(channels, form):
    assert count(IP.build("drunet", DRUNetOptions(**form), channels=channels)) == counted(channels, **form)


@pytest.mark.parametrize(("number", "options"), [(564_420, DRUNetOptions(32, 3, 1, 2)), (32_650_753, DRUNetOptions())])
def test_documented_parameter_count(number, options):
    assert count(DRUNet(options, channels=1)) == number
    assert f"{number:,}" in (DRUNet.__doc__ or "")


@pytest.mark.parametrize("size", [(8, 8), (13, 31), (1, 9)])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_untrained_network_interpolates(scale, size):
    x = torch.rand(2, 3, *size)
    y = DRUNet(SMALL, channels=3, scale=scale)(x)
    expected = x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def trained(options: DRUNetOptions) -> DRUNet:
    torch.manual_seed(0)
    network = DRUNet(options, channels=1).double().eval()
    torch.nn.init.normal_(network.tail.weight, std=0.1)
    return network


def test_it_is_a_u_net():
    """Written out for two levels: the first one's features are added to what comes back from below."""
    network = trained(DRUNetOptions(features=3, levels=2, blocks=1, unshuffle=1))

    def block(features: Tensor, part: torch.nn.Sequential) -> Tensor:
        first, _, second = part[0].body
        inner = F.conv2d(features, first.weight, first.bias, padding=1).clamp(min=0)
        return features + F.conv2d(inner, second.weight, second.bias, padding=1)

    x = torch.rand(2, 1, 6, 8, dtype=torch.float64)
    above = block(F.conv2d(x, network.head.weight, network.head.bias, padding=1), network.down[0])
    below = block(F.conv2d(above, network.shrink[0].weight, network.shrink[0].bias, stride=2), network.bottom)
    back = F.conv_transpose2d(below, network.grow[0].weight, network.grow[0].bias, stride=2) + above
    tail = F.conv2d(block(back, network.up[0]), network.tail.weight, network.tail.bias, padding=1)
    torch.testing.assert_close(network(x), x + tail)


def test_sides_of_any_length_are_padded_by_their_border():
    network = trained(SMALL)
    x = torch.rand(1, 1, 13, 18, dtype=torch.float64)
    whole = F.pad(x, (0, 6, 0, 3), mode="replicate")  # to 16 x 24, multiples of 8
    torch.testing.assert_close(network(x), network(whole)[..., :13, :18])


def test_squares_of_pixels_become_channels():
    """A translation by a whole square is a translation of the features; by a pixel it is not."""
    network = trained(DRUNetOptions(features=4, levels=1, blocks=1, unshuffle=2))
    x = torch.rand(1, 1, 40, 40, dtype=torch.float64)
    inner = (..., slice(16, 24), slice(16, 24))
    moved = network(x.roll(2, -1)).roll(-2, -1)
    torch.testing.assert_close(moved[inner], network(x)[inner])
    moved = network(x.roll(1, -1)).roll(-1, -1)
    assert not torch.allclose(moved[inner], network(x)[inner])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DRUNetOptions(features=0), "features must be at least 1, not 0"),
        (lambda: DRUNetOptions(levels=0), "levels must be at least 1, not 0"),
        (lambda: DRUNetOptions(blocks=0), "blocks must be at least 1, not 0"),
        (lambda: DRUNetOptions(unshuffle=0), "unshuffle must be at least 1, not 0"),
        (lambda: DRUNet(SMALL, channels=0), "channels must be at least 1, not 0"),
        (lambda: DRUNet(SMALL, channels=1, scale=5), "scale must be one of 1, 2, 3, 4, not 5"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
