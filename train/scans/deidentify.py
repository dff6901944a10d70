"""De-identification of a DICOM header: PS3.15 Annex E, Basic Application Level Confidentiality Profile.

The table of attributes and their actions is that of the package dicom-anonymizer. Identifiers are replaced by hashes of
themselves: those that were the same stay the same, over all files and runs. A hash cannot be turned back, but who has
the original identifiers can find out which belongs to which. Private elements are dropped, also inside of sequences.

What is written into the pixels (names in the corner of an ultrasound image) stays there: only a person can see it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from train.data.base import DataError
from train.data.formats import imported

METHOD = "DICOM PS3.15 Basic Application Level Confidentiality Profile"
_TABLE = "dicomfields_2026c"
# Modalities whose devices write words into their pixels; of others that is rare.
_WRITE_INTO_PIXELS = {"US", "IVUS", "SC", "OT", "ES", "XA", "RF", "XC", "GM", "DOC", "OP"}
logger = logging.getLogger(__name__)


def deidentify(path: Path, dataset: Any) -> None:
    """Applies the profile to a data set, in place.

    :param path: where it was read from, for messages.
    :raises DataError: dicom-anonymizer is not installed, or does not know what to do with an element.
    """
    library = _library(path)
    burned = str(dataset.get("BurnedInAnnotation") or "")
    modality = str(dataset.get("Modality") or "")
    if burned == "YES" or (burned != "NO" and modality in _WRITE_INTO_PIXELS):
        logger.warning(
            "%s may show names in its pixels (%s), which --anonymize does not touch; look at it before you hand it on.",
            path,
            "BurnedInAnnotation is YES" if burned == "YES" else f"modality {modality}",
        )
    from pydicom.sr.codedict import codes

    rules = library.initialize_actions(_TABLE)
    _identifiers(dataset, library.dictionary)
    try:
        _apply(library, rules, dataset)
    except NotImplementedError as error:
        raise DataError(f"{path} cannot be de-identified ({error}); remove that element first") from error
    finally:
        library.dictionary.clear()
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = METHOD
    dataset.DeidentificationMethodCodeSequence = [coded(codes.DCM.BasicApplicationConfidentialityProfile)]
    dataset.LongitudinalTemporalInformationModified = "REMOVED"


def replacement(uid: str) -> str:
    """The identifier that stands for another one.

    >>> replacement("1.2.3") == replacement("1.2.3") != replacement("1.2.4")
    True
    """
    from pydicom.uid import generate_uid

    return str(generate_uid(entropy_srcs=["de-identified", uid]))


def coded(code: Any) -> Any:
    """A code as the item of a sequence."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item


def _library(path: Path) -> Any:
    try:
        return imported("dicomanonymizer.simpledicomanonymizer", path)
    except DataError:
        raise DataError(
            f"{path} can only be de-identified with dicom-anonymizer, which is not installed: "
            "pip install dicom-anonymizer"
        ) from None


def _identifiers(dataset: Any, replacements: dict[str, str]) -> None:
    """What the library replaces identifiers by: its own choice would be another one each time."""
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _identifiers(item, replacements)
        elif element.VR == "UI" and element.value:
            values = [element.value] if isinstance(element.value, str) else element.value
            replacements.update({each: replacement(str(each)) for each in values})


def _apply(library: Any, rules: Any, dataset: Any) -> None:
    """To a data set, and to the items of the sequences that are left, which the library leaves alone."""
    library.anonymize_dataset(dataset, base_rules_gen=lambda: rules)
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value:
                _apply(library, rules, item)
