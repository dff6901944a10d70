"""Crops and zero-filling of k-space against numbers worked by hand, a sum of waves in NumPy, and SciPy's resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.signal import resample

from models.kspace import cartesian_columns, enlarged, reduced


def wave(cycles: float, side: int = 8) -> torch.Tensor:
    """``1 + cos`` along rows, ``float64 [side, side]``."""
    x = torch.arange(side, dtype=torch.float64)
    return (1 + torch.cos(2 * math.pi * cycles * x / side)).expand(side, side)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("image", [wave(1), wave(1).T])
def test_a_wave_is_sampled_at_the_centers_of_the_larger_pixels(image):
    """At x = 0.5, 2.5, 4.5 and 6.5. A crop without the ramp samples at 0, 2, 4 and 6: 2, 1, 0, 1."""
    small = reduced(image, 2)
    row = small[0] if image[0, 0] != image[0, 4] else small[:, 0]
    expected = torch.tensor([1.923880, 0.617317, 0.076120, 1.382683], dtype=torch.float64)
    torch.testing.assert_close(row, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cycles", [2, 3])
def test_a_wave_that_is_too_fine_disappears(cycles):
    """At 2 cycles, the highest frequency of four pixels, of which a crop has one side: alone it leaves 1 +- 1/2."""
    torch.testing.assert_close(reduced(wave(cycles), 2), torch.ones(4, 4, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_brightness_stays(scale):
    """Without the factor 1 / s^2, 0.3 becomes 1.2 at x2."""
    flat = torch.full((24, 12), 0.3, dtype=torch.float64)
    torch.testing.assert_close(reduced(flat, scale), flat[: 24 // scale, : 12 // scale])
    torch.testing.assert_close(enlarged(flat, scale), torch.full((24 * scale, 12 * scale), 0.3, dtype=torch.float64))
    image = noise(24, 12) + 3  # so bright that nothing rings below 0
    torch.testing.assert_close(reduced(image, scale).mean(), image.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(enlarged(image, scale).mean(), image.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("shape", "scale"), [((16, 24), 2), ((16, 24), 4), ((20, 12), 4), ((15, 21), 3), ((18, 10), 2)]
)
def test_a_crop_is_a_sum_of_waves_at_the_new_centers(shape, scale):
    """Written out in NumPy: a coefficient for each wave that has fewer than half a cycle per new pixel, and its value
    there. Odd sides of small images have no highest frequency without a partner."""
    image = (noise(*shape) + 3).numpy()
    sides = [side // scale for side in shape]
    ways = []
    for side, few in zip(shape, sides, strict=True):
        cycles = np.array([k for k in range(-side, side + 1) if 2 * abs(k) < few])
        old, new = np.arange(side), scale * np.arange(few) + (scale - 1) / 2
        ways.append(
            np.exp(2j * np.pi * np.outer(new, cycles) / side)
            @ np.exp(-2j * np.pi * np.outer(cycles, old) / side)
            / side
        )
    expected = ways[0] @ image @ ways[1].T
    assert np.abs(expected.imag).max() < 1e-12, "a crop of a real image is real"
    torch.testing.assert_close(reduced(torch.from_numpy(image), scale), torch.from_numpy(expected.real))


@pytest.mark.parametrize("scale", [2, 4])
def test_a_mirror_commutes(scale):
    image = noise(2, 16, 24)
    for dims in ((-1,), (-2,), (-2, -1)):
        torch.testing.assert_close(reduced(image.flip(dims), scale), reduced(image, scale).flip(dims))
        torch.testing.assert_close(enlarged(image.flip(dims), scale), enlarged(image, scale).flip(dims))


@pytest.mark.parametrize(("side", "scale"), [(8, 2), (8, 4), (9, 2), (7, 3)])
def test_zero_filling_is_scipys_resampling(side, scale):
    """SciPy's points begin at the first pixel's center; every second one of twice as many is where ours are."""
    row = noise(side).numpy()
    fine = resample(row, 2 * scale * side)
    expected = fine[(2 * np.arange(scale * side) - (scale - 1)) % len(fine)]
    found = enlarged(torch.from_numpy(row).expand(side, side), scale)
    torch.testing.assert_close(found[0], torch.from_numpy(expected))
    torch.testing.assert_close(enlarged(torch.from_numpy(row).expand(side, side).T, scale)[:, 0], found[0])


@pytest.mark.parametrize("side", [8, 9])
def test_zero_filling_undoes_a_crop(side):
    image = reduced(enlarged(noise(side, side) + 3, 4), 4)
    torch.testing.assert_close(reduced(enlarged(image, 4), 4), image)


def test_columns_that_are_not_measured():
    """A wave along rows is gone without its columns; one along columns does not notice."""
    measured = torch.tensor([False, True, True, False])  # -2, -1, 0, 1: the wave has lost one of its sides
    half = reduced(wave(1), 2, measured)
    x = torch.arange(4, dtype=torch.float64)
    expected = (1 + 0.5 * torch.exp(-2j * math.pi * (x + 0.25) / 4)).abs()
    torch.testing.assert_close(half, expected.expand(4, 4))
    torch.testing.assert_close(reduced(wave(1).T, 2, measured), reduced(wave(1).T, 2))
    torch.testing.assert_close(
        reduced(wave(1), 2, torch.tensor([False, False, True, False])), torch.ones(4, 4).double()
    )


def test_how_many_columns_a_scan_measures():
    """64 columns, a quarter of them, 5 in the middle: the others with the probability (16 - 5) / (64 - 5)."""
    drawn = torch.stack([cartesian_columns(64, 4, 0.08, torch.Generator().manual_seed(seed)) for seed in range(2000)])
    assert drawn[:, 30:35].all()
    others = torch.cat([drawn[:, :30], drawn[:, 35:]], 1).double().mean()
    deviation = math.sqrt(0.186441 * (1 - 0.186441) / (2000 * 59))
    assert abs(others - 0.186441) < 4 * deviation
    assert torch.equal(drawn[7], cartesian_columns(64, 4, 0.08, torch.Generator().manual_seed(7)))
    assert not torch.equal(drawn[7], drawn[8])
    assert cartesian_columns(64, 1, 0.08, torch.Generator()).all()


@pytest.mark.parametrize("width", [1, 2, 5, 6, 12, 33])
def test_the_lowest_frequency_is_always_measured(width):
    columns = cartesian_columns(width, 4, 1e-9, torch.Generator().manual_seed(1))
    assert columns[width // 2]


def test_what_it_refuses():
    with pytest.raises(ValueError, match="images must be real, not complex"):
        reduced(torch.zeros(8, 8, dtype=torch.complex64), 2)
    with pytest.raises(ValueError, match="images must be real, not complex"):
        enlarged(torch.zeros(8, 8, dtype=torch.complex64), 2)
    with pytest.raises(ValueError, match="images of 8 x 9 pixels have no k-space that 2 divides without a rest"):
        reduced(torch.zeros(8, 9), 2)
    with pytest.raises(ValueError, match="scale must be at least 1, not 0"):
        reduced(torch.zeros(8, 8), 0)
    with pytest.raises(ValueError, match=r"a k-space of 4 columns needs as many, not \[8\]"):
        reduced(torch.zeros(8, 8), 2, torch.ones(8, dtype=torch.bool))
