"""Images of low and of high quality that are no pairs: two halves of a data set, or what a data set itself says."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from train.data.base import SPLITS, DataError, ImageData, Subset
from train.data.readers import LUMA
from train.seeds import stable_seed

WHITE, BLACK, ONE_SHADE = 0.8, 0.07, 0.0125
"""Of the gray values in the central half of an image: a mean above or below which it is nearly white or black, and a
standard deviation below which it is of one shade. Nothing can be recovered there. Of the bad images of DRIMDB ten are
left out so: five white ones, three black ones, and two of one gray."""

logger = logging.getLogger(__name__)


def by_name(data: ImageData, *, seed: int) -> ImageData:
    """Splits the training images: one half is to be degraded (``train``), the other one guides (``guides``), so that no
    image is ever seen on both sides.

    A hash of the patient decides or, where no patient is known, of the image's name: images of one patient are nearly
    pairs. The halves are as equal as patients allow.

    :param seed: of the hash.
    :raises DataError: there are no two patients.
    """
    train = data.train
    units = np.array(train.patients or train.names)
    order = sorted(set(units.tolist()), key=lambda unit: stable_seed("half", seed, unit))
    ends = np.cumsum([(units == unit).sum() for unit in order])
    cut = int(np.argmin(abs(ends[:-1] - len(train) / 2))) + 1 if len(order) > 1 else 0
    low = np.isin(units, order[:cut])
    if not cut:
        raise DataError(f"{data.title} has too few training images to be split into two unpaired halves")
    return dataclasses.replace(data, train=train.take(np.flatnonzero(low)), guides=train.take(np.flatnonzero(~low)))


def by_label(data: ImageData, *, low: int, high: int) -> ImageData:
    """Data of which a label is the quality.

    :param low: the class of images of low quality.
    :param high: that of images of high quality; those for training become guides.
    """
    assert data.train.labels is not None
    names = {
        name
        for split in SPLITS
        for name, label in zip(getattr(data, split).names, _labels(getattr(data, split)), strict=True)
        if label == low
    }
    guides = data.train.take(np.flatnonzero(data.train.labels == high))
    return dataclasses.replace(data, guides=guides, low_quality=frozenset(names))


def by_nature(data: ImageData) -> ImageData:
    """Of data that say so, the images of low quality alone, but for those in which nothing can be recovered; what was
    left out is logged.

    :raises DataError: the data do not say which images are of low and of high quality, or no image is left.
    """
    if data.guides is None or not len(data.guides):
        raise DataError(
            f"--task none takes images as they are, and {data.title} does not say which of them are of high quality; "
            "give a degradation (--task illumination), or data that do (--dataset drimdb, or a folder with hq/ beside "
            "images/)"
        )
    subsets: dict[str, Any] = {}
    lost = []
    for split in SPLITS:
        subset: Subset = getattr(data, split)
        kept = []
        for i, name in enumerate(subset.names):
            if name not in data.low_quality:
                continue
            if recoverable(subset.image(i).numpy()):
                kept.append(i)
            else:
                lost.append(name)
        if not kept and split != "val":
            raise DataError(f"{data.title} has no {split} image of low quality in which anything can be recovered")
        subsets[split] = subset.take(np.array(kept, np.int64))
    if lost:
        logger.warning(
            "%s: %d images of low quality are left out, as they are nearly white, nearly black or of one shade: %s.",
            data.title,
            len(lost),
            ", ".join(lost),
        )
    return dataclasses.replace(data, **subsets)


def recoverable(image: np.ndarray) -> bool:
    """Whether the central half of an image shows more than one shade, and is neither nearly white nor nearly black.

    :param image: ``float [C, H, W]`` in [0, 1]; of colors the luminance counts.
    """
    gray = image[0] if len(image) == 1 else np.einsum("c,chw->hw", LUMA, image)
    height, width = gray.shape
    center = gray[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return bool(BLACK <= center.mean() <= WHITE and center.std() >= ONE_SHADE)


def _labels(subset: Subset) -> list[int | None]:
    return [None] * len(subset) if subset.labels is None else subset.labels.tolist()
