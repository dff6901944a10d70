"""Checkpoints: all that a run needs to go on bit for bit, written so that no crash can damage an earlier one.

A checkpoint is a file of ``torch.save``. Behind it, in the comment that every zip archive may end with, stands the
SHA-256 of all that comes before, so that a file which is cut off, or in which a bit has changed, is not believed:
PyTorch itself does not look at the checksums of the archive. ``torch.load`` reads the file as any other.

``checkpoint.pt`` is the newest one; ``checkpoint-1.pt`` is the one before it, ``checkpoint-2.pt`` the one before that.
Where the newest is damaged, a run goes on from the next older whole one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Protocol

import torch

from train.errors import RunError
from train.files import generations, newest_file

VERSION = 2
"""Files of version 1 have no checksum, and are read without."""

_MARK = b"gradprom_ext sha256 "
_COMMENT = len(_MARK) + 64  # bytes: the mark and the digest in hex
_BLOCK = 1 << 20

logger = logging.getLogger(__name__)


class Part(Protocol):
    """What can be saved and restored: a network, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """Writes ``state`` (tensors and plain Python values); ``path`` holds all of it, or what it held before.

    :param keep: how many checkpoints there may be in all, the newest and those before it, which are moved on.
    :raises RunError: a file cannot be written (a full disk, say); the message names it.
    """
    try:
        with newest_file(path, keep) as file:
            summed: Any = _Summed(file)
            torch.save({"version": VERSION} | state, summed)
            comment = _MARK + summed.digest.hexdigest().encode()
            file.seek(-2, os.SEEK_END)  # the last field of the archive is the length of its comment, so far 0
            file.write(struct.pack("<H", len(comment)) + comment)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the OSError of a full disk into a RuntimeError
        kept = "; the earlier one is untouched" if generations(path) else ""
        raise RunError(f"the checkpoint {path} cannot be written: {_reason(error)}{kept}") from error


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote. Executes nothing from the file (``weights_only=True``).

    :raises RunError: the file is missing, damaged or not a checkpoint of this project; the message names it.
    """
    try:
        whole = _is_whole(path)
        if whole is False:
            raise ValueError("its checksum is another one")
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise RunError(
            f"the checkpoint {path} cannot be read; it is damaged, or no checkpoint ({_reason(error)})"
        ) from error
    if not isinstance(state, dict) or state.get("version") not in (1, VERSION):
        raise RunError(f"{path} is not a checkpoint of this version of the project")
    if state["version"] > 1 and whole is None:
        raise RunError(f"the checkpoint {path} cannot be read; it is damaged, or no checkpoint (it has no checksum)")
    return state


def load_newest(path: Path, device: torch.device | str = "cpu") -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that is whole, and where it lies. A damaged one is left alone, with a warning.

    :param path: of the newest of all.
    :raises RunError: there is none, or none is whole; the message says what is wrong with the newest.
    """
    first: RunError | None = None
    for each in generations(path) or [path]:
        try:
            state = load(each, device)
        except RunError as error:
            first = first or error
            continue
        if first is not None:
            logger.warning("%s. The run goes on from an older one, %s.", first, each)
        return each, state
    assert first is not None
    raise first


def restore(path: Path, state: dict[str, Any], parts: dict[str, Part]) -> None:
    """Hands each part its share of a loaded checkpoint.

    Shapes and names are all compared before anything is changed.

    :raises RunError: the checkpoint belongs to other networks or other settings; the message names what differs.
    """
    if missing := [name for name in parts if name not in state]:
        raise RunError(f"the checkpoint {path} is one of another kind of run: it has no {', '.join(missing)}")
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            _compare(path, name, part.state_dict(), state[name])
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"the checkpoint {path} is that of another model or optimizer ({name}): {error}") from error


class _Summed:
    """A binary file with the SHA-256 of what is written into it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.digest = hashlib.sha256()
        self.flush: Callable[[], None] = file.flush
        self._write = file.write

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self._write(content)


def _is_whole(path: Path) -> bool | None:
    """Whether a checkpoint's content is that of its checksum; ``None``: it has none.

    :raises OSError: it cannot be read.
    """
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END) - _COMMENT - 2
        file.seek(max(length, 0))
        end = file.read()
        if length < 0 or not end[2:].startswith(_MARK):
            return None
        file.seek(0)
        digest = hashlib.sha256()
        while length and (block := file.read(min(length, _BLOCK))):
            digest.update(block)
            length -= len(block)
        digest.update(b"\0\0")  # the length of the comment when there was none
    return end == struct.pack("<H", _COMMENT) + _MARK + digest.hexdigest().encode()


def _compare(path: Path, name: str, own: dict[str, Any], stored: Any) -> None:
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    tensors = stored if isinstance(stored, dict) else {}
    found = {key: tuple(value.shape) for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    if shapes == found:
        return
    key = next(key for key in (*shapes, *found) if shapes.get(key) != found.get(key))
    raise RunError(
        f"the checkpoint {path} is that of another model: {name}.{key} is {_shape(found.get(key))} there "
        f"and {_shape(shapes.get(key))} here"
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _reason(error: BaseException) -> str:
    """The root of an error in one line: the operating system's words where it had any."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
