"""Degradations: what they do to pixels, and whose seed decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from train.degradations import DEGRADATIONS, Downsample, Gaussian, fixed_seeds, stable_seed


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.rand(5, 1, 64, 64, generator=torch.Generator().manual_seed(0))


class TestSeeds:
    PART = st.integers() | st.text()

    @given(st.lists(PART), st.lists(PART))
    def test_injective_in_practice(self, a: list[int | str], b: list[int | str]) -> None:
        assert (stable_seed(*a) == stable_seed(*b)) == (list(map(repr, a)) == list(map(repr, b)))
        assert 0 <= stable_seed(*a) < 2**63

    def test_never_changes(self) -> None:
        """A test set degraded today is the one degraded in a year, in any process."""
        assert stable_seed("test", 7, "ä%0.png") == 5665324844081614792

    @pytest.mark.parametrize("part", [1.0, None, True, b"x"])
    def test_other_types_are_refused(self, part: object) -> None:
        with pytest.raises(TypeError, match="integers and strings"):
            stable_seed(part)

    def test_fixed_seeds_depend_on_name_and_degradation(self) -> None:
        names = ["a.png", "b.png"]
        assert fixed_seeds(Gaussian(0.1), names) == fixed_seeds(Gaussian(sigma=0.1), names)
        assert fixed_seeds(Gaussian(0.1), names[1:]) == fixed_seeds(Gaussian(0.1), names)[1:]
        assert len({*fixed_seeds(Gaussian(0.1), names), *fixed_seeds(Gaussian(0.2), names)}) == 4


class TestGaussian:
    def test_moments(self, clean: torch.Tensor) -> None:
        noise = (Gaussian(0.2)(clean, range(5)) - clean).double().flatten()
        count = noise.numel()
        assert abs(noise.mean()) < 4 * 0.2 / math.sqrt(count)
        assert abs(noise.std() - 0.2) < 4 * 0.2 / math.sqrt(2 * count)
        assert abs((noise / 0.2).pow(4).mean() - 3) < 4 * math.sqrt(96 / count)  # the kurtosis of a Gaussian

    def test_not_clipped(self, clean: torch.Tensor) -> None:
        degraded = Gaussian(0.3)(clean, range(5))
        assert degraded.min() < -0.3
        assert degraded.max() > 1.3
        assert degraded.dtype == torch.float32

    def test_an_image_depends_on_its_own_seed_only(self, clean: torch.Tensor) -> None:
        degrade = Gaussian(0.1)
        together = degrade(clean, [3, 1, 4, 1, 5])
        assert torch.equal(degrade(clean[2:3], [4]), together[2:3])
        assert torch.equal(degrade(clean.flip(0), [5, 1, 4, 1, 3]), together.flip(0))
        noise = together - clean
        assert not torch.allclose(noise[0], noise[1], atol=1e-3)

    def test_global_random_state_is_left_alone(self, clean: torch.Tensor) -> None:
        before = torch.get_rng_state()
        Gaussian(0.1)(clean, range(5))
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_clean_image_is_left_alone(self, clean: torch.Tensor) -> None:
        copy = clean.clone()
        Gaussian(0.1)(clean, range(5))
        assert torch.equal(clean, copy)

    def test_no_noise_at_zero(self, clean: torch.Tensor) -> None:
        assert torch.equal(Gaussian(0)(clean, range(5)), clean)

    @pytest.mark.parametrize("sigma", [-0.1, math.nan, math.inf])
    def test_bad_sigma(self, sigma: float) -> None:
        with pytest.raises(ValueError, match=r"sigma must be .* not (-0\.1|nan|inf)"):
            Gaussian(sigma)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
    def test_same_noise_on_the_gpu(self, clean: torch.Tensor) -> None:
        on_gpu = Gaussian(0.1)(clean.cuda(), range(5))
        torch.testing.assert_close(on_gpu.cpu(), Gaussian(0.1)(clean, range(5)))


class TestDownsample:
    @pytest.mark.parametrize("scale", [2, 4])
    def test_equals_pillow(self, clean: torch.Tensor, scale: int) -> None:
        """Pillow's antialiased bicubic reduction is the oracle."""
        small = Downsample(scale)(clean, range(5))
        assert small.shape == (5, 1, 64 // scale, 64 // scale)
        for image, reduced in zip(clean, small, strict=True):
            oracle = Image.fromarray(image[0].numpy()).resize((64 // scale,) * 2, Image.Resampling.BICUBIC)
            np.testing.assert_allclose(reduced[0], np.asarray(oracle).clip(0, 1), atol=1e-4)

    def test_sides_must_be_multiples(self) -> None:
        with pytest.raises(ValueError, match="64 x 65 pixels cannot be reduced by 2"):
            Downsample(2)(torch.zeros(1, 1, 64, 65), [0])

    @pytest.mark.parametrize("scale", [1, 0, -2, 2.5])
    def test_bad_scale(self, scale: float) -> None:
        with pytest.raises(ValueError, match="scale must be an integer > 1"):
            Downsample(scale)


@pytest.mark.parametrize("degrade", [Gaussian(0.1), Downsample(2)])
class TestEveryDegradation:
    def test_bad_batches(self, degrade: object, clean: torch.Tensor) -> None:
        with pytest.raises(ValueError, match="5 images need as many seeds, not 4"):
            degrade(clean, range(4))
        with pytest.raises(ValueError, match="empty"):
            degrade(clean[:0], [])
        with pytest.raises(ValueError, match="float32"):
            degrade(clean.double(), range(5))
        with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
            degrade(clean[0], [1])

    def test_registered(self, degrade: object, clean: torch.Tensor) -> None:
        assert type(DEGRADATIONS.build(degrade.name)) is type(degrade)
        assert degrade(clean, range(5)).shape[-1] == 64 // degrade.scale
