"""What a few seeds and a few hundred test images say about the ones that were not tried.

A strategy is trained with several seeds, and each of its networks is scored on the same test images. Both are samples:
another seed trains another network, and other patients give other images. A comparison that is meant to hold for new
seeds *and* new images must count both, as studies of diagnostic accuracy do with their readers and cases (multi-reader
multi-case analysis; here a seed is the reader, and a strategy the modality):

* N. A. Obuchowski and H. E. Rockette, "Hypothesis testing of diagnostic accuracy for multiple readers and multiple
  tests: an ANOVA approach with dependent observations", Communications in Statistics - Simulation and Computation 24,
  1995: the test for the mean of an image's score, whose covariances the mean squares below estimate.
* S. L. Hillis, "A comparison of denominator degrees of freedom methods for multiple observer ROC analysis", Statistics
  in Medicine 26, 2007: its degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its confidence interval.

    :param mean: NaN where one of the values is, as a seed whose score is undefined must not be forgotten.
    :param low: ``None`` where there is no interval: fewer than two values, or one that is not finite.
    :param high: likewise.
    :param number: of values.
    """

    mean: float
    low: float | None
    high: float | None
    number: int

    def written(self, form: str = ".2f") -> str:
        """In words, which say why there is no interval where there is none.

        :param form: of each number, for :func:`format`.

        >>> Interval(28.031, 27.6, 28.462, 3).written(), Interval(28.031, None, None, 1).written()
        ('28.03 [27.60, 28.46]', '28.03 (one seed: no interval)')
        """
        if not math.isfinite(self.mean):
            return "undefined"
        return f"{self.mean:{form}}{_bounds(self, form, 'one seed: no interval')}"


@dataclass(frozen=True)
class Difference:
    """How much better one strategy is than another.

    :param mean: of the score of the first one less that of the second, over seeds and images; NaN where no image has a
        score of every network.
    :param low: end of its confidence interval; ``None`` where there is neither a second seed nor a second image.
    :param high: likewise.
    :param p: two-sided p value of the hypothesis that there is no difference; ``None`` likewise.
    :param seeds: that were compared.
    :param images: that were compared: those that have a score of every network.
    :param left_out: images that were not, because a score is missing.
    """

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int
    images: int
    left_out: int = 0

    @property
    def scope(self) -> str:
        """What the interval and the p value are about: they speak of nothing that was seen only once."""
        if self.p is None:
            return "these images and seeds only: no inference"
        if self.seeds == 1:
            return "new images, but only for networks trained with this one seed"
        return "new seeds and new images" if self.images > 1 else "new seeds, but only for this one image"

    def written(self, form: str = "+.2f") -> str:
        """In words.

        :param form: of each number, for :func:`format`.

        >>> Difference(0.413, 0.1, 0.726, 0.01, 5, 40).written()
        '+0.41 [+0.10, +0.73]'
        """
        if not math.isfinite(self.mean):
            return "undefined"
        return f"{self.mean:{form}}{_bounds(self, form, 'one seed, one image: no interval')}"


def _bounds(of: Interval | Difference, form: str, otherwise: str) -> str:
    return f" ({otherwise})" if of.low is None or of.high is None else f" [{of.low:{form}}, {of.high:{form}}]"


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """The mean of a score over seeds, with Student's t interval: what the mean over all seeds would be.

    It says nothing about new images; :func:`difference` does.

    :param values: a score per seed ``[S]``, S > 0.
    :param level: how often an interval made like this one holds the mean, in (0, 1).
    :raises ValueError: there is no value, or the level is out of range.
    """
    known = np.asarray(values, dtype=np.float64)
    if known.ndim != 1 or not len(known):
        raise ValueError(f"an interval needs one value per seed, [S] with S > 0, not {list(known.shape)}")
    mean = float(known.mean())
    if len(known) == 1 or not math.isfinite(mean):
        _checked(level)
        return Interval(mean, None, None, len(known))
    half = _quantile(len(known) - 1, level) * float(known.std(ddof=1)) / math.sqrt(len(known))
    return Interval(mean, mean - half, mean + half, len(known))


def difference(a: np.ndarray, b: np.ndarray, level: float = 0.95) -> Difference:
    r"""How much higher the scores ``a`` are than the scores ``b``, for new seeds and new images.

    Scores are paired: by the image, and by the seed, which both strategies share. Their differences :math:`d_{si}` are
    taken as :math:`\mu + \text{seed}_s + \text{image}_i + \text{residual}_{si}`, where everything but :math:`\mu` is
    random. The mean over S seeds and I images then has the variance (with the mean squares of the two-way table)

    .. math:: (MS_{seed} + \max(MS_{image} - MS_{residual}, 0)) / (S I)

    which is the denominator of Obuchowski and Rockette's F for two tests, with the bound at 0 that they and Hillis
    ask for: images cannot make the mean surer than seeds alone leave it. Its degrees of freedom are Satterthwaite's,
    with every mean square in it. Hillis counts that of the seeds only, because cases abound in his studies; for many
    images both are the same, but with 8 images and effects of images his rejects 8 of 100 true hypotheses at 5 %.

    With one seed there is only the paired t test over images, and :attr:`Difference.scope` says that it speaks of that
    seed alone; with one image, likewise, that over seeds.

    :param a: ``float64 [S, I]``, S > 0; NaN: an image that has no score. It is left out for all seeds and both
        strategies, so that the table stays balanced; ``left_out`` counts such images.
    :param b: the same shape, seeds and images in the same order.
    :param level: of the interval, in (0, 1).
    :raises ValueError: the shapes differ or have not two axes, there is no seed, or the level is out of range.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise ValueError(
            f"a difference needs scores of one shape [seeds, images] with at least one seed, "
            f"not {list(first.shape)} and {list(second.shape)}"
        )
    _checked(level)
    scored = np.isfinite(first - second).all(0)
    table = (first - second)[:, scored]
    seeds, images = table.shape
    left_out = first.shape[1] - images
    mean = float(table.mean()) if table.size else math.nan
    if table.size < 2:
        return Difference(mean, None, None, None, seeds, images, left_out)
    variance, freedom = _variance_of_mean(table)
    error = math.sqrt(variance)
    half = _quantile(freedom, level) * error if error else 0.0
    return Difference(mean, mean - half, mean + half, _p_value(mean, error, freedom), seeds, images, left_out)


def _variance_of_mean(table: np.ndarray) -> tuple[float, float]:
    """The variance of the mean of differences ``float64 [S, I]``, and its degrees of freedom."""
    seeds, images = table.shape
    if 1 in table.shape:
        return float(table.var(ddof=1)) / table.size, table.size - 1
    mean, by_seed, by_image = table.mean(), table.mean(1), table.mean(0)
    residual = table - by_seed[:, None] - by_image + mean
    of_seed = images * float(((by_seed - mean) ** 2).sum()) / (seeds - 1)
    of_image = seeds * float(((by_image - mean) ** 2).sum()) / (images - 1)
    of_residual = float((residual**2).sum()) / ((seeds - 1) * (images - 1))
    parts = [(of_seed, seeds - 1)]
    total = of_seed
    if of_image > of_residual:
        total += of_image - of_residual
        parts += [(of_image, images - 1), (of_residual, (seeds - 1) * (images - 1))]
    uncertain = sum(square**2 / freedom for square, freedom in parts)
    return total / table.size, total**2 / uncertain if uncertain else math.inf


def _p_value(mean: float, error: float, freedom: float) -> float:
    if not error:  # all differences are the same, and as sure as can be
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error, freedom))


def _quantile(freedom: float, level: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.5 + _checked(level) / 2, freedom))


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval must lie between 0 and 1, not {level}")
    return level


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values of a family of hypotheses, corrected so that the chance of even one false rejection stays at the level
    that they are compared with.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979: the
    k-th smallest of m is multiplied by m - k + 1, and none becomes smaller than the one before. It needs no assumption
    on how the tests depend on each other, as those of strategies on the same images do.

    :param p_values: in [0, 1]; ``None``: a hypothesis that was not tested, which counts for nothing.
    :returns: the corrected values in the same order, at most 1.
    :raises ValueError: a value is out of range.

    >>> holm([0.01, 0.04, 0.03, None])
    [0.03, 0.06, 0.06, None]
    """
    tested = {place: p for place, p in enumerate(p_values) if p is not None}
    for p in tested.values():
        if not 0 <= p <= 1:
            raise ValueError(f"a p value lies in [0, 1], which {p} does not")
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (place, p) in enumerate(sorted(tested.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[place] = largest
    return corrected
