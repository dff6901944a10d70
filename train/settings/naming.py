"""What distinguishes one run from another: a name for people, and a digest for programs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.errors import RunError, reason
from train.settings.presets import preset_settings
from train.settings.sections import FIELDS, NETWORKS, Settings

LONGEST = 120  # characters of a name; beyond, a part of the identity stands for what the name cannot say

_IN_FRONT = ("dataset", "source", "task", "sigma", "strategy", "seed")  # what every name or identity says anyhow
_FIRST = ("aux", "gate", "aux_weight")  # what a person looks for first
# Empty: its values speak for themselves.
_WORDS = {"aux_weight": "lambda", "aux": "", "vr": "", "seg": "", "ip": "", "precision": ""}


def computed(settings: Settings) -> dict[str, Any]:
    """All settings that decide what a run computes, as JSON values by their names (``ip.blocks``: an option).

    :raises RunError: a file of weights cannot be read; the digest of its content is what counts.
    """
    found: dict[str, Any] = {}
    concerned, values = settings.concerned, settings.values
    for name, field in FIELDS.items():
        value = values[name]
        if name not in concerned or not field.metadata["computes"] or name == "out":
            continue
        if name.endswith("_options"):
            key = name.removesuffix("_options")
            found |= {f"{key}.{option}": chosen for option, chosen in dataclasses.asdict(value).items()}
        else:
            found[name] = _digest(name, value) if isinstance(value, Path) else value
    return found


def _digest(name: str, path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise RunError(f"--{name.replace('_', '-')} {path} cannot be read: {reason(error)}") from error


def identity(settings: Settings, data: Mapping[str, Any], *, degradation: str) -> str:
    """A digest of what a run computes: 16 hexadecimal digits, the same wherever and whenever the run is done.

    Settings that have their defaults are left out, so that one that is added later changes no identity.

    :param data: the fingerprint of the data (``data.json``).
    :param degradation: with all its arguments (``gaussian:0.1``), however the task was written.
    :raises RunError: a file of weights cannot be read.
    """
    own = {
        name: value
        for name, value in computed(settings).items()
        if name not in ("task", "sigma") and (name in _IN_FRONT or value != _default(name, settings))
    }
    content = json.dumps({"settings": own, "degradation": degradation, "data": data}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _default(name: str, settings: Settings) -> Any:
    key, dot, option = name.partition(".")
    if not dot:
        return FIELDS[name].default
    return getattr(NETWORKS[key].options(settings.values[key])(), option)


def run_name(settings: Settings, *, title: str, source: str, task: str, identity: str) -> str:
    """``DATASET-TASK-STRATEGY-...-sSEED``, with ``-PHANTOM`` where the images are generated. In between stands what
    differs from the preset and decides what the run computes: ``covidct-denoise0.2-gradprom-lambda0.01-s0``.

    The name is one of a file on every system, and the same settings always have the same name.

    :param title: of the data.
    :param source: of the data.
    :param task: the degradation with its arguments.
    :param identity: of the run.
    """
    preset = preset_settings(settings.preset)
    # Other networks have other options: those of a chosen network are compared with what the preset gives it.
    usual = computed(preset.change({name: settings.values[name] for name in ("strategy", "aux", *NETWORKS)}))
    usual |= {name: preset.values[name] for name in ("aux", *NETWORKS)}
    own = computed(settings)
    told = [] if settings.preset == "quick" else [str(settings.preset)]
    special = [name for name, value in own.items() if name not in _IN_FRONT and value != usual.get(name)]
    first = [_word(name, own[name]) for name in special if name in _FIRST]
    rest = [_word(name, own[name]) for name in special if name not in _FIRST]
    front, back = f"{title}-{task}-{settings.method.strategy}", f"s{settings.training.seed}"
    marks = [] if source == "real" else ["PHANTOM"]
    name = "-".join(map(_safe, (front, *told, *first, *rest, back, *marks)))
    if len(name) > LONGEST:
        begin = "-".join(map(_safe, (front, *told, *first)))
        name = "-".join((begin[:LONGEST], identity[:8], back, *marks))
    return name


def _word(name: str, value: Any) -> str:
    """
    >>> _word("aux_weight", (0.01, 0.1)), _word("ip.blocks", 8), _word("vr", "resnet50"), _word("gate", "soft")
    ('lambda0.01+0.1', 'blocks8', 'resnet50', 'gatesoft')
    """
    values = value if isinstance(value, (list, tuple)) else [value]
    text = "+".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values)
    return _WORDS.get(name, name.removeprefix("ip.")) + text


def _safe(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=_-]+", "-", part.replace(":", "").replace(",", "+").replace("_", "-"))
