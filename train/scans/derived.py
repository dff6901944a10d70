"""The header of a DICOM file whose pixels come from another one's: DICOM PS3.3 C.7.6.1, General Image.

Everything stays but what would be wrong of the new pixels. The image is DERIVED and SECONDARY, has an identifier of its
own and lies in a series of its own, the same for all files of a series that one run enhances: identifiers are hashes of
the source's and of the derivation, so that what is written twice is the same. The study and the frame of reference, in
which positions are meant, are the source's.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from train.data.cache import file_sha256
from train.scans.base import Derivation
from train.scans.deidentify import coded, deidentify, replacement

if TYPE_CHECKING:
    from train.scans.dicom import Dicom

# Extremes and checks of the old pixels, a picture of them, their compression, and when the file was made. Elements of
# groups behind the pixels (digital signatures, padding) are dropped with them.
_STALE = (
    "SmallestImagePixelValue", "LargestImagePixelValue", "SmallestPixelValueInSeries", "LargestPixelValueInSeries",
    "SmallestImagePixelValueInPlane", "LargestImagePixelValueInPlane", "IconImageSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", "InstanceCreationDate", "InstanceCreationTime", "PixelDataProviderURL",
    "MACParametersSequence", "EncryptedAttributesSequence",
)  # fmt: skip
_PALETTE = (
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "AlphaPaletteColorLookupTableDescriptor", "PaletteColorLookupTableUID",
    "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "AlphaPaletteColorLookupTableData", "SegmentedRedPaletteColorLookupTableData",
    "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData",
    "SegmentedAlphaPaletteColorLookupTableData", "PixelPaddingValue", "PixelPaddingRangeLimit",
)  # fmt: skip
# Transfer syntaxes that lose something, and those that may (near-lossless JPEG-LS, JPEG 2000): the header knows.
_LOSSY = {f"1.2.840.10008.1.2.4.{end}" for end in (50, 51, 53, 55)}
_PERHAPS = {f"1.2.840.10008.1.2.4.{end}" for end in (81, 91, 93, 203)}
_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
# Places in pixels: of ultrasound regions, which count from 0, and of shutters and collimators, which count from 1.
_FROM_ZERO = (
    "RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1", "ReferencePixelX0",
    "ReferencePixelY0",
)  # fmt: skip
_FROM_ONE = (
    "ShutterLeftVerticalEdge", "ShutterRightVerticalEdge", "ShutterUpperHorizontalEdge", "ShutterLowerHorizontalEdge",
    "CenterOfCircularShutter", "VerticesOfThePolygonalShutter", "CollimatorLeftVerticalEdge",
    "CollimatorRightVerticalEdge", "CollimatorUpperHorizontalEdge", "CollimatorLowerHorizontalEdge",
    "CenterOfCircularCollimator", "VerticesOfThePolygonalCollimator",
)  # fmt: skip
_LENGTHS = ("RadiusOfCircularShutter", "RadiusOfCircularCollimator")


def derived_header(scan: Dicom, header: Any, derivation: Derivation, overlays: dict[int, np.ndarray]) -> Any:
    """
    :param header: of the source, without pixels.
    :param overlays: which lay in bits of the source's pixels, by their group.
    :returns: another data set, ready for pixels in explicit VR, little endian.
    """
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.sr.codedict import codes
    from pydicom.uid import ExplicitVRLittleEndian

    syntax = header.file_meta.TransferSyntaxUID
    new = copy.deepcopy(header)
    source = str(new.get("SOPInstanceUID") or "") or _uid("source", file_sha256(scan.path))
    kind = str(new.get("SOPClassUID") or "1.2.840.10008.5.1.4.1.1.7")  # secondary capture, as of files before DICOM
    if not syntax.is_little_endian:
        new.walk(_swapped)
        _little(new)
    if not derivation.anonymize and (before := str(new.get("DerivationDescription") or "")):
        before = f" Before that: {before}"
    else:
        before = ""
    for name in _STALE:
        _drop(new, name)
    del new[0x7FE0_0000:]  # type: ignore[misc]
    _overlaid(new, overlays, derivation.scale)
    _described(scan, new)
    if derivation.scale > 1:
        _finer(new, derivation.scale)
    if derivation.anonymize:
        deidentify(scan.path, new)
        source = replacement(source)
    own = (derivation.identity, str(derivation.scale), str(derivation.anonymize))
    new.SOPClassUID = kind
    new.SOPInstanceUID = _uid("instance", *own, str(header.get("SOPInstanceUID") or source))
    new.SeriesInstanceUID = _uid("series", *own, str(header.get("SeriesInstanceUID") or source))
    name = str(new.get("SeriesDescription") or "")
    new.SeriesDescription = f"{name[:53]} (enhanced)".strip()
    rest = list(header.get("ImageType") or ())[2:] if not isinstance(header.get("ImageType"), str) else []
    new.ImageType = ["DERIVED", "SECONDARY", *rest]
    new.walk(_frame_type)
    # The character set of the file may have no other letters.
    new.DerivationDescription = f"{derivation.description}{before}".encode("ascii", "replace").decode()[:1024]
    if derivation.scale > 1:
        new.DerivationCodeSequence = [coded(codes.DCM.SpatialResampling)]
    reference = Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = kind, source
    reference.PurposeOfReferenceCodeSequence = [coded(codes.DCM.SourceImageForImageProcessingOperation)]
    new.SourceImageSequence = [reference]
    if str(syntax) in _LOSSY or (str(syntax) in _PERHAPS and not new.get("LossyImageCompression")):
        new.LossyImageCompression = "01"  # what was lost stays lost
    new.file_meta = FileMetaDataset()
    new.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    new.file_meta.MediaStorageSOPClassUID = kind
    new.file_meta.MediaStorageSOPInstanceUID = new.SOPInstanceUID
    new.preamble = None
    return new


def _described(scan: Dicom, new: Any) -> None:
    """The pixels that are going to be written."""
    if scan.channels == 3:
        new.PhotometricInterpretation, new.SamplesPerPixel, new.PlanarConfiguration = "RGB", 3, 0
    elif "PhotometricInterpretation" not in new:
        new.PhotometricInterpretation, new.SamplesPerPixel = "MONOCHROME2", 1
    if scan._palette:
        new.BitsAllocated = new.BitsStored = 8
        new.PixelRepresentation = 0
        for name in _PALETTE:
            _drop(new, name)
    new.HighBit = int(new.BitsStored) - 1
    new.PixelRepresentation = int(new.get("PixelRepresentation") or 0)


def _finer(new: Any, scale: int) -> None:
    """Everything that is counted in pixels, or is the size of one, where ``scale`` pixels lie along an old one.

    The first new pixel lies in the upper left corner of the first old one: its center is half an old pixel less half a
    new one away from that one's (PS3.3 C.7.6.2.1.1, ImagePositionPatient).
    """
    new.Rows, new.Columns = int(new.Rows) * scale, int(new.Columns) * scale
    shared = list(new.get("SharedFunctionalGroupsSequence") or ())
    every = [new, *shared, *(new.get("PerFrameFunctionalGroupsSequence") or ())]
    # Positions first: they are moved by the old spacings.
    for groups in every:
        spacing = _found("PixelMeasuresSequence", "PixelSpacing", groups, *shared, new)
        orientation = _found("PlaneOrientationSequence", "ImageOrientationPatient", groups, *shared, new)
        for place in (groups, *(groups.get("PlanePositionSequence") or ())):
            if place.get("ImagePositionPatient") and spacing and orientation:
                place.ImagePositionPatient = _moved(place.ImagePositionPatient, spacing, orientation, scale)
    for groups in every:
        for place in (groups, *(groups.get("PixelMeasuresSequence") or ())):
            for name in _SPACINGS:
                if place.get(name):
                    setattr(place, name, [_decimal(float(each) / scale) for each in place.get(name)])
    for place in (new, *(new.get("SequenceOfUltrasoundRegions") or ())):
        _change(place, _FROM_ZERO, lambda each: each * scale)
        _change(place, ("RegionLocationMaxX1", "RegionLocationMaxY1"), lambda each: each + scale - 1)
        _change(place, _LENGTHS, lambda each: each * scale)
        _change(place, _FROM_ONE, lambda each: (each - 1) * scale + 1)
        for name in ("PhysicalDeltaX", "PhysicalDeltaY"):
            if place.get(name) is not None:
                setattr(place, name, float(place.get(name)) / scale)


def _moved(position: Any, spacing: Any, orientation: Any, scale: int) -> list[str]:
    along_row, along_column = np.array(orientation, float).reshape(2, 3)
    between_rows, between_columns = (float(each) for each in spacing)
    step = (1 / scale - 1) / 2
    moved = np.array(position, float) + step * (between_columns * along_row + between_rows * along_column)
    return [_decimal(each) for each in moved]


def _found(sequence: str, name: str, *places: Any) -> Any:
    """What the first of several places says, in its functional group or itself."""
    for place in places:
        for item in (*(place.get(sequence) or ()), place):
            if item.get(name):
                return item.get(name)
    return None


def _change(place: Any, names: tuple[str, ...], change: Any) -> None:
    for name in names:
        if (value := place.get(name)) is None or value == "":
            continue
        several = [value] if isinstance(value, int) else list(value)
        changed = [int(change(int(each))) for each in several]
        setattr(place, name, changed[0] if isinstance(value, int) else changed)


def _overlaid(new: Any, hidden: dict[int, np.ndarray], scale: int) -> None:
    """Overlays become elements of their own, as large as the new image."""
    for group in range(0x6000, 0x6020, 2):
        if (group, 0x0010) not in new:
            continue
        if group in hidden:
            planes = hidden[group]
            new.add_new((group, 0x0010), "US", planes.shape[1])
            new.add_new((group, 0x0011), "US", planes.shape[2])
            if len(planes) > 1:
                new.add_new((group, 0x0015), "IS", str(len(planes)))
            new.add_new((group, 0x0050), "SS", [1, 1])
        elif (group, 0x3000) in new:
            if scale == 1:
                continue
            planes = np.atleast_3d(new.overlay_array(group).T).T
        else:
            continue
        height, width = planes.shape[1] * scale, planes.shape[2] * scale
        planes = planes.repeat(scale, axis=1).repeat(scale, axis=2)
        new.add_new((group, 0x0010), "US", height)
        new.add_new((group, 0x0011), "US", width)
        if (group, 0x0050) in new:
            first = [int((int(each) - 1) * scale + 1) for each in new[group, 0x0050].value]
            new.add_new((group, 0x0050), "SS", first)
        new.add_new((group, 0x0100), "US", 1)
        new.add_new((group, 0x0102), "US", 0)
        packed = np.packbits(planes.astype(np.uint8).ravel(), bitorder="little").tobytes()
        new.add_new((group, 0x3000), "OW", packed + b"\0" * (len(packed) % 2))


def _frame_type(dataset: Any, element: Any) -> None:
    if element.keyword == "FrameType" and element.value:
        element.value = ["DERIVED", "SECONDARY", *list(element.value)[2:]]


def _swapped(dataset: Any, element: Any) -> None:
    """Words (tables, overlays) in bytes, of whose order pydicom knows nothing."""
    if element.VR == "OW" and isinstance(element.value, bytes):
        element.value = np.frombuffer(element.value, ">u2").astype("<u2").tobytes()


def _little(dataset: Any) -> None:
    """Numbers are written in the other order of bytes from now on; they were decoded when they were looked at."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _little(item)
    dataset.set_original_encoding(False, True)


def _drop(dataset: Any, name: str) -> None:
    if name in dataset:
        delattr(dataset, name)


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters."""
    from pydicom.valuerep import format_number_as_ds

    return format_number_as_ds(value)


def _uid(*sources: str) -> str:
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=list(sources)))
