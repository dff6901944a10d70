"""Data sets by name: found on disk, fetched, or imitated by phantoms."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, get_args

from train.data.base import DATASETS, DataError, DataSet, DataUnavailableError, ImageData, Subset
from train.data.cache import ArrayCache, default_cache_dir

__all__ = ["DATASETS", "DataError", "DataUnavailableError", "ImageData", "Source", "Subset", "load"]

Source = Literal["auto", "real", "phantom"]
logger = logging.getLogger(__name__)


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    source: Source = "auto",
    size: int = 128,
    channels: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ImageData:
    """Loads a data set; on its first use also fetches and decodes it.

    It is looked for in ``root``, ``$GRADPROM_DATA`` and ``./data``, each of which may be the data set's folder itself
    or the folder that holds it. Found nowhere, it is downloaded into the first of these.

    :param name: one of ``DATASETS``.
    :param root: where to look first.
    :param source: ``"real"``: the real images or an error. ``"phantom"``: generated images. ``"auto"``: the real images
        if they are here or can be fetched, else phantoms, said in one log line. Real data that are here but damaged are
        an error in both cases: no one should train on phantoms because of a typo in a list file.
    :param size: side of the square images in pixels.
    :param channels: 1 (grey) or 3 (RGB).
    :param cache_dir: where decoded images are kept; ``$GRADPROM_CACHE`` or ``~/.cache/gradprom_ext`` by default.
    :param progress: show progress bars on stderr.
    :raises DataError: no data, or data that are incomplete, damaged or contradictory.
    :raises UnknownNameError: there is no data set called ``name``.
    :raises ValueError: ``source``, ``size`` or ``channels`` is out of range.
    """
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {', '.join(get_args(Source))}, not {source!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels!r}")
    if not 16 <= size <= 4096:
        raise ValueError(f"size must be between 16 and 4096 pixels, not {size!r}")
    dataset = DATASETS.build(name)
    cache = ArrayCache(Path(cache_dir) if cache_dir is not None else default_cache_dir())

    if source != "phantom":
        try:
            path = _find_or_fetch(dataset, root, progress)
            return dataset.read(path, size=size, channels=channels, cache=cache, progress=progress)
        except DataUnavailableError as error:
            if source == "real":
                raise
            logger.warning("%s Going on with generated PHANTOM images.", error)
    return dataset.phantom(size=size, channels=channels, cache=cache, progress=progress)


def _find_or_fetch(dataset: DataSet, root: str | os.PathLike[str] | None, progress: bool) -> Path:
    """The data set's folder.

    :raises DataUnavailableError: it is nowhere and cannot be downloaded.
    :raises DataError: a root is a file.
    """
    roots = [Path(given).expanduser() for given in (root, os.environ.get("GRADPROM_DATA"), "data") if given]
    for candidate in roots:
        if candidate.exists() and not candidate.is_dir():
            raise DataError(f"the data root {candidate} is a file; give the folder that holds {dataset.folder}")
        for path in (candidate, candidate / dataset.folder):
            if dataset.is_at(path):
                return path
    target = roots[0] / dataset.folder
    try:
        dataset.download(target, progress=progress)
    except DataUnavailableError as error:
        searched = ", ".join(str(candidate) for candidate in roots)
        raise DataUnavailableError(
            f"{dataset.title} is not in {searched}, and could not be downloaded: {error}. "
            f"Get it from {dataset.homepage} and give its folder with --data-root or $GRADPROM_DATA."
        ) from error
    return target


# Registration: one line per data set.
from train.data import covidct as covidct  # noqa: E402
