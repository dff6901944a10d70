"""Data sets by name: found on disk, fetched, or imitated by phantoms."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, get_args

import train.data.sets  # noqa: F401  (the data sets register themselves)
from train.data.base import DATASETS, DataError, DataSet, DataUnavailableError, ImageData, Subset
from train.data.cache import ArrayCache, default_cache_dir
from train.data.window import Window, windowed
from train.errors import reason
from train.files import expanded

__all__ = ["DATASETS", "DataError", "DataUnavailableError", "ImageData", "Source", "Subset", "load"]

Source = Literal["auto", "real", "phantom"]
PHANTOM_SIZE = 128
logger = logging.getLogger(__name__)


def load(
    name: str,
    *,
    root: str | os.PathLike[str] | None = None,
    formerly: Path | None = None,
    source: Source = "auto",
    size: int | None = 128,
    channels: int = 1,
    split_seed: int = 0,
    window: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> ImageData:
    """Loads a data set; on its first use also fetches and decodes it.

    A ``root`` has to hold it. Without one it is looked for in ``formerly``, ``$GRADPROM_DATA`` and ``./data``. Each of
    these may be the data set's folder itself or the folder that holds it (under its own name, or that of GitHub's zip
    file, with ``-master`` at its end). Found in none of them, it is downloaded into ``$GRADPROM_DATA`` or ``./data``.

    :param name: one of ``DATASETS``.
    :param root: where it is.
    :param formerly: where it once was, and may have left.
    :param source: ``"real"``: the real images or an error. ``"phantom"``: generated images. ``"auto"``: the real images
        if they are here or can be fetched, else phantoms, said in one log line. Real data that are here but damaged are
        an error in both cases: a run must not train on phantoms because of a typo in a list file.
    :param size: side of the square that every image is squeezed into, in pixels; ``None`` leaves the images as they
        are, each of its own size (phantoms, which have none, get 128 pixels).
    :param channels: 1 (gray) or 3 (RGB).
    :param split_seed: decides the split of data that have no official one. It is not the seed of a run: the runs of a
        comparison are tested on the same images.
    :param window: which values become 0 and 1 (``"-600/1500"``, ``"P1-P99"``: :class:`train.data.window.Window`);
        by default the data decide (:func:`train.data.readers.value_range`). Real data only.
    :param cache_dir: where decoded images are kept; ``$GRADPROM_CACHE`` or ``~/.cache/gradprom_ext`` by default.
    :param progress: show progress bars on stderr.
    :raises DataError: no data, or data that are incomplete, damaged, unreadable or contradictory.
    :raises RunError: an environment variable is not understood.
    :raises UnknownNameError: there is no data set called ``name``.
    :raises ValueError: ``source``, ``size``, ``channels`` or ``window`` is out of range.
    """
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {', '.join(get_args(Source))}, not {source!r}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels!r}")
    if size is not None and not 16 <= size <= 4096:
        raise ValueError(f"size must be between 16 and 4096 pixels, not {size!r}")
    chosen = None if window is None else Window.parse(window)
    dataset = DATASETS.build(name)
    cache = ArrayCache(expanded(cache_dir, "cache_dir") if cache_dir is not None else default_cache_dir())

    if source != "phantom":
        try:
            path = _find_or_fetch(dataset, root, formerly, progress)
            data = dataset.read(
                path, size=size, channels=channels, cache=cache, progress=progress, split_seed=split_seed
            )
            return data if chosen is None else windowed(data, chosen)
        except OSError as error:
            raise DataError(f"{error.filename or dataset.title} cannot be read: {reason(error)}") from error
        except DataUnavailableError as error:
            if source == "real" or not dataset.has_phantoms:
                raise
            logger.warning("%s Going on with generated PHANTOM images.", error)
    if chosen is not None:
        raise DataError(f"--window {window} is for real images, and phantoms have no unit; leave it out")
    return dataset.phantom(size=size or PHANTOM_SIZE, channels=channels, cache=cache, progress=progress)


def _find_or_fetch(
    dataset: DataSet, root: str | os.PathLike[str] | None, formerly: Path | None, progress: bool
) -> Path:
    """The data set's folder.

    :raises DataUnavailableError: it is nowhere and cannot be downloaded.
    :raises DataError: ``root`` does not hold it, or a place to look is a file.
    :raises OSError: a place to look cannot be read.
    """
    if root is not None:
        given = expanded(root, "--data-root")
        if (path := _find(dataset, given)) is None:
            raise DataError(_not_there(dataset, given))
        return path
    if formerly is not None and (path := _find(dataset, formerly)) is not None:
        return path
    if not dataset.folder:  # it may lie anywhere, and be called anything
        gone = "" if formerly is None else f" ({formerly}, where it was, does not hold it any more)"
        raise DataError(f"--dataset {dataset.name} needs --data-root DIR, the folder that holds it{gone}")
    variable = os.environ.get("GRADPROM_DATA")
    places = [expanded(variable, "$GRADPROM_DATA")] if variable else []
    places.append(Path("data"))
    for place in places:
        if (path := _find(dataset, place)) is not None:
            return path
        if variable and place == places[0]:  # it may hold other data sets, so this is no error, but no secret either
            logger.warning("%s is not in $GRADPROM_DATA (%s); looking elsewhere.", dataset.title, place)
    target = places[0] / dataset.folder
    try:
        dataset.download(target, progress=progress)
    except DataUnavailableError as error:
        if (path := _find(dataset, places[0])) is not None:
            return path  # of two runs that started together, the other one was first
        searched = ", ".join(str(place) for place in ([formerly] if formerly else []) + places)
        raise DataUnavailableError(
            f"{dataset.title} is not in {searched}, and could not be downloaded: {error}. "
            f"Get it from {dataset.homepage} and give its folder with --data-root or $GRADPROM_DATA."
        ) from error
    return target


def _find(dataset: DataSet, place: Path) -> Path | None:
    """The data set's folder, if ``place`` is or holds it."""
    if place.exists() and not place.is_dir():
        raise DataError(f"the data root {place} is a file; give the folder that holds {dataset.folder or 'the images'}")
    # The last two are what a branch of a GitHub repository unpacks to.
    names = [f"{dataset.folder}{end}" for end in ("", "-master", "-main")] if dataset.folder else []
    names += dataset.copies
    return next((path for path in (place, *(place / name for name in names)) if dataset.is_at(path)), None)


def _not_there(dataset: DataSet, given: Path) -> str:
    """Why a data root is refused, and which folder may have been meant."""
    if not given.exists():
        if not dataset.folder:
            return f"--data-root {given}: there is no such folder"
        return (
            f"--data-root {given}: there is no such folder. To have {dataset.title} downloaded, leave the flag out "
            "($GRADPROM_DATA or data/ is where it goes)"
        )
    nearby = [given.absolute().parent, *sorted(each for each in given.iterdir() if each.is_dir())]
    meant = next((path for each in nearby if (path := _find(dataset, each)) is not None), None)
    if not dataset.folder:
        hint = f"did you mean {meant}?" if meant else "put the images there"
        return f"--data-root {given} is no folder of --dataset {dataset.name}: it holds no {dataset.holds}; {hint}"
    hint = f"did you mean {meant}?" if meant else f"get it from {dataset.homepage}, or leave the flag out"
    return f"--data-root {given} neither is nor holds the folder of {dataset.title} ({dataset.folder}); {hint}"
