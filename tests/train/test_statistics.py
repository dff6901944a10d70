"""Statistics over seeds and images: hand-worked tables, and how often true hypotheses are rejected."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from train.evaluation.statistics import Difference, Interval, difference, holm, interval


def two_sided(t: float, freedom: float) -> float:
    """The p value of Student's t, from the integral of its density."""
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    inside, _ = integrate.quad(lambda x: scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), -t, t)
    return 1 - inside


class TestInterval:
    def test_by_hand(self) -> None:
        """Mean 3, standard deviation 1 and error 1 / sqrt(3); 4.303 is the table's 97.5 % quantile for 2."""
        found = interval([2.0, 3.0, 4.0])
        assert (found.mean, found.number) == (3.0, 3)
        assert found.low is not None and found.high is not None
        assert (3 - found.low, found.high - 3) == pytest.approx((4.303 / 3**0.5,) * 2, rel=1e-3)

    def test_the_level_is_that_of_another_implementation(self) -> None:
        values = np.array([27.1, 28.4, 27.7, 28.0, 26.9])
        found = interval(values, level=0.8)
        expected = stats.ttest_1samp(values, 0).confidence_interval(0.8)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))

    def test_one_seed_has_none_and_says_so(self) -> None:
        found = interval([28.0])
        assert found == Interval(28.0, None, None, 1)
        assert found.written() == "28.00 (one seed: no interval)"

    def test_a_seed_without_a_score_is_not_forgotten(self) -> None:
        found = interval([28.0, math.nan, 27.0])
        assert math.isnan(found.mean) and found.low is None and found.high is None
        assert found.written() == "undefined"

    def test_what_is_refused(self) -> None:
        for values in ([], [[1.0, 2.0]]):
            with pytest.raises(ValueError, match="one value per seed"):
                interval(np.array(values))
        for level in (0.0, 1.0, 95.0):
            with pytest.raises(ValueError, match="level"):
                interval([1.0], level=level)
            with pytest.raises(ValueError, match="level"):
                difference(np.zeros((1, 1)), np.zeros((1, 1)), level=level)


class TestDifference:
    def test_by_hand(self) -> None:
        """
        Differences 1 2 3 / 3 2 7: mean 3, of the seeds 2 and 4, of the images 2, 2 and 5. Mean squares: of seeds
        3 (1 + 1) / 1 = 6, of images 2 (1 + 1 + 4) / 2 = 6; residuals 0 1 -1 / 0 -1 1, so 4 / 2 = 2. Variance of the
        mean (6 + 6 - 2) / 6 = 5 / 3; degrees of freedom 10^2 / (6^2 / 1 + 6^2 / 2 + 2^2 / 2) = 100 / 56.
        """
        b = np.array([[5.0, 9.0, 1.0], [2.0, 8.0, 4.0]])
        found = difference(b + np.array([[1, 2, 3], [3, 2, 7]]), b)
        assert (found.mean, found.seeds, found.images, found.left_out) == (3.0, 2, 3, 0)
        t, freedom = 3 / math.sqrt(5 / 3), 100 / 56
        assert found.p == pytest.approx(two_sided(t, freedom), rel=1e-6)
        assert found.low is not None and found.high is not None
        assert found.high - 3 == pytest.approx(3 - found.low)
        # The interval ends where the hypothesis would just be rejected.
        assert two_sided((3 - found.low) / math.sqrt(5 / 3), freedom) == pytest.approx(0.05, rel=1e-6)
        assert found.scope == "new seeds and new images"

    def test_images_that_vary_less_than_the_residuals_make_nothing_surer(self) -> None:
        """
        Differences 1 3 2 / 5 3 4: means of the seeds 2 and 4, of all images 3. Mean squares 6, 0 and 2 (residuals
        -1 1 0 / 1 -1 0), so the variance is 6 / 6, not 4 / 6, and one degree of freedom is that of the seeds.
        """
        found = difference(np.array([[1.0, 3.0, 2.0], [5.0, 3.0, 4.0]]), np.zeros((2, 3)))
        assert found.p == pytest.approx(two_sided(3.0, 1.0), rel=1e-6)

    def test_it_is_the_test_of_obuchowski_rockette_and_hillis_for_many_images(self) -> None:
        """Their F, written out for both strategies in one table [strategy, seed, image], with Hillis's degrees."""
        random = np.random.default_rng(1)
        seeds, images = 4, 3000
        both = random.normal(size=(2, seeds, images)) + random.normal(size=(2, seeds, 1)) / 20
        both += random.normal(size=(2, 1, images)) + random.normal(size=(1, seeds, images))
        both[0] += 0.12
        whole = both.mean()
        of = {axes: both.mean(axes, keepdims=True) for axes in ((0, 1), (0, 2), (1, 2), (0,), (1,), (2,))}
        ms_t = seeds * images * ((of[1, 2] - whole) ** 2).sum()
        ms_tr = images * ((of[2,] - of[1, 2] - of[0, 2] + whole) ** 2).sum() / (seeds - 1)
        ms_tc = seeds * ((of[1,] - of[1, 2] - of[0, 1] + whole) ** 2).sum() / (images - 1)
        rest = both - of[0,] - of[1,] - of[2,] + of[0, 1] + of[0, 2] + of[1, 2] - whole
        ms_trc = (rest**2).sum() / ((seeds - 1) * (images - 1))
        below = ms_tr + max(ms_tc - ms_trc, 0)
        expected = stats.f.sf(ms_t / below, 1, below**2 / (ms_tr**2 / (seeds - 1)))
        assert 1e-4 < expected < 0.5
        assert difference(*both).p == pytest.approx(expected, rel=0.02)

    @pytest.mark.parametrize("seeds", [3, 5])
    @pytest.mark.parametrize("binary", [False, True], ids=["scores", "right or wrong"])
    def test_a_true_hypothesis_is_rejected_as_often_as_it_should_be(self, seeds: int, binary: bool) -> None:
        """
        With effects of seeds as well as of images, 1500 times. The test over images alone (of each image's mean over
        seeds) rejects 10 to 24 % of these true hypotheses, and one that takes all seeds and images together for a
        sample even more: they ask about these networks alone, and are sure of what other seeds would contradict.
        """
        random = np.random.default_rng(seeds)
        images, tries = 40, 1500
        found, naive = [], []
        for _ in range(tries):
            a, b = (
                0.4 * random.normal(size=(seeds, 1))
                + random.normal(size=(1, images))
                + random.normal(size=(seeds, images))
                for _ in range(2)
            )
            if binary:  # whether the diagnosis is right
                shared = 2 * random.normal(size=(1, images))
                a, b = ((each + shared > -1).astype(float) for each in (a, b))
            p = difference(a, b).p
            assert p is not None
            found.append(p < 0.05)
            naive.append(stats.ttest_1samp((a - b).mean(0), 0).pvalue < 0.05)
        assert 0.035 <= np.mean(found) <= 0.075
        assert np.mean(naive) >= 0.085

    def test_one_seed_speaks_of_images_alone(self) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 1, 12))
        found, expected = difference(a, b), stats.ttest_rel(a[0], b[0])
        assert found.p == pytest.approx(expected.pvalue)
        assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
        assert "one seed" in found.scope and "new seeds" not in found.scope

    def test_one_image_speaks_of_seeds_alone(self) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 5, 1))
        found, expected = difference(a, b), stats.ttest_rel(a[:, 0], b[:, 0])
        assert found.p == pytest.approx(expected.pvalue)
        assert "one image" in found.scope and "new images" not in found.scope

    def test_an_image_without_a_score_is_left_out_everywhere_and_counted(self) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 3, 8))
        spoiled, other = a.copy(), b.copy()
        spoiled[1, 2] = math.nan
        other[0, 5] = math.nan
        found = difference(spoiled, other)
        kept = [0, 1, 3, 4, 6, 7]
        assert found == Difference(**{**vars(difference(a[:, kept], b[:, kept])), "left_out": 2})
        assert (found.images, found.left_out) == (6, 2)

    def test_nothing_to_infer_from(self) -> None:
        found = difference(np.ones((1, 1)), np.zeros((1, 1)))
        assert (found.mean, found.low, found.high, found.p) == (1.0, None, None, None)
        assert "no inference" in found.scope and "no interval" in found.written()
        found = difference(np.full((3, 4), math.nan), np.zeros((3, 4)))
        assert math.isnan(found.mean) and found.p is None and found.images == 0
        assert found.written() == "undefined"

    def test_differences_that_are_all_the_same(self) -> None:
        """A strategy compared with itself; the answers of two readers on every image, say."""
        same = np.random.default_rng(0).normal(size=(3, 8))
        assert difference(same, same) == Difference(0.0, 0.0, 0.0, 1.0, 3, 8)
        found = difference(np.ones((3, 8)), np.zeros((3, 8)))
        assert (found.low, found.high, found.p) == (1.0, 1.0, 0.0)

    def test_other_shapes_are_refused(self) -> None:
        for shapes in (((3, 4), (3, 5)), ((4,), (4,)), ((0, 4), (0, 4))):
            with pytest.raises(ValueError, match=r"one shape \[seeds, images\]"):
                difference(*(np.zeros(shape) for shape in shapes))


class TestHolm:
    def test_by_hand(self) -> None:
        """Sorted 0.005, 0.01, 0.02, 0.04 times 4, 3, 2, 1; the third would be 0.04 and the last 0.04."""
        assert holm([0.02, 0.005, 0.04, 0.01]) == pytest.approx([0.04, 0.02, 0.04, 0.03])

    def test_none_is_smaller_than_the_one_before_nor_above_one(self) -> None:
        assert holm([0.3, 0.4, 0.5, 0.9]) == pytest.approx([1, 1, 1, 1])
        assert holm([0.01, 0.011, 0.011]) == pytest.approx([0.03, 0.03, 0.03])

    def test_what_was_not_tested_counts_for_nothing(self) -> None:
        assert holm([0.02, None, 0.03]) == pytest.approx([0.04, None, 0.04])
        assert holm([]) == []

    @pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
    def test_what_is_no_p_value_is_refused(self, wrong: float) -> None:
        with pytest.raises(ValueError, match="p value"):
            holm([0.1, wrong])
