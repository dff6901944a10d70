"""Metrics against independent oracles: NumPy's arithmetic, and scikit-image's PSNR and SSIM."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from train.data import load
from train.degradations import Gaussian, fixed_seeds
from train.evaluation.evaluate import classical_quality
from train.evaluation.metrics import PSNR_CAP, accuracy, image_quality, majority_share, psnr_of


@pytest.fixture
def clean() -> torch.Tensor:
    """Smooth images, so that there is something to restore: ``[70, 1, 32, 32]``, more than one scoring batch."""
    coarse = torch.rand(70, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")


@pytest.mark.parametrize("channels", [1, 3])
def test_quality_equals_the_oracles_after_clamping(clean: torch.Tensor, channels: int) -> None:
    clean = clean.repeat(1, channels, 1, 1)
    degraded = Gaussian(0.3)(clean, range(70))
    assert degraded.min() < 0 < 1 < degraded.max()
    quality = image_quality(degraded, clean)
    a, b = degraded.clamp(0, 1).double().numpy(), clean.double().numpy()
    psnr = -10 * np.log10(((a - b) ** 2).mean((1, 2, 3)))
    ssim = [
        structural_similarity(
            x, y, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=0
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(quality.psnr, psnr, atol=1e-4)
    np.testing.assert_allclose(quality.ssim, ssim, atol=1e-4)
    assert quality.mean_psnr == pytest.approx(psnr.mean(), abs=1e-4)
    assert quality.mean_ssim == pytest.approx(np.mean(ssim), abs=1e-4)


def test_a_single_image(clean: torch.Tensor) -> None:
    quality = image_quality(clean[:1] * 0.9, clean[:1])
    assert quality.psnr.shape == quality.ssim.shape == (1,)


def test_a_perfect_image(clean: torch.Tensor) -> None:
    quality = image_quality(clean, clean)
    assert quality.mean_psnr == PSNR_CAP == 60
    assert quality.capped == len(clean)
    assert quality.mean_ssim == pytest.approx(1)


@pytest.mark.parametrize(("error", "psnr"), [(0.1, 20), (1.1e-3, 59.172), (0.9e-3, 60), (1e-6, 60), (0, 60)])
def test_the_cap_is_an_error_of_a_thousandth(error: float, psnr: float) -> None:
    black = torch.zeros(1, 1, 16, 16)
    assert image_quality(black + error, black).mean_psnr == pytest.approx(psnr, abs=1e-3)
    assert psnr_of(black + error, black).item() == pytest.approx(psnr, abs=1e-3)


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.5, 0.25)])
def test_similarity_of_constant_images(a: float, b: float) -> None:
    """Variances and covariance are 0, so the definition leaves (2ab + C1) / (a^2 + b^2 + C1)."""
    image = torch.ones(1, 1, 16, 16)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert image_quality(image * a, image * b).mean_ssim == pytest.approx(expected, abs=1e-3)


def test_nan_is_neither_forgotten_nor_right(clean: torch.Tensor) -> None:
    images = clean[:3].clone()
    images[1, 0, 3, 4] = math.nan
    quality = image_quality(images, clean[:3])
    assert quality.psnr.isnan().tolist() == quality.ssim.isnan().tolist() == [False, True, False]
    assert quality.undefined == 1
    assert math.isnan(quality.mean_psnr) and math.isnan(quality.mean_ssim)
    logits = torch.tensor([[1.0, 0.0], [math.nan, math.nan], [0.0, math.nan], [0.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 0, 1, 1])) == 0.5


def test_quality_refuses_other_shapes(clean: torch.Tensor) -> None:
    for images in (clean[:3], clean[:, :, :16], clean[0]):
        with pytest.raises(ValueError, match="share one shape"):
            image_quality(images, clean)
    with pytest.raises(ValueError, match="N > 0"):
        image_quality(clean[:0], clean[:0])


def test_accuracy() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 4.0], [-2.0, -1.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75
    with pytest.raises(ValueError, match="accuracy needs"):
        accuracy(logits[:0], torch.tensor([]))


def test_images_of_unknown_diagnosis_are_ignored() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 4.0], [-2.0, -1.0]])
    assert accuracy(logits, torch.tensor([0, -1, 1, -1])) == 0.5
    with pytest.raises(ValueError, match="at least one that is known"):
        accuracy(logits, torch.full((4,), -1))
    assert majority_share(np.array([-1, 2, 2, 0, -1])) == pytest.approx(2 / 3)
    assert majority_share(np.array([-1, -1])) is majority_share(None) is None


def test_on_real_images(shared_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Known from measurements at 128 px and sigma 0.1: degraded 20.9 dB, non-local means above 26 dB."""
    test = load("covidct", root=shared_data("COVID-CT"), source="real", cache_dir=tmp_path).test
    chosen = range(0, len(test), 8)
    degrade = Gaussian(0.1)
    clean = test.tensor(list(chosen))
    degraded = degrade(clean, fixed_seeds(degrade, [test.names[i] for i in chosen]))
    assert image_quality(degraded, clean).mean_psnr == pytest.approx(20.9, abs=0.3)
    quality = classical_quality(test.take(list(chosen)), degrade, degrade.remedies["classical"])
    assert 26 < quality.mean_psnr < 29
