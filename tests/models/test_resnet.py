from __future__ import annotations

import pytest
import torch

from models import IP, VR, UnknownNameError
from models import resnet as resnet_file

# As published by torchvision for its ImageNet models (three channels, 1000 classes).
PUBLISHED = {"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet101": 44_549_160}
LAST_WIDTH = {"resnet18": 512, "resnet50": 2048, "resnet101": 2048}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    def count(channels: int, num_classes: int) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in VR.build(name, channels=channels, num_classes=num_classes).parameters())

    assert count(3, 1000) == PUBLISHED[name]
    assert count(1, 1000) == PUBLISHED[name] - 2 * 7 * 7 * 64
    assert count(3, 2) == PUBLISHED[name] - 998 * (LAST_WIDTH[name] + 1)
    assert f"{PUBLISHED[name]:,}" in getattr(resnet_file, name).__doc__


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 65)])
def test_logits(channels, height, width):
    network = VR.build("resnet18", channels=channels, num_classes=5)
    assert network(torch.rand(2, channels, height, width)).shape == (2, 5)


def test_stem_halves_twice():
    """MONAI's default stem has stride 1; He et al.'s first stage works at a quarter of the resolution."""
    network = VR.build("resnet18", channels=1, num_classes=2)
    sizes = []
    network.layer1.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[2:])))
    network(torch.rand(2, 1, 64, 64))
    assert sizes == [(16, 16)]


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"num_classes": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1, got 0"):
        VR.build("resnet18", **({"channels": 1, "num_classes": 2} | wrong))


@pytest.mark.parametrize(("registry", "known"), [(IP, "srresnet"), (VR, "resnet18, resnet50, resnet101")])
def test_unknown_network(registry, known):
    with pytest.raises(UnknownNameError, match=f"unknown {registry.kind} 'list'; choose from: .*{known}"):
        registry.build("list")
