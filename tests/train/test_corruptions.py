"""The corruptions of pre-trainings against hand-worked numbers, and against NumPy's transform of whole spectra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from train.degradations import (
    Frepa,
    FrequencyDisc,
    FrequencyMask,
    HistogramMask,
    LowFrequencyNoise,
    ZeroMask,
    parse,
)
from train.degradations.grids import cells
from train.errors import RunError

NEW = ["histogram-mask", "zero-mask", "frequency-mask", "low-frequency-noise", "frequency-disc", "frepa"]


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def patches(image: torch.Tensor, grid: int) -> torch.Tensor:
    """``[C, N, N] -> [C, grid^2, pixels]``, for a grid that divides N."""
    side = image.shape[-1] // grid
    cut = image.unfold(1, side, side).unfold(2, side, side)
    return cut.reshape(len(image), grid * grid, side * side)


def cosine(rows: int, columns: int, side: int = 128) -> torch.Tensor:
    """``0.5 + 0.5 cos``, ``[1, side, side]``, with so many periods along each axis."""
    y, x = np.mgrid[:side, :side]
    return torch.tensor(0.5 + 0.5 * np.cos(2 * math.pi * (rows * y + columns * x) / side)).float()[None]


def amplitude(image: torch.Tensor, rows: int, columns: int) -> float:
    """Of a frequency in an image, 1 for a cosine of amplitude 1."""
    side = image.shape[-1]
    spectrum = np.fft.fft2(image[0].double().numpy())
    return float(2 * abs(spectrum[rows % side, columns % side]) / side**2)


# --- the image mask ---


def test_shuffle_keeps_the_pixels_of_every_patch() -> None:
    image = noise(3, 64, 64)
    masked = HistogramMask(1, 1, "shuffle").degrade(image, torch.Generator().manual_seed(1))
    assert torch.equal(patches(masked, 16).sort(-1).values, patches(image, 16).sort(-1).values)
    assert ((patches(masked, 16) != patches(image, 16)).any(-1)).all(), "every patch was shuffled"
    whole = [set(map(tuple, each.T.tolist())) for each in (masked.flatten(1), image.flatten(1))]
    assert whole[0] == whole[1], "the channels of a pixel have parted"


def test_gaussian_has_mean_and_spread_of_every_patch() -> None:
    image = noise(1, 512, 512)  # patches of 1024 pixels
    masked = HistogramMask(1, 1).degrade(image, torch.Generator().manual_seed(1))
    own, other = patches(image, 16)[0], patches(masked, 16)[0]
    std = own.std(-1, correction=0)
    assert ((other.mean(-1) - own.mean(-1)).abs() < 4.5 * std / 32).all()
    assert ((other.std(-1) - std).abs() < 4.5 * std / math.sqrt(2 * 1024)).all()
    correlation = np.corrcoef(own.flatten() - own.mean(-1).repeat_interleave(1024), other.flatten())[0, 1]
    assert abs(correlation) < 0.01, "the structure must be gone"
    assert masked.max() > 1, "the noise is not clipped"


@pytest.mark.parametrize("fill", ["gaussian", "shuffle"])
def test_a_constant_image_stays(fill: str) -> None:
    image = torch.full((1, 40, 33), 0.3)
    assert torch.equal(HistogramMask(1, 1, fill).degrade(image, torch.Generator().manual_seed(1)), image)


def test_how_many_patches_are_masked() -> None:
    image = noise(1, 64, 64)
    assert torch.equal(HistogramMask(0, 0).degrade(image, torch.Generator()), image)
    shares = []
    for seed in range(60):
        masked = HistogramMask(0.3, 0.3).degrade(image, torch.Generator().manual_seed(seed))
        shares.append((patches(masked, 16) != patches(image, 16)).any(-1).sum().item())
    # Binomial(256, 0.3): mean 76.8, standard deviation 7.33.
    assert abs(np.mean(shares) - 76.8) < 4 * 7.33 / math.sqrt(60)
    assert 5 < np.std(shares) < 10


def test_the_share_is_drawn_between_its_limits() -> None:
    image = noise(1, 64, 64)
    counts = [
        (
            patches(HistogramMask(0.5, 0.75).degrade(image, torch.Generator().manual_seed(seed)), 16)
            != patches(image, 16)
        )
        .any(-1)
        .sum()
        .item()
        / 256
        for seed in range(40)
    ]
    assert abs(np.mean(counts) - 0.625) < 4 * math.sqrt((0.25**2 / 12 + 0.625 * 0.375 / 256) / 40)
    assert np.std(counts) > 0.05, "one share for all images"


def test_black_patches() -> None:
    image = noise(1, 64, 64) + 0.1
    masked = ZeroMask().degrade(image, torch.Generator().manual_seed(1))
    black = (patches(masked, 16) == 0).all(-1)
    assert black.sum() == 192
    assert torch.equal(patches(masked, 16)[~black], patches(image, 16)[~black])


def test_grids_that_do_not_divide() -> None:
    counts = torch.bincount(cells(100, 16))
    assert len(counts) == 16 and counts.sum() == 100 and counts.max() - counts.min() == 1
    assert cells(3, 16).tolist() == [0, 1, 2]
    image = noise(1, 50, 37) + 0.1
    masked = ZeroMask(1.0).degrade(image, torch.Generator())
    assert not masked.any()


# --- the frequency mask ---


@pytest.mark.parametrize(
    ("rows", "columns", "stays"),
    [(3, 0, 1), (-4, 1, 1), (0, 3, 1), (-4, 3, 1), (4, 0, 0), (0, 4, 0), (4, 1, 0), (20, 0, 0), (0, 64, 0), (64, 0, 0),
     (30, 41, 0), (-5, 2, 0)],
)  # fmt: skip
def test_all_but_the_center(rows: int, columns: int, stays: int) -> None:
    """At 128 pixels a patch has 4 x 4 frequencies. A mask of k without -k would leave half of the amplitude."""
    masked = FrequencyMask(1, 1).degrade(cosine(rows, columns), torch.Generator())
    before = amplitude(cosine(rows, columns), rows, columns)
    assert before > 0.49
    assert amplitude(masked, rows, columns) == pytest.approx(stays * before, abs=1e-6)
    assert masked.mean().item() == pytest.approx(cosine(rows, columns).mean().item(), abs=1e-6)


@pytest.mark.parametrize("side", [64, 65])
def test_every_frequency_goes_with_its_opposite(side: int) -> None:
    image = noise(1, side, side)
    masked = FrequencyMask(0.5, 0.5).degrade(image, torch.Generator().manual_seed(3))
    ratio = np.abs(np.fft.fft2(masked[0].double()) / np.fft.fft2(image[0].double()))
    assert ((ratio < 1e-3) | (np.abs(ratio - 1) < 1e-3)).all(), "a frequency is half there"
    assert 0.4 < (ratio < 1e-3).mean() < 0.6


@pytest.mark.parametrize("keep", [0, 1])
def test_disc(keep: int) -> None:
    disc = FrequencyDisc(10 / 128, keep)
    for rows, columns, inside in [(6, 8, True), (10, 0, True), (10, 1, False), (0, 30, False)]:
        masked = disc.degrade(cosine(rows, columns), torch.Generator())
        assert amplitude(masked, rows, columns) == pytest.approx(0.5 * (inside == keep), abs=1e-5)
        assert masked.mean().item() == pytest.approx(0.5 * keep, abs=1e-5)


# --- the perturbation ---


@pytest.mark.parametrize("side", [128, 256])
def test_strength_of_the_perturbation(side: int) -> None:
    """sigma * (512 / N) * mean * sqrt(pi) * d * N / sqrt(2), as at 512 pixels, whatever the size: 0.02567 here."""
    image = torch.full((1, side, side), 0.4)
    degrade = LowFrequencyNoise(0.2, 0.2, 5e-4, 0)
    stds = [(degrade.degrade(image, torch.Generator().manual_seed(seed)) - image).std().item() for seed in range(20)]
    assert math.sqrt(np.mean(np.square(stds))) == pytest.approx(0.02567, rel=0.05)


def test_the_perturbation_is_smooth_and_spares_the_mean() -> None:
    image = noise(3, 128, 128)
    degrade = LowFrequencyNoise(0.05, 0.05)
    added = degrade.degrade(image, torch.Generator().manual_seed(1)) - image
    assert added.mean((1, 2)).abs().max() < 1e-6
    assert not torch.equal(added[0], added[1])
    power = np.abs(np.fft.fft2(added[0].double())) ** 2
    assert power[40:88, 40:88].sum() < 1e-3 * power.sum()  # from 0.3 cycles per pixel: exp(-36)
    mirrored = added[0].flip(0, 1).roll((1, 1), (0, 1))
    assert abs(np.corrcoef(added[0].flatten(), mirrored.flatten())[0, 1]) < 0.4, "the noise is its own mirror image"


def test_the_strength_is_drawn_for_each_image() -> None:
    image = torch.full((1, 64, 64), 0.4)
    degrade = LowFrequencyNoise(0.2, 0.2)  # from one image to the next, chance alone makes 3 %
    stds = [degrade.degrade(image, torch.Generator().manual_seed(seed)).std().item() for seed in range(30)]
    assert np.std(stds) / np.mean(stds) > 0.1


# --- Frepa, and all of them ---


def test_frepa_is_one_or_the_other() -> None:
    image = noise(1, 64, 64)
    kinds = []
    for seed in range(40):
        result = Frepa(0.5, 0.6, 0.6, "shuffle").degrade(image, torch.Generator().manual_seed(seed))
        changed = (patches(result, 16) != patches(image, 16)).any(-1)
        kinds.append(bool(changed.all()))  # a change of the spectrum is one everywhere
        if not kinds[-1]:
            assert torch.equal(patches(result, 16).sort(-1).values, patches(image, 16).sort(-1).values)
        else:
            assert result.mean().item() == pytest.approx(image.mean().item(), abs=1e-5)
    assert 8 < sum(kinds) < 32
    assert all(
        (patches(Frepa(1).degrade(image, torch.Generator().manual_seed(s)), 16) == patches(image, 16)).all(-1).any()
        for s in range(5)
    )


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("shape", [(1, 33, 50), (3, 7, 5), (1, 1, 1)])
def test_any_size(name: str, shape: tuple[int, int, int]) -> None:
    for image in (noise(1, *shape), torch.zeros(1, *shape)):
        degraded = parse(name)(image, [5])
        assert degraded.shape == image.shape
        assert degraded.isfinite().all()


@pytest.mark.parametrize("name", NEW)
def test_complex_images_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be float32"):
        parse(name)(torch.zeros(1, 1, 16, 16, dtype=torch.complex64), [0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("histogram-mask:0.5,0.75,paint", "fill must be gaussian or shuffle, not 'paint'"),
        ("histogram-mask:0.8,0.7", "low must not exceed high"),
        ("histogram-mask:0.5,1.5", "high must be a share from 0 to 1"),
        ("histogram-mask:0.5,0.75,shuffle,0", "grid must be an integer of at least 1"),
        ("frequency-mask:nan", "low must be a share"),
        ("low-frequency-noise:0", "low must be above 0"),
        ("low-frequency-noise:0.1,0.2,-1", "sigma must be a finite number"),
        ("frequency-disc:0", "radius must be above 0"),
        ("zero-mask:2", "share must be a share"),
        ("frepa:0.5,0.5,0.75,0.1", "fill must be gaussian or shuffle"),
    ],
)
def test_wrong_arguments(text: str, said: str) -> None:
    with pytest.raises(RunError, match=said):
        parse(text)


def test_a_word_is_an_argument() -> None:
    degrade = parse("histogram-mask:0.5,0.6,shuffle+frepa:0,0.5,0.75,shuffle")
    assert degrade.parts == (HistogramMask(0.5, 0.6, "shuffle"), Frepa(0, 0.5, 0.75, "shuffle"))
    assert str(degrade) == "histogram-mask:0.5,0.6,shuffle,16+frepa:0,0.5,0.75,shuffle"
