"""Checkpoints: all that a run needs to go on bit for bit, written so that no crash can damage an earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from train.errors import RunError
from train.files import atomic_file

VERSION = 1


class Part(Protocol):
    """What can be saved and restored: a network, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` (tensors and plain Python values); ``path`` holds all of it, or what it held before.

    :raises RunError: the file cannot be written (a full disk, say); the message names it.
    """
    try:
        with atomic_file(path) as file:
            torch.save({"version": VERSION} | state, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns the OSError of a full disk into a RuntimeError
        kept = "; the earlier one is untouched" if path.exists() else ""
        raise RunError(f"the checkpoint {path} cannot be written: {_reason(error)}{kept}") from error


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What :func:`save` wrote. Executes nothing from the file (``weights_only=True``).

    :raises RunError: the file is missing, damaged or not a checkpoint of this project; the message names it.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise RunError(
            f"the checkpoint {path} cannot be read; it is damaged, or no checkpoint ({_reason(error)})"
        ) from error
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise RunError(f"{path} is not a checkpoint of this version of the project")
    return state


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
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise RunError(f"the checkpoint {path} is that of another model or optimizer ({name}): {error}") from error


def _compare(path: Path, name: str, own: dict[str, Any], stored: dict[str, Any]) -> None:
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    found = {key: tuple(value.shape) for key, value in stored.items()}
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
