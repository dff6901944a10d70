from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from models import IP, SEG, VR, NoOptions, UnknownNameError
from models.srresnet import SRResNetOptions
from models.unet import UNetOptions


def conv(inputs: int, outputs: int, side: int = 3) -> int:
    return inputs * outputs * side * side + outputs


def twice(inputs: int, outputs: int) -> int:
    """Two convolutions, each with a normalization of two numbers per map."""
    return conv(inputs, outputs) + conv(outputs, outputs) + 4 * outputs


@pytest.mark.parametrize(("channels", "classes", "width"), [(1, 2, 16), (3, 4, 5)])
def test_parameter_count(channels, classes, width):
    """By hand: five levels down, four up (each a transposed convolution of side 2 and two convolutions), one 1 x 1."""
    features = [width, width, 2 * width, 4 * width, 8 * width]
    down = twice(channels, width) + sum(twice(a, b) for a, b in itertools.pairwise(features))
    up = 0
    for level, (below, here) in enumerate(((8, 4), (4, 2), (2, 1), (1, 1))):
        inputs, skip = below * width, here * width
        raised = inputs // 2 if level < 3 else inputs  # the last step up keeps its width
        up += conv(inputs, raised, 2) + twice(raised + skip, skip)
    network = SEG.build("unet", UNetOptions(features=width), channels=channels, num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) == down + up + conv(width, classes, 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 65), (47, 50)])
def test_any_size(height, width):
    network = SEG.build("unet", UNetOptions(features=4), channels=1, num_classes=3)
    assert network(torch.rand(2, 1, height, width)).shape == (2, 3, height, width)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"features": 0}, "features must be at least 1, not 0"),
        ({"norm": "layer"}, "norm must be 'instance' or 'batch', not 'layer'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1, not -0.1"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(ValueError, match=message):
        UNetOptions(**wrong)


@pytest.mark.parametrize("name", ["channels", "num_classes"])
def test_wrong_shapes(name):
    with pytest.raises(ValueError, match=f"UNet: {name} must be at least 1, not 0"):
        SEG.build("unet", **({"channels": 1, "num_classes": 2} | {name: 0}))


def test_options_are_those_of_the_network():
    assert VR.options("resnet18") is NoOptions and SEG.options("unet") is UNetOptions
    with pytest.raises(TypeError, match="IP network 'srresnet' takes SRResNetOptions, not UNetOptions"):
        IP.build("srresnet", UNetOptions(), channels=1)
    with pytest.raises(UnknownNameError, match="unknown segmentation network 'list'; choose from: unet"):
        SEG.options("list")
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(SRResNetOptions))
