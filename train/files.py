"""Files that are whole or not there, folders that belong to one process at a time, and paths as people type them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
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
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}
_held: set[int] = set()  # descriptors of the locks of this process


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
    drives), the run goes on without.

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
