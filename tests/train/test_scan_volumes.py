"""Scans in NIfTI and MetaImage: written, and read by nibabel and SimpleITK; slices as they are trained on."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from train.data.base import DataError
from train.data.limits import VARIABLE
from train.data.volumes import VolumeSlice
from train.scans import Derivation, Scan, open_scan

RNG = np.random.default_rng(0)
SAID = Derivation("Enhanced for a test; not for diagnosis.", "test")
# Of voxels of 1 x 2 x 3 mm, turned and shifted: the slices lie across the last axis.
AFFINE = np.array([[0.8, -1.2, 0, 5], [0.6, 1.6, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1]])


def written(scan: Scan, target: Path, derivation: Derivation = SAID) -> Path:
    scale, before = derivation.scale, scan.path.read_bytes()
    scan.write(target, (scan.read(i).repeat(scale, 0).repeat(scale, 1) for i in range(scan.frames)), derivation)
    assert scan.path.read_bytes() == before
    return target


def nifti(path: Path, array: np.ndarray, *, affine: np.ndarray = AFFINE, kind: Any = nibabel.Nifti1Image) -> Path:
    header = kind.header_class(endianness=">" if array.dtype.byteorder == ">" else "<")
    header.set_data_dtype(array.dtype)
    image = kind(array, affine, header)
    image.set_qform(affine, 1)
    image.set_sform(affine, 2)
    image.header["descrip"] = b"of A. Person"
    image.to_filename(path)
    return path


def corners(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Where the eight corners of a volume are: half a voxel beyond the centers of the outermost ones."""
    ends = np.stack(np.meshgrid(*([-0.5, side - 0.5] for side in shape[:3]), indexing="ij"), -1).reshape(-1, 3)
    return ends @ affine[:3, :3].T + affine[:3, 3]


class TestNifti:
    @pytest.mark.parametrize("ending", ["nii", "nii.gz"])
    @pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8", ">i2"])
    def test_types(self, tmp_path: Path, ending: str, dtype: str) -> None:
        array = RNG.integers(0, 250, (5, 6, 4)).astype(dtype)
        scan = open_scan(nifti(tmp_path / f"x.{ending}", array))
        assert (scan.format, scan.frames, scan.channels, scan.size(3)) == ("NIfTI", 4, 1, (6, 5))
        assert all((scan.read(i)[..., 0] == array[..., i].T).all() for i in range(4))
        new = nibabel.load(written(scan, tmp_path / f"y.{ending}"))
        assert new.get_data_dtype() == array.dtype
        assert (np.asanyarray(new.dataobj) == array).all()
        np.testing.assert_array_equal(new.affine, nibabel.load(scan.path).affine)
        old = nibabel.load(scan.path).header
        for field in ("descrip", "qform_code", "sform_code", "pixdim", "xyzt_units", "dim_info"):
            assert (new.header[field] == old[field]).all(), field
        (extension,) = new.header.extensions
        assert (extension.get_code(), extension.get_content()) == (6, SAID.description.encode())

    def test_the_scale_of_values_is_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "x.nii.gz"
        image = nibabel.Nifti1Image(RNG.integers(-1000, 3000, (5, 6, 4)).astype(np.int16), AFFINE)
        image.header.set_slope_inter(0.5, 10)
        # nibabel writes numbers as they are where the header is that of the numbers.
        header = image.header.copy()
        header["vox_offset"] = 352
        with gzip.open(path, "wb") as file:
            header.write_to(file)
            file.write(np.asarray(image.dataobj).tobytes(order="F"))
        told = nibabel.load(path).get_fdata()
        assert told[0, 0, 0] == np.asarray(image.dataobj)[0, 0, 0] * 0.5 + 10
        scan = open_scan(path)
        assert all((scan.read(i)[..., 0] == told[..., i].T).all() for i in range(4))
        assert scan.value_range == (told.min(), told.max())
        new = nibabel.load(written(scan, tmp_path / "y.nii.gz"))
        assert (new.dataobj.slope, new.dataobj.inter) == (0.5, 10)
        assert (new.dataobj.get_unscaled() == np.asarray(image.dataobj)).all()
        frames = [np.full((6, 5, 1), 3.3, np.float32)] * 4
        scan.write(tmp_path / "z.nii.gz", frames, SAID)
        assert (nibabel.load(tmp_path / "z.nii.gz").get_fdata() == 3.5).all()  # of -13.4 and a half, -13

    def test_what_is_black_and_white(self, tmp_path: Path) -> None:
        array = np.zeros((5, 6, 4), np.int16)
        array[0, 0, 0] = 1500
        assert open_scan(nifti(tmp_path / "x.nii", array)).value_range == (0, 2047)
        assert open_scan(nifti(tmp_path / "y.nii", array - 1000)).value_range == (-1000, 500)
        assert open_scan(nifti(tmp_path / "z.nii", array / np.float32(1500))).value_range == (0, 1)
        image = nibabel.Nifti1Image(array, AFFINE)
        image.header["cal_min"], image.header["cal_max"] = 10, 900
        image.to_filename(tmp_path / "c.nii")
        assert open_scan(tmp_path / "c.nii").value_range == (10, 900)

    def test_what_is_no_number_stays_so(self, tmp_path: Path) -> None:
        array = RNG.normal(size=(5, 6, 4)).astype(np.float32)
        array[0] = np.nan
        scan = open_scan(nifti(tmp_path / "x.nii", array))
        assert scan.value_range == (np.nanmin(array), np.nanmax(array))
        found = np.asanyarray(nibabel.load(written(scan, tmp_path / "y.nii")).dataobj)
        np.testing.assert_array_equal(found, array)

    def test_times_and_dimensions(self, tmp_path: Path) -> None:
        array = RNG.integers(0, 250, (5, 6, 4, 3)).astype(np.int16)
        scan = open_scan(nifti(tmp_path / "x.nii.gz", array))
        assert scan.frames == 12
        assert (scan.read(4 + 2)[..., 0] == array[..., 2, 1].T).all()
        assert (np.asanyarray(nibabel.load(written(scan, tmp_path / "y.nii.gz")).dataobj) == array).all()
        for shape in ((5, 6), (5, 6, 1, 1)):
            scan = open_scan(nifti(tmp_path / "x.nii", array[..., 0, 0].reshape(shape)))
            assert scan.frames == 1
            assert np.asanyarray(nibabel.load(written(scan, tmp_path / "y.nii")).dataobj).shape == shape
        with pytest.raises(DataError, match=r"x\.nii holds an array of \[5, 6, 1, 1, 2\]"):
            open_scan(nifti(tmp_path / "x.nii", array[:, :, :1, :1].repeat(2, 3).reshape(5, 6, 1, 1, 2)))

    def test_of_version_2(self, tmp_path: Path) -> None:
        array = RNG.integers(0, 250, (5, 6, 4)).astype(np.int16)
        scan = open_scan(nifti(tmp_path / "x.nii", array, kind=nibabel.Nifti2Image))
        new = nibabel.load(written(scan, tmp_path / "y.nii"))
        assert isinstance(new, nibabel.Nifti2Image)
        assert (np.asanyarray(new.dataobj) == array).all()

    def test_colors(self, tmp_path: Path) -> None:
        array = np.zeros((5, 6, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")])
        for name in "RGB":
            array[name] = RNG.integers(0, 256, (5, 6, 4))
        nibabel.Nifti1Image(array, AFFINE).to_filename(tmp_path / "x.nii.gz")
        scan = open_scan(tmp_path / "x.nii.gz")
        assert (scan.channels, scan.value_range) == (3, (0, 255))
        assert (scan.read(1) == np.stack([array[name][..., 1].T for name in "RGB"], -1)).all()
        assert (np.asanyarray(nibabel.load(written(scan, tmp_path / "y.nii.gz")).dataobj) == array).all()

    @pytest.mark.parametrize("through", [0, 1, 2])
    @pytest.mark.parametrize("scale", [2, 3])
    def test_geometry(self, tmp_path: Path, through: int, scale: int) -> None:
        """The volume takes up the same space, whatever the axis of its slices."""
        zooms = [1.0, 1.5, 1.25]
        zooms[through] = 4
        affine = AFFINE.copy()
        affine[:3, :3] = AFFINE[:3, :3] / np.linalg.norm(AFFINE[:3, :3], axis=0) * zooms
        array = RNG.integers(0, 250, (5, 6, 4)).astype(np.int16)
        scan = open_scan(nifti(tmp_path / "x.nii", array, affine=affine))
        assert scan.frames == array.shape[through]
        new = nibabel.load(written(scan, tmp_path / "y.nii", Derivation("", "", scale=scale)))
        expected = array
        for axis in {0, 1, 2} - {through}:
            expected = expected.repeat(scale, axis)
        assert (np.asanyarray(new.dataobj) == expected).all()
        for form in (new.affine, new.get_qform(), new.get_sform()):
            np.testing.assert_allclose(corners(form, new.shape), corners(affine, array.shape), atol=1e-4)
        finer = [zoom / (1 if axis == through else scale) for axis, zoom in enumerate(zooms)]
        assert new.header.get_zooms() == pytest.approx(finer)

    def test_slices_are_those_of_a_training(self, tmp_path: Path) -> None:
        array = RNG.integers(0, 250, (5, 6, 4)).astype(np.uint8)
        path = nifti(tmp_path / "x.nii.gz", array, affine=np.diag([1.0, 3, 1, 1]))
        scan = open_scan(path)
        assert scan.frames == 6
        for index in range(6):
            assert (VolumeSlice(path, None, index, 0, 1).read(1).clip(0, 1) == scan.read(index).clip(0, 1)).all()

    def test_anonymized(self, tmp_path: Path) -> None:
        image = nibabel.Nifti1Image(np.zeros((5, 6, 4), np.uint8), AFFINE)
        image.header["descrip"], image.header["aux_file"] = b"of A. Person", b"person.txt"
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension(6, b"A. Person"))
        image.to_filename(tmp_path / "x.nii")
        assert b"A. Person" in written(open_scan(tmp_path / "x.nii"), tmp_path / "y.nii").read_bytes()
        new = written(open_scan(tmp_path / "x.nii"), tmp_path / "y.nii", Derivation("d", "", anonymize=True))
        assert b"erson" not in new.read_bytes()
        np.testing.assert_array_equal(nibabel.load(new).affine, nibabel.load(tmp_path / "x.nii").affine)

    def test_written_twice_is_the_same(self, tmp_path: Path) -> None:
        scan = open_scan(nifti(tmp_path / "x.nii.gz", np.zeros((5, 6, 4), np.uint8)))
        content = written(scan, tmp_path / "a.nii.gz").read_bytes()
        assert content == written(scan, tmp_path / "b.nii.gz").read_bytes()
        assert content[3:8] == bytes(5)  # gzip's flags and time: none

    @pytest.mark.parametrize("name", ["M2208_T2w", "T2w"])
    def test_real_volumes(self, shared_data: Callable[..., Path], tmp_path: Path, name: str) -> None:
        path = shared_data("MRI_NIIVUE") / f"{name}.nii.gz"
        scan = open_scan(path)
        old = nibabel.load(path)
        target = written(scan, tmp_path / "y.nii.gz")
        new = nibabel.load(target)
        assert scan.value_range == {"M2208_T2w": (0, 255), "T2w": (0, 4095)}[name]
        assert (np.asanyarray(new.dataobj) == np.asanyarray(old.dataobj)).all()
        assert new.get_data_dtype() == old.get_data_dtype()
        np.testing.assert_array_equal(new.affine, old.affine)
        fields = {key: (value, new.header[key]) for key, value in old.header.items() if key != "vox_offset"}
        assert [
            key
            for key, (one, other) in fields.items()
            if not np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        ] == []
        # SimpleITK, which knows nothing of nibabel, sees the same geometry.
        one, other = (SimpleITK.ReadImage(str(each)) for each in (path, target))
        assert (one.GetOrigin(), one.GetSpacing(), one.GetDirection()) == (
            other.GetOrigin(), other.GetSpacing(), other.GetDirection(),
        )  # fmt: skip


class TestNiftiBadFiles:
    @pytest.mark.parametrize("ending", ["nii", "nii.gz"])
    def test_truncated(self, tmp_path: Path, ending: str) -> None:
        path = nifti(tmp_path / f"x.{ending}", RNG.integers(0, 250, (30, 30, 30)).astype(np.uint8))
        whole = path.read_bytes()
        for length in (20, 300, len(whole) // 2):
            path.write_bytes(whole[:length])
            with pytest.raises(DataError, match=rf"x\.{ending}"):
                open_scan(path).read(0)

    @pytest.mark.parametrize("packed", [False, True])
    def test_lying_sizes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
        content = bytearray(nifti(tmp_path / "x.nii", np.zeros((5, 6, 4), np.uint8)).read_bytes())
        pack = gzip.compress if packed else bytes
        content[40:48] = struct.pack("<4h", 3, 10000, 10000, 100)
        (tmp_path / "x.nii").write_bytes(pack(content))
        with pytest.raises(DataError, match="10,000,000,000 pixels large by its header, more than"):
            open_scan(tmp_path / "x.nii")
        monkeypatch.setenv(VARIABLE, str(10**10))
        with pytest.raises(DataError, match=r"x\.nii has .* bytes for pixels, too few for the 10,000,000,000"):
            open_scan(tmp_path / "x.nii")
        content[40:48] = struct.pack("<4h", 3, 5, -6, 4)
        (tmp_path / "x.nii").write_bytes(pack(content))
        with pytest.raises(DataError, match="it holds no image"):
            open_scan(tmp_path / "x.nii")
        content[108:112] = struct.pack("<f", 1e9)
        (tmp_path / "x.nii").write_bytes(pack(content))
        with pytest.raises(DataError, match="begins at byte 1000000000"):
            open_scan(tmp_path / "x.nii")

    def test_what_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "x.nii.gz").write_bytes(gzip.compress(b"no volume" * 99))
        with pytest.raises(DataError, match=r"x\.nii\.gz is compressed, and no NIfTI inside"):
            open_scan(tmp_path / "x.nii.gz")
        with pytest.raises(DataError, match=r"x\.nii holds values of type complex64"):
            open_scan(nifti(tmp_path / "x.nii", np.zeros((5, 6, 4), np.complex64)))
        nibabel.Nifti1Pair(np.zeros((5, 6, 4), np.uint8), AFFINE).to_filename(tmp_path / "x.img")
        with pytest.raises(DataError, match=r"x\.hdr has its pixels in another file"):
            open_scan(tmp_path / "x.hdr")


def meta(path: Path, array: np.ndarray, *, packed: bool = False, color: bool = False) -> Path:
    """
    :param array: ``[z, y, x]``, or ``[z, y, x, 3]``.
    """
    image = SimpleITK.GetImageFromArray(array, isVector=color)
    dimension = image.GetDimension()
    image.SetSpacing([1.0, 1.5, 4.0, 1.0][:dimension])
    image.SetOrigin([5.0, -7.0, 11.0, 0.0][:dimension])
    if dimension == 3:
        image.SetDirection([0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1])
    image.SetMetaData("Comment", "of A. Person")
    image.SetMetaData("Own", "2026")
    SimpleITK.WriteImage(image, str(path), useCompression=packed)
    return path


class TestMetaImage:
    @pytest.mark.parametrize("ending", ["mha", "mhd"])
    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "f4", "f8"])
    def test_types(self, tmp_path: Path, ending: str, packed: bool, dtype: str) -> None:
        array = RNG.integers(0, 250, (4, 6, 5)).astype(dtype)
        scan = open_scan(meta(tmp_path / f"x.{ending}", array, packed=packed))
        assert (scan.format, scan.frames, scan.channels, scan.size(0)) == ("MetaImage", 4, 1, (6, 5))
        assert all((scan.read(i)[..., 0] == array[i]).all() for i in range(4))
        new = SimpleITK.ReadImage(str(written(scan, tmp_path / f"y.{ending}")))
        found = SimpleITK.GetArrayFromImage(new)
        assert found.dtype == array.dtype
        assert (found == array).all()
        old = SimpleITK.ReadImage(str(scan.path))
        assert new.GetSpacing() == old.GetSpacing()
        assert new.GetOrigin() == old.GetOrigin()
        assert new.GetDirection() == pytest.approx(old.GetDirection())
        assert new.GetMetaData("Derivation") == SAID.description
        assert new.GetMetaData("Own") == "2026"
        assert b"Comment = of A. Person" in (tmp_path / f"y.{ending}").read_bytes()
        other = {".mhd": [f"y.{'zraw' if packed else 'raw'}"], ".mha": []}[scan.path.suffix]
        assert sorted(each.name for each in tmp_path.glob("y*")) == sorted([f"y.{ending}", *other])
        assert [each.name for each in tmp_path.iterdir() if each.name.startswith(".")] == []

    @pytest.mark.parametrize("shape, color", [((6, 5), False), ((3, 4, 6, 5), False), ((4, 6, 5, 3), True)])
    def test_dimensions_and_colors(self, tmp_path: Path, shape: tuple[int, ...], color: bool) -> None:
        array = RNG.integers(0, 250, shape).astype(np.uint8)
        scan = open_scan(meta(tmp_path / "x.mha", array, color=color))
        assert scan.channels == (3 if color else 1)
        planes = array.reshape(-1, 6, 5, scan.channels)
        assert scan.frames == len(planes)
        assert all((scan.read(i) == planes[i]).all() for i in range(scan.frames))
        new = SimpleITK.ReadImage(str(written(scan, tmp_path / "y.mha")))
        assert (SimpleITK.GetArrayFromImage(new) == array).all()
        assert new.GetNumberOfComponentsPerPixel() == scan.channels

    def test_geometry(self, tmp_path: Path) -> None:
        array = RNG.integers(0, 250, (4, 6, 5)).astype(np.int16)
        path = meta(tmp_path / "x.mha", array)
        new = SimpleITK.ReadImage(str(written(open_scan(path), tmp_path / "y.mha", Derivation("", "", scale=2))))
        old = SimpleITK.ReadImage(str(path))
        assert new.GetSpacing() == (0.5, 0.75, 4)
        for corner in ((0, 0, 0), (5, 0, 0), (0, 6, 0), (5, 6, 4)):
            before = old.TransformContinuousIndexToPhysicalPoint([each - 0.5 for each in corner])
            doubled = [2 * corner[0] - 0.5, 2 * corner[1] - 0.5, corner[2] - 0.5]
            assert new.TransformContinuousIndexToPhysicalPoint(doubled) == pytest.approx(before)

    def test_anonymized(self, tmp_path: Path) -> None:
        path = meta(tmp_path / "x.mha", np.zeros((4, 6, 5), np.uint8))
        assert b"Person" in path.read_bytes()
        new = written(open_scan(path), tmp_path / "y.mha", Derivation("d", "", anonymize=True))
        assert b"Person" not in new.read_bytes()
        assert b"2026" not in new.read_bytes()

    def test_bad_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = meta(tmp_path / "x.mha", RNG.integers(0, 250, (4, 6, 5)).astype(np.uint8))
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"x\.mha"):
            open_scan(path).read(0)
        path.write_bytes(whole.replace(b"DimSize = 5 6 4", b"DimSize = 10000 10000 100"))
        with pytest.raises(DataError, match=r"10,000,000,000 pixels large by its header, more than"):
            open_scan(path)
        monkeypatch.setenv(VARIABLE, str(10**10))
        with pytest.raises(DataError, match=r"bytes for pixels, too few"):
            open_scan(path)
        for name in (b"../elsewhere.raw", b"/etc/passwd", b"LIST", b"x%03d.raw 1 4 1", b"gone.raw"):
            path.write_bytes(whole.replace(b"ElementDataFile = LOCAL", b"ElementDataFile = " + name))
            with pytest.raises(DataError, match=r"x\.mha has its pixels in"):
                open_scan(path)
        path.write_bytes(whole)
        path.rename(tmp_path / "x.txt")
        with pytest.raises(DataError, match=r"x\.txt is MetaImage by its content; give it the ending \.mha"):
            open_scan(tmp_path / "x.txt")

    def test_a_failure_leaves_what_there_was(self, tmp_path: Path) -> None:
        scan = open_scan(meta(tmp_path / "x.mhd", np.zeros((4, 6, 5), np.uint8)))
        meta(tmp_path / "y.mhd", np.ones((4, 6, 5), np.uint8))
        before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
        with pytest.raises(ValueError, match="4 frames; 1 were given"):
            scan.write(tmp_path / "y.mhd", [scan.read(0)], SAID)
        assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
