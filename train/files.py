"""Files that are whole or not there, folders that belong to one process at a time, and paths as people type them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from train.errors import RunError, reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"

# A look at a lock holds it for an instant, which must not make an attempt in earnest fail.
_PATIENCE, _PAUSE = 1.0, 0.05  # seconds
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF}  # some network drives
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_held: set[int] = set()  # descriptors of the locks of this process


@contextlib.contextmanager
def atomic_file(path: Path, before: Callable[[], None] | None = None) -> Iterator[IO[bytes]]:
    """A binary file that appears under ``path`` only once it is complete; an earlier file stays until then.

    What is there after the block survives a power cut: the file and the folder that names it are synchronized. A
    process that is killed within the block leaves a hidden file, which :func:`remove_leftovers` removes.

    :param before: is called once all is written, before the file gets its name.
    :raises OSError: the folder is not writable, or the disk is full.
    """
    temporary = _temporary(path)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before is not None:
            before()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    """A new name beside a file, which :func:`is_leftover` knows."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def sync_folder(folder: Path) -> None:
    """Returns once the names in a folder will survive a power cut, as far as the file system can promise that.

    :raises OSError: the disk fails.
    """
    if os.name == "nt":  # a folder cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is one that :func:`atomic_file` had not finished when its process was killed.

    >>> is_leftover(".checkpoint.pt.0123456789abcdef0123456789abcdef.tmp"), is_leftover(".notes.tmp")
    (True, False)
    """
    return _LEFTOVER.fullmatch(name) is not None


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes have left of files that were never finished. The folder has to be locked."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if is_leftover(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()


def generations(path: Path) -> list[Path]:
    """A file and those before it (``x.pt``, ``x-1.pt``, ``x-2.pt``, ...) as far as they are there, the newest first.

    :param path: of the newest.
    """
    numbered = re.compile(rf"{re.escape(path.stem)}-([1-9]\d*){re.escape(path.suffix)}")
    older = {int(match[1]): each for each in path.parent.glob("*") if (match := numbered.fullmatch(each.name))}
    return [*([path] if path.exists() else []), *(older[number] for number in sorted(older))]


@contextlib.contextmanager
def newest_file(path: Path, keep: int) -> Iterator[IO[bytes]]:
    """As :func:`atomic_file`, but what was there before is kept as the one before it (:func:`generations`).

    :param keep: how many there may be in all; at no moment there are fewer, once there were so many.
    :raises OSError: as :func:`atomic_file`, or a file cannot be renamed.
    """
    with atomic_file(path, (lambda: _move_on(path)) if keep > 1 else None) as file:
        yield file
    for each in generations(path)[keep:]:
        with contextlib.suppress(OSError):
            each.unlink()


def _move_on(path: Path) -> None:
    """Gives a file also the name of the one before it, that one the next, and so on."""

    def numbered(number: int) -> Path:
        return path.with_name(f"{path.stem}-{number}{path.suffix}")

    if not path.exists() or (numbered(1).exists() and path.samefile(numbered(1))):  # the last attempt ended here
        return
    free = next(number for number in itertools.count(1) if not numbered(number).exists())
    for number in range(free, 1, -1):
        os.replace(numbered(number - 1), numbered(number))
    second = _temporary(path)
    try:
        os.link(path, second)  # so that the newest is never without its name
    except OSError:  # a file system without second names
        os.replace(path, numbered(1))
        return
    try:
        os.replace(second, numbered(1))
    except BaseException:
        with contextlib.suppress(OSError):
            second.unlink()
        raise


def write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    :raises RunError: it cannot be written; the message names it.
    """
    try:
        with atomic_file(path) as file:
            file.write(content)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {reason(error)}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file for people to read, whole or not at all.

    :raises RunError: it cannot be written; the message names it.
    """
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; ``None`` where there is no such file.

    :raises RunError: the file cannot be read or holds no JSON object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise RunError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: it holds no JSON object")
    return value


def expanded(path: str | os.PathLike[str], what: str) -> Path:
    """A path as a person typed it, with a leading ``~`` or ``~user`` replaced.

    Shells leave the ``~`` of ``--out=~/x`` and of many environment variables as it is.

    :param what: where the path comes from (``"--out"``), for the message.
    :raises RunError: there is no such home directory.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise RunError(f"{what} {path}: there is no such home directory; give the whole path") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps every other process out of a run's folder while the block runs.

    The lock is the operating system's (``flock``) and ends with the process, however that ends, so none is ever stale,
    on network drives neither (Linux passes it on to the NFS server). ``run.lock`` says who holds it and disappears with
    the lock; a killed process leaves the file, but not the lock. Where there is no such lock (Windows, some network
    drives), the run goes on without. What killed processes had begun to write is removed first.

    :raises RunError: another process holds the folder, or it cannot be written; the message names it.
    """
    path = folder / LOCK
    try:
        descriptor = _acquired(path, os.O_RDWR | os.O_CREAT, _PATIENCE)
    except OSError as error:
        raise RunError(f"the run folder {folder} cannot be written: {reason(error)}") from error
    if descriptor is None:
        raise RunError(f"{folder} is at work in another process{_holder(path)}; wait until it is done, or stop it")
    _held.add(descriptor)
    try:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(holder).encode() + b"\n")
        remove_leftovers(folder)
        yield
    finally:
        # Removed while it is held: a process that opened the old file finds that it has no name, and tries again.
        with contextlib.suppress(OSError):
            path.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether another process is at work in a run's folder. In doubt (it cannot be looked at): no."""
    try:
        descriptor = _acquired(folder / LOCK, os.O_RDWR, 0)
    except OSError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _acquired(path: Path, flags: int, patience: float) -> int | None:
    """The descriptor of the lock file, locked until it is closed; ``None`` where another process holds the lock.

    :raises OSError: the file cannot be opened.
    """
    deadline = time.monotonic() + patience
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                return None
            time.sleep(_PAUSE)
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(descriptor)
                raise
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # the process that held it has just removed it


def _leave_to_parent() -> None:
    """A forked process (one that prepares batches, say) may outlive its parent, and the lock must not."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
