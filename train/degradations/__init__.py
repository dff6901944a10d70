"""From a clean image to a degraded one: seeded per image, so that every strategy and every device sees the same noise.

A new degradation is one file with a frozen dataclass that is a :class:`Degradation` (one method, and a second one where
there is a classical remedy), and one line below. :func:`parse` knows it from then on, alone and in chains.

Nothing here imports torch before an image is degraded: the command line checks and lists what there is.
"""

from __future__ import annotations

# Registration: one line per degradation.
from train.degradations.base import CLASSICAL, DEGRADATIONS, Degradation, Remedy, fixed_seeds
from train.degradations.blur import Blur
from train.degradations.chain import Chain
from train.degradations.downsample import Downsample
from train.degradations.frepa import Frepa
from train.degradations.frequency_disc import FrequencyDisc
from train.degradations.frequency_mask import FrequencyMask
from train.degradations.gaussian import Gaussian
from train.degradations.histogram_mask import HistogramMask
from train.degradations.illumination import Illumination
from train.degradations.jpeg import Jpeg
from train.degradations.kspace import KSpace
from train.degradations.low_frequency_noise import LowFrequencyNoise
from train.degradations.parsing import choices, parse
from train.degradations.poisson import Poisson
from train.degradations.remedies import enlarge
from train.degradations.untouched import Untouched
from train.degradations.zero_mask import ZeroMask
from train.seeds import stable_seed

__all__ = [
    "CLASSICAL",
    "DEGRADATIONS",
    "Blur",
    "Chain",
    "Degradation",
    "Downsample",
    "Frepa",
    "FrequencyDisc",
    "FrequencyMask",
    "Gaussian",
    "HistogramMask",
    "Illumination",
    "Jpeg",
    "KSpace",
    "LowFrequencyNoise",
    "Poisson",
    "Remedy",
    "Untouched",
    "ZeroMask",
    "choices",
    "enlarge",
    "fixed_seeds",
    "parse",
    "stable_seed",
]
