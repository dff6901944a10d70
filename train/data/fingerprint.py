"""What identifies the data of a run: not where they lie, but every pixel, label and name, in their order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from train.data.base import SPLITS, ImageData, Subset

WORDS = {"train": "training", "val": "validation", "test": "test"}
PLAIN = ("number", "shape")  # facts that are no digests: a message quotes them


def fingerprint(data: ImageData) -> dict[str, Any]:
    """Facts and SHA-256 digests of a data set as JSON values, for a person to read and for :func:`differences`.

    The pixels are those that the networks are trained on: decoded, resized and in the order of the split.
    """
    return {
        "data set": data.name,
        "source": data.source,
        "classes": list(data.class_names),
        "splits": {split: _subset(getattr(data, split)) for split in SPLITS},
    }


def differences(stored: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty where they are the same.

    :param stored: of the data a run began with; read from a file, so that anything may be in it or missing.
    :param found: of the data at hand.
    """
    differing = [
        f"{fact}: {stored.get(fact)} then, {found[fact]} now"
        for fact in ("data set", "source", "classes")
        if stored.get(fact) != found[fact]
    ]
    splits = stored.get("splits")
    for split in SPLITS:
        then = splits.get(split) if isinstance(splits, dict) else None
        now = found["splits"][split]
        if not isinstance(then, dict):
            differing.append(f"{WORDS[split]} images: nothing is known of those of then")
            continue
        changed = [
            f"{fact} ({then.get(fact)} then, {value} now)" if fact in PLAIN else fact
            for fact, value in now.items()
            if then.get(fact) != value
        ]
        if changed:
            differing.append(f"{WORDS[split]} images: other {', '.join(changed)}")
    return differing


def _subset(subset: Subset) -> dict[str, Any]:
    return {
        "number": len(subset),
        "shape": list(subset.images.shape[1:]),
        "names or order": _digest("\0".join(subset.names).encode(errors="surrogateescape")),
        "labels": _array_digest(subset.labels),
        "masks": _array_digest(subset.masks),
        "pixels": _array_digest(subset.images),
    }


def _array_digest(array: np.ndarray | None) -> str | None:
    if array is None:
        return None
    # The byte order is fixed, so that a run may move between machines.
    return _digest(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
