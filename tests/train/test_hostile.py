"""Files from strangers whose headers lie, lead elsewhere or hold code: an error that names the file, before memory is
taken or anything is executed."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from train.data.base import DataError
from train.data.formats import MedicalImage, MedicalMask, files_of
from train.data.readers import ImageFile, MaskFile
from train.data.sets.lizard import LizardLabels
from train.data.volumes import facts, patient_of
from train.errors import RunError
from train.scans import open_scan
from train.training.weights import load_weights

LARGE = "pixels large by its header, more than"


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def png(path: Path, width: int, height: int) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))
    return path


def npy(path: Path, shape: str, kind: str = "<f8", content: bytes = bytes(100)) -> Path:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (117 - len(header)) + b"\n"
    path.write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content)
    return path


def nifti(path: Path, *sides: int, kind: int = 16) -> Path:
    """A header of float32 (16), and 1 kB of pixels."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into(f"<{1 + len(sides)}h", header, 40, len(sides), *sides)
    struct.pack_into("<hh", header, 70, kind, 32)
    struct.pack_into("<8f", header, 76, *[1.0] * 8)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    content = bytes(header) + bytes(1000)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def meta(path: Path, size: str, data: str = "LOCAL") -> Path:
    text = f"ObjectType = Image\nNDims = {len(size.split())}\nDimSize = {size}\nElementType = MET_UCHAR\n"
    path.write_bytes(f"{text}ElementDataFile = {data}\n".encode() + bytes(100))
    return path


def tiff(path: Path, *, rows: int) -> Path:
    """Of 8 x 8 pixels, with another number of rows in its header."""
    import tifffile

    tifffile.imwrite(path, np.zeros((8, 8), np.uint16))
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        places = [tags[code].valueoffset for code in (257, 278)]  # rows of the image, and of its only strip
        kinds = [tags[code].dtype_name for code in (257, 278)]
    content = bytearray(path.read_bytes())
    for place, kind in zip(places, kinds, strict=True):
        struct.pack_into("<I" if kind == "LONG" else "<H", content, place, rows)
    path.write_bytes(content)
    return path


def dicom(path: Path, *, rows: int = 8, frames: int = 1) -> Path:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid(entropy_srcs=["hostile"])
    header.Rows, header.Columns, header.NumberOfFrames = rows, 65535 if rows > 1000 else 8, frames
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 12, 11, 0
    header.PixelData = bytes(128)
    header["PixelData"].VR = "OW"
    header.save_as(path, enforce_file_format=True)
    return path


def scan(path: Path) -> None:
    opened = open_scan(path)
    opened.read(opened.frames - 1)


def gray(path: Path) -> np.ndarray:
    return ImageFile(path).read(1)


READ: list[tuple[str, Callable[[Path], Path], Callable[[Path], object], str]] = [
    ("a.png", lambda path: png(path, 100_000, 100_000), gray, "exceeds limit of"),
    ("a.png", lambda path: png(path, 100_000, 100_000), lambda path: MaskFile(path).read(), "exceeds limit of"),
    ("a.png", lambda path: png(path, 100_000, 100_000), scan, LARGE),
    ("a.png", lambda path: png(path, 12_000, 12_000), scan, "too few for the"),
    ("a.npy", lambda path: npy(path, "(30000, 30000, 3)"), gray, LARGE),
    ("a.npy", lambda path: npy(path, "(30000, 30000)", "|u1"), lambda path: MaskFile(path).read(), LARGE),
    ("a.npy", lambda path: npy(path, "(1000, 1000)"), gray, "too few for the 8,000,000"),
    ("a.npy", lambda path: npy(path, "(-1, 5)"), gray, "holds no image"),
    ("a.tif", lambda path: tiff(path, rows=2**31), gray, LARGE),
    ("a.tif", lambda path: tiff(path, rows=9000), gray, "too few for the"),
    ("a.tif", lambda path: tiff(path, rows=9000), lambda path: MaskFile(path).read(), "too few for the"),
    ("a.tif", lambda path: tiff(path, rows=9000), scan, "too few for the"),
    *(
        (name, lambda path: nifti(path, 30_000, 30_000, 30_000), read, LARGE)
        for name in ("a.nii", "a.nii.gz")
        for read in (facts, scan, lambda path: MedicalImage(path).read(1), lambda path: MedicalMask(path).read())
    ),
    *(
        (name, lambda path: nifti(path, 4000, 4000, 1), read, "too few for the 64,000,000|bytes for pixels")
        for name in ("a.nii", "a.nii.gz")
        for read in (facts, scan, lambda path: MedicalImage(path).read(1))
    ),
    *(
        ("a.nii", lambda path: nifti(path, 16, -16, 4), read, "holds no image|cannot be read")
        for read in (facts, scan, lambda path: MedicalImage(path).read(1))
    ),
    ("a.mha", lambda path: meta(path, "30000 30000 30000"), lambda path: MedicalImage(path).read(1), LARGE),
    ("a.mha", lambda path: meta(path, "30000 30000 30000"), scan, LARGE),
    ("a.mha", lambda path: meta(path, "4000 4000"), lambda path: MedicalImage(path).read(1), "too few for the"),
    ("a.mha", lambda path: meta(path, "16 -16"), lambda path: MedicalImage(path).read(1), LARGE),
    ("a.dcm", lambda path: dicom(path, rows=65535), scan, LARGE),
    ("a.dcm", lambda path: dicom(path, frames=2**31 - 1), scan, "too few for the"),
    ("a.dcm", lambda path: dicom(path, frames=2), scan, "too few for the"),
    ("a.dcm", lambda path: dicom(path, frames=-5), scan, "has -5 frames by its header"),
]


@pytest.mark.parametrize(("name", "write", "read", "said"), READ)
def test_headers_that_lie(tmp_path, name, write, read, said):
    path = write(tmp_path / name)
    with pytest.raises(DataError, match=said) as error:
        read(path)
    assert str(path) in str(error.value)


def test_the_limit_is_the_users_everywhere(tmp_path, monkeypatch):
    from PIL import Image

    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    assert gray(tmp_path / "a.png").shape == (40, 40, 1)
    monkeypatch.setenv("GRADPROM_MAX_PIXELS", "1599")
    for read in (gray, scan, lambda path: MaskFile(path).read()):
        with pytest.raises(DataError, match=r"40 x 40 = 1,600 pixels .* set \$GRADPROM_MAX_PIXELS to at least 1600"):
            read(tmp_path / "a.png")


def test_no_object_is_unpickled(tmp_path):
    folder = tmp_path / "trapped"
    np.save(tmp_path / "a.npy", np.array([[Trap(folder)]], object))
    for read in (gray, lambda path: MaskFile(path).read()):
        with pytest.raises(DataError):
            read(tmp_path / "a.npy")
    torch.save({"ip.weight": Trap(folder)}, tmp_path / "weights.pt")
    with pytest.raises(RunError, match="damaged, or no safetensors file"):
        load_weights(tmp_path / "weights.pt", {"ip": nn.Linear(1, 1)}, flag="--ip-weights")
    assert not folder.exists()


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}" + bytes(1000),
        struct.pack("<Q", 64) + b'{"weight":{"dtype":"F32","shape":[1,99999999999],"data_offsets":'.ljust(64)[:64],
        struct.pack("<Q", 72)
        + b'{"weight":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4]}}'[:72].ljust(72)
        + bytes(4),
        b"",
    ],
)
def test_weights_whose_header_lies(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    network = nn.Linear(1, 1)
    before = network.weight.clone()
    with pytest.raises(RunError, match=rf"--ip-weights {path} is damaged, or no safetensors file"):
        load_weights(path, {"ip": network}, flag="--ip-weights")
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize("data", ["../secret.raw", "/etc/hostname", "LIST", "slice%d.raw 1 3 1", ".."])
def test_a_header_that_leads_out_of_its_folder(tmp_path, data):
    (tmp_path / "secret.raw").write_bytes(b"secret" * 100)
    (tmp_path / "in").mkdir()
    path = meta(tmp_path / "in" / "a.mhd", "10 10", data)
    for read in (files_of, lambda path: MedicalImage(path).read(1), scan):
        with pytest.raises(DataError, match="has its pixels in"):
            read(path)


class TestHDF5:
    h5py = pytest.importorskip("h5py")

    def test_parts_that_were_never_written(self, tmp_path):
        path = tmp_path / "a.h5"
        with self.h5py.File(path, "w") as file:
            file.create_dataset("reconstruction_rss", (30_000, 30_000, 30_000), "f4", chunks=(1, 1000, 1000))
        assert path.stat().st_size < 10_000
        with pytest.raises(DataError, match=LARGE):
            facts(path)

    @pytest.mark.parametrize("name", ["reconstruction_rss", "kspace", "ismrmrd_header"])
    def test_links_to_other_files(self, tmp_path, name):
        with self.h5py.File(tmp_path / "secret.h5", "w") as file:
            file["secret"] = np.ones((2, 4, 4), np.float32)
        path = tmp_path / "a.h5"
        with self.h5py.File(path, "w") as file:
            if name == "ismrmrd_header":
                file["kspace"] = np.ones((2, 4, 4), np.complex64)
            file[name] = self.h5py.ExternalLink("secret.h5", "/secret")
        with pytest.raises(DataError, match=f"{name} lies in another file, which is not read"):
            facts(path)

    def test_arrays_in_other_files(self, tmp_path):
        (tmp_path / "secret.raw").write_bytes(bytes(range(128)))
        with self.h5py.File(tmp_path / "raw.h5", "w") as file:
            file.create_dataset("kspace", (2, 4, 4), "f4", external=[(str(tmp_path / "secret.raw"), 0, 128)])
        with self.h5py.File(tmp_path / "secret.h5", "w") as file:
            file["secret"] = np.ones((2, 4, 4), np.float32)
        with self.h5py.File(tmp_path / "virtual.h5", "w") as file:
            layout = self.h5py.VirtualLayout((2, 4, 4), "f4")
            layout[:] = self.h5py.VirtualSource(tmp_path / "secret.h5", "secret", (2, 4, 4))
            file.create_virtual_dataset("reconstruction_rss", layout)
        for name in ("raw.h5", "virtual.h5"):
            with pytest.raises(DataError, match="lies in another file, which is not read"):
                facts(tmp_path / name)

    def test_a_group_in_the_place_of_an_array(self, tmp_path):
        with self.h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_group("reconstruction_rss")
        with pytest.raises(DataError, match="reconstruction_rss is no array, no stack of slices"):
            facts(tmp_path / "a.h5")

    def test_a_header_that_expands_without_end(self, tmp_path):
        """A billion laughs: each entity is ten of the one before."""
        laughs = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
        xml = f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha ha ha ha ha">{laughs}]><x>&l9;</x>'
        path = tmp_path / "a.h5"
        with self.h5py.File(path, "w") as file:
            file["kspace"] = np.ones((2, 4, 4), np.complex64)
            file["ismrmrd_header"] = xml
        with pytest.raises(DataError, match="cannot be read"):
            facts(path)
        assert patient_of(path) is None


def test_a_matlab_file_whose_header_lies(tmp_path):
    from scipy.io import savemat

    path = tmp_path / "a.mat"
    savemat(path, {"inst_map": np.zeros((64, 64)), "id": np.ones((1, 1)), "class": np.ones((1, 1))})
    content = path.read_bytes()
    sides = struct.pack("<ii", 64, 64)
    assert content.count(sides) == 1
    path.write_bytes(content.replace(sides, struct.pack("<ii", 2**30, 2**30)))
    with pytest.raises(DataError, match=LARGE):
        LizardLabels(path).read()
