"""NIfTI and MetaImage: written by the libraries themselves, and compared pixel for pixel, the right way up."""

from __future__ import annotations

import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK

from train.data import DataError
from train.data.formats import MedicalImage, MedicalMask

from .layouts import medical

RNG = np.random.default_rng(0)
RELEASES = ["nifti", "mhd"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_pixels(tmp_path: Path, release: str, dtype: type) -> None:
    pixels = RNG.integers(0, 250, (30, 20)).astype(dtype)
    pixels[0, 3] = 251  # in the uppermost row, left of the middle
    path = medical(tmp_path / "x", pixels, release=release)
    found = MedicalImage(path).read(1)
    assert found.shape == (30, 20, 1)
    assert found.dtype == (np.float32 if dtype == np.int16 else dtype)  # as any other file of Hounsfield units
    assert (found[..., 0] == pixels).all()
    assert (MedicalImage(path).read(3) == pixels[..., None]).all()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_masks(tmp_path: Path, release: str, dtype: type) -> None:
    indices = RNG.integers(0, 4, (30, 20)).astype(dtype)
    path = medical(tmp_path / "x", indices, release=release)
    found = MedicalMask(path, (0, 1, 2, 3)).read()
    assert found.dtype == np.uint8
    assert (found == indices).all()


def test_an_axis_of_depth_is_dropped(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 250, (30, 20), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(pixels.T[..., None, None], np.eye(4)), tmp_path / "x.nii")
    assert (MedicalImage(tmp_path / "x.nii").read(1)[..., 0] == pixels).all()


def test_scaled_values(tmp_path: Path) -> None:
    """A NIfTI header may scale what is stored."""
    image = nibabel.Nifti1Image(np.arange(12, dtype=np.int16).reshape(4, 3), np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    nibabel.save(image, tmp_path / "x.nii")
    np.testing.assert_allclose(
        MedicalImage(tmp_path / "x.nii").read(1)[..., 0], nibabel.load(tmp_path / "x.nii").get_fdata().T
    )


def test_the_pixels_of_a_header_are_a_file_of_its_own(tmp_path: Path) -> None:
    """The cache has to notice when they change."""
    path = medical(tmp_path / "x", RNG.integers(0, 250, (30, 20), dtype=np.uint8), release="mhd")
    assert MedicalImage(path).files == (path, tmp_path / "x.raw")
    compressed = SimpleITK.GetImageFromArray(RNG.integers(0, 250, (30, 20), dtype=np.uint8))
    SimpleITK.WriteImage(compressed, str(tmp_path / "z.mhd"), useCompression=True)
    assert MedicalImage(tmp_path / "z.mhd").files == (tmp_path / "z.mhd", tmp_path / "z.zraw")
    assert (MedicalImage(tmp_path / "z.mhd").read(1)[..., 0] == SimpleITK.GetArrayFromImage(compressed)).all()
    SimpleITK.WriteImage(compressed, str(tmp_path / "x.mha"))
    assert MedicalImage(tmp_path / "x.mha").files == (tmp_path / "x.mha",)
    nifti = medical(tmp_path / "x", RNG.integers(0, 250, (30, 20), dtype=np.uint8), release="nifti")
    assert MedicalImage(nifti).files == (nifti,)


@pytest.mark.parametrize("release", RELEASES)
def test_damage(tmp_path: Path, release: str) -> None:
    path = medical(tmp_path / "x", RNG.integers(0, 250, (30, 20), dtype=np.uint8), release=release)
    content = (path if release == "nifti" else tmp_path / "x.raw").read_bytes()
    (path if release == "nifti" else tmp_path / "x.raw").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{path.name} (cannot be read|has .* bytes for pixels, too few)"):
        MedicalImage(path).read(1)
    path.unlink()
    for reader in (MedicalImage(path), MedicalMask(path)):
        with pytest.raises(DataError, match=rf"{path.name} is missing"):
            reader.read(1)


@pytest.mark.parametrize("frames", [2, 5])
def test_sequences_are_no_single_image(tmp_path: Path, frames: int) -> None:
    pixels = RNG.integers(0, 250, (frames, 30, 20), dtype=np.uint8)
    nibabel.save(nibabel.Nifti1Image(pixels.T.copy(), np.eye(4)), tmp_path / "x.nii.gz")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels), str(tmp_path / "x.mhd"))
    for ending in ("nii.gz", "mhd"):
        with pytest.raises(DataError, match=rf"x\.{ending} holds an array of \[20, 30, {frames}\] \(x first\)"):
            MedicalImage(tmp_path / f"x.{ending}").read(1)


def test_colors_and_other_formats(tmp_path: Path) -> None:
    colored = SimpleITK.GetImageFromArray(RNG.integers(0, 250, (30, 20, 3), dtype=np.uint8), isVector=True)
    SimpleITK.WriteImage(colored, str(tmp_path / "x.mha"))
    with pytest.raises(DataError, match=r"x\.mha has colors"):
        MedicalImage(tmp_path / "x.mha").read(1)
    with pytest.raises(DataError, match=r"x\.dcm is neither NIfTI"):
        MedicalImage(tmp_path / "x.dcm").read(1)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(
    ("value", "dtype", "culprit"),
    [
        (4, np.uint8, "holds the values 4, and only 0, 1, 2, 3 have a meaning"),
        (300, np.int16, "holds values from 0 to 300"),
        (0.5, np.float32, "no image of whole numbers"),
        (np.nan, np.float32, "no image of whole numbers"),
    ],
)
def test_masks_without_a_meaning(tmp_path: Path, release: str, value: float, dtype: type, culprit: str) -> None:
    indices = np.zeros((30, 20), dtype)
    indices[5, 7] = value
    path = medical(tmp_path / "x_gt", indices, release=release)
    with pytest.raises(DataError, match=rf"the mask .*x_gt.* {culprit}"):
        MedicalMask(path, (0, 1, 2, 3)).read()


@pytest.mark.parametrize(("release", "library"), [("nifti", "nibabel"), ("mhd", "SimpleITK")])
def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, library: str) -> None:
    path = medical(tmp_path / "x", np.zeros((3, 2), np.uint8), release=release)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        DataError, match=rf"can only be read with {library}, which is not installed: pip install {library}"
    ):
        MedicalImage(path).read(1)
