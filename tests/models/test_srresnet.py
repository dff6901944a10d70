from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import IP
from models.srresnet import SRResNetOptions
from models.srresnet.network import SRResNet


def counted(*, channels: int, scale: int, blocks: int, features: int, kernel: int, norm: str) -> int:
    """By hand: weights and biases of each convolution, one slope per PReLU, two numbers per normalized map."""

    def conv(inputs: int, outputs: int, side: int) -> int:
        return inputs * outputs * side * side + outputs

    bn = 2 * features if norm == "batch" else 0
    head = conv(channels, features, kernel) + 1
    block = 2 * conv(features, features, 3) + 2 * bn + 1
    after_blocks = conv(features, features, 3) + bn
    stages = {1: [], 2: [4], 3: [9], 4: [4, 4]}[scale]  # how many maps a stage makes of each, before it rearranges them
    enlarging = sum(conv(features, maps * features, 3) + 1 for maps in stages)
    return head + blocks * block + after_blocks + enlarging + conv(features, channels, kernel)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize(("kernel", "norm"), [(3, "none"), (9, "batch")])
@pytest.mark.parametrize(("blocks", "features"), [(16, 64), (0, 5)])
def test_parameter_count(channels, scale, kernel, norm, blocks, features):
    form = {"blocks": blocks, "features": features, "kernel": kernel, "norm": norm}
    network = IP.build("srresnet", SRResNetOptions(**form), channels=channels, scale=scale)
    assert sum(p.numel() for p in network.parameters()) == counted(channels=channels, scale=scale, **form)


@pytest.mark.parametrize(
    ("count", "form"),
    [
        (1_222_164, {"scale": 1}),
        (1_369_877, {"scale": 2}),
        (1_554_517, {"scale": 3}),
        (1_517_590, {"scale": 4}),
        (1_549_462, {"scale": 4, "kernel": 9, "norm": "batch"}),
    ],
)
def test_documented_parameter_count(count, form):
    form = dict(form)
    scale = form.pop("scale")
    assert sum(p.numel() for p in SRResNet(SRResNetOptions(**form), channels=3, scale=scale).parameters()) == count
    assert f"{count:,}" in (SRResNet.__doc__ or "")


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_untrained_network_interpolates(scale, norm):
    x = torch.rand(2, 3, 7, 9)
    y = SRResNet(SRResNetOptions(blocks=2, features=4, norm=norm), channels=3, scale=scale)(x)
    expected = x if scale == 1 else F.interpolate(x, size=(7 * scale, 9 * scale), mode="bicubic", align_corners=False)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1, 3, 4])
def test_every_parameter_learns(scale):
    torch.manual_seed(0)
    network = SRResNet(SRResNetOptions(blocks=2, features=4), channels=1, scale=scale)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    x, target = torch.rand(2, 1, 8, 8), torch.rand(2, 1, 8 * scale, 8 * scale)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for _ in range(2):  # behind the zero of the last convolution, the others move from the second step on
        optimizer.zero_grad()
        F.mse_loss(network(x), target).backward()
        optimizer.step()
    still = [name for name, p in network.named_parameters() if torch.equal(p, before[name])]
    assert still == []


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_enlarges_by_sub_pixels(scale):
    """Written out: what a stage computes for a pixel is spread over the ``factor x factor`` pixels that replace it."""
    torch.manual_seed(0)
    network = SRResNet(SRResNetOptions(blocks=0, features=3), channels=1, scale=scale)
    x = torch.rand(2, 3, 5, 4)
    expected = x
    for conv, factor in zip(list(network.upsample)[::3], {2: [2], 3: [3], 4: [2, 2]}[scale], strict=True):
        maps = F.conv2d(expected, conv.weight, conv.bias, padding=1)
        n, _, h, w = maps.shape
        spread = torch.zeros(n, 3, h * factor, w * factor)
        for row in range(factor):
            for column in range(factor):
                spread[:, :, row::factor, column::factor] = maps[:, row * factor + column :: factor**2]
        expected = torch.where(spread > 0, spread, 0.25 * spread)  # the slope that a PReLU begins with
    torch.testing.assert_close(network.upsample(x), expected)


def test_sees_what_its_depth_promises():
    """The residual of a pixel depends on its receptive field and on nothing else (no batch or global statistics)."""
    torch.manual_seed(0)
    network = SRResNet(SRResNetOptions(blocks=1, features=4), channels=1)
    torch.nn.init.normal_(network.tail.weight)
    x = torch.rand(1, 1, 21, 21, requires_grad=True)
    network(x)[0, 0, 10, 10].backward()
    reached = x.grad[0, 0].nonzero()
    radius = 5  # five 3x3 convolutions in a row: head, two in the block, trunk, tail
    assert (reached.min().item(), reached.max().item()) == (10 - radius, 10 + radius)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scale": 5}, "scale must be one of 1, 2, 3, 4, not 5"),
        ({"blocks": -1}, "blocks must be at least 0, not -1"),
        ({"features": 0}, "features must be at least 1, not 0"),
        ({"channels": 0}, "channels must be at least 1, not 0"),
        ({"kernel": 4}, "kernel must be odd and at least 1, not 4"),
        ({"norm": "layer"}, "norm must be 'none' or 'batch', not 'layer'"),
    ],
)
def test_wrong_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        shape = {name: value for name, value in wrong.items() if name in ("channels", "scale")}
        options = {name: value for name, value in wrong.items() if name not in shape}
        SRResNet(SRResNetOptions(**options), **({"channels": 1} | shape))
