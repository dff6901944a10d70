"""CAMUS in both of its layouts: the right way up, quality by view, the official lists; and what can be wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
import torch

from train.data import DataError, ImageData, load
from train.data.fingerprint import differences, fingerprint
from train.data.formats import MedicalImage
from train.data.sets.camus import CLASS_NAMES, MASK_NAMES

from .layouts import CAMUS_PATIENTS, CAMUS_SHAPE, camus, medical

SPLITS = ("train", "val", "test")
RELEASES = ["nifti", "mhd"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return camus(tmp_path / "CAMUS_public")


def read(root: Path, **options: object) -> ImageData:
    return load("camus", root=root, source="real", cache_dir=root.parent / "cache", **({"size": None} | options))  # type: ignore[arg-type]


def refused(root: Path, *culprits: str) -> None:
    with pytest.raises(DataError) as caught:
        read(root)
    for culprit in culprits:
        assert culprit in str(caught.value)


@pytest.mark.parametrize("release", RELEASES)
def test_pixels_masks_qualities_and_patients(tmp_path: Path, release: str) -> None:
    """The oracle: SimpleITK's array of MetaImage, whose rows come first, and nibabel's of NIfTI, turned."""
    root = camus(tmp_path / "CAMUS", release=release)
    data = read(root)
    assert (data.class_names, data.mask_names) == (CLASS_NAMES, MASK_NAMES)
    names = [name for split in SPLITS for name in getattr(data, split).names]
    assert len(names) == len(set(names)) == 4 * len(CAMUS_PATIENTS)
    for split in SPLITS:
        subset = getattr(data, split)
        for i, name in enumerate(subset.names):
            patient, view, _ = name.split("_")
            n = CAMUS_PATIENTS.index(patient)
            assert subset.patients[i] == patient
            assert subset.labels[i] == (n + (view == "4CH")) % 3
            assert subset.size(i) == (CAMUS_SHAPE[0] + n, CAMUS_SHAPE[1] + 2 * n)
            for found, end in ((subset.images[i][..., 0], ""), (subset.mask(i).numpy(), "_gt")):
                if release == "nifti":
                    file = root / "database_nifti" / patient / f"{name}{end}.nii.gz"
                    expected = np.asarray(nibabel.load(file).dataobj).T
                else:
                    file = root / "training" / patient / f"{name}{end}.mhd"
                    expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(file)))[0]
                assert (found == expected).all()


def test_both_layouts_are_the_same_data(tmp_path: Path) -> None:
    both = [fingerprint(read(camus(tmp_path / release, release=release))) for release in RELEASES]
    assert differences(*both) == []


def test_official_lists(root: Path) -> None:
    data = read(root)
    assert [sorted(set(getattr(data, split).patients)) for split in SPLITS] == [
        CAMUS_PATIENTS[:5],
        CAMUS_PATIENTS[5:6],
        CAMUS_PATIENTS[6:],
    ]


def test_without_lists_the_patients_are_split(tmp_path: Path) -> None:
    data = read(camus(tmp_path / "CAMUS", split=False))
    patients = [set(getattr(data, split).patients) for split in SPLITS]
    assert all(patients)
    assert set.union(*patients) == set(CAMUS_PATIENTS)
    assert sum(map(len, patients)) == len(CAMUS_PATIENTS)


def test_without_qualities(root: Path) -> None:
    for file in root.rglob("Info_*.cfg"):
        file.unlink()
    data = read(root)
    assert data.class_names == ()
    assert data.train.labels is None


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize(("dtype", "scale", "top"), [(np.uint16, 16, 4095), (np.float32, 0.5, 127.5)])
def test_other_depths(tmp_path: Path, release: str, dtype: type, scale: float, top: float) -> None:
    """Nothing is rounded to 8 bits; what is white is decided for all images together."""
    root = camus(tmp_path / "CAMUS", release=release)
    before = read(root).train
    ending = ".nii.gz" if release == "nifti" else ".mhd"
    for file in root.rglob(f"patient*{ending}"):
        if "_gt" not in file.name:
            pixels = MedicalImage(file).read(1)[..., 0]
            medical(
                file.with_name(file.name.removesuffix(ending)),
                (pixels.astype(float) * scale).astype(dtype),
                release=release,
            )
    after = read(root).train
    assert after.images.dtype == dtype
    assert after.value_range == (0, top)
    for i in range(len(after)):
        torch.testing.assert_close(after.image(i), before.image(i) * 255 * scale / top)


def test_changed_pixels_beside_a_header_are_noticed(tmp_path: Path) -> None:
    root = camus(tmp_path / "CAMUS", release="mhd")
    before = fingerprint(read(root))
    file = root / "training" / "patient0001" / "patient0001_2CH_ED.raw"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    assert len(differences(before, fingerprint(read(root)))) == 1


class TestDamage:
    def test_a_patient_without_quality(self, root: Path) -> None:
        file = root / "database_nifti" / "patient0003" / "Info_4CH.cfg"
        file.unlink()
        refused(root, f"{file} is missing", "quality")

    @pytest.mark.parametrize(
        ("content", "culprit"),
        [
            (
                "ED: 1\nImageQuality: Fair\n",
                "line 2 of {}: the ImageQuality must be one of Good, Medium, Poor, not 'Fair'",
            ),
            ("ED: 1\n", "{} has no line 'ImageQuality: ...'"),
            ("ImageQuality: Good\n\nImageQuality: Poor\n", "line 3 of {}: the ImageQuality is in line 1 already"),
            ("ImageQuality\n", "line 1 of {}: the ImageQuality must be one of"),
        ],
    )
    def test_qualities(self, root: Path, content: str, culprit: str) -> None:
        file = root / "database_nifti" / "patient0003" / "Info_2CH.cfg"
        file.write_text(content)
        refused(root, culprit.format(file))

    @pytest.mark.parametrize("end", ["", "_gt"])
    def test_missing_file(self, root: Path, end: str) -> None:
        file = root / "database_nifti" / "patient0003" / f"patient0003_4CH_ES{end}.nii.gz"
        file.unlink()
        refused(root, f"{file} is missing")

    def test_mask_of_another_size(self, root: Path) -> None:
        stem = root / "database_nifti" / "patient0001" / "patient0001_2CH_ED_gt"
        medical(stem, np.zeros((20, 30), np.uint8), release="nifti")
        refused(root, f"the mask {stem}.nii.gz has 20 x 30 pixels (height x width), its image 30 x 20")

    def test_unknown_mask_value(self, root: Path) -> None:
        stem = root / "database_nifti" / "patient0001" / "patient0001_2CH_ED_gt"
        medical(stem, np.full(CAMUS_SHAPE, 4, np.uint8), release="nifti")
        refused(root, f"the mask {stem}.nii.gz holds the values 4")

    def test_mixed_depths(self, root: Path) -> None:
        stem = root / "database_nifti" / "patient0001" / "patient0001_2CH_ED"
        medical(stem, np.full(CAMUS_SHAPE, 4000, np.uint16), release="nifti")
        refused(root, f"{stem}.nii.gz", "uint16", "save all images in one type")

    def test_a_patient_in_two_lists(self, root: Path) -> None:
        lists = root / "database_split"
        with (lists / "subgroup_testing.txt").open("a") as file:
            file.write("\npatient0002\n")
        refused(
            root, f"line 3 of {lists / 'subgroup_testing.txt'}: patient0002 is in line 2 of ", "subgroup_training.txt"
        )

    def test_a_patient_in_no_list(self, root: Path) -> None:
        (root / "database_split" / "subgroup_testing.txt").write_text("patient0007\r\n")
        refused(root, "no list in", "has patient0008")

    def test_a_list_of_strangers(self, root: Path) -> None:
        file = root / "database_split" / "subgroup_testing.txt"
        file.write_text("patient0007\n\npatient0099\n")
        refused(root, f"line 3 of {file}: there is no folder of 'patient0099'")

    def test_a_missing_list(self, root: Path) -> None:
        (root / "database_split" / "subgroup_validation.txt").unlink()
        refused(root, "the list", "subgroup_validation.txt is missing")

    def test_nothing_there(self, root: Path) -> None:
        (root / "database_nifti").rename(root / "elsewhere")
        (root / "database_nifti").mkdir()
        refused(root, "neither is nor holds the folder of CAMUS (CAMUS_public)")


def test_nothing_is_imported_before_it_is_needed() -> None:
    code = "import sys, train.data; print({'nibabel', 'SimpleITK', 'scipy', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_real_data(shared_data: Callable[..., Path], tmp_path: Path) -> None:
    """For those who have the official files: 500 patients, 400, 50 and 50 of them by the lists."""
    root = shared_data("CAMUS_public", "CAMUS", required=False)
    data = load("camus", root=root, source="real", size=64, cache_dir=tmp_path)
    assert sum(len(getattr(data, split)) for split in SPLITS) in (2000, 1800)  # the old layout has 450 with masks
    masks = data.train.masks_tensor().double()
    # The right way up: the atrium lies below the ventricle in the apical views.
    rows = [
        (masks == k).double().mean((0, 2)) @ np.arange(64.0) / (masks == k).double().mean((0, 2)).sum() for k in (1, 3)
    ]
    assert rows[0] < rows[1]
