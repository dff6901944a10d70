"""The cache of decoded images: built once, verified always, rebuilt when in doubt."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from train.data import cache as module
from train.data.cache import ArrayCache, atomic_file, default_cache_dir

ARRAYS = {"train": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "test": np.zeros((0, 3), np.float32)}


class Builder:
    """Counts how often the arrays are built."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return ARRAYS


def same(found: object) -> bool:
    return found.keys() == ARRAYS.keys() and all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype for name, array in ARRAYS.items()
    )


def entry_of(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def test_built_once_and_mapped(tmp_path: Path) -> None:
    build, cache = Builder(), ArrayCache(tmp_path / "new" / "cache")
    for _ in range(3):
        found = cache.arrays("label", {"size": 3}, build)
        assert same(found)
    assert build.calls == 1
    assert isinstance(found["train"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        found["train"][0] = 1
    assert entry_of(cache.folder).name.startswith("label-")


def test_another_key_is_another_entry(tmp_path: Path) -> None:
    build, cache = Builder(), ArrayCache(tmp_path)
    for key in ({"size": 3}, {"size": 4}, {"size": 3, "files": [["a", 1]]}, {"size": 3, "files": [["a", 2]]}):
        cache.arrays("label", key, build)
    assert build.calls == 4
    assert len(list(tmp_path.iterdir())) == 4


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda entry: flip(entry / "train.npy"),
    "an array cut short": lambda entry: (entry / "train.npy").write_bytes((entry / "train.npy").read_bytes()[:-5]),
    "an array missing": lambda entry: (entry / "train.npy").unlink(),
    "no index (the write was interrupted)": lambda entry: (entry / "index.json").unlink(),
    "an index cut short": lambda entry: (entry / "index.json").write_text('{"sha256": {"train"'),
    "an index of another shape": lambda entry: (entry / "index.json").write_text("[1, 2]"),
    "an index without checksums": lambda entry: (entry / "index.json").write_text(
        json.dumps({"key": json.loads((entry / "index.json").read_text())["key"]})
    ),
    "an index that is no text": lambda entry: (entry / "index.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_rebuilt(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    build, cache = Builder(), ArrayCache(tmp_path)
    cache.arrays("label", {}, build)
    damage(entry_of(tmp_path))
    assert same(cache.arrays("label", {}, build))
    assert build.calls == 2
    assert same(cache.arrays("label", {}, build))
    assert build.calls == 2


def test_an_unwritable_folder_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    obstacle = tmp_path / "file"  # works for root too, whom no permission stops
    obstacle.touch()
    build, cache = Builder(), ArrayCache(obstacle / "cache")
    with caplog.at_level(logging.WARNING):
        assert same(cache.arrays("label", {}, build))
    assert "cannot be written" in caplog.text


def test_a_full_disk_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: IO[bytes], array: np.ndarray, **_: object) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    build, cache = Builder(), ArrayCache(tmp_path)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(module.np, "save", full)
        assert same(cache.arrays("label", {}, build))
    assert "No space left" in caplog.text
    assert list(entry_of(tmp_path).iterdir()) == []
    assert same(cache.arrays("label", {}, build))
    assert build.calls == 2


def test_errors_of_the_builder_leave_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise RuntimeError("no such image")

    with pytest.raises(RuntimeError, match="no such image"):
        ArrayCache(tmp_path).arrays("label", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_keeps_the_old_one_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("GRADPROM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "gradprom_ext"
