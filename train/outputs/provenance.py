"""Where and by which version something was computed."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def provenance() -> dict[str, Any]:
    """Facts as JSON values: the version of the package, the commit of the checkout (``None`` where it is none), the
    versions of PyTorch and Python, and the machine."""
    import torch

    from gradprom_ext import __version__

    return {
        "version": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""),
    }


def commit() -> str | None:
    """The commit of the checkout that this file is in, with ``+`` where files of it have been changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ":/train", ":/models", ":/gradprom_ext", ":/csrc"
        )
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
