"""How many threads there are to share out."""

from __future__ import annotations

import os


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(at_once: int) -> int:
    """Threads of each of some processes side by side."""
    return max(1, cores() // at_once)
