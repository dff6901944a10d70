"""A person's file of images: what is in it, frame by frame, and how a file like it is written with other pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Derivation:
    """What a written file says of where it comes from.

    :param description: in words, at most 1,024 characters: what was done, by which run, trained on what, and that it is
        not for diagnosis.
    :param identity: of the processing, the same for the same run and options: new identifiers are made of it and of the
        source's, so that what is written twice is the same.
    :param scale: how many pixels of the result lie along one of the source; spacings become smaller by it.
    :param anonymize: leaves out what identifies a person.
    """

    description: str
    identity: str
    scale: int = 1
    anonymize: bool = False


class Scan(ABC):
    """A file that was opened: its header was read and believed only as far as the file is long, its pixels were not.

    Frames are pages of a TIFF, frames of a DICOM file, slices of a volume (and all its times), in the order in which
    they are stored. Values are those which the file means: of DICOM and NIfTI after their rescale slope and intercept
    (Hounsfield units, say), else the numbers as they are stored. Larger ones are brighter: where a file has it the
    other way round (MONOCHROME1, WhiteIsZero), its numbers are turned over, and back when they are written. NaN stays
    NaN.

    :ivar path: the file.
    :ivar format: its name for people: ``PNG``, ``DICOM``, ``NIfTI``.
    :ivar frames: how many there are, at least 1.
    :ivar channels: 1 (gray) or 3 (RGB, whatever the file stores), of every frame.
    :ivar value_range: the values that are black and white where nothing else is said: the limits of integers of as many
        bits as are used, the window of a DICOM file that has one, the extremes of floating-point values.
    :ivar patient: whose it is, as far as the file says.
    :ivar dtype: of ``uint8``, ``uint16`` and ``float32`` the one that holds all values as exactly as the file.
    """

    path: Path
    format: str
    frames: int
    channels: int
    value_range: tuple[float, float]
    patient: str | None = None
    dtype: np.dtype = np.dtype(np.float32)

    @abstractmethod
    def size(self, frame: int) -> tuple[int, int]:
        """Height and width in pixels, without decoding."""

    @abstractmethod
    def read(self, frame: int) -> np.ndarray:
        """
        :returns: ``float32 [H, W, channels]``, in the values that the file means.
        :raises DataError: the pixels are damaged, or of a kind that cannot be decoded; the message says what is
            missing.
        """

    @abstractmethod
    def write(self, target: Path, frames: Iterable[np.ndarray], derivation: Derivation) -> None:
        """Writes a file of the same format, geometry, depth and header with other pixels.

        Values are rounded and clipped to what the stored type holds. Frames are asked for one after the other, so that
        only formats which cannot be written in parts hold all of them.

        :param target: is replaced in one step once all is written, and never left half.
        :param frames: as many as the scan has, as :meth:`read` gives them, ``scale`` times as high and wide.
        :raises OSError: it cannot be written.
        """
