"""ICONet: its parts at hand-worked numbers, its size, its losses against a sum by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import IP, kspace
from models.iconet import ICONetOptions
from models.iconet.network import RSCFL, Fusion, ICONet

SMALL = ICONetOptions(blocks=2, features=8)


def parameters(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def learned(options: ICONetOptions, scale: int) -> ICONet:
    """With last convolutions that are not zero any more."""
    torch.manual_seed(0)
    network = ICONet(options, channels=1, scale=scale)
    for stage in network.stages:
        for tail in (stage.sr_tail, stage.rec_tail):
            nn.init.normal_(tail.weight, std=0.1)
    return network


@pytest.mark.parametrize(("features", "rscfl", "fusion"), [(32, 14_536, 6_272), (64, 54_672, 24_832)])
def test_sizes_of_the_parts(features, rscfl, fusion):
    assert parameters(RSCFL(features)) == rscfl
    assert parameters(Fusion(features)) == fusion


@pytest.mark.parametrize(
    ("blocks", "features", "scale", "size"),
    [(4, 32, 2, 198_082), (4, 32, 4, 396_164), (8, 64, 2, 1_297_410), (8, 64, 4, 2_594_820)],
)
def test_sizes(blocks, features, scale, size):
    assert parameters(ICONet(ICONetOptions(blocks, features), channels=1, scale=scale)) == size
    bare = ICONet(ICONetOptions(blocks, features, fusion=False), channels=1, scale=scale)
    assert parameters(bare) == size - blocks * (scale // 2) * parameters(Fusion(features))


def test_a_block_that_mixes_nothing_in_is_the_identity():
    block = RSCFL(8)
    x = random(2, 8, 9, 10)
    assert not torch.equal(block(x), x)
    for parameter in block.mix.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)


def test_the_channel_branch_scales_channels_and_the_spatial_branch_sees_7_pixels():
    block = RSCFL(8)
    u = random(1, 8, 20, 20)
    scales = block.channel(u)
    assert scales.shape == (1, 8, 1, 1) and (scales > 0).all() and (scales < 1).all()
    torch.testing.assert_close(scales, block.channel(u.flip(-1)))
    touched = u.clone()
    touched[..., 10, 10] += 1
    changed = (block.spatial(touched) - block.spatial(u)).abs().sum((0, 1)) > 0
    assert changed.nonzero().min() == 7 and changed.nonzero().max() == 13


def test_a_fusion_by_hand():
    """Open by half, with identities for projections: 2 + 4 / 2 and 4 + 2 / 2."""
    fusion = Fusion(1)
    for parameter in fusion.parameters():
        nn.init.zeros_(parameter)
    for projection in (fusion.to_sr, fusion.to_rec):
        nn.init.ones_(projection.weight)
    sr, rec = fusion(torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 4.0))
    assert torch.equal(sr, torch.full((1, 1, 2, 2), 4.0))
    assert torch.equal(rec, torch.full((1, 1, 2, 2), 5.0))


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("scale", [2, 4])
def test_untrained_it_is_bicubic_enlargement(scale, fusion):
    network = IP.build("iconet", ICONetOptions(1, 8, fusion), channels=3, scale=scale)
    x = expected = random(2, 3, 9, 16)
    for _ in range(scale // 2):
        expected = F.interpolate(expected, scale_factor=2, mode="bicubic", align_corners=False)
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize(("loss", "power"), [("l1", 1), ("mse", 2)])
@pytest.mark.parametrize("scale", [2, 4])
def test_losses_against_a_sum_by_hand(scale, loss, power):
    network = learned(ICONetOptions(blocks=2, features=8, loss=loss), scale)
    degraded, clean = random(2, 1, 8, 12), random(2, 1, 8 * scale, 12 * scale, seed=1)
    found = network.training_loss(degraded, clean)
    image, main, rec = degraded, 0.0, 0.0
    for number, stage in enumerate(network.stages, 1):
        sr, restored = stage(image)
        smaller = scale // 2**number  # by what the result of this stage is smaller than the clean image
        target = kspace.reduced(clean, smaller).clamp(0, 1) if smaller > 1 else clean
        main += 0.8 * (sr - target).abs().pow(power).mean()
        rec += (restored - kspace.reduced(clean, 2 * smaller).clamp(0, 1)).abs().pow(power).mean()
        image = sr
    torch.testing.assert_close(found.main, main)
    torch.testing.assert_close(found.terms["rec"].loss, rec)
    torch.testing.assert_close(found.total(), main + 0.2 * rec)
    torch.testing.assert_close(found.enhanced, image)
    torch.testing.assert_close(network(degraded), image)


@pytest.mark.parametrize("fusion", [True, False])
def test_what_the_branches_learn_from(fusion):
    """Each branch learns from the other one's loss through the fusion alone; the restored image learns from its own."""
    network = learned(ICONetOptions(2, 8, fusion), 2)
    found = network.training_loss(random(1, 1, 8, 8), random(1, 1, 16, 16, seed=1))
    found.terms["rec"].loss.backward(retain_graph=True)
    stage = network.stages[0]

    def reached(parameter):
        return parameter.grad is not None and bool(parameter.grad.any())

    assert reached(stage.sr_blocks[0].mix.weight) == fusion
    assert reached(stage.rec_tail.weight)
    network.zero_grad()
    found.main.backward()
    assert reached(stage.rec_blocks[0].mix.weight) == fusion
    assert not reached(stage.rec_tail.weight)


def test_inner_stages_are_supervised():
    """A last stage that is right does not hide a first one that is wrong."""
    network = learned(SMALL, 4)
    degraded, clean = random(1, 1, 8, 8), random(1, 1, 32, 32, seed=1)
    grad = torch.autograd.grad(network.training_loss(degraded, clean).main, network.stages[0].sr_tail.weight)[0]
    final = 0.8 * F.l1_loss(network(degraded), clean)
    assert not torch.allclose(grad, torch.autograd.grad(final, network.stages[0].sr_tail.weight)[0])


@pytest.mark.parametrize("scale", [1, 3, 8])
def test_scales_that_are_no_stages_of_two(scale):
    with pytest.raises(ValueError, match=f"scale must be 2 or 4, not {scale}: it enlarges in stages of 2"):
        IP.build("iconet", channels=1, scale=scale)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"blocks": 0}, "^blocks must be at least 1, not 0"),
        ({"features": 0}, "^features must be a multiple of 4, not 0"),
        ({"loss": "huber"}, "^loss must be 'l1' or 'mse', not 'huber'"),
        ({"features": 30}, "^features must be a multiple of 4, not 30"),
    ],
)
def test_options_out_of_range(wrong, said):
    with pytest.raises(ValueError, match=said):
        ICONetOptions(**wrong)


def test_images_that_do_not_fit():
    network = learned(SMALL, 4)
    with pytest.raises(ValueError, match=r"ICONet needs 7 x 7 pixels at least.*was given 6 x 9.*28 pixels at x4"):
        network(random(1, 1, 6, 9))
    with pytest.raises(ValueError, match=r"clean images must be \[1, 1, 32, 32\], not \[1, 1, 16, 16\]"):
        network.training_loss(random(1, 1, 8, 8), random(1, 1, 16, 16))
    with pytest.raises(ValueError, match="channels must be at least 1, not 0"):
        ICONet(SMALL, channels=0, scale=2)
