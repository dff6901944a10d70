"""Decoded images are kept between runs: memory-mapped ``.npy`` files that are verified before they are believed.

A cache entry is a folder ``<label>-<digest of the key>`` with one ``.npy`` file per array and an ``index.json`` that
holds the key and each file's SHA-256. The index is written last, every file by rename: an interrupted write leaves an
entry that does not verify, and such an entry is rebuilt. The cache may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """``$GRADPROM_CACHE``, or ``~/.cache/gradprom_ext``."""
    return Path(os.environ.get("GRADPROM_CACHE") or Path.home() / ".cache" / "gradprom_ext")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` only once it is complete; an earlier file stays until then.

    :raises OSError: the folder is not writable, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@dataclass(frozen=True)
class ArrayCache:
    """Named arrays, built once per key.

    :param folder: where the entries lie; made when first needed.
    """

    folder: Path

    def arrays(
        self, label: str, key: Mapping[str, Any], build: Callable[[], dict[str, np.ndarray]]
    ) -> Mapping[str, np.ndarray]:
        """The arrays of ``key``: memory-mapped and read-only from the cache, else from ``build()``.

        A folder that cannot be written is worth a warning, not an error: the arrays are returned all the same.

        :param label: what a person sees as the entry's name.
        :param key: JSON-able facts that determine the arrays; any change makes another entry.
        :param build: computes the arrays; called only where no intact entry exists.
        """
        canonical = json.dumps(key, sort_keys=True, ensure_ascii=True)
        entry = self.folder / f"{label}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"
        if (found := _read(entry, canonical)) is not None:
            return found
        built = build()
        try:
            _write(entry, canonical, built)
        except OSError as error:
            logger.warning("the image cache %s cannot be written (%s); the next run decodes again", entry, error)
            return built
        # Built arrays would be as good; the maps make the first run behave (and weigh) like every later one.
        return _read(entry, canonical) or built


def _write(entry: Path, canonical: str, arrays: Mapping[str, np.ndarray]) -> None:
    entry.mkdir(parents=True, exist_ok=True)
    checksums = {}
    for name, array in arrays.items():
        path = entry / f"{name}.npy"
        with atomic_file(path) as file:
            np.save(file, array, allow_pickle=False)
        checksums[name] = file_sha256(path)
    with atomic_file(entry / "index.json") as file:
        file.write(json.dumps({"sha256": checksums, "key": canonical}, indent=1).encode())


def _read(entry: Path, canonical: str) -> dict[str, np.ndarray] | None:
    """The entry's arrays, or ``None`` where it is absent or does not verify."""
    try:
        index = json.loads((entry / "index.json").read_bytes())
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
    return arrays
