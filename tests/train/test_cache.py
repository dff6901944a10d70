"""The cache of decoded images: built once, verified always, rebuilt when in doubt."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from train.data import cache as module
from train.data.cache import ArrayCache, cache_limit, default_cache_dir
from train.errors import RunError
from train.files import atomic_file

ARRAYS = {"train": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "test": np.zeros((0, 3), np.float32)}


class Builder:
    """Counts how often the arrays are built."""

    def __init__(self, arrays: dict[str, np.ndarray] = ARRAYS) -> None:
        self.arrays = arrays
        self.calls = 0

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return self.arrays


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


def use(cache: ArrayCache, name: str, day: int, kilobytes: int = 10) -> Path:
    """Reads an entry as a process that has ended since; builds one of so many kilobytes, dated, where there is none."""
    build = Builder({"pixels": np.zeros(kilobytes * 1000, np.uint8)})
    cache.arrays(name, {}, build)
    entry = next(path for path in cache.folder.iterdir() if path.name.startswith(f"{name}-"))
    if build.calls:
        for part in entry.iterdir():
            os.utime(part, (day, day))
    module._in_use.clear()
    return entry


def kept(cache: ArrayCache) -> str:
    return "".join(sorted(path.name.split("-")[0] for path in cache.folder.iterdir()))


class TestBound:
    def test_the_least_recently_used_go_first(self, tmp_path: Path) -> None:
        cache = ArrayCache(tmp_path, limit=35_000)
        for day, name in enumerate("abc"):
            use(cache, name, day)
        assert kept(cache) == "abc"
        use(cache, "a", 4)
        use(cache, "d", 5)
        assert kept(cache) == "acd"
        use(cache, "e", 6, kilobytes=20)
        assert kept(cache) == "ae"

    def test_what_this_process_uses_stays(self, tmp_path: Path) -> None:
        cache = ArrayCache(tmp_path, limit=15_000)
        use(cache, "z", 0)
        mapped = {
            name: cache.arrays(name, {}, lambda: {"pixels": np.ones(10_000, np.uint8)})["pixels"] for name in "abc"
        }
        assert kept(cache) == "abc"
        assert all(pixels.all() for pixels in mapped.values())

    def test_another_process_may_take_what_is_mapped_here(self, tmp_path: Path) -> None:
        mapped = ArrayCache(tmp_path).arrays("a", {}, lambda: {"pixels": np.arange(50_000)})["pixels"]
        code = (
            "import sys; from pathlib import Path; from train.data.cache import ArrayCache; "
            "import numpy as np; ArrayCache(Path(sys.argv[1]), limit=0).arrays('b', {}, lambda: {'x': np.zeros(9)})"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
        assert [path.name[0] for path in tmp_path.iterdir()] == ["b"]
        assert (mapped == np.arange(50_000)).all()

    def test_many_at_once(self, tmp_path: Path) -> None:
        """Threads play processes here: none knows what another one uses."""
        cache = ArrayCache(tmp_path, limit=25_000)

        def work(seed: int) -> bool:
            rng = np.random.default_rng(seed)
            for number in rng.integers(0, 6, 30):
                found = cache.arrays(
                    "abcdef"[number], {}, lambda number=number: {"pixels": np.full(10_000, number, np.uint8)}
                )
                if not (found["pixels"] == number).all():
                    return False
                module._in_use.clear()
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))

    def test_nothing_else_is_removed(self, tmp_path: Path) -> None:
        """$GRADPROM_CACHE may be a folder with other things in it, even under such names."""
        cache = ArrayCache(tmp_path, limit=0)
        entry = use(cache, "a", 0)
        mine = [tmp_path / "thesis.txt", tmp_path / "photos" / "x.npy", entry / "notes.txt"]
        for path in mine:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        os.utime(entry / "notes.txt", (0, 0))
        use(cache, "b", 1)
        use(cache, "c", 2)
        assert all(path.read_text() == "mine" for path in mine)
        assert os.listdir(entry) == ["notes.txt"]
        assert kept(cache) == "acphotosthesis.txt"

    def test_leftovers_of_killed_processes_count(self, tmp_path: Path) -> None:
        cache = ArrayCache(tmp_path, limit=15_000)
        entry = use(cache, "a", 0)
        (entry / "index.json").unlink()
        leftover = entry / f".test.npy.{'0' * 32}.tmp"
        leftover.write_bytes(bytes(9000))
        os.utime(leftover, (0, 0))
        use(cache, "b", 1)
        assert kept(cache) == "b"

    def test_the_limit_is_a_variable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("GRADPROM_CACHE_GB", raising=False)
        assert ArrayCache(tmp_path).limit == 5_000_000_000
        monkeypatch.setenv("GRADPROM_CACHE_GB", "0.25")
        assert ArrayCache(tmp_path).limit == 250_000_000

    @pytest.mark.parametrize("value", ["much", "-1", "nan", "inf", "5GB"])
    def test_no_limit_at_all(self, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
        monkeypatch.setenv("GRADPROM_CACHE_GB", value)
        with pytest.raises(RunError, match=rf"^\$GRADPROM_CACHE_GB must be a number .*, not '{value}'$"):
            cache_limit()


class TestDigests:
    """The oracle is hashlib on the whole file."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        """Three files that were last changed long ago, as far as the cache can tell."""
        folder = tmp_path / "data" / "inner"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.png").write_bytes(bytes([number]) * 100)
        return sorted(folder.iterdir())

    @pytest.fixture
    def read(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the files that were read."""
        names: list[str] = []
        original = module.file_sha256
        monkeypatch.setattr(module, "file_sha256", lambda path: names.append(path.name) or original(path))
        return names

    def expect(self, cache: ArrayCache, files: list[Path]) -> None:
        found = cache.digests(files[0].parents[1], files)
        assert found == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def test_read_once(
        self, tmp_path: Path, files: list[Path], read: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_RACE_NS", -(10**18))
        cache = ArrayCache(tmp_path / "cache")
        self.expect(cache, files)
        assert sorted(read) == ["0.png", "1.png", "2.png"]
        read.clear()
        self.expect(cache, files)
        assert read == []
        os.utime(files[1])
        self.expect(cache, files)
        assert read == ["1.png"]

    def test_same_size_and_time(
        self, tmp_path: Path, files: list[Path], read: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_RACE_NS", -(10**18))
        cache = ArrayCache(tmp_path / "cache")
        self.expect(cache, files)
        for file in files[:2]:
            before = file.stat()
            if file == files[0]:
                file.write_bytes(b"x" * before.st_size)
            else:
                other = file.with_name("other")
                other.write_bytes(b"y" * before.st_size)
                other.replace(file)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        self.expect(cache, files)

    def test_files_that_have_only_just_changed_are_not_remembered(
        self, tmp_path: Path, files: list[Path], read: list[str]
    ) -> None:
        """A second change within a tick of the clock would leave every time stamp as it is."""
        cache = ArrayCache(tmp_path / "cache")
        for _ in range(2):
            self.expect(cache, files)
        assert len(read) == 6

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"files": 3}', b'{"files": {"inner/0.png": 7}}', b"\xff"])
    def test_a_damaged_memory_is_rebuilt(
        self, tmp_path: Path, files: list[Path], content: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "_RACE_NS", -(10**18))
        cache = ArrayCache(tmp_path / "cache")
        self.expect(cache, files)
        (memory,) = cache.folder.iterdir()
        intact = memory.read_bytes()
        memory.write_bytes(content)
        self.expect(cache, files)
        assert memory.read_bytes() == intact

    def test_without_a_cache(self, files: list[Path]) -> None:
        self.expect(ArrayCache(None), files)
        build = Builder()
        assert same(ArrayCache(None).arrays("label", {}, build)) and build.calls == 1


def test_a_tilde_is_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GRADPROM_CACHE", "~/kept")
    assert default_cache_dir() == tmp_path / "kept"
    monkeypatch.setenv("GRADPROM_CACHE", "~no-such-user/kept")
    with pytest.raises(RunError, match=r"^\$GRADPROM_CACHE ~no-such-user/kept: there is no such home"):
        default_cache_dir()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADPROM_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("GRADPROM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "gradprom_ext"
