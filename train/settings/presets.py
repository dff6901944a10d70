"""Presets: partial overrides of the settings' defaults. ``NETWORK.OPTION`` is for runs with that network alone."""

from __future__ import annotations

import dataclasses
from typing import Any

from train.settings.sections import Settings

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "srresnet.blocks": 4,
        "srresnet.features": 32,
        "drunet.features": 32,
        "drunet.levels": 3,
        "drunet.blocks": 1,
        "drunet.unshuffle": 2,
        "iconet.blocks": 4,
        "iconet.features": 32,
    },
    "paper": {
        "size": 256,
        "srresnet.blocks": 16,
        "srresnet.features": 64,
        "iconet.blocks": 8,
        "iconet.features": 64,
        "hqgnet.width": 64,
        "patch.width": 64,
        "vr": "resnet50",
        "lr": 3e-4,
        "vr_lr": 2e-4,
        "alone_steps": 20_000,
        "alone_lr": 3e-4,
        "alone_batch_size": 16,
        "alone_crop": 128,
        "clean_lr": 2e-4,
        "clean_epochs": 100,
        "batch_size": 16,
        "crop": 128,
        "epochs": 1000,
        "pretrain_epochs": 100,
        "num_workers": 8,
        "checkpoint_every": 1000,
    },
}


def preset_options(preset: str, network: str, kind: type[Any]) -> Any:
    """The options of a network under a preset: its own defaults, with what the preset overrides.

    :param kind: the dataclass of the options.
    """
    return dataclasses.replace(
        kind(),
        **{
            name.removeprefix(f"{network}."): value
            for name, value in PRESETS[preset].items()
            if name.startswith(f"{network}.")
        },
    )


def preset_settings(preset: str) -> Settings:
    """All settings of a preset."""
    settings = Settings(preset)  # type: ignore[arg-type]
    options = {
        f"{key}_options": preset_options(preset, name, type(getattr(section, f"{key}_options")))
        for section, key, name in (
            (settings.network, "ip", settings.network.ip),
            (settings.auxiliary, "vr", settings.auxiliary.vr),
            (settings.auxiliary, "seg", settings.auxiliary.seg),
            (settings.unpaired, "critic", settings.unpaired.critic),
        )
    }
    plain = {name: value for name, value in PRESETS[preset].items() if "." not in name}
    return settings.change(options).change(plain)
