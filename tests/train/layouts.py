"""Small data sets in the layouts of the official ones, in the formats and with the traps of these."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from train.data.sets import isic2018


def folder(root: Path) -> Path:
    """Images of different sizes, with masks, labels and patients."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    rows = ["image,patient,label"]
    for i in range(12):
        shape = (30 + i, 40 - i)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(root / "images" / f"{i}.png")
        Image.fromarray(rng.integers(0, 3, shape, dtype=np.uint8)).save(root / "masks" / f"{i}.png")
        rows.append(f"{i}.png,p{i // 2},{'ab'[i // 2 % 2]}")
    (root / "labels.csv").write_text("\n".join(rows))
    return root


ISIC = {f"ISIC_{3 + i:07d}": i % 4 - 1 for i in range(20)}
"""Twenty images with their labels; every fourth is unknown."""


def isic_pairs(root: Path, split: str, ids: list[str]) -> None:
    """Images of noise with lesions, as the challenge names them; every image is of another size."""
    rng = np.random.default_rng(len(ids))
    images, masks = root / isic2018.image_folder(split), root / isic2018.mask_folder(split)
    images.mkdir(parents=True)
    masks.mkdir()
    for i, id in enumerate(ids):
        shape = (18 + i, 40 - i)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(images / f"{id}.jpg")
        Image.fromarray(255 * rng.integers(0, 2, shape, dtype=np.uint8)).save(masks / f"{id}_segmentation.png")
    for folder in (images, masks):  # as the official archives have them
        (folder / "ATTRIBUTION.txt").touch()
        (folder / "LICENSE.txt").touch()


def isic_table(path: Path, labels: dict[str, int], *, form: str = "{:.1f}") -> Path:
    """In the columns of the official tables; an unknown label is a row with empty fields."""
    rows = ["image_id,melanoma,seborrheic_keratosis"]
    for id, label in labels.items():
        told = ["", ""] if label < 0 else [form.format(label == 1), form.format(label == 2)]
        rows.append(",".join([id, *told]))
    path.write_text("\n".join(rows) + "\n")
    return path


def isic(root: Path) -> Path:
    """In two tables of 2017, which do not know five of the images, and know one of another year."""
    isic_pairs(root, "train", list(ISIC))
    known = [(id, label) for id, label in ISIC.items() if label >= 0]
    isic_table(root / "ISIC-2017_Training_Part3_GroundTruth.csv", dict(known[:7]) | {"ISIC_0009999": 1})
    isic_table(root / "ISIC-2017_Validation_Part3_GroundTruth.csv", dict(known[7:]))
    return root


def drimdb(root: Path) -> Path:
    """With date and time burnt in, in white, and an outlier of another size."""
    rng = np.random.default_rng(0)
    for quality, number in (("Good", 6), ("Bad", 5), ("Outlier", 4)):
        (root / quality).mkdir(parents=True)
        for i in range(number):
            scale = 3 if (quality, i) == ("Outlier", 2) else 1
            pixels = np.repeat(np.repeat(rng.integers(40, 200, (57, 76, 3), dtype=np.uint8), 10, 0), 10, 1)
            pixels[8:23, 574:682] = 255
            image = Image.fromarray(pixels).resize((760 * scale, 570 * scale), Image.Resampling.NEAREST)
            image.save(root / quality / f"drimdb_{quality.lower()} ({i + 1}).jpg", quality=90)
    return root


CAMUS_PATIENTS = [f"patient{i:04d}" for i in range(1, 9)]
CAMUS_SHAPE = (30, 20)
"""Height and width of the first patient's images; those of the others differ."""


def camus(root: Path, *, release: str = "nifti", split: bool = True) -> Path:
    """Echocardiograms of eight patients. No image or mask equals its own transpose or mirror image.

    :param release: "nifti" for the layout of today, "mhd" for that before.
    :param split: whether the official lists are there.
    """
    rng = np.random.default_rng(0)
    folder = root / ("database_nifti" if release == "nifti" else "training")
    for n, patient in enumerate(CAMUS_PATIENTS):
        (folder / patient).mkdir(parents=True)
        for v, view in enumerate(("2CH", "4CH")):
            quality = ("Good", "Medium", "Poor")[(n + v) % 3]
            info = folder / patient / f"Info_{view}.cfg"
            info.write_text(f"ED: 1\nES: 18\nNbFrame: 18\nSex: F\nAge: 56\nImageQuality: {quality}\nEF: 47\n")
            for phase in ("ED", "ES"):
                shape = (CAMUS_SHAPE[0] + n, CAMUS_SHAPE[1] + 2 * n)
                stem = folder / patient / f"{patient}_{view}_{phase}"
                medical(stem, rng.integers(0, 256, shape, dtype=np.uint8), release=release)
                medical(Path(f"{stem}_gt"), rng.integers(0, 4, shape, dtype=np.uint8), release=release)
    if split:
        (root / "database_split").mkdir()
        for name, some in (("training", slice(0, 5)), ("validation", slice(5, 6)), ("testing", slice(6, 8))):
            (root / "database_split" / f"subgroup_{name}.txt").write_text("\n".join(CAMUS_PATIENTS[some]))
    return root


def medical(stem: Path, pixels: np.ndarray, *, release: str) -> Path:
    """Writes an image in a format with the x axis first.

    :param pixels: ``[H, W]``, the uppermost row first.
    """
    if release == "nifti":
        import nibabel

        # As CAMUS has them: a plane without depth, and an affine that turns x and y around.
        path = stem.with_name(f"{stem.name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(pixels.T.copy(), np.diag([-0.3, -0.15, 1.0, 1.0])), path)
    else:
        import SimpleITK

        path = stem.with_name(f"{stem.name}.mhd")
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels[None]), str(path))
    return path


LIZARD = {"consep_1": 1, "crag_2": 1, "crag_10": 2, "dpath_3": 3, "glas_4": 1, "pannuke_5": 3}
"""Images and the parts of the cross-validation that they are in."""


def lizard(root: Path, *, info: bool = True) -> Path:
    """Rectangular nuclei whose numbers have gaps and are listed in no order; their classes are known by number.

    :param info: whether the table of the parts is there.
    """
    rng = np.random.default_rng(0)
    labels = root / "lizard_labels" / "Lizard_Labels" / "Labels"
    labels.mkdir(parents=True)
    for n, stem in enumerate(LIZARD):
        images = root / f"lizard_images{1 + n % 2}" / f"Lizard_Images{1 + n % 2}"
        images.mkdir(parents=True, exist_ok=True)
        shape = (270 + 10 * n, 530 + 7 * n)
        coarse = rng.integers(0, 256, (*(1 + side // 8 for side in shape), 3), dtype=np.uint8)
        pixels = coarse.repeat(8, 0).repeat(8, 1)[: shape[0], : shape[1]]
        Image.fromarray(pixels).save(images / f"{stem}.png")
        numbers = rng.permutation(np.arange(1, 400, 3))[:40]
        nuclei(labels / f"{stem}.mat", rng, shape, numbers, classes=numbers % 6 + 1)
    if info:
        rows = [f"{stem},{stem.split('_')[0]},{part}" for stem, part in LIZARD.items()]
        (labels.parent / "info.csv").write_text("\n".join(["Filename,Source,Split", *rows]))
    return root


def nuclei(
    path: Path, rng: np.random.Generator, shape: tuple[int, int], numbers: np.ndarray, *, classes: np.ndarray
) -> np.ndarray:
    """Writes a file of labels as Lizard has them; returns the instance map."""
    from scipy.io import savemat

    instances = np.zeros(shape, np.int32)
    for number in numbers:
        top, left = rng.integers(0, shape[0] - 12), rng.integers(0, shape[1] - 12)
        instances[top : top + 12, left : left + 12] = number
    seen = np.isin(numbers, instances)  # those that others have covered are not listed
    centroids = rng.uniform(0, 100, (seen.sum(), 2))
    savemat(
        path,
        {
            "inst_map": instances,
            "id": numbers[seen].astype(np.int32)[:, None],
            "class": classes[seen].astype(np.int32)[:, None],
            "bbox": np.zeros((seen.sum(), 4), np.int32),
            "centroid": centroids,
        },
        do_compression=True,
    )
    return instances


def mr_volume(path: Path, stored: np.ndarray, *, zooms: tuple[float, ...] = (1, 1, 2)) -> Path:
    """Writes a NIfTI volume.

    :param stored: ``[x, y, z]``, as the file has it.
    """
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([*zooms, 1.0])), path)
    return path


def fastmri_volume(path: Path, images: np.ndarray, *, what: str = "reconstruction_rss", **attributes: str) -> Path:
    """Writes a volume in fastMRI's layout.

    :param images: ``[slices, H, W]``.
    :param what: "reconstruction_rss", or "kspace" for two coils that saw it with half of its brightness each.
    """
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        if what == "kspace":
            axes = (-2, -1)
            seen = np.stack([images, 1j * images], 1) * np.sqrt(0.5)
            spectrum = np.fft.fft2(np.fft.ifftshift(seen, axes=axes), norm="ortho")
            file["kspace"] = np.fft.fftshift(spectrum, axes=axes).astype(np.complex64)
        else:
            file[what] = images
        file.attrs.update(attributes)
    return path


def mri(root: Path) -> Path:
    """Seven volumes of five patients in every format; their types and scales of brightness differ."""
    rng = np.random.default_rng(0)

    def volume(top: float) -> np.ndarray:
        """Every other slice is empty."""
        bright = rng.uniform(0.2, 1, (20, 24, 6)) * top
        bright[..., ::2] *= 0.01
        return bright

    mr_volume(root / "IXI002-Guys-0828-T1.nii.gz", volume(4095).astype(np.int16))
    mr_volume(root / "IXI002-Guys-0828-T2.nii.gz", volume(255).astype(np.uint8))
    mr_volume(root / "sub-01" / "anat" / "sub-01_T2w.nii", volume(1).astype(np.float32))
    mr_volume(root / "sub-01" / "anat" / "sub-01_T1w.nii", volume(3e4).astype(np.uint16))
    mr_volume(root / "scan.nii.gz", volume(9).astype(np.float64))
    stack = np.moveaxis(volume(1e-4), 2, 0).astype(np.float32)
    fastmri_volume(root / "multicoil_train" / "file1.h5", stack, patient_id="abc")
    fastmri_volume(root / "multicoil_train" / "file2.h5", stack[:, :16] * 7, what="kspace", patient_id="def")
    return root


SMALL: dict[str, Callable[[Path], Path]] = {
    "folder": folder,
    "isic2018": isic,
    "drimdb": drimdb,
    "camus": camus,
    "lizard": lizard,
    "mri": mri,
}
"""How to write a small data set of one's own, by the name of the data set whose layout it has."""
