"""What identifies the data of a run: not where they lie, but every pixel, label and name, in their order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from train.data.base import SPLITS, Arrays, ImageData, Ragged, Subset

WORDS = {"train": "training", "val": "validation", "test": "test"}
PLAIN = ("number", "shape", "value range")  # facts that are no digests: a message quotes them


def fingerprint(data: ImageData) -> dict[str, Any]:
    """Facts and SHA-256 digests of a data set as JSON values, for a person to read and for :func:`differences`.

    The pixels are those that the networks are trained on: decoded, resized and in the order of the split.
    """
    masks = {"mask classes": list(data.mask_names)} if data.mask_names else {}
    return {
        "data set": data.name,
        "source": data.source,
        "classes": list(data.class_names),
        **masks,
        "splits": {split: _subset(getattr(data, split)) for split in SPLITS},
    }


def differences(stored: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; empty where they are the same.

    :param stored: of the data a run began with; read from a file, so that anything may be in it or missing.
    :param found: of the data at hand.
    """
    differing = [
        f"{fact}: {stored.get(fact)} then, {found.get(fact)} now"
        for fact in ("data set", "source", "classes", "mask classes")
        if stored.get(fact) != found.get(fact)
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
    facts = {
        "number": len(subset),
        "shape": "various" if isinstance(subset.images, Ragged) else list(subset.images.shape[1:]),
        "names or order": _names_digest(subset.names),
        "labels": _array_digest(subset.labels),
        "masks": _array_digest(subset.masks),
        "pixels": _array_digest(subset.images),
    }
    # What not every data set has is left out of the others: the fingerprints of runs of earlier versions stay valid.
    if subset.patients is not None:
        facts["patients"] = _names_digest(subset.patients)
    if subset.value_range != (0.0, 255.0):
        facts["value range"] = list(subset.value_range)
    return facts


def _names_digest(names: tuple[str, ...]) -> str:
    return _digest("\0".join(names).encode(errors="surrogateescape"))


def _array_digest(array: Arrays | None) -> str | None:
    if array is None:
        return None
    if isinstance(array, Ragged):
        return _digest(f"{_array_digest(array.shapes)} {_array_digest(array.flat)}".encode())
    # The byte order is fixed, so that a run may move between machines.
    return _digest(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).data)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()
