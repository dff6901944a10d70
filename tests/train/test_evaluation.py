from __future__ import annotations

import pytest
import torch
from torch import nn

from train.data.cache import ArrayCache
from train.degradations import DEGRADATIONS, fixed_seeds
from train.evaluation import BATCH, evaluate
from train.metrics import image_quality

from .tiny import subset

CPU = torch.device("cpu")


class Brightness(nn.Module):
    """Diagnoses by the mean brightness, as the tiny data set's classes are made."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.zeros_like(mean), mean - 0.5], 1)


@pytest.fixture
def images():
    return subset("test", BATCH + 3)  # more than one batch, the last one incomplete


def test_an_ip_that_does_nothing_gains_nothing(images):
    degrade = DEGRADATIONS.build("gaussian", sigma=0.1)
    result = evaluate(nn.Identity(), None, images, degrade, device=CPU)
    given = degrade(images.tensor(), fixed_seeds(degrade, images.names))
    assert torch.equal(result.degraded, given)
    assert torch.equal(result.enhanced, given.clamp(0, 1))
    assert torch.equal(result.quality_enhanced.psnr, result.quality_degraded.psnr)
    assert result.accuracies is None
    assert len(result.quality_classical.psnr) == len(images)


def test_diagnosis_on_each_kind_of_image(images):
    degrade = DEGRADATIONS.build("gaussian", sigma=0.1)
    darken = nn.Hardtanh(-1.0, 0.0)  # everything is black: no image is bright
    result = evaluate(darken, Brightness(), images, degrade, device=CPU)
    clean, labels = images.tensor(), torch.tensor(images.labels)
    right = ((clean.mean((1, 2, 3)) > 0.5).long() == labels).double().mean().item()
    assert result.accuracies == {
        "clean": pytest.approx(right),
        "degraded": pytest.approx(right, abs=0.2),
        "enhanced": pytest.approx((labels == 0).double().mean().item()),
    }
    assert result.enhanced.abs().max() == 0


def test_super_resolution_is_compared_at_full_size(images):
    degrade = DEGRADATIONS.build("downsample", scale=2)
    result = evaluate(nn.Upsample(scale_factor=2), Brightness(), images, degrade, device=CPU)
    assert result.degraded.shape == result.enhanced.shape == result.clean.shape
    nearest = nn.Upsample(scale_factor=2)(degrade(result.clean, fixed_seeds(degrade, images.names)))
    assert torch.equal(result.quality_enhanced.psnr, image_quality(nearest, result.clean).psnr)


def test_the_test_noise_never_changes(images):
    degrade = DEGRADATIONS.build("gaussian", sigma=0.1)
    results = [evaluate(nn.Identity(), None, images, degrade, device=CPU).degraded for _ in range(2)]
    assert torch.equal(*results)


def test_networks_are_evaluated_in_eval_mode(images):
    degrade = DEGRADATIONS.build("gaussian", sigma=0.1)
    network = nn.Dropout(0.9).train()
    result = evaluate(network, None, images, degrade, device=CPU)
    assert torch.equal(result.enhanced, result.degraded.clamp(0, 1))


def test_the_classical_scores_are_kept(images, tmp_path):
    degrade = DEGRADATIONS.build("gaussian", sigma=0.1)
    first, second = (
        evaluate(nn.Identity(), None, images, degrade, device=CPU, cache=ArrayCache(tmp_path)) for _ in range(2)
    )
    assert list(tmp_path.iterdir())
    assert torch.equal(first.quality_classical.psnr, second.quality_classical.psnr)
