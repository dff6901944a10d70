"""Numbers on their way between devices, without waiting for one and without reading what has not arrived."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On ``device``. Only a copy to the host waits: the host would read it at once, whether it has arrived or not."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def readable(number: Any, device: torch.device) -> Any:
    """A tensor where a step on ``device`` can read it, there or in host memory; anything else as it is."""
    if not isinstance(number, Tensor) or number.device == device or number.device.type == "cpu":
        return number
    return to_device(number, device)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse_capture() -> None:
    """:raises RuntimeError: a CUDA graph is being captured, and it would repeat what happens once in a lifetime."""
    if is_capturing():
        raise RuntimeError(
            "the first step of an optimizer creates its state, which a CUDA graph would do again at every replay; run "
            "at least one step before the capture"
        )
