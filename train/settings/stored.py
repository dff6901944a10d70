"""Settings as JSON: the file ``config.json``, of this version and of earlier ones.

Version 1 (runs until November 2026) was flat and is recognized by its lack of a version. Version 2 has sections. A
setting that a file of version 2 lacks did not exist when it was written: it gets its default, so the default of a new
setting has to be what was done before there was one, and nothing else needs a new version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from train.errors import RunError
from train.settings.presets import PRESETS
from train.settings.sections import FIELDS, NETWORKS, SECTIONS, Settings, from_values, known

VERSION = 2
HINTS = {name: hint for section in SECTIONS.values() for name, hint in get_type_hints(section).items()}

# fmt: off
# Sections that the first files of version 2 lack.
_YOUNGER = {"alone", "clean", "evaluation", "pretraining", "unpaired"}
_VERSION_1 = {
    "dataset", "data_root", "source", "size", "channels", "task", "sigma", "ip", "blocks", "features", "vr", "strategy",
    "gate", "aux_weight", "optimizer", "lr", "vr_lr", "batch_size", "crop", "epochs", "max_steps", "pretrain_epochs",
    "seed", "device", "preset", "num_workers", "out", "resume", "checkpoint_every", "log_every", "tensorboard",
}
# fmt: on


def to_json(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values, in sections."""
    return {
        "version": VERSION,
        "preset": settings.preset,
        **{
            section: {each.name: _plain(settings.values[each.name]) for each in dataclasses.fields(kind)}
            for section, kind in SECTIONS.items()
        },
    }


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return list(value)
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def from_json(content: Mapping[str, Any]) -> Settings:
    """What :func:`to_json`, of this version or an earlier one, was given.

    :raises RunError: a setting is missing, unknown, of a wrong type or out of range, or the version is a later one.
    """
    version = content.get("version", 1)
    if version == 1:
        return _from_version_1(content)
    if version != VERSION:
        raise RunError(f"version {version!r} is unknown to this version of the project; use a later one")
    return _from_version_2(content)


def _from_version_1(content: Mapping[str, Any]) -> Settings:
    if differing := set(content) ^ _VERSION_1:
        raise RunError(f"the settings {', '.join(sorted(differing))} are missing or unknown to this version")
    values = dict(content)
    preset = values.pop("preset")
    # Both went to SR-ResNet, the only IP there was; a type that does not fit is reported under the old names.
    options = {name: values.pop(name) for name in ("blocks", "features")}
    for name, value in options.items():
        if not _fits(value, int):
            raise RunError(f"{name} cannot be {value!r}")
    values["ip_options"] = options if values["ip"] == "srresnet" else {}
    weight = values["aux_weight"]
    if not _fits(weight, float):
        raise RunError(f"aux_weight cannot be {weight!r}")
    values["aux_weight"] = [weight]
    return _from_plain(values, preset)


def _from_version_2(content: Mapping[str, Any]) -> Settings:
    # A section that is younger than the file is not in it.
    sections = {name: content.get(name, {} if name in _YOUNGER else None) for name in SECTIONS}
    if missing := [name for name, section in sections.items() if not isinstance(section, dict)]:
        raise RunError(f"{', '.join(missing)} must be an object each")
    values: dict[str, Any] = {}
    for name, section in sections.items():
        assert isinstance(section, dict)
        known = {each.name for each in dataclasses.fields(SECTIONS[name])}
        if unknown := sorted(set(section) - known):
            raise RunError(f"{name}: the settings {', '.join(unknown)} are unknown to this version of the project")
        values |= section
    return _from_plain(values, content.get("preset"))


def _from_plain(values: dict[str, Any], preset: Any) -> Settings:
    """Settings of JSON values, the defaults for what is missing."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RunError(f"preset cannot be {preset!r}")
    values = {name: field.default for name, field in FIELDS.items()} | values
    for key, registry in NETWORKS.items():
        name, options = values[key], values[f"{key}_options"]
        if not isinstance(name, str):
            raise RunError(f"{key} cannot be {name!r}")
        known(key, registry, name)
        values[f"{key}_options"] = _options(key, registry.options(name), {} if options is None else options)
    for name, hint in HINTS.items():
        value = values[name]
        if hint is Any:
            continue
        if get_origin(hint) is tuple:
            if not isinstance(value, (list, tuple)) or not all(_fits(each, get_args(hint)[0]) for each in value):
                raise RunError(f"{name} cannot be {value!r}")
            values[name] = tuple(value)
            continue
        if Path in get_args(hint) and isinstance(value, str):
            value = values[name] = Path(value)
        if not _fits(value, hint):
            raise RunError(f"{name} cannot be {value!r}")
    return from_values(values, preset)


def _options(key: str, kind: type[Any], values: Any) -> Any:
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or not set(values) <= set(hints):
        raise RunError(f"{key}_options cannot be {values!r}")
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise RunError(f"{key}.{name} cannot be {value!r}")
    try:
        return kind(**values)
    except ValueError as error:
        raise RunError(f"{key}.{error}") from error


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value that was read from a file is of a setting's type.

    >>> _fits(3, int | None), _fits(3, float), _fits("3", int), _fits(True, int), _fits(2, Literal[1, 3])
    (True, True, False, False, False)
    """
    if get_origin(kind) is Literal:
        return any(value == each and type(value) is type(each) for each in get_args(kind))
    if isinstance(kind, UnionType) or get_args(kind):
        return any(_fits(value, each) for each in get_args(kind))
    if kind is NoneType or value is None:
        return kind is NoneType and value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
