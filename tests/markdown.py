"""What of a Markdown file can be tried: its code blocks and the commands in them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^ *(?:[^#\n`]* && )?(python -m (?:train|gradprom_ext)\.[^#\n]*)", re.MULTILINE)


def blocks(path: Path, language: str) -> list[str]:
    """The code of a file's fenced blocks in a language."""
    return [code for found, code in _BLOCK.findall(path.read_text()) if found == language]


def languages(path: Path) -> set[str]:
    """Those of a file's fenced blocks."""
    return {found for found, _ in _BLOCK.findall(path.read_text())}


def commands(path: Path) -> list[list[str]]:
    """Every command of ours that begins a line, in a fenced or an indented block: module and arguments."""
    text = path.read_text().replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in _COMMAND.findall(text)]
