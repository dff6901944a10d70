"""HQG-Net's layers against examples worked by hand and against PyTorch's own normalizations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import CRITIC, IP
from models.adalin import VIN, AdaLIN, adalin
from models.critic import PatchCriticOptions
from models.hqgnet import HQGNetOptions
from models.hqgnet.network import CUE, HQGNet


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def small(channels: int = 1, **options) -> HQGNet:
    """With an output that is not the identity."""
    torch.manual_seed(0)
    network = HQGNet(HQGNetOptions(**{"width": 2, "levels": 2} | options), channels=channels)
    nn.init.normal_(network.enhancer.last.weight)
    return network


def images(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_adalin_by_hand():
    """Biased variances of x: 2.5 over all channels (unbiased it would be 2.857, and a variance of the channels'
    variances 0.5625)."""
    x = torch.tensor([[[[1.0, 3.0], [1.0, 3.0]], [[0.0, 4.0], [0.0, 4.0]]]])
    ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)

    def rows(mix: float, scale: torch.Tensor = ones, shift: torch.Tensor = zeros) -> list[list[float]]:
        return adalin(x, torch.full((2,), mix), scale, shift, eps=0.0)[0, :, 0].tolist()

    assert rows(1.0) == [pytest.approx([-1, 1]), pytest.approx([-1, 1])]
    assert rows(0.0) == [pytest.approx([-0.632456, 0.632456]), pytest.approx([-1.264911, 1.264911])]
    assert rows(0.5) == [pytest.approx([-0.816228, 0.816228]), pytest.approx([-1.132456, 1.132456])]
    assert rows(0.5, 2 * ones, 0.5 + zeros)[1] == pytest.approx([-1.764911, 2.764911])


def test_adalin_at_its_ends_is_pytorchs_normalizations():
    x, ones, zeros = images(3, 4, 5, 6), torch.ones(3, 4), torch.zeros(3, 4)
    torch.testing.assert_close(adalin(x, torch.ones(4), ones, zeros), F.instance_norm(x))
    torch.testing.assert_close(adalin(x, torch.zeros(4), ones, zeros), F.layer_norm(x, x.shape[1:]))


def test_adalin_without_an_affine_part_is_the_mix():
    layer, x = AdaLIN(4, 7), images(2, 4, 5, 6)
    nn.init.zeros_(layer.affine.weight)
    nn.init.zeros_(layer.affine.bias)
    expected = 0.9 * F.instance_norm(x) + 0.1 * F.layer_norm(x, x.shape[1:])
    torch.testing.assert_close(layer(x, images(2, 7)), expected, rtol=1e-4, atol=1e-5)


def test_adalin_is_told_mu_first_and_each_image_its_own():
    layer, x, codes = AdaLIN(1, 1), images(2, 1, 8, 8), torch.tensor([[0.0], [1.0]])
    layer.affine.weight.data, layer.affine.bias.data = torch.tensor([[3.0], [1.0]]), torch.zeros(2)
    made = layer(x, codes)
    plain = layer(x, 0 * codes)
    torch.testing.assert_close(made[0], plain[0])
    torch.testing.assert_close(made[1], 2 * plain[1] + 3)


def test_vin_with_a_zero_convolution_is_the_identity():
    block, x = VIN(4, 7), images(2, 4, 5, 6)
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)
    assert torch.equal(block(x, images(2, 7)), x)


@pytest.mark.parametrize(
    ("width", "guidance", "enhancer", "critic"),
    [(16, 459_824, 2_204_881, 156_529), (64, 7_248_896, 34_750_225, 2_496_961)],
)
def test_numbers_of_parameters(width: int, guidance: int, enhancer: int, critic: int):
    network = IP.build("hqgnet", HQGNetOptions(width=width), channels=1)
    assert (count(network.guidance), count(network.enhancer)) == (guidance, enhancer)
    assert count(network) == guidance + enhancer
    assert count(CRITIC.build("patch", PatchCriticOptions(width=width), channels=1)) == critic
    assert all(count(VIN(c, 80)) == 9 * c**2 + 164 * c for c in (16, 32, 64, 128))
    variational = IP.build("hqgnet", HQGNetOptions(width=width, variational=True), channels=1)
    assert count(variational.guidance) - guidance == {16: 8256, 64: 32832}[width]


@pytest.mark.parametrize("channels", [1, 3])
def test_untrained_it_is_the_identity(channels: int):
    x = images(2, channels, 32, 36) * 0.998 + 0.001
    network = IP.build("hqgnet", channels=channels)
    torch.testing.assert_close(network(x), x, rtol=0, atol=1e-5)
    enlarging = IP.build("hqgnet", channels=channels, scale=2)
    bicubic = F.interpolate(x, scale_factor=2.0, mode="bicubic").clamp(1e-3, 1 - 1e-3)
    torch.testing.assert_close(enlarging(x), bicubic, rtol=0, atol=1e-5)


def test_without_the_residual_it_is_the_figure():
    assert (small(residual=False)(images(1, 1, 8, 8)) - 0.5).abs().max() > 1e-3
    network = small(residual=False)
    nn.init.zeros_(network.enhancer.last.weight)
    nn.init.zeros_(network.enhancer.last.bias)
    assert torch.equal(network(images(1, 1, 8, 8)), torch.full((1, 1, 8, 8), 0.5))


def test_the_guide_changes_the_output_and_its_place_matters():
    network, x, guides = small().eval(), images(2, 1, 16, 16), images(2, 1, 16, 16, seed=2)
    guides[1] *= 0.1
    one, other = network(x, guides), network(x, guides.flip(0))
    assert (one - other).abs().max() > 1e-4
    torch.testing.assert_close(network(x[:1], guides[:1]), one[:1])
    torch.testing.assert_close(network(x, guides[:1])[1], other[1])  # one guide for all
    blind = small(guided=False).eval()
    assert torch.equal(blind(x, guides), blind(x, guides.flip(0)))


def test_inference_needs_the_image_alone():
    network, x = small().eval(), images(2, 1, 16, 16)
    before = network(x)
    guides = [images(1, 16, 16, seed=3), images(1, 21, 12, seed=4)]
    network.remember(guides)
    expected = torch.stack([network.describe(each[None]).mean[0] for each in guides]).mean(0)
    assert torch.equal(network.guide, expected)
    assert not torch.equal(network(x), before)
    other = small()
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.eval()(x), network(x))


def test_a_variational_guide_is_drawn_in_training_alone():
    network, x, guide = small(variational=True), images(1, 1, 16, 16), images(1, 1, 16, 16, seed=2)
    torch.manual_seed(1)
    first = network(x, guide)
    assert not torch.equal(network(x, guide), first)
    torch.manual_seed(1)
    assert torch.equal(network(x, guide), first)
    network.eval()
    assert torch.equal(network(x, guide), network(x, guide))
    mean, log_variance = network.describe(guide)
    assert mean.shape == log_variance.shape == (1, CUE)
    # Of many draws: the mean and the standard deviation that it says.
    drawn = torch.stack([network.describe(guide).sample() for _ in range(400)])
    scale = (log_variance / 2).exp()
    assert ((drawn.mean(0) - mean) / scale).abs().max() < 5 / 20
    assert (drawn.std(0) / scale - 1).abs().max() < 0.25


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_images_of_one_value_have_gradients(value: float):
    network = small()
    network(torch.full((1, 1, 16, 16), value), torch.full((1, 1, 16, 16), 1 - value)).mean().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_sides_that_the_levels_do_not_fit_are_mirrored():
    network, x = small().eval(), images(1, 1, 18, 13)
    rows, columns = [*range(18), 16, 15], [*range(13), 11, 10, 9]
    whole = network(x[..., rows, :][..., columns])
    torch.testing.assert_close(network(x), whole[..., :18, :13])


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 16), r"made for 1 channel\(s\), and the images have 3"),
        ((1, 1, 16, 7), "at least 8 x 8 px, not 16 x 7"),
    ],
)
def test_images_that_do_not_fit(shape: tuple[int, ...], message: str):
    with pytest.raises(ValueError, match=message):
        small()(images(*shape))
    with pytest.raises(ValueError, match=message):
        small()(images(1, 1, 16, 16), images(*shape))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (HQGNetOptions, {"width": 0}, "width must be at least 1, not 0"),
        (HQGNetOptions, {"levels": 7}, "levels must be between 1 and 6, not 7"),
        (PatchCriticOptions, {"blocks": 0}, "blocks must be at least 1, not 0"),
    ],
)
def test_options_out_of_range(kind, options, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        kind(**options)


def test_the_critic_answers_patch_by_patch():
    critic = CRITIC.build("patch", PatchCriticOptions(width=2), channels=1)
    x = images(1, 1, 128, 128)
    logits = critic(x)
    assert logits.shape == (1, 1, 16, 16)
    x[..., :8, :8] = 0
    changed = critic(x) != logits
    assert changed[0, 0, 0, 0] and not changed[0, 0, 8:, 8:].any()
