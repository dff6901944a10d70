"""MR volumes: which slices they have, how bright they are, whose they are, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from train.data import DataError, load
from train.data.volumes import Facts, VolumeSlice, facts, patient_of, root_sum_of_squares

from .layouts import fastmri_volume, mr_volume, mri

SHAPE = (12, 10, 8)


def ramp(shape: tuple[int, ...] = SHAPE, *, along: int = 2) -> np.ndarray:
    """Noise that is brighter from slice to slice along an axis, no slice of which is empty."""
    rng = np.random.default_rng(0)
    steps = np.arange(1, shape[along] + 1).reshape([-1 if axis == along else 1 for axis in range(len(shape))])
    return (1000 + 100 * steps + rng.integers(0, 50, shape)).astype(np.int16)


def read(root: Path, tmp_path: Path, **options):
    return load("mri", root=root, source="real", size=None, cache_dir=tmp_path / "cache", **options)


def names(data, split: str) -> list[str]:
    return [name.rpartition("-")[0] for name in getattr(data, split).names]


def test_a_slice_is_what_was_stored(tmp_path):
    """x runs along a row; the 99.9th percentile of the volume is white, and 0 is black."""
    stored = ramp()
    path = mr_volume(tmp_path / "a.nii.gz", stored)
    about = facts(path)
    assert about == Facts(0.0, pytest.approx(np.percentile(stored, 99.9)), tuple(range(8)), 8)
    pixels = VolumeSlice(path, None, 3, about.low, about.white).read(1)
    assert pixels.dtype == np.float32 and pixels.shape == (10, 12, 1)
    np.testing.assert_allclose(pixels[2, 7, 0], stored[7, 2, 3] / about.white, rtol=1e-6)
    assert VolumeSlice(path, None, 7, about.low, about.white).read(1).max() == 1, "what is brighter is cut off"
    assert VolumeSlice(path, None, 3, about.low, about.white).read(3).shape == (10, 12, 3)


def test_negative_values(tmp_path):
    """The least value is black."""
    mr_volume(tmp_path / "a.nii", ramp() - 1300.0)
    about = facts(tmp_path / "a.nii")
    assert about.low == (ramp() - 1300.0).min() < 0
    pixels = VolumeSlice(tmp_path / "a.nii", None, 0, about.low, about.white).read(1)
    expected = (ramp()[:, :, 0].T - 1300.0 - about.low) / (about.white - about.low)
    np.testing.assert_allclose(pixels[..., 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("zooms", "axes", "named", "through"),
    [
        ((1, 1, 3), "xyz", None, 2),
        ((3, 1, 1), "xyz", None, 0),
        ((1, 1, 1), "xyz", None, 2),  # cubes: across the body
        ((1, 1, 1), "zxy", None, 0),
        ((1, 1, 3), "xyz", 1, 1),  # the header knows
    ],
)
def test_across_which_axis_the_slices_lie(zooms, axes, named, through, tmp_path):
    stored = ramp(along=through)
    affine = np.zeros((4, 4))
    for axis, direction in enumerate(axes):
        affine["xyz".index(direction), axis] = zooms[axis]
    affine[3, 3] = 1
    image = nibabel.Nifti1Image(stored, affine)
    if named is not None:
        image.header.set_dim_info(slice=named)
    nibabel.save(image, tmp_path / "a.nii")
    about = facts(tmp_path / "a.nii")
    assert about.slices == SHAPE[through]
    expected = np.moveaxis(stored, through, 0)[4].T / about.white
    pixels = VolumeSlice(tmp_path / "a.nii", None, 4, about.low, about.white).read(1)[..., 0]
    np.testing.assert_allclose(pixels, expected.clip(0, 1), atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 10, 1), (12, 10), (12, 10, 1, 1), (1, 12, 10)])
def test_a_volume_of_one_slice(shape, tmp_path):
    """Whatever its spacing says, the slice is the image and not a row of it."""
    stored = np.random.default_rng(0).integers(100, 200, shape).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([3, 1, 1, 1])), tmp_path / "a.nii")
    about = facts(tmp_path / "a.nii")
    assert about.slices == 1
    pixels = VolumeSlice(tmp_path / "a.nii", None, 0, about.low, about.white).read(1)[..., 0]
    np.testing.assert_allclose(pixels, (stored.squeeze().T / about.white).clip(0, 1), rtol=1e-6)


def test_files_of_fastmri(tmp_path):
    """The magnitude that is stored, or that of k-space, whose borders the header leaves out."""
    images = np.moveaxis(ramp(), 2, 0).astype(np.float32)
    stored = fastmri_volume(tmp_path / "a.h5", images, patient_id="abc")
    raw = fastmri_volume(tmp_path / "b.h5", images, what="kspace")
    assert patient_of(stored) == "abc" and patient_of(raw) is None
    for path in (stored, raw):
        about = facts(path)
        assert about.slices == 8 and about.white == pytest.approx(np.percentile(images, 99.9), rel=1e-5)
        pixels = VolumeSlice(path, None, 2, about.low, about.white).read(1)[..., 0]
        np.testing.assert_allclose(pixels, (images[2] / about.white).clip(0, 1), atol=1e-5)
    import h5py

    with h5py.File(raw, "a") as file:
        file["ismrmrd_header"] = (
            b'<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><encoding><encodedSpace><matrixSize><x>12</x><y>10</y>'
            b"</matrixSize></encodedSpace><reconSpace><matrixSize><x>6</x><y>20</y></matrixSize></reconSpace></encoding>"
            b"</ismrmrdHeader>"
        )
    about = facts(raw)
    pixels = VolumeSlice(raw, None, 2, about.low, about.white).read(1)[..., 0]
    np.testing.assert_allclose(pixels, (images[2, 3:9] / about.white).clip(0, 1), atol=1e-5)


def test_coils_are_combined():
    """3 and 4 give 5, whatever their phases."""
    one = np.zeros((1, 2, 4, 4), complex)
    one[0, :, 2, 2] = 3 * 4, 4j * 4  # the zero frequency: 3 and 4i everywhere
    np.testing.assert_allclose(root_sum_of_squares(one), np.full((1, 4, 4), 5.0), rtol=1e-6)
    np.testing.assert_allclose(root_sum_of_squares(one[:, 1]), np.full((1, 4, 4), 4.0), rtol=1e-6)


def test_patients(tmp_path):
    """Two contrasts of one head are one patient's; empty slices are left out, and that is said."""
    data = read(mri(tmp_path / "data"), tmp_path)
    found: dict[str, str] = {}
    for split in ("train", "val", "test"):
        found |= dict(zip(names(data, split), getattr(data, split).patients, strict=True))
        assert all(int(name[-3:]) % 2 for name in getattr(data, split).names)
    assert found == {
        "IXI002-Guys-0828-T1.nii.gz": "IXI002",
        "IXI002-Guys-0828-T2.nii.gz": "IXI002",
        "sub-01/anat/sub-01_T1w.nii": "sub-01",
        "sub-01/anat/sub-01_T2w.nii": "sub-01",
        "scan.nii.gz": "scan",
        "multicoil_train/file1.h5": "abc",
        "multicoil_train/file2.h5": "def",
    }
    assert data.title == "mri-data"
    assert sum(len(getattr(data, split)) for split in ("train", "val", "test")) == 7 * 3


def test_what_is_left_out_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read(mri(tmp_path / "data"), tmp_path)
    assert "21 of 42 slices are empty and left out" in caplog.text


def test_the_table(tmp_path, caplog):
    root = mri(tmp_path / "data")
    rows = [
        "volume,patient,split,axis,every",
        "scan.nii.gz,x,train,0,5",
        "multicoil_train/file1.h5,y,test,,",
        "IXI002-Guys-0828-T1.nii.gz,,val,,2",
    ]
    (root / "volumes.csv").write_text("\n".join(rows))
    with caplog.at_level(logging.WARNING):
        data = read(root, tmp_path)
    assert data.train.names == tuple(f"scan.nii.gz-{index:03d}" for index in (0, 5, 10, 15))
    assert data.train.size(0) == (6, 24)
    assert data.val.names == tuple(f"IXI002-Guys-0828-T1.nii.gz-{index:03d}" for index in (1, 5))
    assert data.val.patients == ("IXI002", "IXI002")
    assert set(data.test.patients) == {"y"}
    assert "does not name 4 of the 7 volumes" in caplog.text


@pytest.mark.parametrize("patients", [1, 2])
def test_too_few_patients_are_cut_into_blocks(patients, tmp_path, caplog):
    """With gaps between them; it is said, and stands in the name of every run."""
    for number in range(patients):
        mr_volume(tmp_path / "heads" / f"{number}.nii.gz", ramp((9, 9, 40)) + np.int16(number))
    with caplog.at_level(logging.WARNING):
        data = read(tmp_path / "heads", tmp_path)
    assert f"has {patients} patient(s), who cannot be split" in caplog.text and "SAME volumes" in caplog.text
    assert data.title == "mri-heads-same-patients"
    for number in range(patients):
        own = {
            split: [int(name[-3:]) for name in getattr(data, split).names if name.startswith(f"{number}.")]
            for split in ("train", "val", "test")
        }
        # 40 slices less two gaps of 2: 36, of which a tenth and two tenths.
        assert own == {"train": list(range(25)), "val": list(range(27, 31)), "test": list(range(33, 40))}


def test_what_was_seen_is_remembered(tmp_path, monkeypatch):
    root = mri(tmp_path / "data")
    read(root, tmp_path)

    def never(*_):
        raise AssertionError("a volume was looked through again")

    monkeypatch.setattr("train.data.volumes.facts", never)
    read(root, tmp_path)
    mr_volume(root / "scan.nii.gz", ramp())
    with pytest.raises(AssertionError, match="looked through again"):
        read(root, tmp_path)


def one(path: Path, array: np.ndarray, **more) -> None:
    mr_volume(path / "a.nii.gz", array, **more)


def h5(**content: object) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import h5py

        with h5py.File(path / "a.h5", "w") as file:
            for name, value in content.items():
                file[name] = value

    return write


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: one(path, np.full((8, 8, 8), 7, np.int16)), "hardly more than one value"),
        (lambda path: one(path, np.zeros((8, 8, 8), np.int16)), "hardly more than one value"),
        (lambda path: one(path, ramp().astype(np.complex64)), "holds complex values, no gray levels"),
        (lambda path: one(path, np.full((8, 8, 8), np.nan, np.float32)), "holds NaN or infinity"),
        (lambda path: one(path, ramp((8, 8, 8, 2))), r"an array of \[8, 8, 8, 2\] \(x first\), no single volume"),
        (lambda path: one(path, ramp((9, 9, 1))), r"has 1 slice\(s\) that are not empty, too few to train"),
        (lambda path: one(path, ramp((9, 9, 4))), r"has 4 slice\(s\) that are not empty, too few to train"),
        (lambda path: (path / "a.nii.gz").write_bytes(b"nothing"), "a.nii.gz cannot be read"),
        (lambda path: (path / "a.h5").write_bytes(b"nothing"), "a.h5 cannot be read"),
        (h5(other=[1]), "has neither reconstruction_rss nor kspace, as files of fastMRI have .only other"),
        (h5(kspace=np.ones((2, 8, 8), complex), mask=[1] * 8), "is undersampled .it has a mask"),
        (h5(reconstruction_rss=np.ones((8, 8))), r"reconstruction_rss is float64 \[8, 8\], no stack of slices"),
    ],
)
def test_volumes_that_are_refused(write, said, tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    with pytest.raises(DataError, match=said):
        read(tmp_path / "data", tmp_path)


def test_mostly_empty_volumes(tmp_path):
    """All of it is dark but a few pixels, so that no slice is worth a look."""
    dark = np.zeros((40, 40, 3), np.int16)
    dark[:4, :4] = 1000
    one(tmp_path / "data", dark)
    with pytest.raises(DataError, match=r"has 3 slice\(s\), and all of them are empty"):
        read(tmp_path / "data", tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["volume", "b.nii"], "line 2 of .*volumes.csv: there is no volume 'b.nii'"),
        (["volume", "a.nii.gz", "a.nii.gz"], "line 3 of .*: a.nii.gz has a row already, in line 2"),
        (["volume,split", "a.nii.gz,dev"], "line 2 of .*: the split must be one of train, val, test, not 'dev'"),
        (["volume,axis", "a.nii.gz,3"], "line 2 of .*: the axis must be 0, 1 or 2, not '3'"),
        (["volume,every", "a.nii.gz,0"], "line 2 of .*: every must be a whole number of at least 1, not '0'"),
        (["volume,split", "a.nii.gz,train"], "puts no volume into test"),
        (["volume"], "names no volume"),
    ],
)
def test_tables_that_are_refused(rows, said, tmp_path):
    one(tmp_path / "data", ramp())
    (tmp_path / "data" / "volumes.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=said):
        read(tmp_path / "data", tmp_path)


def test_one_patient_in_two_splits(tmp_path):
    for name in "ab":
        mr_volume(tmp_path / "data" / f"{name}.nii", ramp())
    (tmp_path / "data" / "volumes.csv").write_text("volume,patient,split\na.nii,p,train\nb.nii,p,test\n")
    with pytest.raises(DataError, match="puts patient p into two splits"):
        read(tmp_path / "data", tmp_path)


def test_a_folder_without_volumes(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"is no folder of --dataset mri: it holds no volume \(\*\.nii"):
        read(tmp_path / "data", tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    fastmri_volume(tmp_path / "data" / "a.h5", np.ones((2, 8, 8)))
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DataError, match="can only be read with h5py, which is not installed: pip install h5py"):
        read(tmp_path / "data", tmp_path)


def test_real_volumes(shared_data, tmp_path):
    """A T2 volume of 12 bits, in slices of 2 mm across the body."""
    path = shared_data("MRI_NIIVUE", required=False) / "T2w.nii.gz"
    about = facts(path)
    assert (about.slices, len(about.kept)) == (60, 60)
    pixels = VolumeSlice(path, None, 30, about.low, about.white).read(1)
    assert pixels.shape == (224, 224, 1) and pixels.max() == 1 and 0.05 < pixels.mean() < 0.5
