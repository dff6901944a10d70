"""What a run is: typed settings in sections, presets, the command line, and ``config.json``. Imports no PyTorch."""

from __future__ import annotations

from train.settings.command_line import parse
from train.settings.presets import PRESETS, preset_settings
from train.settings.sections import CHANGEABLE, FIELDS, Settings, flag
from train.settings.stored import from_json, to_json

__all__ = ["CHANGEABLE", "FIELDS", "PRESETS", "Settings", "flag", "from_json", "parse", "preset_settings", "to_json"]
