"""Decoded images are kept between runs: memory-mapped ``.npy`` files that are verified before they are believed.

A cache entry is a folder ``<label>-<digest of the key>`` with one ``.npy`` file per array and an ``index.json`` that
holds the key and each file's SHA-256. The index is written last, every file by rename: an interrupted write leaves an
entry that does not verify, and such an entry is rebuilt. The cache may be deleted at any time.

Its size is bounded: the entries that were used least recently go first. Processes need no lock among each other for
that. An entry loses its index first, so that no other process believes what is left of it; and a process that has
mapped an entry keeps its memory until it ends, as the operating system promises for files that are removed while open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from train.errors import RunError, reason
from train.files import atomic_file, expanded

DEFAULT_GB = 5.0
INDEX = "index.json"
# Nothing else is ever removed: $GRADPROM_CACHE may be a folder in which other things lie.
_ENTRY = re.compile(r".+-[0-9a-f]{16}")
_DIGESTS = re.compile(r"digests-[0-9a-f]{16}\.json")
_PART = re.compile(r"(.+\.npy|index\.json|\..+\.[0-9a-f]{32}\.tmp)")
_LEFTOVER = re.compile(r"\.digests-.+\.[0-9a-f]{32}\.tmp")

_RACE_NS = 2_000_000_000  # the coarsest time stamps in use are those of FAT, 2 s
_in_use: set[Path] = set()  # entries that this process has been given: it will not evict them

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path | None:
    """``$GRADPROM_CACHE``, or ``~/.cache/gradprom_ext``; ``None``, with a warning, for a user without a home.

    :raises RunError: ``$GRADPROM_CACHE`` begins with the ``~`` of a home that does not exist.
    """
    if given := os.environ.get("GRADPROM_CACHE"):
        return expanded(given, "$GRADPROM_CACHE")
    try:
        return Path.home() / ".cache" / "gradprom_ext"
    except RuntimeError:
        logger.warning("images are not cached: this user has no home directory; give a folder with $GRADPROM_CACHE")
        return None


def cache_limit() -> int:
    """How many bytes the cache may hold: ``$GRADPROM_CACHE_GB`` (gigabytes of 10^9 bytes), 5 by default.

    :raises RunError: the variable is no number, or a negative one.
    """
    given = os.environ.get("GRADPROM_CACHE_GB") or DEFAULT_GB
    try:
        gigabytes = float(given)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise RunError(f"$GRADPROM_CACHE_GB must be a number of gigabytes, at least 0, not {given!r}")
    return int(gigabytes * 1e9)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex.

    :raises OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class ArrayCache:
    """Named arrays, built once per key.

    :param folder: where the entries lie; made when first needed. ``None``: nothing is kept.
    :param limit: how many bytes the entries may take in all. What this process uses stays even beyond that.
    """

    folder: Path | None
    limit: int = field(default_factory=cache_limit)

    def arrays(
        self, label: str, key: Mapping[str, Any], build: Callable[[], dict[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        """The arrays of ``key``: memory-mapped and read-only from the cache, else from ``build()``.

        A folder that cannot be written is worth a warning, not an error: the arrays are returned all the same.

        :param label: what a person sees as the entry's name.
        :param key: JSON-able facts that determine the arrays; any change makes another entry.
        :param build: computes the arrays; called only where no intact entry exists.
        """
        if self.folder is None:
            return build()
        canonical = json.dumps(key, sort_keys=True, ensure_ascii=True)
        entry = self.folder / f"{label}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        _in_use.add(entry.absolute())
        found = _read(entry, canonical)
        if found is None:
            found = build()
            try:
                _write(entry, canonical, found)
            except OSError as error:
                logger.warning("the image cache %s cannot be written (%s); the next run decodes again", entry, error)
            else:
                # Built arrays would be as good; the maps make the first run behave (and weigh) like every later one.
                found = _read(entry, canonical) or found
        self._evict()
        return found

    def digests(self, root: Path, files: Sequence[Path]) -> list[str]:
        """SHA-256 of each of the files of a data set, read again only where a file may have changed.

        A digest is remembered with the file's size, times and inode. The time of the last change of the inode (ctime)
        cannot be set by a program, so that a file of the same size under the same modification time is noticed, too. As
        a clock ticks in steps, a digest of a file that has only just been changed is not remembered.

        :param root: the data set's folder, in which the files lie.
        :raises OSError: a file cannot be read.
        """
        known: dict[str, list[Any]] = {}
        memory = None
        if self.folder is not None:
            place = str(root.resolve())
            memory = (
                self.folder / f"digests-{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:16]}.json"
            )
            _in_use.add(memory.absolute())
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                known = dict(json.loads(memory.read_bytes())["files"])
        began = time.time_ns()

        def look(file: Path) -> tuple[str, list[Any], bool]:
            status = file.stat()
            stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
            remembered = known.get(str(file.relative_to(root)))
            if isinstance(remembered, list) and remembered[:-1] == stamp:
                return str(remembered[-1]), remembered, True
            digest = file_sha256(file)
            settled = max(status.st_mtime_ns, status.st_ctime_ns) < began - _RACE_NS
            return digest, [*stamp, digest], settled

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looked = list(pool.map(look, files))
        told = {str(file.relative_to(root)): row for file, (_, row, keep) in zip(files, looked, strict=True) if keep}
        if memory is not None and told != known:
            try:
                memory.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(memory) as out:
                    out.write(json.dumps({"root": place, "files": told}).encode())
            except OSError as error:
                logger.warning("the image cache %s cannot be written (%s)", memory, reason(error))
        elif memory is not None:
            _touch(memory)
        return [digest for digest, *_ in looked]

    def _evict(self) -> None:
        """Removes what was used least recently, until the rest fits into the limit."""
        assert self.folder is not None
        with contextlib.suppress(OSError):  # a cache that cannot be read or written does not grow either
            entries = sorted(_entries(self.folder))
            total = sum(size for _, _, size in entries)
            for _, path, size in entries:
                if total <= self.limit:
                    break
                if path.absolute() not in _in_use:
                    _remove(path)
                    total -= size


def _entries(folder: Path) -> Iterator[tuple[int, Path, int]]:
    """For each entry: when it was last used (in nanoseconds), where it lies, and its size in bytes."""
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process has just removed it
            if _ENTRY.fullmatch(path.name) and path.is_dir():
                parts = [part.stat() for part in path.iterdir()]
                times = [part.st_mtime_ns for part in parts] or [path.stat().st_mtime_ns]
                yield max(times), path, sum(part.st_size for part in parts)
            elif _DIGESTS.fullmatch(path.name) or _LEFTOVER.fullmatch(path.name):
                status = path.stat()
                yield status.st_mtime_ns, path, status.st_size


def _remove(path: Path) -> None:
    """Removes an entry as far as it consists of files of the cache."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            (path / INDEX).unlink(missing_ok=True)
            for part in path.iterdir():
                if _PART.fullmatch(part.name):
                    part.unlink(missing_ok=True)
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    """Notes that a file was used now; without effect in a cache that belongs to another user."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _write(entry: Path, canonical: str, arrays: Mapping[str, np.ndarray]) -> None:
    entry.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name, array in arrays.items():
        path = entry / f"{name}.npy"
        with atomic_file(path) as file:
            np.save(file, array, allow_pickle=False)
        checksums[name] = file_sha256(path)
    with atomic_file(entry / INDEX) as file:
        file.write(json.dumps({"sha256": checksums, "key": canonical}, indent=1).encode())


def _read(entry: Path, canonical: str) -> dict[str, np.ndarray] | None:
    """The entry's arrays, or ``None`` where it is absent or does not verify."""
    try:
        index = json.loads((entry / INDEX).read_bytes())
        if index["key"] != canonical:
            raise ValueError("its key is that of other data")
        arrays = {}
        for name, checksum in index["sha256"].items():
            path = entry / f"{name}.npy"
            if file_sha256(path) != checksum:
                raise ValueError(f"{path.name} is damaged")
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("the image cache %s is rebuilt: %s", entry, error)
        return None
    _touch(entry / INDEX)
    return arrays
