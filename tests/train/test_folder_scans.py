"""The data set ``folder`` with medical files: their frames, patients, masks and windows; and ``--window``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
import tifffile
import torch
from PIL import Image

from train.data import DataError, ImageData, load
from train.data.frames import ScanFrame
from train.data.readers import ImageFile
from train.data.window import Window
from train.errors import RunError
from train.settings import from_json, parse, to_json

from .test_dicom import made
from .test_scan_volumes import nifti

RNG = np.random.default_rng(0)
SPLITS = ("train", "val", "test")
CUBES = np.eye(4)


def read(root: Path, **options: Any) -> ImageData:
    return load("folder", root=root, source="real", size=None, cache_dir=root.parent / "cache", **options)


def images(data: ImageData) -> dict[str, tuple[str, np.ndarray, str | None]]:
    """Split, pixels and patient of each image."""
    return {
        name: (split, np.array(subset.images[i]), None if subset.patients is None else subset.patients[i])
        for split in SPLITS
        for subset in [getattr(data, split)]
        for i, name in enumerate(subset.names)
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "mine"
    (root / "images").mkdir(parents=True)
    return root


class TestFrames:
    def test_slices_of_volumes(self, root: Path) -> None:
        volumes = {name: RNG.integers(-500, 900, (5, 6, 4)).astype(np.int16) for name in "abcd"}
        for name, ending in zip("ab", ("nii", "nii.gz"), strict=True):
            nifti(root / "images" / f"{name}.{ending}", volumes[name])
        for name, ending in zip("cd", ("mha", "mhd"), strict=True):
            image = SimpleITK.GetImageFromArray(volumes[name].T)
            SimpleITK.WriteImage(image, str(root / "images" / f"{name}.{ending}"))
        for _ in range(2):  # decoded, and from the cache
            found = images(read(root))
            assert sorted(found) == [f"{name}-{index:03d}" for name in "abcd" for index in range(4)]
            for name, (split, pixels, patient) in found.items():
                assert (pixels[..., 0] == volumes[name[0]][..., int(name[-1])].T).all()
                assert pixels.dtype == np.float32
                assert patient is not None
                assert patient.startswith(f"{name[0]}.")
                assert split == found[f"{name[0]}-000"][0]
        data = read(root)
        low, high = (getattr(np.stack(list(volumes.values())), which)() for which in ("min", "max"))
        assert data.train.value_range == (low, high)

    def test_dicom_with_and_without_an_ending(self, root: Path) -> None:
        """Hounsfield units; the slices of a patient stay together, whatever their files are called."""
        stored = {
            f"{patient}{i}": RNG.integers(0, 2000, (6, 8)).astype(np.int16) for patient in "PQRS" for i in range(3)
        }
        for name, pixels in stored.items():
            more = {"PatientID": name[0], "RescaleIntercept": "-1000", "RescaleSlope": "1"}
            made(root / "images" / (f"{name}.dcm" if name[1] == "0" else f"1.2.840.{name}"), pixels, **more)
        found = images(read(root))
        assert len(found) == 12
        for name, (split, pixels, patient) in found.items():
            key = name.removesuffix(".dcm").removeprefix("1.2.840.")
            assert (pixels[..., 0] == stored[key] - 1000).all()
            assert patient == key[0]
            assert split == found[f"{key[0]}0.dcm"][0]

    def test_without_a_patient_a_study_stays_together(self, root: Path) -> None:
        for study in range(3):
            for i in range(2):
                more = {"PatientID": "ANONYMOUS", "PatientName": "", "StudyInstanceUID": f"1.2.{study}"}
                made(root / "images" / f"{study}{i}.dcm", RNG.integers(0, 9, (6, 8)).astype(np.uint16), **more)
        found = images(read(root))
        assert {patient for _, _, patient in found.values()} == {f"study 1.2.{study}" for study in range(3)}
        assert all(found[f"{study}0.dcm"][0] == found[f"{study}1.dcm"][0] for study in range(3))

    def test_frames_and_pages(self, root: Path) -> None:
        """Of 8 bits, beside a photograph; a TIFF of one page is read as ever."""
        pages = RNG.integers(0, 256, (3, 6, 8), dtype=np.uint8)
        tifffile.imwrite(root / "images" / "pages.tif", pages, photometric="minisblack")
        tifffile.imwrite(root / "images" / "one.tif", pages[0])
        made(root / "images" / "frames.dcm", pages, NumberOfFrames=3)
        Image.fromarray(pages[1]).save(root / "images" / "x.png")
        data = read(root)
        found = images(data)
        assert sorted(found) == sorted(
            ["one.tif", "x.png", *(f"{n}-00{i}" for n in ("pages", "frames") for i in range(3))]
        )
        for name in ("pages", "frames"):
            assert all((found[f"{name}-00{i}"][1][..., 0] == pages[i]).all() for i in range(3))
        assert data.train.images.dtype == np.uint8
        assert data.train.value_range == (0, 255)
        assert (
            ScanFrame(root / "images" / "one.tif", 0).read(1).dtype
            == ImageFile(root / "images" / "one.tif").read(1).dtype
        )

    def test_one_row_for_a_file(self, root: Path) -> None:
        for name in "abcdef":
            nifti(root / "images" / f"{name}.nii.gz", RNG.integers(0, 99, (5, 6, 4)).astype(np.uint8))
        rows = ["image,label,split,patient"]
        rows += [f"{n}{e},{'xy'[i % 2]},{s},P{i}" for i, (n, e, s) in enumerate(zip(
            "abcdef", ("", ".nii.gz", "", "", "", ""), ("train", "train", "train", "train", "val", "test"), strict=True
        ))]  # fmt: skip
        (root / "labels.csv").write_text("\n".join(rows))
        data = read(root)
        assert [len(getattr(data, split)) for split in SPLITS] == [16, 4, 4]
        assert data.test.names == tuple(f"f-00{i}" for i in range(4))
        assert data.test.labels is not None
        assert data.test.labels.tolist() == [1] * 4
        assert data.test.patients == ("P5",) * 4

    def test_masks(self, root: Path) -> None:
        """Slice for slice, across the image's axis: here the mask's own header names another one."""
        (root / "masks").mkdir()
        for name in "abc":
            nifti(root / "images" / f"{name}.nii.gz", RNG.integers(0, 99, (5, 6, 4)).astype(np.uint8), affine=CUBES)
            mask = nibabel.Nifti1Image(RNG.integers(0, 3, (5, 6, 4)).astype(np.float32), CUBES)
            mask.header.set_dim_info(slice=0)
            mask.to_filename(root / "masks" / f"{name}.nii")
        data = read(root)
        assert data.mask_names == ("0", "1", "2")
        for split in SPLITS:
            subset = getattr(data, split)
            for i, name in enumerate(subset.names):
                indices = nibabel.load(root / "masks" / f"{name[0]}.nii").get_fdata()[..., int(name[-1])].T
                assert (subset.mask(i).numpy() == indices).all()
        nifti(root / "masks" / "a.nii", RNG.integers(0, 3, (5, 6, 3)).astype(np.uint8), affine=CUBES)
        with pytest.raises(DataError, match=r"mask .*a\.nii has 3 frames or slices, and its image .*a\.nii\.gz 4"):
            read(root)
        (root / "masks" / "a.nii").unlink()
        Image.fromarray(np.zeros((6, 5), np.uint8)).save(root / "masks" / "a.png")
        with pytest.raises(DataError, match=r"mask .*a\.png has 1 frames or slices"):
            read(root)

    def test_the_mask_of_a_photograph_is_no_volume(self, root: Path) -> None:
        (root / "masks").mkdir()
        for i in range(3):
            Image.fromarray(RNG.integers(0, 99, (6, 5), dtype=np.uint8)).save(root / "images" / f"{i}.png")
            nifti(root / "masks" / f"{i}.nii", RNG.integers(0, 2, (5, 6, 1)).astype(np.uint8))
        expected = nibabel.load(root / "masks" / read(root).test.names[0].replace("png", "nii")).get_fdata()[..., 0].T
        assert (read(root).test.mask(0).numpy() == expected).all()
        nifti(root / "masks" / "1.nii", RNG.integers(0, 2, (5, 6, 2)).astype(np.uint8))
        with pytest.raises(DataError, match=r"mask .*1\.nii has 2 frames or slices, and its image .*1\.png 1"):
            read(root)

    def test_a_mask_of_another_format(self, root: Path) -> None:
        (root / "masks").mkdir()
        for i in range(3):
            made(root / "images" / f"{i}.dcm", RNG.integers(0, 99, (6, 8)).astype(np.uint8), PatientID=f"{i}")
            Image.fromarray(RNG.integers(0, 2, (6, 8), dtype=np.uint8)).save(root / "masks" / f"{i}.png")
        data = read(root)
        expected = np.asarray(Image.open(root / "masks" / f"{data.test.names[0][0]}.png"))
        assert (data.test.mask(0).numpy() == expected).all()

    def test_high_quality(self, root: Path) -> None:
        (root / "hq").mkdir()
        for i in range(3):
            nifti(root / "images" / f"{i}.nii", RNG.integers(0, 99, (5, 6, 4)).astype(np.uint8))
        nifti(root / "hq" / "good.nii.gz", RNG.integers(0, 99, (5, 6, 4)).astype(np.uint8))
        data = read(root)
        assert data.guides is not None
        assert data.guides.names == tuple(f"hq/good-00{i}" for i in range(4))
        assert data.low_quality == {f"{i}-00{k}" for i in range(3) for k in range(4)}

    def test_what_is_refused(self, root: Path) -> None:
        nifti(root / "images" / "a.nii", RNG.integers(0, 99, (5, 6, 4)).astype(np.uint8))
        nifti(root / "images" / "a.nii.gz", RNG.integers(0, 99, (5, 6, 4)).astype(np.uint8))
        with pytest.raises(DataError, match=r"a\.nii and a\.nii\.gz, both with an image a-000"):
            read(root)
        (root / "images" / "a.nii.gz").unlink()
        with pytest.raises(DataError, match=r"has 1 patients \(4 images\)"):
            read(root)
        made(root / "images" / "IM1", np.zeros((6, 8), np.uint16), Rows=60000, Columns=60000)
        with pytest.raises(DataError, match=r"IM1 is 60000 x 60000"):
            read(root)

    def test_the_cache_knows_what_decodes(self, root: Path) -> None:
        code = ScanFrame(root, 0).code
        assert {"dicom.py", "volume.py", "raster.py", "pixels.py"} <= {path.name for path in code}


class TestWindow:
    @pytest.mark.parametrize("text", ["", "40", "40/0", "40/-3", "a/b", "P1", "P99-P1", "P-1-P99", "P1-P101", "1-99"])
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(ValueError, match="is no window; give CENTER/WIDTH"):
            Window.parse(text)
        with pytest.raises(RunError, match=r"--window: .* is no window"):
            parse([f"--window={text}"])

    def test_hounsfield_units(self, root: Path) -> None:
        pixels = np.array([[-2000, -1350], [-600, 150], [-225, 3000]], np.int16)
        for i in range(3):
            made(root / "images" / f"{i}.dcm", np.roll(pixels, i), PatientID=f"{i}")
        data = read(root, window="-600/1500")
        assert [getattr(data, split).value_range for split in SPLITS] == [(-1350, 150)] * 3
        assert read(root).train.value_range == (-2000, 3000)  # and the same pixels from the cache
        for split in SPLITS:
            subset = getattr(data, split)
            shift = int(subset.names[0][0])
            expected = np.roll([[0, 0], [0.5, 1], [0.75, 1]], shift)
            torch.testing.assert_close(subset.image(0)[0], torch.tensor(expected, dtype=torch.float32))

    def test_percentiles_are_those_of_the_training_images(self, root: Path) -> None:
        for i in range(10):
            Image.fromarray(RNG.integers(0, 200, (6, 8), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        data = read(root, window="P5-P90")
        low, high = np.percentile(data.train.images, [5, 90])
        assert data.test.value_range == (low, high)
        unit = (np.asarray(data.test.images[0]).astype(np.float64) - low) / (high - low)
        torch.testing.assert_close(data.test.image(0)[0], torch.from_numpy(unit.clip(0, 1)[..., 0]).float())
        for path in (root / "images").iterdir():
            Image.fromarray(np.full((6, 8), 7, np.uint8)).save(path)
        with pytest.raises(DataError, match="both percentiles of the training images are 7"):
            read(root, window="P5-P90")

    def test_of_eight_bits(self, root: Path) -> None:
        """What is above the window is white, and no whiter."""
        for i in range(3):
            Image.fromarray(np.array([[0, 50], [100, 200]], np.uint8)).save(root / "images" / f"{i}.png")
        data = read(root, window="50/100")
        torch.testing.assert_close(data.test.image(0), torch.tensor([[[0, 0.5], [1, 1]]]))

    def test_the_setting(self) -> None:
        settings = parse(["--dataset", "folder", "--window", "-600/1500"])
        assert to_json(settings)["data"]["window"] == "-600/1500"
        assert from_json(to_json(settings)).data.window == "-600/1500"
        assert parse([]).data.window is None

    def test_phantoms_have_no_unit(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="--window 40/400 is for real images"):
            load("covidct", source="phantom", window="40/400", cache_dir=tmp_path)


def test_a_run_on_slices(root: Path, tmp_path: Path) -> None:
    """The whole way: three patients' volumes, a window, and what is stored of it."""
    for name in "abc":
        nifti(root / "images" / f"{name}.nii.gz", RNG.integers(-1000, 1000, (32, 32, 3)).astype(np.int16))
    command = [
        "-m",
        "train.run",
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--strategy",
        "ip-only",
        "--window=0/1000",
    ]
    command += [
        "--size",
        "32",
        "--crop",
        "32",
        "--batch-size",
        "2",
        "--max-steps",
        "2",
        "--epochs",
        "1",
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
    ]
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"window": "0/1000"' in (tmp_path / "run" / "config.json").read_text()
    assert '"value range": [\n' in (tmp_path / "run" / "data.json").read_text()
