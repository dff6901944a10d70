"""How a command line becomes settings: the preset's, or those of the run that goes on, where a flag is not given."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from train.errors import RunError, reason
from train.files import expanded, is_locked, read_json
from train.outputs import run_folder
from train.outputs.run_folder import RunFolder
from train.settings.presets import preset_settings
from train.settings.sections import CHANGEABLE, FIELDS, NETWORKS, SECTIONS, Settings, change_options, flag, from_values
from train.settings.stored import HINTS, from_json

logger = logging.getLogger(__name__)

ABOUT = """Train an image processing network (IP) with a recognition network (VR) as its auxiliary.

A name (of a data set, task, network or strategy) that is not known is answered with the list of those that are:
--strategy list shows the strategies. Shown below is what concerns the chosen strategy, auxiliaries and networks:
--strategy frozen --help and --aux dia,seg --help show more. The defaults are those of preset quick; --preset paper
--help shows the other one's."""

PRESET_HELP = (
    "quick: minutes on two CPU cores. paper: for one GPU, meant to beat BM3D (not measured yet). auto: paper with a "
    "GPU, else quick."
)
_SHORT = {"--blocks": "--ip.blocks", "--features": "--ip.features"}  # as they were called when there was one IP
# What decides which flags there are.
_CHOICES = ("strategy", "aux", "vr_update", "vr_loss", "vr_start", "ip_start", *NETWORKS)


def parse(argv: Sequence[str], over: Mapping[str, Any] | None = None, prog: str = "python -m train.run") -> Settings:
    """The settings of a command line; the preset's name is resolved.

    The preset (or the run that is continued) and the networks have to be known before the flags can be read over their
    values, hence two readings.

    :param over: settings that stand over the preset's, where no flag is given.
    :param prog: the command, for ``--help``.
    :raises RunError: a value is out of range, a path begins with the ``~`` of a home that does not exist, or a flag
        contradicts the run that is continued.
    :raises SystemExit: ``--help``, or a flag that does not exist or cannot be read (tyro has said why).
    """
    argv = [_written_out(each) for each in argv]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "device", "resume", *_CHOICES):
        first.add_argument(flag(name), nargs="?")
    given, _ = first.parse_known_args(argv)
    wants_help = "-h" in argv or "--help" in argv
    if given.resume and not wants_help:
        return _resumed(argv, given.resume)
    preset = given.preset or "auto"
    if preset == "auto":
        preset = "quick" if wants_help else automatic_preset(given.device or "auto")
    # A preset that does not exist is reported by the second reading.
    base = preset_settings(preset if preset in ("quick", "paper") else "quick")
    chosen: dict[str, Any] = {name: value for name in _CHOICES if (value := getattr(given, name)) is not None}
    if "--reader" in argv:
        chosen["reader"] = True
    base = base.change({**(over or {}), **chosen})
    return _read(argv, base, short=wants_help, prog=prog)


def _written_out(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return _SHORT.get(name, name) + equals + value


def _read(argv: Sequence[str], base: Settings, *, short: bool, prog: str = "python -m train.run") -> Settings:
    """The second reading, over the values of ``base``.

    :param short: show and know only the flags that concern this run.
    """
    import tyro

    concerned = base.concerned
    values = base.values
    sections = []
    for section, kind in SECTIONS.items():
        fields = [each for each in dataclasses.fields(kind) if not short or each.name in concerned]
        # A network without options has no form for them.
        fields = [each for each in fields if not (_is_options(each.name) and not vars(values[each.name]))]
        made: Any = dataclasses.make_dataclass(section, [_argument(each, values[each.name]) for each in fields])
        sections.append((section, Annotated[made, tyro.conf.arg(name="")], dataclasses.field(default_factory=made)))
    about = tyro.conf.arg(help=PRESET_HELP)
    preset = ("preset", Annotated[Literal["auto", "quick", "paper"], about], base.preset)  # type: ignore[valid-type]
    form = dataclasses.make_dataclass("Form", [preset, *sections])
    read: Any = tyro.cli(form, prog=prog, description=ABOUT, args=list(argv))
    for section in SECTIONS:
        values |= vars(getattr(read, section))
    for key in NETWORKS:
        options = values[f"{key}_options"]
        if values[key] != base.values[key]:  # only where a run goes on, which is about to be refused
            values[f"{key}_options"] = None
        elif isinstance(options, _Unchecked):
            values[f"{key}_options"] = change_options(key, values[key], base.values[f"{key}_options"], vars(options))
    for name in ("data_root", "test_root", "out", "ip_weights", "vr_weights"):
        values[name] = values[name] and expanded(values[name], flag(name))
    return from_values(values, base.preset)


def _is_options(name: str) -> bool:
    return name.endswith("_options")


def _argument(field: dataclasses.Field[Any], value: Any) -> tuple[str, Any, Any]:
    import tyro

    if _is_options(field.name):
        key, form = field.name.removesuffix("_options"), _unchecked(type(value))
        default = dataclasses.field(default=form(**vars(value)))
        return field.name, Annotated[form, tyro.conf.arg(name=key)], default
    return field.name, Annotated[HINTS[field.name], tyro.conf.arg(help=field.metadata["help"])], value


class _Unchecked:
    """Options as they were typed: what is wrong with them is said by us, and not in the midst of the reading."""

    def __post_init__(self) -> None:
        pass


def _unchecked(kind: type[Any]) -> Any:
    return dataclasses.dataclass(frozen=True)(type(kind.__name__, (_Unchecked, kind), {"__doc__": kind.__doc__}))


def automatic_preset(device: str) -> str:
    """``"paper"`` where the run will have a GPU, else ``"quick"``."""
    import torch

    return "paper" if device != "cpu" and torch.cuda.is_available() else "quick"


# ----------------------------------------------------------------------------------------------------------------------
# Runs that go on


def _resumed(argv: Sequence[str], resume: str) -> Settings:
    if resume != "latest":
        return _continued(argv, resume_folder(resume))
    refused: list[str] = []
    for folder in latest_runs():
        base = stored(folder)
        settings = _read(argv, base, short=False)
        if not (said := changes(base, settings)):
            return settings
        refused.append(said)
    if len(refused) == 1:
        raise RunError(refused[0])
    raise RunError(
        f"--resume latest: none of the {len(refused)} runs under {run_folder.RUNS}/ has the settings that were given; "
        f"the latest one: {refused[0]}"
    )


def _continued(argv: Sequence[str], folder: Path) -> Settings:
    base = stored(folder)
    settings = _read(argv, base, short=False)
    if said := changes(base, settings):
        raise RunError(said)
    return settings


def resume_folder(resume: str) -> Path:
    """The folder of the run to be continued, as a person gave it.

    :raises RunError: there is no such run, or it has no checkpoint yet.
    """
    folder = RunFolder(expanded(resume, "--resume"))
    try:
        if not folder.path.is_dir():
            raise RunError(f"--resume {resume}: there is no such folder")
        for file, there in ((folder.config, folder.config.is_file()), (folder.checkpoint, bool(folder.checkpoints))):
            if not there:
                raise RunError(
                    f"--resume {resume}: the folder has no {file.name}, so there is nothing to continue; remove the "
                    "folder, and start the run again"
                )
    except OSError as error:
        raise RunError(f"--resume {resume}: the folder cannot be read: {reason(error)}") from error
    return folder.path


def latest_runs() -> Iterator[Path]:
    """The runs under ``runs/`` in which no process is at work, the one that was written to last first.

    :raises RunError: there is no run to continue.
    """
    runs = run_folder.RUNS
    found: list[tuple[float, Path]] = []
    for folder in runs.glob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile, or of another user
            found += [(checkpoint.stat().st_mtime, folder) for checkpoint in RunFolder(folder).checkpoints[:1]]
    if not found:
        raise RunError(f"--resume latest: no run with a checkpoint under {runs}/; give the run's folder")
    at_work: list[str] = []
    free = 0
    for _, folder in sorted(found, key=lambda each: each[0], reverse=True):
        if is_locked(folder):
            at_work.append(str(folder))
            continue
        if at_work:
            logger.warning("%s is at work; the latest run that is not: %s", ", ".join(at_work), folder)
            at_work = []
        free += 1
        yield folder
    if not free:
        raise RunError(f"--resume latest: every run under {runs}/ is at work in another process ({', '.join(at_work)})")


def stored(folder: Path) -> Settings:
    """The settings of the run in ``folder``, ready to be continued.

    :raises RunError: ``config.json`` cannot be read; the message names it.
    """
    path = RunFolder(folder).config
    if (content := read_json(path)) is None:
        raise RunError(f"{path} is missing, so there is nothing to continue; start the run again")
    try:
        settings = from_json(content)
        paths = {name: settings.values[name] for name in ("data_root", "test_root")}
        paths = {name: path and expanded(path, flag(name)) for name, path in paths.items()}
        return settings.change({**paths, "out": folder})
    except (ValueError, TypeError, RunError) as error:
        raise RunError(f"{path} does not hold the settings of a run: {error}") from error


def changes(base: Settings, settings: Settings) -> str:
    """Why ``settings`` are refused for the continued run ``base``: they change what it computes. Empty: they do not."""
    before, after = base.values, settings.values
    changed = [name for name in FIELDS if before[name] != after[name]]
    # Other networks have other options: there is one thing to say about that.
    changed = [name for name in changed if not (_is_options(name) and name.removesuffix("_options") in changed)]
    refused = [_changed_flag(name, base, settings) for name in changed if name not in CHANGEABLE]
    if not refused:
        return ""
    allowed = ", ".join(sorted(flag(name) for name in CHANGEABLE - {"resume"}))
    return (
        f"--resume goes on with the settings of {base.output.out}, and {', '.join(refused)} would change them. "
        f"Leave that out (only {allowed} may change), or start a new run."
    )


def _changed_flag(name: str, base: Settings, settings: Settings) -> str:
    if not _is_options(name):
        return flag(name)
    before, after = vars(base.values[name]), vars(settings.values[name])
    return ", ".join(f"{flag(name)}.{option}" for option in before if before[option] != after.get(option))
