"""Files that are whole or not there, folders that belong to one process at a time, and paths as people type them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from train.errors import RunError, reason

LOCK = "run.lock"

# A look at a lock holds it for an instant, which must not make an attempt in earnest fail.
_PATIENCE, _PAUSE = 1.0, 0.05  # seconds


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

    The lock is the operating system's (``flock``) and ends with the process, however that ends, so none is ever stale;
    where a file system has no such locks (some network drives), filelock falls back to the mere existence of the file.
    ``run.lock`` says who holds it and disappears with the lock; a killed process leaves the file, but not the lock.

    :raises RunError: another process holds the folder, or it cannot be written; the message names it.
    """
    path = folder / LOCK
    lock = _acquired(path, _PATIENCE)
    if lock is None:
        raise RunError(f"{folder} is at work in another process{_holder(path)}; wait until it is done, or stop it")
    try:
        yield
    finally:
        # Removed while it is held: a process that opened the old file finds that it has no name, and tries again.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process is at work in a run's folder. In doubt (it cannot be looked at): no."""
    path = folder / LOCK
    try:
        if not path.exists():
            return False
        lock = _acquired(path, 0)
    except (OSError, RunError):
        return False
    if lock is None:
        return True
    lock.release()
    return False


def _acquired(path: Path, timeout: float) -> Any:
    """The lock, held; ``None`` where another process holds it.

    :raises RunError: the file cannot be written.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    lock = FileLock(path, timeout=timeout, poll_interval=_PAUSE)
    try:
        lock.acquire()
    except Timeout:
        return None
    except OSError as error:
        raise RunError(f"the run folder {path.parent} cannot be written: {reason(error)}") from error
    if timeout and not isinstance(lock, SoftFileLock):  # which has written the like already
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            path.write_text(json.dumps(holder) + "\n")
    return lock


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f" (process {holder['pid']} on {holder['host']}, since {holder['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
