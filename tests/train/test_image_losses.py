"""The losses of Frepa against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from train import losses
from train.frequencies import filtered, radius


def images(value: float = 0.5) -> torch.Tensor:
    return torch.full((2, 1, 32, 32), value, dtype=torch.float64)


def test_rmse_is_the_offset_and_has_a_gradient_at_0() -> None:
    assert losses.rmse_loss(images(0.5), images(0.2)).item() == pytest.approx(0.3)
    assert losses.rmse_loss(images(0.2), images(0.5)).item() == pytest.approx(0.3)
    equal = images().requires_grad_()
    loss = losses.rmse_loss(equal, images())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert equal.grad is not None and not equal.grad.any(), "the gradient of a root at 0 is not finite"
    assert losses.rmse_loss(images() * math.nan, images()).isnan()


def test_gradient_of_a_ramp_is_its_slope() -> None:
    ramp = images(0) + 0.03 * torch.arange(32)
    assert losses.gradient_loss(ramp, images(0)).item() == pytest.approx(0.03)
    both = ramp + 0.02 * torch.arange(32)[:, None]
    assert losses.gradient_loss(both, images(0)).item() == pytest.approx(0.05)
    assert losses.gradient_loss(images(0.9), images(0.1)).item() == 0


def test_high_pass() -> None:
    """The gain is 0 at frequency 0 and 1 - 1/e at the cut: a filter whose center is off by half a bin has neither."""
    side, bins = 64, 8
    wave = torch.cos(2 * math.pi * bins * torch.arange(side, dtype=torch.float64) / side).expand(1, 1, side, side)
    for image in (wave, wave.transpose(2, 3)):
        passed = losses.high_passed(image, bins / side)
        torch.testing.assert_close(passed, 0.632121 * image, rtol=1e-6, atol=1e-6)
    assert losses.high_passed(images(), 0.02).abs().max() < 1e-12


def test_high_frequency_loss_of_a_wave() -> None:
    """At 512 pixels the cuts are 10, 20, ... 50 bins; a wave of 20 bins at 512 is one of 5 at 128."""
    for side, bins in [(512, 20), (128, 5)]:
        wave = torch.cos(2 * math.pi * bins * torch.arange(side, dtype=torch.float64) / side).expand(1, 1, side, side)
        gains = sum(1 - math.exp(-((20 / cut) ** 2)) for cut in (10, 20, 30, 40, 50))
        expected = gains * wave.abs().mean().item()
        assert losses.high_frequency_loss(wave, torch.zeros_like(wave)).item() == pytest.approx(expected, rel=1e-6)
    assert losses.high_frequency_loss(images(0.9), images(0.1)).item() == pytest.approx(0, abs=1e-12)


def test_frepa_is_the_sum() -> None:
    """An offset of 0.3 costs its RMSE alone; the weights are 1, 1 and 0.2."""
    assert losses.frepa_loss(images(0.5), images(0.2)).item() == pytest.approx(0.3, abs=1e-9)
    one = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    other = one.flip(0)
    parts = [each(one, other) for each in (losses.rmse_loss, losses.gradient_loss, losses.high_frequency_loss)]
    assert losses.frepa_loss(one, other).item() == pytest.approx((parts[0] + parts[1] + 0.2 * parts[2]).item())


@pytest.mark.parametrize("name", list(losses.IMAGE_LOSSES))
def test_every_image_loss_is_0_between_equal_images(name: str) -> None:
    loss = losses.IMAGE_LOSSES[name]
    one, other = (torch.rand(2, 3, 16, 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    equal = one.clone().requires_grad_()
    value = loss(equal, one)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert equal.grad is not None and equal.grad.isfinite().all()
    assert loss(one, other).item() > 0.05
    assert loss(one, other).shape == ()


def test_consistency() -> None:
    one = torch.tensor([[[[3.0]], [[4.0]]]], requires_grad=True)
    other = torch.tensor([[[[4.0]], [[3.0]]]], requires_grad=True)
    loss = losses.embedding_distance(one, other)
    assert loss.item() == pytest.approx(1 - 24 / 25)
    loss.backward()
    assert one.grad is not None and one.grad.any()
    assert other.grad is None, "the target gets a gradient"
    assert losses.embedding_distance(one, 5 * one).item() == pytest.approx(0, abs=1e-6)


def test_critic_at_0() -> None:
    zero = torch.zeros(2, 1, 3, 3)
    assert losses.critic_loss(zero, zero).item() == pytest.approx(2 * 0.693147, abs=1e-6)
    assert losses.adversarial_loss(zero).item() == pytest.approx(0.693147, abs=1e-6)
    assert losses.critic_loss(zero + 5, zero - 5) < 0.02 < losses.critic_loss(zero - 5, zero + 5)
    assert losses.adversarial_loss(zero + 5) < 0.01


@pytest.mark.parametrize("shape", [(8, 8), (9, 6), (6, 9)])
def test_frequencies_are_those_of_numpy(shape: tuple[int, int]) -> None:
    height, width = shape
    rows, columns = np.fft.fftfreq(height), np.fft.rfftfreq(width)
    expected = np.sqrt(rows[:, None] ** 2 + columns**2)
    np.testing.assert_allclose(radius(height, width).numpy(), expected, atol=1e-7)
    image = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = np.fft.fft2(image[0].numpy()) * (np.hypot(rows[:, None], np.fft.fftfreq(width)) < 0.3)
    gain = (radius(height, width) < 0.3).double()
    np.testing.assert_allclose(filtered(image, gain)[0].numpy(), np.fft.ifft2(whole).real, atol=1e-12)
