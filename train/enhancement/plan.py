"""Which files are enhanced, and what they become: decided, and refused, before anything is written."""

from __future__ import annotations

import glob
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.errors import RunError, reason
from train.files import expanded
from train.text import shell_word

MAGIC = frozenset("*?[")
DIGITS = 4  # at least, of the numbers that are names where nothing may identify a person


@dataclass(frozen=True)
class Job:
    """A file and what becomes of it.

    :param source: the file.
    :param name: of what becomes of it, under OUTPUT, with ``/`` between folders.
    :param target: the same as a path.
    """

    source: Path
    name: str
    target: Path

    @property
    def stamp(self) -> list[int]:
        """Size and time of change of the source: by them it is known again."""
        about = self.source.stat()
        return [about.st_size, about.st_mtime_ns]


@dataclass(frozen=True)
class Plan:
    """All that is to be done.

    :param jobs: in the order of their names.
    :param output: the folder that all of it is written under.
    :param single: whether OUTPUT is the name of the one file.
    :param ignored: files in the folders that are no images.
    """

    jobs: tuple[Job, ...]
    output: Path
    single: bool
    ignored: int

    @property
    def report(self) -> Path:
        """Where the page is written."""
        if self.single:
            return self.output / f"{_parts(self.jobs[0].target.name)[0]}-report.html"
        return self.output / "report.html"


def made(
    inputs: Sequence[str],
    output: str,
    *,
    is_scan: Callable[[Path], bool],
    anonymize: bool = False,
    limit: int | None = None,
) -> Plan:
    """Finds the files.

    :param inputs: files, folders (with all that is below them) and patterns, as they were typed.
    :param output: a folder, or, for one file, the name of another file.
    :param is_scan: whether a file is one of the formats.
    :param anonymize: files get numbers in the place of their names.
    :param limit: so many files at most, the first ones.
    :raises RunError: nothing is found, something is there already, or two things have one name; nothing was written.
    """
    target = expanded(output, "OUTPUT")
    found: list[tuple[Path, str]] = []
    ignored = 0
    for given in inputs:
        paths, others = _found(given, is_scan)
        found += paths
        ignored += others
    if not found:
        told = f" ({ignored} other files are no images that can be read)" if ignored else ""
        raise RunError(f"{' '.join(map(shell_word, inputs))}: there is no image here{told}")
    found.sort(key=lambda each: each[1])
    single = len(inputs) == 1 and expanded(inputs[0], "INPUT").is_file() and _names_a_file(target, found[0][0])
    folder = target.parent if single else target
    if not single and os.path.lexists(target) and not target.is_dir():
        raise RunError(f"OUTPUT {target} is a file; give a folder")
    _refuse_nested(inputs, [path for path, _ in found], target, single)
    if single:
        jobs = [Job(found[0][0], target.name, target)]
    elif anonymize:
        digits = max(DIGITS, len(str(len(found))))
        names = [f"{number:0{digits}d}{_parts(path.name)[1]}" for number, (path, _) in enumerate(found, 1)]
        jobs = [Job(path, name, folder / name) for (path, _), name in zip(found, names, strict=True)]
    else:
        jobs = [Job(path, name, folder / name) for path, name in found]
    _refuse_same_names(jobs)
    _refuse_inputs_as_targets(jobs)
    return Plan(tuple(jobs[:limit]), folder, single, ignored)


def _found(given: str, is_scan: Callable[[Path], bool]) -> tuple[list[tuple[Path, str]], int]:
    """The files of one INPUT with their names under OUTPUT, and how many others there were."""
    path = expanded(given, "INPUT")
    if os.path.lexists(path) and not path.exists():
        raise RunError(f"{given} is a link to something that is not there")
    if path.is_dir():
        return _below(path, path, is_scan)
    if path.is_file():
        if not is_scan(path):
            raise RunError(f"{given} is no image that can be read; python -m train.enhance --help lists the formats")
        return [(path, path.name)], 0
    if not MAGIC & set(given):
        raise RunError(f"{given}: there is no such file or folder")
    fixed = Path(*_before_magic(path.parts))
    matched = [Path(each) for each in glob.glob(str(path), recursive=True)]
    if not matched:
        raise RunError(f"{given}: no file has a name like that")
    found: dict[Path, str] = {}
    ignored = 0
    for each in matched:
        if each.is_dir():
            paths, others = _below(each, fixed, is_scan)
            found |= dict(paths)
            ignored += others
        elif is_scan(each):
            found[each] = each.relative_to(fixed).as_posix()
        else:
            ignored += 1
    return list(found.items()), ignored


def _before_magic(parts: Sequence[str]) -> Iterator[str]:
    """The folders of a pattern that are no pattern themselves; a pattern in the working directory has none."""
    for part in parts[:-1]:
        if MAGIC & set(part):
            return
        yield part


def _below(folder: Path, base: Path, is_scan: Callable[[Path], bool]) -> tuple[list[tuple[Path, str]], int]:
    """The images below a folder. Links to folders are followed, each folder once, so that a circle ends; hidden files
    (among them the ``._NAME`` that macOS leaves beside every file) are none.

    :raises RunError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise RunError(f"{error.filename} cannot be read: {reason(error)}") from error

    found: list[tuple[Path, str]] = []
    ignored = 0
    seen: set[tuple[int, int]] = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        about = os.stat(here)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each != "__MACOSX")
        for name in sorted(files):
            path = Path(here) / name
            if name.startswith("."):
                continue
            if path.is_file() and is_scan(path):
                found.append((path, path.relative_to(base).as_posix()))
            else:
                ignored += 1
    return found, ignored


def _parts(name: str) -> tuple[str, str]:
    """A file's name without its ending, and the ending: ``.nii.gz`` is one, and what begins with a digit is none, as
    in ``1.2.840.10008``.

    >>> _parts("a.b.nii.gz"), _parts("IM0001"), _parts("1.2.840.113619")
    (('a.b', '.nii.gz'), ('IM0001', ''), ('1.2.840.113619', ''))
    """
    if name.lower().endswith(".nii.gz"):
        return name[:-7], name[-7:]
    stem, dot, ending = name.rpartition(".")
    return (stem, dot + ending) if stem and ending[:1].isalpha() else (name, "")


def _names_a_file(target: Path, source: Path) -> bool:
    """Whether OUTPUT is the name of a file and not that of a folder.

    :raises RunError: it is the name of a file of another format.
    """
    if target.is_dir():
        return False
    own, wanted = (_parts(each.name)[1].lower() for each in (source, target))
    if os.path.lexists(target) and not (target.exists() and os.path.samefile(target, source)):
        raise RunError(f"OUTPUT {target} is a file that is there already; give another name, or a folder")
    if wanted and wanted != own:
        raise RunError(
            f"OUTPUT {target} ends in {wanted}, and {source.name} is written in its own format; give a name that ends "
            f"in {own or 'nothing'}, or a folder"
        )
    return bool(wanted) or os.path.lexists(target)


def _refuse_nested(inputs: Sequence[str], sources: Iterable[Path], target: Path, single: bool) -> None:
    """
    :raises RunError: a folder of INPUT holds OUTPUT, or a file of INPUT lies in OUTPUT.
    """
    output = Path(os.path.realpath(target))
    for given in inputs:
        path = expanded(given, "INPUT")
        if "**" in path.parts and not path.exists():
            path = Path(*_before_magic(path.parts))
        path = Path(os.path.realpath(path))
        if path.is_dir() and (path == output or path in output.parents):
            raise RunError(
                f"OUTPUT {target} lies in INPUT {given}, so that the next time what was enhanced would be enhanced "
                "again; give a folder elsewhere"
            )
    for source in () if single else sources:
        if output in Path(os.path.realpath(source)).parents:
            raise RunError(f"the input {source} lies in OUTPUT {target}; give a folder elsewhere")


def _refuse_same_names(jobs: Iterable[Job]) -> None:
    """
    :raises RunError: two files would have one name, at least where the case of letters makes no difference.
    """
    taken: dict[str, Job] = {}
    for job in jobs:
        other = taken.setdefault(unicodedata.normalize("NFC", job.name).casefold(), job)
        if other is job:
            continue
        what = "both become" if other.name == job.name else "differ in the case of letters alone, and are one file as"
        raise RunError(
            f"{other.source} and {job.source} {what} {job.target}; give the folder that holds both, which keeps the "
            "folders below it, or enhance them into two folders"
        )


def _refuse_inputs_as_targets(jobs: Sequence[Job]) -> None:
    """
    :raises RunError: what is written would take the place of an input, whatever links lead there.
    """
    sources = {(about.st_dev, about.st_ino): job.source for job in jobs for about in [os.stat(job.source)]}
    for job in jobs:
        if not os.path.lexists(job.target):
            continue
        try:
            about = os.stat(job.target)
        except OSError:  # a link to nothing, which is not ours either
            continue
        if source := sources.get((about.st_dev, about.st_ino)):
            raise RunError(
                f"OUTPUT {job.target} is the input {source}, which is never written over; give another folder"
            )


def refuse_too_little_space(jobs: Iterable[Job], output: Path, scale: int) -> None:
    """
    :raises RunError: the disk has less room than the inputs take, times what they grow by.
    """
    needed = sum(job.source.stat().st_size for job in jobs) * scale**2
    there = next(each for each in (output, *output.absolute().parents) if each.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise RunError(
            f"OUTPUT {output} needs about {needed / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left; make room, "
            "or give a folder elsewhere"
        )
