"""Degradations: what they do to pixels, and whose seed decides."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.stats import poisson
from skimage.restoration import denoise_nl_means

from train.degradations import (
    DEGRADATIONS,
    Blur,
    Chain,
    Degradation,
    Downsample,
    Gaussian,
    Jpeg,
    Poisson,
    choices,
    enlarge,
    fixed_seeds,
    parse,
    stable_seed,
)
from train.degradations.base import written
from train.degradations.parsing import ALIASES
from train.degradations.remedies import anscombe, inverse_anscombe
from train.errors import RunError

from .contracts import phantoms, psnr

# The same examples in every run, and no clock: a busy machine is no failure.
STEADY = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.rand(5, 1, 64, 64, generator=torch.Generator().manual_seed(0))


class TestSeeds:
    PART = st.integers() | st.text()

    @STEADY
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


def imresize(rows: np.ndarray, scale: int) -> np.ndarray:
    """MATLAB's ``imresize(rows, 1 / scale)`` along the first side: Keys' cubic kernel with a = -1/2, as wide as
    ``scale`` asks for, over pixels that are counted from 1 and go on mirrored."""
    count = len(rows)
    small = []
    for place in range(1, count // scale + 1):
        center = place * scale + 0.5 * (1 - scale)
        near = np.arange(math.floor(center - 2 * scale), math.floor(center - 2 * scale) + 4 * scale + 2)
        x = np.abs(center - near) / scale
        weights = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x <= 2)
        mirrored = np.concatenate([np.arange(count), np.arange(count)[::-1]])[(near - 1) % (2 * count)]
        small.append(weights @ rows[mirrored] / weights.sum())
    return np.stack(small)


class TestDownsample:
    @pytest.mark.parametrize("scale", [2, 3, 4])
    def test_equals_pillow(self, clean: torch.Tensor, scale: int) -> None:
        """Pillow's antialiased bicubic reduction is the oracle."""
        clean = clean[..., :60, :48]
        small = Downsample(scale)(clean, range(5))
        assert small.shape == (5, 1, 60 // scale, 48 // scale)
        for image, reduced in zip(clean, small, strict=True):
            size = (48 // scale, 60 // scale)
            oracle = Image.fromarray(image[0].numpy()).resize(size, Image.Resampling.BICUBIC)
            np.testing.assert_allclose(reduced[0], np.asarray(oracle).clip(0, 1), atol=1e-4)

    @pytest.mark.parametrize("scale", [2, 3, 4])
    def test_equals_imresize_of_matlab(self, clean: torch.Tensor, scale: int) -> None:
        """Its published formula in float64, but for two pixels at the border, beyond which it mirrors the image."""
        image = 0.2 + 0.6 * clean[0, 0, :60, :48]  # what overshoots stays in [0, 1], and is not clipped
        expected = imresize(imresize(image.double().numpy(), scale).T, scale).T
        assert 0 < expected.min() < expected.max() < 1
        found = Downsample(scale)(image[None, None], [0])[0, 0].numpy()
        np.testing.assert_allclose(found[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-5)
        assert not np.allclose(found[:2], expected[:2], atol=1e-3)

    def test_sides_must_be_multiples(self) -> None:
        with pytest.raises(ValueError, match="64 x 65 pixels cannot be reduced by 2"):
            Downsample(2)(torch.zeros(1, 1, 64, 65), [0])

    @pytest.mark.parametrize("scale", [1, 0, -2, 2.5])
    def test_bad_scale(self, scale: float) -> None:
        with pytest.raises(ValueError, match="scale must be an integer > 1"):
            Downsample(scale)


class TestPoisson:
    @pytest.mark.parametrize("peak", [4.0, 30.0])
    @pytest.mark.parametrize("level", [0.1, 0.6, 1.0])
    def test_counts(self, peak: float, level: float) -> None:
        """Whole numbers of photons, as many on average as the image says, with a variance that equals their mean."""
        counts = Poisson(peak)(torch.full((1, 1, 128, 128), level), [7]).double().flatten() * peak
        torch.testing.assert_close(counts, counts.round(), atol=1e-4, rtol=0)
        n, mean = counts.numel(), peak * level
        assert abs(counts.mean() - mean) < 4 * math.sqrt(mean / n)
        # The variance of a sample variance: the fourth central moment of a Poisson distribution is 3 m^2 + m.
        assert abs(counts.var() - mean) < 4 * math.sqrt((2 * mean**2 + mean) / n)

    def test_nothing_is_counted_where_it_is_black(self) -> None:
        image = torch.tensor([[[[-0.3, 0.0], [0.0, 1.0]]]])
        assert (Poisson(1000)(image, [0])[0, 0] > 0).tolist() == [[False, False], [False, True]]

    def test_not_clipped(self, clean: torch.Tensor) -> None:
        assert Poisson(5)(clean, range(5)).max() > 1.2

    @pytest.mark.parametrize("peak", [0, -3, math.nan, math.inf, 1e7])
    def test_bad_peak(self, peak: float) -> None:
        with pytest.raises(ValueError, match="peak must be a number of photons"):
            Poisson(peak)

    @pytest.mark.parametrize("mean", [0.05, 0.5, 1, 2, 5, 20, 200])
    def test_inverse_anscombe_is_unbiased(self, mean: float) -> None:
        """The definition, summed up: the inverse takes the mean of the transformed counts back to the mean."""
        counts = np.arange(0, 600)
        transformed = (2 * np.sqrt(counts + 0.375) * poisson.pmf(counts, mean)).sum()
        assert inverse_anscombe(np.array(transformed)) == pytest.approx(mean, rel=0.02, abs=0.01)
        algebraic = (transformed / 2) ** 2 - 3 / 8
        assert abs(inverse_anscombe(np.array(transformed)) - mean) < abs(algebraic - mean)

    def test_anscombe_evens_the_noise_out(self) -> None:
        rng = np.random.default_rng(0)
        spreads = [anscombe(rng.poisson(mean, 20_000)).std() for mean in (5, 20, 100)]
        np.testing.assert_allclose(spreads, 1, atol=0.03)

    def test_the_remedy_keeps_the_brightness(self) -> None:
        flat = torch.full((1, 1, 96, 96), 0.3)
        restored = Poisson(8).restore_batch(Poisson(8)(flat, [3]))
        assert restored.mean() == pytest.approx(0.3, abs=0.006)  # the algebraic inverse would be at 0.27


class TestBlur:
    @pytest.mark.parametrize("sigma", [0.6, 1.5, 4.0])
    def test_equals_the_integral_written_out(self, sigma: float) -> None:
        """Each pixel is the mean of its neighborhood, weighted by the Gaussian; the image goes on mirrored."""
        image = np.random.default_rng(0).random((20, 23))
        radius = int(4 * sigma + 0.5)
        rows, columns = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        weights = np.exp(-(rows**2 + columns**2) / (2 * sigma**2))
        around = np.pad(image, radius, "symmetric")
        windows = np.lib.stride_tricks.sliding_window_view(around, weights.shape)
        expected = (windows * weights).sum((2, 3)) / weights.sum()
        blurred = Blur(sigma)(torch.from_numpy(image)[None, None].float(), [0])
        np.testing.assert_allclose(blurred[0, 0], expected, atol=1e-5)

    def test_channels_do_not_mix(self) -> None:
        image = torch.zeros(1, 3, 16, 16)
        image[0, 1, 8, 8] = 1
        blurred = Blur(1)(image, [0])
        assert blurred[0, [0, 2]].abs().max() == 0
        assert blurred[0, 1].sum() == pytest.approx(1, abs=1e-5)

    def test_a_kernel_larger_than_the_image(self) -> None:
        image = torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
        blurred = Blur(20)(image, [0])
        torch.testing.assert_close(blurred, image.mean().expand_as(image), atol=0.05, rtol=0)
        assert Blur(20).restore(blurred[0]).shape == (1, 6, 5)

    def test_sharp_at_zero(self, clean: torch.Tensor) -> None:
        assert torch.equal(Blur(0)(clean, range(5)), clean)
        assert torch.equal(Blur(0).restore_batch(clean), clean)

    @pytest.mark.parametrize("sigma", [-1, math.nan, math.inf, 51])
    def test_bad_sigma(self, sigma: float) -> None:
        with pytest.raises(ValueError, match="sigma must be a number of pixels from 0 to 50"):
            Blur(sigma)

    def test_its_sigma_is_no_noise(self) -> None:
        assert Blur(1.5).noise_level is None
        assert Gaussian(0.2).noise_level == 0.2


class TestJpeg:
    def test_one_block_written_out(self) -> None:
        """The standard by hand, for a gray block of 8 x 8: cosine transform, division by the table of its annex K,
        which is that of quality 50, rounding, and the way back."""
        table = np.array(
            [
                [16, 11, 10, 16, 24, 40, 51, 61],
                [12, 12, 14, 19, 26, 58, 60, 55],
                [14, 13, 16, 24, 40, 57, 69, 56],
                [14, 17, 22, 29, 51, 87, 80, 62],
                [18, 22, 37, 56, 68, 109, 103, 77],
                [24, 35, 55, 64, 81, 104, 113, 92],
                [49, 64, 78, 87, 103, 121, 120, 101],
                [72, 92, 95, 98, 112, 100, 103, 99],
            ]
        )
        rows, columns = np.mgrid[:8, :8]
        noise = np.random.default_rng(308).standard_normal((8, 8))
        block = np.rint(128 + 60 * np.sin(rows / 2) + 40 * np.cos(columns / 3) + 12 * noise)
        exact = dctn(block - 128, norm="ortho") / table
        quantized = np.rint(exact)
        assert np.abs(exact - quantized).max() < 0.45, "nothing lies where a rounding error decides"
        expected = np.rint(idctn(quantized * table, norm="ortho") + 128).clip(0, 255)
        assert np.abs(expected - block).max() > 3
        found = Jpeg(50)(torch.tensor(block / 255).float()[None, None], [0])[0, 0].numpy() * 255
        np.testing.assert_allclose(found, expected, atol=1.01)  # the library computes in integers

    def test_color_is_stored_at_half_the_size(self) -> None:
        """Stripes of one pixel: those of brightness stay, those of color alone become their mean."""
        stripes = (torch.arange(32) % 2).float().expand(1, 1, 32, 32)
        brightness = (0.3 + 0.4 * stripes).expand(-1, 3, -1, -1)
        color = torch.cat([0.5 + 0.2 * stripes, 0.5 - 0.2 * stripes * 0.299 / 0.587, 0.5 * torch.ones_like(stripes)], 1)
        for image, kept in ((brightness, True), (color, False)):
            stored = Jpeg(95)(image, [0])[0, 0]
            contrast = (stored[:, 1::2].mean() - stored[:, ::2].mean()).item()
            assert contrast == pytest.approx(0.4, abs=0.02) if kept else abs(contrast) < 0.05

    def test_eight_bits_in_range(self, clean: torch.Tensor) -> None:
        stored = Jpeg(95)(Gaussian(0.3)(clean, range(5)), range(5))
        assert 0 <= stored.min() <= stored.max() <= 1
        torch.testing.assert_close(stored * 255, (stored * 255).round(), atol=1e-4, rtol=0)
        between = torch.full((1, 1, 8, 8), 100.7 / 255)
        torch.testing.assert_close(Jpeg(95)(between, [0]) * 255, torch.full((1, 1, 8, 8), 101.0))
        beyond = torch.tensor([-0.4, 1.7]).repeat_interleave(8).expand(1, 1, 8, 16)
        assert torch.equal(Jpeg(95)(beyond, [0]), Jpeg(95)(beyond.clamp(0, 1), [0]))

    @pytest.mark.parametrize("channels", [1, 3])
    def test_better_with_quality(self, channels: int) -> None:
        clean = phantoms(2).expand(-1, channels, -1, -1)
        scores = [psnr(Jpeg(quality)(clean, [0, 0]), clean).mean() for quality in (5, 20, 50, 95)]
        assert scores == sorted(scores)
        assert scores[0] + 10 < scores[-1]

    @pytest.mark.parametrize("quality", [0, 96, -1, 50.0, True])
    def test_bad_quality(self, quality: object) -> None:
        with pytest.raises(ValueError, match="quality must be an integer from 1 to 95"):
            Jpeg(quality)

    def test_other_channels(self) -> None:
        with pytest.raises(ValueError, match="1 or 3 channels, not of 2"):
            Jpeg()(torch.zeros(1, 2, 8, 8), [0])


class TestChain:
    def test_one_part_is_the_part(self, clean: torch.Tensor) -> None:
        for part in (Gaussian(0.1), Poisson(30), Blur(1), Downsample(2)):
            chain = Chain((part,))
            assert torch.equal(chain(clean, range(5)), part(clean, range(5)))
            assert (chain.name, chain.scale, chain.remedy, str(chain)) == (
                part.name,
                part.scale,
                part.remedy,
                str(part),
            )
            assert chain.noise_level == part.noise_level

    def test_one_after_the_other(self, clean: torch.Tensor) -> None:
        """Written out with the seeds that are documented."""
        chain = parse("blur:1.5+downsample:2+gaussian:0.1+poisson:30")
        seeds = [stable_seed("image", i) for i in range(5)]
        expected = Downsample(2)(Blur(1.5)(clean, seeds), seeds)
        expected = Gaussian(0.1)(expected, [stable_seed("part", 2, seed) for seed in seeds])
        expected = Poisson(30)(expected, [stable_seed("part", 3, seed) for seed in seeds])
        assert torch.equal(chain(clean, seeds), expected)
        assert chain.scale == 2
        assert chain.noise_level is None

    def test_the_same_kind_twice_is_not_the_same_noise(self, clean: torch.Tensor) -> None:
        once = Gaussian(0.1)(clean, range(5)) - clean
        more = Gaussian(0.1)(clean, range(5)) - (parse("gaussian:0.1+gaussian:0.1")(clean, range(5)))
        correlation = torch.corrcoef(torch.stack([once.flatten(), more.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(once.numel())

    def test_a_chain_in_a_chain(self) -> None:
        inner = Chain((Blur(1), Gaussian(0.1)))
        assert Chain((Poisson(30), inner)) == parse("poisson:30+blur:1+gaussian:0.1")

    def test_remedies_in_reverse(self, clean: torch.Tensor) -> None:
        chain = parse("blur:1+downsample:2+gaussian:0.1")
        degraded = chain(clean, range(5))
        expected = Blur(1).restore(Downsample(2).restore(Gaussian(0.1).restore(degraded[0])))
        assert torch.equal(chain.restore(degraded[0]), expected)
        assert chain.remedy == "non-local means, bicubic, Richardson-Lucy"

    def test_no_remedy_if_a_part_has_none(self, clean: torch.Tensor) -> None:
        class Odd(Degradation):
            name = "odd"

            def degrade(self, image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
                return image

        chain = Chain((Gaussian(0.1), Odd()))
        assert chain.remedy is None
        assert chain.restore(clean[0]) is None
        assert chain.restore_batch(clean) is None

    def test_no_part(self) -> None:
        with pytest.raises(ValueError, match="at least one"):
            Chain(())


class TestRemedies:
    def test_non_local_means_of_scikit_image(self, clean: torch.Tensor) -> None:
        noisy = Gaussian(0.1)(clean, range(5))
        expected = denoise_nl_means(
            noisy[1, 0].numpy(), patch_size=5, patch_distance=6, h=0.06, sigma=0.1, fast_mode=True
        )
        np.testing.assert_allclose(Gaussian(0.1).restore(noisy[1])[0], expected, atol=1e-5)

    def test_bicubic(self, clean: torch.Tensor) -> None:
        small = Downsample(2)(clean, range(5))
        expected = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
        assert torch.equal(Downsample(2).restore_batch(small), expected)
        assert torch.equal(enlarge(small, 2), expected)
        assert enlarge(small, 1) is small


class TestParse:
    @pytest.mark.parametrize(
        ("text", "sigma", "expected"),
        [
            ("denoise", 0.2, Gaussian(0.2)),
            ("denoise", None, Gaussian(0.1)),
            ("sr2", 0.2, Downsample(2)),
            ("sr3", None, Downsample(3)),
            ("sr4", None, Downsample(4)),
            ("mixture", 0.3, Chain((Blur(1), Poisson(50), Gaussian(0.05)))),
            ("sr2+mixture", None, Chain((Downsample(2), Blur(1), Poisson(50), Gaussian(0.05)))),
            ("jpeg", None, Jpeg(10)),
            ("jpeg:30", None, Jpeg(30)),
            ("gaussian", 0.3, Gaussian(0.3)),
            ("gaussian:0.1", 0.3, Gaussian(0.1)),
            ("gaussian:0", None, Gaussian(0)),
            ("poisson", 0.3, Poisson(30)),
            ("blur:1.5", None, Blur(1.5)),
            ("downsample:3", None, Downsample(3)),
            ("poisson:30+blur:1.5", None, Chain((Poisson(30), Blur(1.5)))),
            (" poisson:1e+3 + denoise", 0.2, Chain((Poisson(1000), Gaussian(0.2)))),
        ],
    )
    def test_meaning(self, text: str, sigma: float | None, expected: Degradation) -> None:
        assert parse(text, sigma=sigma) == expected

    @STEADY
    @given(st.lists(st.floats(0, 50) | st.integers(2, 9), min_size=1, max_size=4))
    def test_text_is_read_back_exactly(self, numbers: list[float]) -> None:
        parts = [Downsample(n) if isinstance(n, int) else (Gaussian if n < 1 else Blur)(n) for n in numbers]
        degrade = Chain(tuple(parts)) if len(parts) > 1 else parts[0]
        again = parse(str(degrade))
        assert again == degrade
        assert repr(again) == repr(degrade)

    @STEADY
    @given(st.floats(allow_nan=False, allow_infinity=False))
    def test_numbers(self, number: float) -> None:
        assert float(written(number)) == number
        assert "+" not in written(number)

    def test_whole_numbers_are_one_degradation(self) -> None:
        """Gaussian(1) and gaussian:1 must not have different test noise."""
        for kind in (Gaussian, Poisson, Blur):
            assert (
                fixed_seeds(kind(1), ["a"]) == fixed_seeds(kind(1.0), ["a"]) == fixed_seeds(parse(str(kind(1))), ["a"])
            )

    @pytest.mark.parametrize(
        ("text", "culprits"),
        [
            ("", ["empty part", "gaussian:SIGMA"]),
            ("gaussian:0.1+", ["empty part", "gaussian:0.1+"]),
            ("gaussian:0.1++blur:1", ["empty part"]),
            (
                "denoize",
                ["'denoize'", "denoise, sr2, sr3, sr4, mixture (blur:1+poisson:50+gaussian:0.05), ", "poisson:PEAK"],
            ),
            ("poisson:30+blurr:1", ["'blurr:1'", "unknown degradation 'blurr'"]),
            ("gaussian:x", ["sigma must be a number, not 'x'", "gaussian:SIGMA"]),
            ("gaussian:", ["sigma must be a number, not ''"]),
            ("poisson:30+blur:-1", ["'blur:-1'", "sigma must be a number of pixels"]),
            ("gaussian:nan", ["sigma must be a finite number"]),
            ("downsample:2.5", ["scale must be an integer, not '2.5'"]),
            ("downsample:1", ["scale must be an integer > 1"]),
            ("blur:1,2", ["takes 1 argument(s), not 2"]),
            ("denoise:0.2", ["denoise takes no argument", "--sigma"]),
            ("sr2:4", ["sr2 takes no argument", "downsample:FACTOR"]),
            ("mixture:2", ["mixture takes no argument", "it is blur:1+poisson:50+gaussian:0.05"]),
            ("jpeg:9.5", ["quality must be an integer, not '9.5'", "jpeg:QUALITY"]),
            ("jpeg:100", ["quality must be an integer from 1 to 95"]),
            ("gaussian:0.1+2", ["sigma must be a number, not '0.1+2'"]),
        ],
    )
    def test_errors_say_which_part_and_what_there_is(self, text: str, culprits: list[str]) -> None:
        with pytest.raises(RunError) as caught:
            parse(text)
        assert str(caught.value).startswith("--task")
        assert "\n" not in str(caught.value)
        for culprit in culprits:
            assert culprit in str(caught.value)

    def test_every_degradation_is_offered(self) -> None:
        assert {re.split("[: ]", name)[0] for name in choices()} == {*DEGRADATIONS, *ALIASES}


@pytest.mark.parametrize(
    "degrade", [Gaussian(0.1), Downsample(2), Poisson(30), Blur(1), Jpeg(10), parse("blur:1+gaussian:0.1")]
)
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
