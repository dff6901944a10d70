"""Seeds that are the same in every process, version and machine."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on ``parts`` alone: the same in every process, version and machine.

    The parts keep their borders and types apart: ``("ab", "c")``, ``("a", "bc")`` and ``(1,)``, ``("1",)`` all differ.

    :raises TypeError: a part is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a seed is made of integers and strings, not {part!r}")
        text = str(part).encode()
        digest.update(f"{type(part).__name__}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little") >> 1
