"""Tiles against the whole image: exact where a network sees no further than the overlap, and never more memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from train.inference import BATCH, Tiling, enlarged, forward

CPU = torch.device("cpu")


def network(layers: int, scale: int = 1, channels: int = 1) -> nn.Module:
    """Sees ``layers`` pixels to every side. Its weights are positive, so that everything that is seen counts."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
    for each in convolutions:
        nn.init.uniform_(each.weight, 0.05, 0.2)
    last = [nn.Upsample(scale_factor=scale)] if scale > 1 else []
    return nn.Sequential(*convolutions, *last).eval()


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("size", [(64, 64), (65, 93), (20, 200), (33, 32), (32, 32), (7, 9)])
@pytest.mark.parametrize("tiling", [Tiling(32, 10, 0), Tiling(32, 14, 4), Tiling(32, 11, 1), Tiling(48, 31, 20)])
def test_tiled_equals_whole(size, scale, tiling):
    images = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))
    ip = network(5, scale)
    tiled = forward(ip, images, device=CPU, tiling=tiling)
    with torch.no_grad():
        whole = ip(images)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-6)


def test_too_little_overlap_shows_near_the_seams_and_nowhere_else():
    images = torch.rand(1, 1, 32, 80, generator=torch.Generator().manual_seed(1))
    ip, tiling, radius = network(5), Tiling(32, 4, 0), 5
    difference = (forward(ip, images, device=CPU, tiling=tiling) - forward(ip, images, device=CPU)).abs()[0, 0].amax(0)
    borders = [each for start in tiling.starts(80) for each in (start, start + 32) if 0 < each < 80]
    near = torch.zeros(80, dtype=torch.bool)
    for border in borders:
        near[max(0, border - radius) : border + radius] = True
    assert difference[~near].max() < 1e-6
    assert difference[near].max() > 1e-3, "the test must be able to see a seam"


def test_a_fade_is_smoother_than_a_cut():
    """A network that sees everything: its tiles differ, and the jump between two pixels is spread over the fade."""

    class Centered(nn.Module):
        def forward(self, x):
            return x - x.mean((2, 3), keepdim=True)

    images = torch.linspace(0, 1, 96).expand(1, 1, 16, 96)
    cut, faded = (
        forward(Centered(), images, device=CPU, tiling=Tiling(32, 16, blend))[0, 0, 0].diff().abs().max()
        for blend in (0, 16)
    )
    assert faded < cut / 4


def test_memory_is_that_of_a_batch_of_tiles():
    largest, most = 0, 0

    class Spy(nn.Module):
        def forward(self, x):
            nonlocal largest, most
            largest, most = max(largest, *x.shape[2:]), max(most, len(x))
            return x

    images = torch.rand(1, 1, 300, 500)  # of more tiles side by side than are done together
    tiled = forward(Spy(), images, device=CPU, tiling=Tiling(32, 8, 0))
    assert (largest, most) == (32, BATCH)
    torch.testing.assert_close(tiled, images)


def test_answers_of_any_shape_are_batched():
    logits = forward(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.ones(BATCH + 3, 2, 8, 8), device=CPU)
    assert torch.equal(logits, torch.ones(BATCH + 3, 2))


@pytest.mark.parametrize("wrong", [(32, 32, 0), (32, 8, 9), (32, -1, 0), (32, 8, -1)])
def test_tiles_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match="0 <= blend <= overlap < side"):
        Tiling(*wrong)


def test_starts_cover_every_pixel_once_at_least():
    for length in range(1, 200):
        starts = Tiling(32, 8, 0).starts(length)
        assert starts[0] == 0 and starts[-1] + 32 >= length and (length <= 32) == (len(starts) == 1)
        assert all(0 < after - before <= 24 for before, after in itertools.pairwise(starts))


def test_enlarged():
    images = torch.rand(2, 1, 5, 7)
    assert enlarged(images, 1) is images and enlarged(images, 2).shape == (2, 1, 10, 14)
