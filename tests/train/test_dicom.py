"""DICOM: pydicom's own test files, one by one, with pydicom as the oracle; and files that are made here."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_rescale, pixel_array
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
)

from train.data.base import DataError
from train.data.limits import VARIABLE
from train.scans import Derivation, Scan, open_scan

SAID = Derivation("Enhanced for a test; not for diagnosis.", "run 1")
RNG = np.random.default_rng(0)
REFUSED = {
    "JPEG-lossy.dcm": "cannot be decoded",  # 12 bits in a process that pylibjpeg does not know
    "MR_truncated.dcm": "8,130 bytes for pixels, too few for the 8,192",
    "badVR.dcm": "a radiotherapy dose",
    "rtdose.dcm": "a radiotherapy dose",
    "liver.dcm": "a segmentation",
    "liver_1frame.dcm": "a segmentation",
    "no_meta.dcm": "is none of PNG",  # its first bytes are missing
}
# name: frames, channels, black, white. The rest of the 68 files.
READ = {
    "693_J2KI.dcm": (1, 1, -10, 89),
    "693_J2KR.dcm": (1, 1, -10, 89),
    "693_UNCR.dcm": (1, 1, -10, 89),
    "CT_small.dcm": (1, 1, -1024, 3071),
    "ExplVR_BigEnd.dcm": (1, 3, 0, 255),
    "GDCMJ2K_TextGBR.dcm": (1, 3, 0, 255),
    "J2K_pixelrep_mismatch.dcm": (1, 1, -10, 89),
    "JPEG2000.dcm": (1, 1, -2048, 2047),
    "JPEG2000_UNC.dcm": (1, 1, -2048, 2047),
    "JPEGLSNearLossless_08.dcm": (1, 1, 0, 255),
    "JPEGLSNearLossless_16.dcm": (1, 1, 0, 65535),
    "JPGExtended.dcm": (1, 1, 0, 4095),
    "JPGLosslessP14SV1_1s_1f_8b.dcm": (1, 1, 0, 253),
    "MR-SIEMENS-DICOM-WithOverlays.dcm": (1, 1, 55, 844),
    "MR_small.dcm": (1, 1, -200, 1399),
    "MR_small_RLE.dcm": (1, 1, -200, 1399),
    "MR_small_bigendian.dcm": (1, 1, -200, 1399),
    "MR_small_implicit.dcm": (1, 1, -200, 1399),
    "MR_small_jp2klossless.dcm": (1, 1, -200, 1399),
    "MR_small_jpeg_ls_lossless.dcm": (1, 1, -200, 1399),
    "MR_small_padded.dcm": (1, 1, -200, 1399),
    "OBXXXX1A.dcm": (1, 3, 0, 255),
    "OBXXXX1A_rle_2frame.dcm": (2, 3, 0, 255),
    "OT-PAL-8-face.dcm": (1, 3, 0, 255),
    "SC_jpeg_no_color_transform.dcm": (1, 3, 0, 255),
    "SC_rgb.dcm": (1, 3, 0, 255),
    "SC_rgb_16bit.dcm": (1, 3, 0, 65535),
    "SC_rgb_16bit_2frame.dcm": (2, 3, 0, 65535),
    "SC_rgb_32bit.dcm": (1, 3, 0, 2**32 - 1),
    "SC_rgb_dcmtk_+eb+cr.dcm": (1, 3, 0, 255),
    "SC_rgb_dcmtk_+eb+cy+s2.dcm": (1, 3, 0, 255),
    "SC_rgb_expb.dcm": (1, 3, 0, 255),
    "SC_rgb_jls_lossy_line.dcm": (1, 3, 0, 255),
    "SC_rgb_jls_lossy_sample.dcm": (1, 3, 0, 255),
    "SC_rgb_jpeg_dcmtk.dcm": (1, 3, 0, 255),
    "SC_rgb_jpeg_gdcm.dcm": (1, 3, 0, 255),
    "SC_rgb_rle.dcm": (1, 3, 0, 255),
    "SC_rgb_rle_16bit.dcm": (1, 3, 0, 65535),
    "SC_rgb_small_odd.dcm": (1, 3, 0, 255),
    "SC_ybr_full_422_uncompressed.dcm": (1, 3, 0, 255),
    "SC_ybr_full_uncompressed.dcm": (1, 3, 0, 255),
    "bad_sequence.dcm": (1, 1, -135, 214),
    "color-pl.dcm": (1, 3, 0, 255),
    "color-px.dcm": (1, 3, 0, 255),
    "eCT_Supplemental.dcm": (2, 1, -2, 99),
    "emri_small.dcm": (10, 1, 0, 4095),
    "emri_small_RLE.dcm": (10, 1, 0, 4095),
    "emri_small_big_endian.dcm": (10, 1, 0, 4095),
    "emri_small_jpeg_2k_lossless.dcm": (10, 1, 0, 4095),
    "emri_small_jpeg_2k_lossless_too_short.dcm": (10, 1, 0, 4095),  # without the item that ends its pixels
    "emri_small_jpeg_ls_lossless.dcm": (10, 1, 0, 4095),
    "examples_jpeg2k.dcm": (1, 3, 0, 255),
    "examples_overlay.dcm": (1, 1, 55, 844),
    "examples_palette.dcm": (1, 3, 0, 255),
    "examples_rgb_color.dcm": (1, 3, 0, 255),
    "examples_ybr_color.dcm": (30, 3, 0, 255),
    "explicit_VR-UN.dcm": (1, 1, -2048, 2047),
    "gdcm-US-ALOKA-16.dcm": (1, 3, 0, 255),
    "image_dfl.dcm": (1, 1, 0, 255),
    "mlut_18.dcm": (1, 1, -2048, 2047),
    "vlut_04.dcm": (1, 1, 0, 255),
}
# Compressed with loss, of which their headers say nothing.
LOSSY = {
    "JPEGLSNearLossless_08.dcm", "JPEGLSNearLossless_16.dcm", "SC_rgb_jls_lossy_line.dcm",
    "SC_rgb_jls_lossy_sample.dcm",
}  # fmt: skip


@pytest.fixture
def pydicom_files(shared_data: Callable[..., Path]) -> Path:
    return shared_data("DICOM_PYDICOM")


def written(scan: Scan, target: Path, derivation: Derivation = SAID) -> Dataset:
    """The scan with its own pixels, each repeated as often as the scale says."""
    scale, before = derivation.scale, scan.path.read_bytes()
    frames = (scan.read(i).repeat(scale, 0).repeat(scale, 1) for i in range(scan.frames))
    scan.write(target, frames, derivation)
    assert scan.path.read_bytes() == before
    return pydicom.dcmread(target)


def told(path: Path) -> np.ndarray:
    """The pixels by pydicom: stored numbers, or the colors of a palette in 8 bits; ``[frames, H, W, channels]``."""
    source = pydicom.dcmread(path, force=True)
    if "TransferSyntaxUID" not in source.file_meta:
        source.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    pixels = source.pixel_array if "PixelData" in source else pixel_array(path)
    colors = source.get("PhotometricInterpretation") == "PALETTE COLOR"
    if colors:
        pixels = apply_color_lut(pixels, source)
        pixels = (pixels / 2 ** (8 * pixels.itemsize - 8)).astype(np.uint8)
    channels = 3 if colors or source.get("SamplesPerPixel") == 3 else 1
    height, width = pixels.shape[-2 - (channels == 3) :][:2]
    return pixels.reshape(-1, height, width, channels)


class TestPydicomsFiles:
    def test_every_file_is_in_the_table(self, pydicom_files: Path) -> None:
        assert {path.name for path in pydicom_files.glob("*.dcm")} == {*READ, *REFUSED}
        assert len(READ) + len(REFUSED) == 68

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, pydicom_files: Path, name: str) -> None:
        with pytest.raises(DataError) as raised:
            open_scan(pydicom_files / name).read(0)
        assert name in str(raised.value)
        assert REFUSED[name] in str(raised.value)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize("name", READ)
    def test_written_with_the_same_pixels(self, pydicom_files: Path, tmp_path: Path, name: str) -> None:
        scan = open_scan(pydicom_files / name)
        frames, channels, black, white = READ[name]
        assert (scan.format, scan.frames, scan.channels, scan.value_range) == (
            "DICOM",
            frames,
            channels,
            (black, white),
        )
        expected = told(scan.path)
        new = written(scan, tmp_path / name)
        # Numbers of 32 bits are as exact as float32 is.
        tolerance = 2.0**-23 * expected.max() if expected.dtype.itemsize > 2 else 0
        found = new.pixel_array.reshape(expected.shape)
        assert found.dtype == expected.dtype.newbyteorder("=")
        assert np.abs(found.astype(np.float64) - expected).max() <= tolerance
        again = open_scan(tmp_path / name)
        assert again.value_range == scan.value_range
        assert all((again.read(i) == scan.read(i)).all() for i in range(scan.frames))
        source = pydicom.dcmread(scan.path, force=True, stop_before_pixels=True)
        assert new.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        assert new.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert new.DerivationDescription.startswith(SAID.description)
        assert new.SOPInstanceUID not in ("", source.get("SOPInstanceUID"))
        assert new.SeriesInstanceUID not in ("", source.get("SeriesInstanceUID"))
        if scan._palette is False:  # type: ignore[attr-defined]
            for keyword in ("BitsAllocated", "BitsStored", "RescaleSlope", "RescaleIntercept", "WindowCenter"):
                assert new.get(keyword) == source.get(keyword), keyword
        for keyword in ("PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "Modality", "PixelSpacing"):
            assert new.get(keyword) == source.get(keyword), keyword
        lossy = source.get("LossyImageCompression") == "01" or name in LOSSY
        assert new.get("LossyImageCompression") == ("01" if lossy else source.get("LossyImageCompression"))

    @pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "eCT_Supplemental.dcm"])
    def test_values_are_those_after_the_rescale(self, pydicom_files: Path, name: str) -> None:
        scan = open_scan(pydicom_files / name)
        source = pydicom.dcmread(scan.path)
        where = source
        if "SharedFunctionalGroupsSequence" in source:
            where = source.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
        assert (scan.read(0)[..., 0] == apply_rescale(told(scan.path)[0, ..., 0], where)).all()

    @pytest.mark.parametrize(
        "name", ["CT_small.dcm", "MR_small_RLE.dcm", "color-pl.dcm", "693_UNCR.dcm", "emri_small.dcm"]
    )
    def test_another_library_sees_the_same(self, pydicom_files: Path, tmp_path: Path, name: str) -> None:
        """GDCM, by SimpleITK: values after the rescale, and where in the patient they are."""
        scan = open_scan(pydicom_files / name)
        written(scan, tmp_path / name)
        old, new = (SimpleITK.ReadImage(str(path)) for path in (scan.path, tmp_path / name))
        assert (SimpleITK.GetArrayFromImage(old) == SimpleITK.GetArrayFromImage(new)).all()
        assert (new.GetSpacing(), new.GetDirection()) == (old.GetSpacing(), old.GetDirection())
        assert new.GetOrigin() == old.GetOrigin()
        if "PixelSpacing" not in pydicom.dcmread(scan.path):
            return
        written(scan, tmp_path / f"fine-{name}", Derivation("", "", scale=2))
        fine = SimpleITK.ReadImage(str(tmp_path / f"fine-{name}"))
        corner = [-0.5, -0.5, *[0] * (old.GetDimension() - 2)]
        expected = old.TransformContinuousIndexToPhysicalPoint(corner)
        assert fine.TransformContinuousIndexToPhysicalPoint(corner) == pytest.approx(expected, abs=1e-4)
        assert fine.GetSpacing()[:2] == pytest.approx([each / 2 for each in old.GetSpacing()[:2]])

    @pytest.mark.parametrize("name", ["CT_small.dcm", "examples_overlay.dcm", "color-pl.dcm", "emri_small.dcm"])
    def test_nothing_that_identifies_a_person_is_left(self, pydicom_files: Path, tmp_path: Path, name: str) -> None:
        scan = open_scan(pydicom_files / name)
        source = pydicom.dcmread(scan.path, stop_before_pixels=True)
        new = written(scan, tmp_path / name, Derivation("d", "run 1", anonymize=True))
        content = (tmp_path / name).read_bytes()
        words = {str(source.get(word) or "") for word in (
            "PatientName", "PatientID", "InstitutionName", "AccessionNumber", "StudyInstanceUID", "SOPInstanceUID",
            "SeriesInstanceUID", "FrameOfReferenceUID", "StudyDescription", "StationName", "StudyDate", "StudyTime",
            "PatientAddress", "DeviceSerialNumber", "OperatorsName", "PatientAge",
        )} - {"", "0", "ANONYMIZED"}  # fmt: skip
        assert words
        assert [word for word in words if word.encode() in content[132:]] == []
        assert (new.PatientIdentityRemoved, new.LongitudinalTemporalInformationModified) == ("YES", "REMOVED")
        assert new.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
        assert not any(element.tag.is_private for element in new.iterall())
        assert (new.pixel_array == pydicom.dcmread(scan.path).pixel_array).all()
        assert new.get("PixelSpacing") == source.get("PixelSpacing")


def made(path: Path, pixels: np.ndarray, **elements: Any) -> Path:
    """A CT slice of stored numbers, in explicit VR, little endian."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        CTImageStorage,
        f"1.2.3.{path.stem.encode().hex()[:8]}1".replace("a", "1"),
    )
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    dataset.PatientID, dataset.PatientName, dataset.Modality = "P1", "Person^A.", "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    if "BitsStored" in elements and "HighBit" not in elements:
        dataset.HighBit = dataset.BitsStored - 1
    dataset["PixelData"].VR = "OB" if dataset.BitsAllocated == 8 else "OW"
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.fixture
def slice_of_ct() -> np.ndarray:
    pixels = RNG.integers(0, 3000, (6, 8)).astype(np.int16)
    pixels[0, :2] = -2000, 2999
    return pixels


class TestValues:
    def test_hounsfield_units_stay_what_they_are(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        path = made(tmp_path / "x.dcm", slice_of_ct, RescaleSlope="2", RescaleIntercept="-1024", RescaleType="HU")
        scan = open_scan(path)
        assert (scan.read(0)[..., 0] == slice_of_ct * 2.0 - 1024).all()
        values = np.full((6, 8, 1), 40.9, np.float32)  # (40.9 + 1024) / 2 = 532.45
        values[0, 0], values[0, 1] = -1e6, 1e6
        scan.write(tmp_path / "y.dcm", [values], SAID)
        found = pydicom.dcmread(tmp_path / "y.dcm").pixel_array
        assert (found[0, 0], found[0, 1], found[1, 1]) == (-32768, 32767, 532)
        assert open_scan(tmp_path / "y.dcm").read(0)[1, 1] == 40

    def test_no_more_bits_than_are_stored(self, tmp_path: Path) -> None:
        path = made(tmp_path / "x.dcm", np.full((4, 4), 4000, np.uint16), BitsStored=12)
        scan = open_scan(path)
        assert scan.value_range == (0, 4095)
        scan.write(tmp_path / "y.dcm", [np.full((4, 4, 1), 5000, np.float32)], SAID)
        assert (pydicom.dcmread(tmp_path / "y.dcm").pixel_array == 4095).all()

    @pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    def test_padding_stays(self, tmp_path: Path, slice_of_ct: np.ndarray, syntax: str) -> None:
        path = made(tmp_path / "x.dcm", slice_of_ct, syntax=syntax, PixelPaddingValue=-2000)
        scan = open_scan(path)
        assert scan.value_range == (0, 4095)
        scan.write(tmp_path / "y.dcm", [np.full((12, 16, 1), 7, np.float32)], Derivation("", "", scale=2))
        found = pydicom.dcmread(tmp_path / "y.dcm").pixel_array
        assert (found[:2, :2] == -2000).all()
        assert (found == -2000).sum() == 4

    @pytest.mark.parametrize(
        "function, low, high",
        # PS3.3 C.11.2.1.2.1: of width 4 around 10, what is up to 8 is black, and what is beyond 11 white.
        [(None, 8, 11), ("LINEAR", 8, 11), ("LINEAR_EXACT", 8, 12)],
    )
    def test_the_window(self, tmp_path: Path, function: str | None, low: float, high: float) -> None:
        more = {} if function is None else {"VOILUTFunction": function}
        path = made(
            tmp_path / "x.dcm", np.zeros((4, 4), np.int16), WindowCenter=["10", "99"], WindowWidth=["4", "1"], **more
        )
        assert open_scan(path).value_range == (low, high)

    def test_small_numbers_that_are_bright(self, tmp_path: Path) -> None:
        stored = RNG.integers(0, 4096, (5, 4)).astype(np.uint16)
        more: dict[str, Any] = {"BitsStored": 12, "PhotometricInterpretation": "MONOCHROME1"}
        scan = open_scan(made(tmp_path / "x.dcm", stored, WindowCenter="1000.5", WindowWidth="801", **more))
        assert (scan.read(0)[..., 0] == 4095 - stored).all()
        assert scan.value_range == (4095 - 1400, 4095 - 600)
        new = written(scan, tmp_path / "y.dcm")
        assert new.PhotometricInterpretation == "MONOCHROME1"
        assert (new.pixel_array == stored).all()

    def test_frames_with_a_rescale_of_their_own(self, tmp_path: Path) -> None:
        stored = RNG.integers(0, 1000, (3, 5, 4)).astype(np.uint16)
        groups = []
        for frame in range(3):
            transformation, item = Dataset(), Dataset()
            transformation.RescaleSlope, transformation.RescaleIntercept = str(frame + 1), str(-10 * frame)
            item.PixelValueTransformationSequence = [transformation]
            groups.append(item)
        more = {"SOPClassUID": EnhancedCTImageStorage, "NumberOfFrames": 3, "PerFrameFunctionalGroupsSequence": groups}
        scan = open_scan(made(tmp_path / "x.dcm", stored, **more))
        assert all((scan.read(i)[..., 0] == stored[i] * (i + 1.0) - 10 * i).all() for i in range(3))
        assert (written(scan, tmp_path / "y.dcm").pixel_array == stored).all()

    def test_an_overlay_in_the_bits_of_the_pixels(self, tmp_path: Path) -> None:
        stored = RNG.integers(0, 4096, (5, 8)).astype(np.uint16)
        plane = RNG.integers(0, 2, (5, 8)).astype(bool)
        path = made(tmp_path / "x.dcm", stored | (plane.astype(np.uint16) << 13), BitsStored=12)
        source = pydicom.dcmread(path)
        for element, kind, value in ((0x10, "US", 5), (0x11, "US", 8), (0x40, "CS", "G"), (0x50, "SS", [1, 1]),
                                     (0x100, "US", 16), (0x102, "US", 13)):  # fmt: skip
            source.add_new((0x6000, element), kind, value)
        source.save_as(path)
        scan = open_scan(path)
        assert (scan.read(0)[..., 0] == stored).all()
        new = written(scan, tmp_path / "y.dcm")
        assert (new.pixel_array == stored).all()
        assert (new.overlay_array(0x6000) == plane).all()
        larger = written(scan, tmp_path / "z.dcm", Derivation("", "", scale=2))
        assert (larger.overlay_array(0x6000) == plane.repeat(2, 0).repeat(2, 1)).all()

    def test_words_of_another_order(self, tmp_path: Path) -> None:
        """Overlays and tables are bytes to pydicom, which turns numbers alone."""
        stored = RNG.integers(0, 4096, (5, 8)).astype(np.uint16)
        plane = RNG.integers(0, 2, (4, 8)).astype(bool)
        source = pydicom.dcmread(made(tmp_path / "x.dcm", stored))
        packed = np.packbits(plane.ravel(), bitorder="little")
        for element, kind, value in ((0x10, "US", 4), (0x11, "US", 8), (0x40, "CS", "G"), (0x50, "SS", [1, 1]),
                                     (0x100, "US", 1), (0x102, "US", 0),
                                     (0x3000, "OW", packed.view("<u2").byteswap().tobytes())):  # fmt: skip
            source.add_new((0x6000, element), kind, value)
        source.PixelData = stored.astype(">u2").tobytes()
        list(source.iterall())  # what was not looked at would be written as it lies in the file
        source.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        source.set_original_encoding(False, False)
        source.save_as(tmp_path / "x.dcm")
        new = written(open_scan(tmp_path / "x.dcm"), tmp_path / "y.dcm")
        assert (new.pixel_array == stored).all()
        assert (new.overlay_array(0x6000) == plane).all()

    def test_bits_above_the_lowest(self, tmp_path: Path) -> None:
        """The files of old devices have 12 bits at the upper end of 16."""
        stored = RNG.integers(0, 4096, (5, 4)).astype(np.uint16)
        scan = open_scan(made(tmp_path / "x.dcm", (stored << 4) | 5, BitsStored=12, HighBit=15))
        assert (scan.read(0)[..., 0] == stored).all()
        new = written(scan, tmp_path / "y.dcm")
        assert new.HighBit == 11
        assert (new.pixel_array == stored).all()


class TestHeader:
    def test_identifiers(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        one, other = (open_scan(made(tmp_path / name, slice_of_ct)) for name in ("x.dcm", "y.dcm"))
        first, again = written(one, tmp_path / "a.dcm"), written(one, tmp_path / "b.dcm")
        assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
        second = written(other, tmp_path / "c.dcm")
        assert first.SeriesInstanceUID == second.SeriesInstanceUID == again.SeriesInstanceUID
        assert first.SOPInstanceUID != second.SOPInstanceUID
        elsewhere = written(one, tmp_path / "d.dcm", Derivation("", "run 2"))
        assert elsewhere.SeriesInstanceUID != first.SeriesInstanceUID
        assert elsewhere.SOPInstanceUID != first.SOPInstanceUID
        assert first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID
        (source,) = first.SourceImageSequence
        assert source.ReferencedSOPInstanceUID == pydicom.dcmread(one.path).SOPInstanceUID
        assert source.PurposeOfReferenceCodeSequence[0].CodeValue == "121322"
        assert first.ImageType == ["DERIVED", "SECONDARY", "AXIAL"]
        assert (first.StudyInstanceUID, first.SeriesDescription) == ("1.2.3", "(enhanced)")
        assert one.patient == "P1"

    def test_what_would_be_wrong_is_left_out(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        stale = {"SmallestImagePixelValue": 3, "LargestImagePixelValue": 9, "IconImageSequence": [Dataset()]}
        more = {"DerivationDescription": "Filtered.", "LossyImageCompression": "01", "LossyImageCompressionRatio": "9"}
        new = written(open_scan(made(tmp_path / "x.dcm", slice_of_ct, **stale, **more)), tmp_path / "y.dcm")
        assert not any(keyword in new for keyword in stale)
        assert (new.LossyImageCompression, new.LossyImageCompressionRatio) == ("01", 9)
        assert new.DerivationDescription == f"{SAID.description} Before that: Filtered."

    def test_words_in_other_letters(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        path = made(tmp_path / "Übergröße +1", slice_of_ct)
        new = written(open_scan(path), tmp_path / "y.dcm", Derivation("σ = 0.1 " + "x" * 2000, ""))
        assert new.DerivationDescription == "? = 0.1 " + "x" * 1016

    def test_geometry(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        """Every corner of the image stays where it is in the patient (PS3.3, equation C.7.6.2.1-1)."""
        turned = [0.8, 0.6, 0, -0.6, 0.8, 0]
        place = {"ImageOrientationPatient": turned, "ImagePositionPatient": [-10, 20, 30], "PixelSpacing": [0.5, 0.7]}
        scan = open_scan(made(tmp_path / "x.dcm", slice_of_ct, **place, ImagerPixelSpacing=["3", "6"]))
        old, new = pydicom.dcmread(scan.path), written(scan, tmp_path / "y.dcm", Derivation("", "", scale=3))
        assert (new.Rows, new.Columns) == (18, 24)
        assert new.PixelSpacing == pytest.approx([0.5 / 3, 0.7 / 3])
        assert new.ImagerPixelSpacing == [1, 2]
        assert new.DerivationCodeSequence[0].CodeMeaning == "Spatial resampling"

        def corner(source: Dataset, row: float, column: float) -> np.ndarray:
            x, y = np.array(source.ImageOrientationPatient, float).reshape(2, 3)
            between_rows, between_columns = map(float, source.PixelSpacing)
            return np.array(source.ImagePositionPatient, float) + x * between_columns * column + y * between_rows * row

        for row, column in ((0, 0), (0, 8), (6, 0), (6, 8)):
            old_corner = corner(old, row - 0.5, column - 0.5)
            np.testing.assert_allclose(corner(new, 3 * row - 0.5, 3 * column - 0.5), old_corner, atol=1e-9)

    def test_geometry_of_frames(self, tmp_path: Path) -> None:
        measures, orientation, shared = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, orientation.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
        groups = []
        for frame in range(2):
            position, kind, item = Dataset(), Dataset(), Dataset()
            position.ImagePositionPatient, kind.FrameType = [0, 0, frame], ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
            item.PlanePositionSequence, item.CTImageFrameTypeSequence = [position], [kind]
            groups.append(item)
        more = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": groups}
        path = made(tmp_path / "x.dcm", np.zeros((2, 4, 4), np.uint16), NumberOfFrames=2, **more)
        new = written(open_scan(path), tmp_path / "y.dcm", Derivation("", "", scale=2))
        assert new.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing == [0.5, 0.5]
        for frame, item in enumerate(new.PerFrameFunctionalGroupsSequence):
            assert item.PlanePositionSequence[0].ImagePositionPatient == [-0.25, -0.25, frame]
            assert item.CTImageFrameTypeSequence[0].FrameType == ["DERIVED", "SECONDARY", "VOLUME", "NONE"]

    def test_regions_of_an_ultrasound_image(self, tmp_path: Path) -> None:
        region = Dataset()
        region.RegionLocationMinX0, region.RegionLocationMinY0 = 1, 0
        region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 3, 2
        region.PhysicalDeltaX = region.PhysicalDeltaY = 0.5
        path = made(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), SequenceOfUltrasoundRegions=[region])
        (new,) = written(open_scan(path), tmp_path / "y.dcm", Derivation("", "", scale=2)).SequenceOfUltrasoundRegions
        corners = (new.RegionLocationMinX0, new.RegionLocationMinY0, new.RegionLocationMaxX1, new.RegionLocationMaxY1)
        assert corners == (2, 0, 7, 5)
        assert new.PhysicalDeltaX == 0.25

    def test_anonymized_alike(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        """One study stays one, whatever is nested in the header; the source's identifiers are replaced everywhere."""
        nested = Dataset()
        nested.ReferencedSOPInstanceUID, nested.PatientName = "1.2.3.99", "Person^A."
        nested.add_new((0x0009, 0x0010), "LO", "PRIVATE")
        content, shared = Dataset(), Dataset()
        content.FrameAcquisitionDateTime = "20250203040506"
        shared.FrameContentSequence = [content]
        more = {"ReferencedImageSequence": [nested], "SharedFunctionalGroupsSequence": [shared]}
        scans = [open_scan(made(tmp_path / f"{name}.dcm", slice_of_ct, **more)) for name in "xy"]
        derivation = Derivation("d", "run 1", anonymize=True)
        one, other = (written(scan, tmp_path / f"new-{scan.path.name}", derivation) for scan in scans)
        assert one.StudyInstanceUID == other.StudyInstanceUID != "1.2.3"
        assert one.SeriesInstanceUID == other.SeriesInstanceUID
        assert one.SOPInstanceUID != other.SOPInstanceUID
        assert b"Person" not in (tmp_path / "new-x.dcm").read_bytes()
        assert b"20250203" not in (tmp_path / "new-x.dcm").read_bytes()
        assert b"1.2.3.99" not in (tmp_path / "new-x.dcm").read_bytes()
        assert b"PRIVATE" not in (tmp_path / "new-x.dcm").read_bytes()
        assert (one.pixel_array == slice_of_ct).all()

    @pytest.mark.parametrize("burned, modality, warned", [("YES", "CT", True), (None, "US", True), ("NO", "US", False)])
    def test_words_in_the_pixels(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, burned: str | None, modality: str, warned: bool
    ) -> None:
        more = {} if burned is None else {"BurnedInAnnotation": burned}
        path = made(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), Modality=modality, **more)
        with caplog.at_level(logging.WARNING):
            written(open_scan(path), tmp_path / "y.dcm", Derivation("", "", anonymize=True))
        assert ("x.dcm may show names in its pixels" in caplog.text) == warned


class TestBadFiles:
    def test_lying_sizes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pixels = np.zeros((4, 4), np.uint16)
        for elements, reason in (
            ({"Rows": 65535, "Columns": 65535}, "4,294,836,225 pixels large by its header, more than"),
            ({"Rows": 5}, "32 bytes for pixels, too few for the 40"),
            ({"NumberOfFrames": 2**31 - 1}, "32 bytes for pixels, too few"),
            ({"Rows": 0}, "holds no image"),
            ({"BitsStored": 17}, "17 bits in 16"),
            ({"RescaleSlope": "0", "RescaleIntercept": "0"}, "the rescale slope 0"),
            ({"PhotometricInterpretation": "CMYK"}, "CMYK"),
            ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.77.1.6"}, "a slide in tiles"),
        ):
            path = made(tmp_path / "x.dcm", pixels, **elements)  # type: ignore[arg-type]
            with pytest.raises(DataError, match=rf"x\.dcm.*{reason}"):
                open_scan(path)
        monkeypatch.setenv(VARIABLE, str(10**10))
        with pytest.raises(DataError, match=r"x\.dcm has 32 bytes for pixels, too few"):
            open_scan(made(tmp_path / "x.dcm", pixels, Rows=65535, Columns=65535))

    def test_no_pixels(self, tmp_path: Path) -> None:
        path = made(tmp_path / "x.dcm", np.zeros((4, 4), np.uint16))
        source = pydicom.dcmread(path)
        del source.PixelData
        source.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
        source.save_as(path)
        with pytest.raises(DataError, match=r"x\.dcm has no pixels \(Basic Text SR Storage\); leave it out"):
            open_scan(path)

    def test_compressed_pixels_of_another_size(self, tmp_path: Path) -> None:
        """A decoder would take memory for 30,000 x 30,000 pixels."""
        jpeg = b"\xff\xd8\xff\xc0\x00\x0b\x08" + struct.pack(">HH", 30000, 30000) + b"\x01\x01\x11\x00\xff\xd9"
        jpeg2000 = b"\xff\x4f\xff\x51\x00\x29\x00\x00" + struct.pack(">IIII", 30000, 30000, 0, 0) + b"\0" * 40
        for syntax, code in ((JPEGBaseline8Bit, jpeg), (JPEG2000Lossless, jpeg2000)):
            path = made(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), syntax=syntax, PixelData=encapsulate([code]))
            with pytest.raises(DataError, match=r"4 x 4 pixels by its header, and 30000 x 30000"):
                open_scan(path).read(0)

    def test_fragments_that_end_behind_the_file(self, tmp_path: Path) -> None:
        path = made(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), syntax=JPEG2000Lossless,
                    PixelData=encapsulate([b"1" * 500, b"2" * 500]), NumberOfFrames=2)  # fmt: skip
        whole = path.read_bytes()
        assert open_scan(path).frames == 2
        path.write_bytes(whole[:-100])
        with pytest.raises(DataError, match=r"x\.dcm ends within its pixels"):
            open_scan(path)
        path = made(tmp_path / "x.dcm", np.zeros((4, 4), np.uint8), syntax=JPEG2000Lossless,
                    PixelData=encapsulate([b"1" * 500, b"2" * 500]), NumberOfFrames=3)  # fmt: skip
        with pytest.raises(DataError, match="2 fragments of 3 frames"):
            open_scan(path)

    def test_a_bomb(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A header that inflates to more than any image has."""
        path = made(tmp_path / "x.dcm", np.zeros((64, 64), np.uint16), syntax=DeflatedExplicitVRLittleEndian)
        assert open_scan(path).size(0) == (64, 64)
        content = path.read_bytes()
        begin = 144 + struct.unpack("<I", content[140:144])[0]
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        inside = zlib.decompress(content[begin:], -15)
        path.write_bytes(content[:begin] + deflate.compress(inside + b"\0" * 1_000_000) + deflate.flush())
        monkeypatch.setenv(VARIABLE, "100000")
        with pytest.raises(DataError, match=r"x\.dcm becomes larger than 800,000 bytes"):
            open_scan(path)
        path.write_bytes(content)
        assert open_scan(path).size(0) == (64, 64)

    def test_a_failure_leaves_what_there_was(self, tmp_path: Path, slice_of_ct: np.ndarray) -> None:
        scan = open_scan(made(tmp_path / "x.dcm", slice_of_ct))
        (tmp_path / "y.dcm").write_bytes(b"earlier")
        with pytest.raises(ValueError, match=r"x\.dcm has 1 frames"):
            scan.write(tmp_path / "y.dcm", [], SAID)
        assert (tmp_path / "y.dcm").read_bytes() == b"earlier"
        assert sorted(each.name for each in tmp_path.iterdir()) == ["x.dcm", "y.dcm"]
